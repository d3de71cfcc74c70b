"""deploy/: what can be known about it without a cluster."""

import fnmatch
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer.main
import yaml

from async_rlhf.cli import app
from async_rlhf.config import Config, load_config
from async_rlhf.config.load import split_arguments
from async_rlhf.demand import demands_of, shortage, total
from tests.support.command import CHECKOUT
from tests.support.deployment import DEPLOY, IN_THE_IMAGE, described_commands, document, documents, first_comment, lead_s
from tests.support.kuberay import KubernetesManifest, Pod, check_manifest, quantity

FIRST_COMMANDS = {
    "Dockerfile": "docker build -f deploy/Dockerfile ",
    "cluster-launcher.yaml": "ray up -y deploy/cluster-launcher.yaml",
    "kuberay-raycluster.yaml": "kubectl apply -f deploy/kuberay-raycluster.yaml",
    "kuberay-rayjob.yaml": "kubectl apply -f deploy/kuberay-rayjob.yaml",
    "runtime-env.yaml": "ray job submit ",
    "slurm.sbatch": "sbatch ",
    "submit.sh": "Submit the checkout as a job:  RAY_API_SERVER_ADDRESS=http://HEAD:8265 deploy/submit.sh ",
}
"""File -> how its first comment begins."""
MANIFESTS = ("kuberay-raycluster.yaml", "kuberay-rayjob.yaml")
PROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_every_file_of_deploy_begins_with_its_one_command() -> None:
    files = {path.name for path in DEPLOY.iterdir() if path.is_file()} - {"Dockerfile.dockerignore"}

    assert files == set(FIRST_COMMANDS)
    assert [name for name, command in FIRST_COMMANDS.items() if not first_comment(name).startswith(command)] == []


def test_no_file_of_deploy_holds_a_secret() -> None:
    texts = {path.name: path.read_text(encoding="utf-8") for path in DEPLOY.rglob("*") if path.is_file()}

    assert [name for name, text in texts.items() if re.search(r"\b[0-9a-f]{64}\b|BEGIN [A-Z ]*PRIVATE KEY|kind: Secret", text)] == []


# Command lines


def config_of(words: list[str]) -> Config:
    """What the command line would run, through the program's own parser and the real configuration."""
    command = typer.main.get_command(app).commands[words[0]]  # type: ignore[attr-defined]
    context = command.make_context(words[0], list(words[1:]))
    files, overrides = split_arguments([str(word) for word in context.params["words"]])
    return load_config([CHECKOUT / file for file in files], overrides).config


@pytest.mark.parametrize("name", sorted(described_commands()))
def test_command_line_in_each_file_of_deploy_parses_and_its_settings_are_accepted(name: str) -> None:
    config = config_of(described_commands()[name])

    assert config.run.dir or name == "slurm.sbatch", "each names its run folder; the Slurm script has one per job"


def test_command_lines_are_found_in_all_files_that_run_something() -> None:
    assert set(described_commands()) >= {"Dockerfile", "kuberay-rayjob.yaml", "runtime-env.yaml", "slurm.sbatch", "submit.sh"}


def test_misspelt_setting_in_a_command_line_would_be_found() -> None:
    with pytest.raises(ValueError, match="did you mean"):
        config_of([*described_commands()["slurm.sbatch"], "max_stalenes=1"])


def test_whoever_ends_a_run_leaves_it_time_for_its_last_checkpoint() -> None:
    environments = (documents("runtime-env.yaml")[0], yaml.safe_load(document("kuberay-rayjob.yaml", "RayJob")["spec"]["runtimeEnvYAML"]))
    script = DEPLOY / "slurm.sbatch"
    stop_s = re.search(r"timeouts\.stop_s=(\d+)", script.read_text(encoding="utf-8"))

    assert stop_s is not None and lead_s(script) >= int(stop_s[1]) + 30
    for environment in environments:
        assert int(environment["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) >= Config().timeouts.stop_s + 30


# KubeRay


@pytest.mark.parametrize("name", MANIFESTS)
def test_kuberay_manifests_have_only_fields_that_version_1_knows_with_values_that_it_takes(name: str) -> None:
    for item in documents(name):
        check_manifest(item)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "entryPoint"), "true"),
        (("spec", "backoffLimit"), "2"),
        (("spec", "rayClusterSpec", "authOptions", "mode"), "tokens"),
        (("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "volumeMounts", 0, "mountpath"), "/x"),
    ],
)
def test_schema_of_the_manifests_finds_a_mistake(path: tuple[Any, ...], value: object) -> None:
    item: Any = document("kuberay-rayjob.yaml", "RayJob")
    place = item
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value

    with pytest.raises(ValueError):
        check_manifest(item)


