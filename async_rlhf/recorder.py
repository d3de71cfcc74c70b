"""The run folder: everything that a run leaves behind, written as it happens.

config.yaml      the resolved config            metrics.jsonl   one row per update
state.json       where the run stands           tensorboard/    the same rows as event files
summary.json     the machine-readable last word samples.json    completions of held-out prompts, before and after
evaluations.jsonl one row per evaluation        opponents.json  the completions that win-rates compare with
report.html      the page for people            model/          the final policy, a Hugging Face folder
origin.json      what the run began from        incidents.jsonl actors that were lost, and when they were back
config-until-N.yaml the config that session N changed
wanted.json      what `async-rlhf scale` asked for scaled.json   the driver's answer
LOCK             held by the living driver      heartbeat       touched by it
wandb/           what Weights & Biases was given (run.wandb)
prometheus.json  where the metrics of a living run's own Ray are scraped
journal/         every sample and decision      checkpoints/    from where the run can go on
rollouts/        what left the journal: a dataset, one row per completion
export/          what `async-rlhf export` wrote, by version
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, cast

from async_rlhf.config import Config, to_yaml
from async_rlhf.dispensable import Dispensable
from async_rlhf.errors import ConfigError
from async_rlhf.evaluation import Findings
from async_rlhf.evaluation_log import EvaluationLog
from async_rlhf.run_plan import RunPlan
from async_rlhf.state import write_atomically

HIDDEN = "***"
"""Stands in the saved config for the value of a secret."""
SECRET_MARKS = ("TOKEN", "KEY", "SECRET", "PASSWORD")
"""In the name of an environment variable: its value is a secret."""


def make_run_folder(config: Config) -> Path:
    """Create the folder of a new run and write its config there.

    Raises:
        ConfigError: it already holds a run, or cannot be written.
    """
    default = Path("runs") / f"{config.run.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = (Path(config.run.dir) if config.run.dir else default).resolve()
    if (folder / "config.yaml").exists():
        raise ConfigError(
            f"run.dir {folder} already holds a run; choose another folder, delete this one, or go on with it: async-rlhf resume {folder}"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(to_yaml(without_secrets(config)), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"run.dir {folder} cannot be written: {error}") from error
    return folder


def keep_config(folder: Path, session: int) -> None:
    """Keep the config of the drivers before `session`, which has another one."""
    write_atomically(folder / f"config-until-{session}.yaml", (folder / "config.yaml").read_text(encoding="utf-8"))


def earlier_configs(folder: Path) -> dict[int, str]:
    """Session -> the config that held until then, in order; none where no resume changed a setting."""
    found = {int(file.stem.rpartition("-")[2]): file.read_text(encoding="utf-8") for file in folder.glob("config-until-*.yaml")}
    return dict(sorted(found.items()))


def without_secrets(config: Config) -> Config:
    """The config with the values of `env` hidden whose names look like a secret's; secrets belong in the environment."""
    env = {name: HIDDEN if is_secret(name) else value for name, value in config.env.items()}
    return replace(config, env=env)


def is_secret(name: str) -> bool:
    """Whether an environment variable's name says that its value is nobody's business."""
    return any(mark in name.upper() for mark in SECRET_MARKS)


class Sink(Protocol):
    """Where rows go."""

    def update(self, row: Mapping[str, float]) -> None:
        """An update's row."""
        ...

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """An evaluation's row."""
        ...

    def incident(self, entry: Mapping[str, Any]) -> None:
        """An actor was lost, or is back."""
        ...

    def cut_after(self, version: int) -> None:
        """Updates after `version` will be trained again."""
        ...

    def close(self) -> None:
        """Nothing more comes."""
        ...


