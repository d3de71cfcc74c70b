"""The stages before reinforcement learning, as a user runs them: on Ray, each in an actor."""

import json
import random
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load_file

from async_rlhf.config import load_config
from async_rlhf.config.rewards import RewardPartConfig
from async_rlhf.model_folders import check_critic_folder, check_model_folder
from async_rlhf.rewards.model import check_reward_model
from async_rlhf.stages.folder import WHOLE, work_folder
from async_rlhf.stages.messages import StageJob, StageProgress, StageWatch
from async_rlhf.stages.perform import perform
from tests.support.cluster import make_model_folder
from tests.support.command import Finished, run_cli, run_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random policy."""
    return make_model_folder(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The arithmetic of an actor with one CPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def jsonl(file: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def pairs(count: int) -> list[dict[str, str]]:
    """The better text holds one 9 more."""
    rng = random.Random(0)
    rows: list[dict[str, str]] = []
    for _ in range(count):
        worse = "".join(rng.choice("0123456*") for _ in range(6))
        at = rng.randrange(6)
        rows.append({"prompt": f"{rng.randrange(1000)}=", "chosen": f"{worse[:at]}9{worse[at + 1 :]}", "rejected": worse})
    return rows


def sums_words(base: Path, folder: Path) -> list[str]:
    """Fine-tuning on 400 sums, 600 steps."""
    rng = random.Random(1)
    sums = [(rng.randrange(30), rng.randrange(30)) for _ in range(400)]
    file = jsonl(folder / "sums.jsonl", [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a, b in sums])
    words = [f"model.path={base}", f"sft.sources.sums.path={file}", "sft.sources.sums.completion_column=completion"]
    return [
        *words,
        "sft.epochs=1000",
        "sft.max_steps=600",
        "sft.batch_size=32",
        "sft.eval_every=50",
        "sft.save_every=50",
        "sft.held_out=100",
    ]


def end(out: str, folder: Path, words: Sequence[str], signum: signal.Signals) -> Finished:
    """Start fine-tuning and end it by a signal once it has come past a further checkpoint of its own."""
    before = {file.parent.name for file in work_folder(folder / "out").glob(f"trainer/*/{WHOLE}")}

    def seen(output: str) -> bool:
        return bool({file.parent.name for file in work_folder(folder / "out").glob(f"trainer/*/{WHOLE}")} - before)

    return run_until("sft", *words, "--out", str(folder / "out"), seen=seen, signum=signum, log=folder / f"{out}.log", between=lambda: None)


@pytest.mark.long
def test_fine_tuning_that_is_stopped_and_killed_ends_where_an_undisturbed_one_does(base: Path, tmp_path: Path, one_thread: None) -> None:
    words = sums_words(base, tmp_path)

    stopped = end("stopped", tmp_path, words, signal.SIGTERM)
    killed = end("killed", tmp_path, words, signal.SIGKILL)
    unfinished = (tmp_path / "out").exists()
    done = run_cli("sft", *words, "--out", str(tmp_path / "out"))

    assert stopped.code == 143 and "ended by SIGTERM" in stopped.output and "Traceback" not in stopped.output, stopped.output
    assert killed.code == -signal.SIGKILL and "going on from step" in killed.output and not unfinished
    assert done.code == 0 and "going on from step" in done.output, done.output
    watched: list[StageProgress] = []
    job = StageJob(kind="sft", config=load_config(overrides=words).config, target=tmp_path / "undisturbed")
    perform(job, StageWatch(on_progress=watched.append))
    check_model_folder(tmp_path / "out")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "undisturbed"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    facts = json.loads((tmp_path / "out" / "stage.json").read_text())
    assert facts["end"]["perplexity"] < facts["start"]["perplexity"] / 5
    steps = [json.loads(line)["step"] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(50, 601, 50))
    assert not work_folder(tmp_path / "out").exists() and not list((tmp_path / "out").glob("checkpoint-*"))


def test_reward_model_learns_what_the_better_texts_have_in_common(base: Path, tmp_path: Path) -> None:
    file = jsonl(tmp_path / "pairs.jsonl", pairs(200))
    words = [f"model.path={base}", f"reward_model.sources.pairs.path={file}", "reward_model.held_out=60", "reward_model.epochs=10"]

    done = run_cli("reward-model", *words, "reward_model.batch_size=32", "reward_model.eval_every=10", "--out", str(tmp_path / "rm"))

    assert done.code == 0 and "held-out accuracy 0.500 (0.377 to 0.623) ->" in done.output, done.output
    facts = json.loads((tmp_path / "rm" / "reward_model.json").read_text())
    assert facts["end"]["accuracy"] > 0.9 and facts["pairs"] == {"trained": 140, "held_out": 60, "left_out": []}
    check_critic_folder(tmp_path / "rm")
    check_reward_model("reward.parts.rm.path", tmp_path / "rm")
    assert RewardPartConfig(kind="model", path=str(tmp_path / "rm")).add_eos, "it was trained on texts with their end"


def test_relabelling_turns_wrong_pairs_round_and_keeps_the_other_columns(tmp_path: Path) -> None:
    rows = [{**row, "id": number} for number, row in enumerate(pairs(100))]
    for row in rows[::4]:
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    file = jsonl(tmp_path / "pairs.jsonl", [*rows, {"prompt": "1=", "chosen": "8", "rejected": "7", "id": 100}])
    (tmp_path / "gold.py").write_text("def score(prompts, completions, **columns):\n    return [text.count('9') for text in completions]\n")

    words = [f"reward.function={tmp_path / 'gold.py'}:score", f"relabel.sources.pairs.path={file}", "--out", str(tmp_path / "gold.parquet")]
    done = run_cli("relabel", *words)

    assert done.code == 0, done.output
    assert "agreement with the old labels 0.750 (0.657 to 0.825) of 100 pairs; 25 turned round, 1 ties left out" in done.output
    labelled = parquet.read_table(tmp_path / "gold.parquet").to_pylist()
    assert [row["id"] for row in labelled] == list(range(100))
    assert all("9" in row["chosen"] and "9" not in row["rejected"] and row["margin"] == 1.0 for row in labelled)