def cluster_spec(name: str) -> dict[str, Any]:
    kind = "RayCluster" if "raycluster" in name else "RayJob"
    spec = document(name, kind)["spec"]
    return spec if kind == "RayCluster" else spec["rayClusterSpec"]


def pods(name: str) -> list[Pod]:
    """All pods of a manifest with what Ray is started with in them."""
    spec = KubernetesManifest.model_validate(document(name, "RayCluster" if "raycluster" in name else "RayJob")).cluster
    return [spec.headGroupSpec.pod, *(group.pod for group in spec.workerGroupSpecs)]


def test_job_brings_the_very_cluster_that_can_stand_alone() -> None:
    assert cluster_spec(MANIFESTS[0]) == cluster_spec(MANIFESTS[1])
    assert documents(MANIFESTS[0])[0] == documents(MANIFESTS[1])[0]


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_pod_has_shared_memory_for_its_object_store_and_inside_its_own_memory(name: str) -> None:
    for pod in pods(name):
        shared = pod.volume_at("/dev/shm")
        assert shared.emptyDir is not None and shared.emptyDir.medium == "Memory"
        limit = quantity(pod.container.resources.limits["memory"])
        assert int(pod.rayStartParams["object-store-memory"]) < quantity(shared.emptyDir.sizeLimit) < limit / 2


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_pod_sees_one_run_folder_that_many_nodes_may_write_and_runs_as_no_root(name: str) -> None:
    claim = document(name, "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for pod in pods(name):
        runs = pod.volume_at("/runs")
        assert runs.persistentVolumeClaim is not None and runs.persistentVolumeClaim.claimName == claim["metadata"]["name"]
        assert pod.template.spec.securityContext.runAsNonRoot and pod.template.spec.securityContext.fsGroup == 1000


@pytest.mark.parametrize("name", MANIFESTS)
def test_ray_of_the_manifests_is_the_one_of_the_dependencies_behind_a_token(name: str) -> None:
    pinned = next(item for item in PROJECT["dependencies"] if item.startswith("ray["))
    spec = cluster_spec(name)

    assert fnmatch.fnmatch(spec["rayVersion"], pinned.partition("==")[2])
    assert spec["authOptions"] == {"mode": "token"}


def test_job_goes_on_where_an_earlier_attempt_ended_and_fills_the_gpus_of_its_cluster() -> None:
    words = described_commands()["kuberay-rayjob.yaml"]
    config, spec = config_of(words), cluster_spec("kuberay-rayjob.yaml")
    workers = [(group["replicas"], group["template"]["spec"]["containers"][0]["resources"]["limits"]) for group in spec["workerGroupSpecs"]]
    nodes = [{"CPU": float(limits["cpu"]), "GPU": float(limits["nvidia.com/gpu"])} for count, limits in workers for _ in range(count)]

    assert "--resume" in words and config.run.dir.startswith("/runs/")
    assert shortage(demands_of(config), nodes) == ""
    assert total(demands_of(config))["GPU"] == sum(node["GPU"] for node in nodes)


def test_described_slurm_job_fits_the_nodes_that_the_script_asks_for() -> None:
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", (DEPLOY / "slurm.sbatch").read_text(encoding="utf-8"), re.MULTILINE))
    nodes = [{"CPU": float(asked["cpus-per-task"]), "GPU": float(asked["gpus-per-node"])}] * int(asked["nodes"])

    assert shortage(demands_of(config_of(described_commands()["slurm.sbatch"])), nodes) == ""


# The launcher


def test_launcher_file_is_what_ray_itself_accepts() -> None:
    ray = importlib.util.find_spec("ray")  # found, not imported
    assert ray is not None and ray.origin is not None
    schema = json.loads((Path(ray.origin).parent / "autoscaler" / "ray-schema.json").read_text(encoding="utf-8"))
    (launcher,) = documents("cluster-launcher.yaml")

    jsonschema.validate(launcher, schema)
    assert {"head_ip", "worker_ips"} <= set(launcher["provider"])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**launcher, "workers": 2}, schema)