class JsonLines:
    """metrics.jsonl and incidents.jsonl. Evaluations have files of their own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = folder / "metrics.jsonl"
        self._lines = self._file.open("a", encoding="utf-8")

    def update(self, row: Mapping[str, float]) -> None:
        """Append it; a reader sees whole lines at once."""
        self._lines.write(json.dumps(row) + "\n")
        self._lines.flush()

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """Nothing: see EvaluationLog."""

    def incident(self, entry: Mapping[str, Any]) -> None:
        """Append it."""
        with (self._folder / "incidents.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(entry) + "\n")

    def cut_after(self, version: int) -> None:
        """Take the rows back."""
        self._lines.close()
        rows = [row for row in read_rows(self._folder) if row["version"] <= version]
        write_atomically(self._file, "".join(json.dumps(row) + "\n" for row in rows))
        self._lines = self._file.open("a", encoding="utf-8")

    def close(self) -> None:
        """Close the file."""
        self._lines.close()


class TensorBoard:
    """The numbers of rows as event files."""

    def __init__(self, folder: Path) -> None:
        # The small writer of the tensorboard package; torch's own would import torch into the driver.
        from tensorboard.summary import Writer

        self._events = Writer(str(folder / "tensorboard"))

    def update(self, row: Mapping[str, Any]) -> None:
        """One point of each curve."""
        for key, value in row.items():
            if "/" in key:
                self._events.add_scalar(key, value, int(row["version"]))

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """Likewise."""
        self.update(row)

    def incident(self, entry: Mapping[str, Any]) -> None:
        """Nothing: it has no curve."""

    def cut_after(self, version: int) -> None:
        """Nothing: event files only grow, and the viewer shows the last point of a step."""

    def close(self) -> None:
        """Flush and close."""
        self._events.close()


class Recorder:
    """Writes a run's rows to all sinks, and its evaluations. JSON lines it cannot do without; any other sink may fail."""

    def __init__(self, folder: Path, sinks: Mapping[str, Callable[[], Sink]] | None = None) -> None:
        """
        Args:
            sinks: name for people -> makes it; beside JSON lines and TensorBoard.
        """
        self.folder = folder
        self._lines = JsonLines(folder)
        makers: Mapping[str, Callable[[], Sink]] = {"TensorBoard": lambda: TensorBoard(folder), **(sinks or {})}
        self._others = [Dispensable(name, make) for name, make in makers.items()]
        self._evaluations = EvaluationLog(folder)

    def write(self, row: Mapping[str, float]) -> None:
        """One update's row."""
        self._tell(lambda sink: sink.update(row))

    def write_evaluation(self, findings: Findings) -> Mapping[str, Any]:
        """Write an evaluation; returns its row."""
        row = self._evaluations.write(findings)
        self._tell(lambda sink: sink.evaluation(row))
        return row

    def write_incident(self, entry: Mapping[str, Any]) -> None:
        """An actor was lost, or is back."""
        self._tell(lambda sink: sink.incident(entry))

    def cut_after(self, version: int) -> None:
        """Take back the rows, and evaluations, after `version`: their updates will be trained again."""
        self._tell(lambda sink: sink.cut_after(version))
        self._evaluations.cut_after(version)

    def close(self) -> None:
        """Close all sinks."""
        self._lines.close()
        for other in self._others:
            other.end(lambda sink: sink.close())

    def _tell(self, act: Callable[[Sink], object]) -> None:
        act(self._lines)
        for other in self._others:
            other.do(act)


def write_summary(folder: Path, summary: Mapping[str, object]) -> None:
    """The machine-readable last word of a run."""
    write_atomically(folder / "summary.json", json.dumps(summary, indent=2) + "\n")


def write_targets(folder: Path, address: str) -> None:
    """Tell Prometheus where a run's own Ray shows its metrics, as its `file_sd_configs` want it; an empty address: nowhere, any more."""
    targets = [{"targets": [address], "labels": {"job": "async_rlhf"}}] if address else []
    write_atomically(folder / "prometheus.json", json.dumps(targets) + "\n")


def write_origin(plan: RunPlan) -> None:
    """What a resumed run, or a replay, must begin from: initial policy, reward, metric."""
    origin = {"model_folder": str(plan.model_folder), "reward": plan.reward, "metric": plan.metric}
    write_atomically(plan.run_folder / "origin.json", json.dumps(origin, indent=2) + "\n")


def read_rows(folder: Path) -> list[dict[str, float]]:
    """The rows of metrics.jsonl. Left out: a last line cut by a crash, and damaged ones (`async-rlhf audit` names the missing updates)."""
    file = folder / "metrics.jsonl"
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    return [row for line in lines[:-1] if (row := _row(line)) is not None]


def rows_of_config(folder: Path) -> list[dict[str, float]]:
    """Those that were measured under the settings of config.yaml: no resume changed them later."""
    since = max(earlier_configs(folder), default=0)
    return [row for row in read_rows(folder) if row.get("session", since) >= since]


def _row(line: str) -> dict[str, float] | None:
    """None: it is none."""
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return cast(dict[str, float], row) if isinstance(row, dict) and "version" in row else None
