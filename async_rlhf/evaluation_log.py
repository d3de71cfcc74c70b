"""The evaluations of a run, in its folder: evaluations.jsonl holds their numbers, samples.json their completions."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from async_rlhf.evaluation import Evaluation, Findings, Sample, Stage, measure
from async_rlhf.state import write_atomically

ROWS = "evaluations.jsonl"
SAMPLES = "samples.json"
LATEST = "latest"
"""In samples.json beside `start` and `final`: the newest evaluation between the updates."""


class EvaluationLog:
    """Writes evaluations; at most one for each version."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, findings: Findings) -> dict[str, Any]:
        """Write an evaluation, in the place of any earlier one of its version; returns its row."""
        start = None if findings.stage == "start" else read_evaluation(self._folder, "start")
        oldest, newest = findings.versions
        row: dict[str, Any] = {
            "stage": findings.stage,
            "version": findings.version,
            "version_min": oldest,
            "version_max": newest,
            "prompts": len(findings.greedy.samples),
            "opponent": findings.opponent,
            "problem": findings.problem,
            **measure(findings, start),
        }
        self._write_rows([*(other for other in read_evaluations(self._folder) if other["version"] != findings.version), row])
        write_samples(self._folder, LATEST if findings.stage == "between" else findings.stage, findings.greedy)
        return row

    def cut_after(self, version: int) -> None:
        """Take back the evaluations that a later version than `version` sampled for: that version will be trained again."""
        rows = read_evaluations(self._folder)
        kept = [row for row in rows if row["version_max"] <= version]
        if len(kept) < len(rows):
            self._write_rows(kept)
        samples = read_samples(self._folder)
        if any(of["version"] > version for of in samples.values()):
            self._write_samples({name: of for name, of in samples.items() if of["version"] <= version})

    def _write_rows(self, rows: list[dict[str, Any]]) -> None:
        rows = sorted(rows, key=lambda row: row["version"])
        write_atomically(self._folder / ROWS, "".join(json.dumps(row) + "\n" for row in rows))

    def _write_samples(self, samples: Mapping[str, Any]) -> None:
        write_atomically(self._folder / SAMPLES, json.dumps(samples) + "\n")


def write_samples(folder: Path, name: str, evaluation: Evaluation) -> None:
    """The completions of an evaluation, beside those of the others."""
    write_atomically(folder / SAMPLES, json.dumps({**read_samples(folder), name: asdict(evaluation)}) + "\n")


def read_samples(folder: Path) -> dict[str, Any]:
    """The evaluations of a run so far with their completions, by name."""
    file = folder / SAMPLES
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def read_evaluation(folder: Path, name: Stage | str) -> Evaluation | None:
    """One of them; None where the run has not come so far."""
    found = read_samples(folder).get(name)
    if not found or not found["samples"]:
        return None
    samples = tuple(Sample(**sample) for sample in found["samples"])
    return Evaluation(
        version=found["version"], temperature=found["temperature"], samples=samples, oldest_version=found.get("oldest_version", -1)
    )


def read_accuracies(folder: Path) -> dict[str, float]:
    """The mean score of each."""
    return {name: sum(sample["score"] for sample in of["samples"]) / len(of["samples"]) for name, of in read_samples(folder).items()}


def read_evaluations(folder: Path) -> list[dict[str, Any]]:
    """The rows of evaluations.jsonl, by version; none in a run that has none."""
    file = folder / ROWS
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