def test_launcher_starts_every_node_behind_the_token_that_it_copies() -> None:
    (launcher,) = documents("cluster-launcher.yaml")
    starts = [line for key in ("head", "worker") for line in launcher[f"{key}_start_ray_commands"] if "ray start" in line]

    assert len(starts) == 2 and all("RAY_AUTH_MODE=token" in line for line in starts)
    assert "~/.ray/auth_token" in launcher["file_mounts"]
    assert any("chmod 600 ~/.ray/auth_token" in line for line in launcher["setup_commands"])
    for line in (*launcher["setup_commands"], *starts):
        subprocess.run(["bash", "-n", "-c", line], check=True)


# The image


def instructions() -> list[tuple[str, list[str]]]:
    """The Dockerfile's instructions with their words."""
    text = re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split()[0], line.split()[1:]) for line in text.splitlines() if line.strip()]


def test_image_copies_only_what_there_is_and_what_docker_is_sent() -> None:
    sent = [line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines() if line.startswith("!")]
    copied = [source for name, words in instructions() if name == "COPY" for source in words[:-1]]

    assert sorted(copied) == sorted(sent)
    assert [source for source in copied if not (CHECKOUT / source).exists()] == []
    assert {"async_rlhf", "actors", "learners", "conf", "pyproject.toml"} <= set(copied)


def test_image_is_built_from_the_extras_for_gpus_and_a_python_that_the_project_takes() -> None:
    words = [word for name, of in instructions() if name == "RUN" for word in of]
    extras = {words[place + 1] for place, word in enumerate(words) if word == "--extra"}
    (base,) = [of[0] for name, of in instructions() if name == "FROM"]
    version = re.match(r"python:3\.(\d+)-", base)

    assert "gpu" in extras and extras <= set(PROJECT["optional-dependencies"])
    assert version is not None and 11 <= int(version[1]) <= 13, PROJECT["requires-python"]


def test_image_runs_as_an_ordinary_user_in_the_folder_of_the_checkout_and_bears_no_secret() -> None:
    last = dict(instructions())
    set_there = " ".join(" ".join(of) for name, of in instructions() if name in ("ENV", "ARG", "LABEL"))

    assert last["USER"] == ["ray"] and last["WORKDIR"] == [IN_THE_IMAGE]
    assert not re.search(r"TOKEN|SECRET|PASSWORD|KEY", set_there)


def test_container_of_the_described_command_has_shared_memory_and_a_run_folder_outside() -> None:
    (line,) = [line for line in first_comment("Dockerfile").splitlines() if "docker run" in line]
    words = shlex.split(line)

    assert any(word.startswith("--shm-size=") for word in words) and "--init" in words
    assert words[words.index("-v") + 1].endswith(":/runs") and any(word.startswith("run.dir=/runs/") for word in words)


# submit.sh


def shim(folder: Path, name: str, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n", encoding="utf-8")
    (folder / name).chmod(0o755)


def run_script(name: str, *words: str, path: Path) -> "subprocess.CompletedProcess[str]":
    env = {**os.environ, "PATH": f"{path}:{os.environ['PATH']}"}
    env.pop("RAY_API_SERVER_ADDRESS", None)
    return subprocess.run([DEPLOY / name, *words], env=env, capture_output=True, text=True, timeout=30)


def test_submit_hands_its_words_on_unchanged(tmp_path: Path) -> None:
    shim(tmp_path, "ray", 'printf "%s\\n" "$@"; pwd')

    done = run_script("submit.sh", "--no-wait", "resume", "/a folder/first", "env.A='x y'", path=tmp_path)
    words = done.stdout.splitlines()

    assert done.returncode == 0 and words[-1] == str(CHECKOUT)
    assert words[words.index("--") + 1 : -1] == ["python", "-m", "async_rlhf", "resume", "/a folder/first", "env.A='x y'"]
    assert "--no-wait" in words[: words.index("--")] and (CHECKOUT / words[words.index("--runtime-env") + 1]).is_file()


def test_submit_without_words_says_how_it_is_used(tmp_path: Path) -> None:
    shim(tmp_path, "ray", "echo called")

    done = run_script("submit.sh", path=tmp_path)

    assert done.returncode == 2 and done.stderr.startswith("usage: ") and done.stdout == ""


def test_submit_without_ray_names_the_environment_to_enter(tmp_path: Path) -> None:
    for name in ("bash", "dirname"):
        (tmp_path / name).symlink_to(shutil.which(name) or "")

    done = subprocess.run([DEPLOY / "submit.sh", "train"], env={"PATH": str(tmp_path)}, capture_output=True, text=True, timeout=30)

    assert done.returncode == 2 and "ray is not on PATH: source .venv/bin/activate" in done.stderr
