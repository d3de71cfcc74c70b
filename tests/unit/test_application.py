"""The wheel carries async_rlhf alone: what its command line says where `actors` and `learners` are absent, or somebody else's."""

import io
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from async_rlhf.commands.train import run_or_resume
from async_rlhf.errors import ConfigError
from tests.support.command import CHECKOUT, environment
from tests.support.run_folders import make_run, state_of
from tests.support.settings import load

# Without the paths that hold a checkout's packages: this very checkout is installed here.
TRAIN = """
import sys
from pathlib import Path
sys.path[:] = sys.argv[1:] + [path for path in sys.path if path and not (Path(path) / "actors").is_dir()]
sys.argv[1:] = ["train", "conf/no-such-file.yaml"]
from async_rlhf.cli import main
main()
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `pip install` of the wheel leaves."""
    site = tmp_path_factory.mktemp("site")
    shutil.copytree(CHECKOUT / "async_rlhf", site / "async_rlhf", ignore=shutil.ignore_patterns("__pycache__"))
    return site


def trained_from(*path: Path) -> "subprocess.CompletedProcess[str]":
    env = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    line = [sys.executable, "-c", TRAIN, *map(str, path)]
    return subprocess.run(line, env=env, capture_output=True, text=True, timeout=120, cwd=path[0])


def test_installed_wheel_without_the_application_says_where_to_run(installed: Path) -> None:
    done = trained_from(installed)

    assert done.returncode == 2
    assert "needs the application package 'actors', which the wheel does not carry" in done.stderr
    assert "--working-dir ." in done.stderr and "pip install -e ." in done.stderr


def test_installed_wheel_names_a_foreign_package_in_the_place_of_its_own(installed: Path, tmp_path: Path) -> None:
    for name in ("actors", "learners"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()

    done = trained_from(installed, tmp_path)

    assert done.returncode == 2
    assert f"a foreign package 'actors' at {tmp_path / 'actors'} hides ours" in done.stderr


def test_uploaded_checkout_goes_before_an_installed_wheel_whole(installed: Path) -> None:
    done = trained_from(CHECKOUT, installed)

    assert done.returncode == 2
    assert "config file not found: conf/no-such-file.yaml" in done.stderr, "it came past the packages to the settings"


# train --resume


def quiet() -> Console:
    return Console(file=io.StringIO(), width=400)


def test_train_that_may_resume_needs_to_know_which_run() -> None:
    with pytest.raises(ConfigError, match=r"give run\.dir=FOLDER"):
        run_or_resume(load(), quiet())


def test_train_that_may_resume_goes_on_with_the_run_that_is_there_by_its_own_settings(tmp_path: Path) -> None:
    make_run(tmp_path / "run", tmp_path)
    (tmp_path / "run" / "state.json").write_text(state_of(9, "finished").to_json())
    console = quiet()

    code = run_or_resume(load(f"run.dir={tmp_path / 'run'}", "updates=20"), console)

    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert code == 0 and "by its own settings" in said and "is finished: all 9 updates are trained" in said


def test_train_that_may_resume_begins_where_there_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"reward\.function must look like"):  # what `train` looks at first
        run_or_resume(load(f"run.dir={tmp_path / 'run'}", "reward.function=len"), quiet())
