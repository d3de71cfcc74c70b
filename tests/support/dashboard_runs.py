"""Run folders as the dashboard meets them: written row by row, as a driver does it."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from async_rlhf.config import load_config, to_yaml
from async_rlhf.state import TrainingState, write_atomically

HOSTILE = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'></script>\u202egnp.exe\u2066\x00\x1b[31m"
LONG = "longword" * 200


class WrittenRun:
    """A run of `num_updates` updates, whose driver is the test."""

    def __init__(self, folder: Path, *settings: str, num_updates: int = 100) -> None:
        self.folder = folder
        self.num_updates = num_updates
        self.version = 0
        folder.mkdir(parents=True)
        config = load_config(overrides=[f"updates={num_updates}", *settings]).config
        (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        (folder / "metrics.jsonl").touch()
        self.write_state("starting")

    def write_state(self, phase: str = "training", **more: Any) -> None:
        """state.json after the last update."""
        v = self.version
        state = TrainingState(
            run_id=self.folder.name,
            phase=phase,
            version=v,
            num_updates=self.num_updates,
            optimizer_steps=v,
            prompts=64 * v,
            completions=256 * v,
            tokens=900 * v,
            seed=0,
            reward_mean=reward_at(v) if v else None,
            staleness_max=min(v, 1),
            weights_version=v,
            queue={"leased": 40, "scoring": 8, "waiting": 30, "taken": 0, "trained": 64 * v},
            dropped={"tied": 5 * v},
            actors={"generator-0.0.0": f"installed version {v}"},
            restarts={"generator-0": 1},
            updated_at=1.8e9,
        )
        write_atomically(self.folder / "state.json", replace(state, **more).to_json())

    def update(self, num: int = 1) -> None:
        """So many more updates."""
        for _ in range(num):
            self.version += 1
            with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(row_of(self.version)) + "\n")
        self.write_state()
        (self.folder / "heartbeat").touch()

    def finish(self) -> None:
        """The driver's last word."""
        self.write_state("finished")
        write_atomically(
            self.folder / "summary.json", json.dumps({"exit": "success", "error": "", "dropped": {"tied": 7}, "metric": "accuracy"})
        )

    def evaluate(self, version: int, score: float) -> None:
        """One row of evaluations.jsonl."""
        row = {"stage": "between", "version": version, "version_max": version, "evaluate/score": score}
        with (self.folder / "evaluations.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row | {"evaluate/score_low": score - 0.05, "evaluate/score_high": score + 0.05}) + "\n")

    def write_samples(self, prompt: str, completion: str) -> None:
        """samples.json with the start, and the same prompt now."""
        sample = {"prompt": prompt, "completion": completion, "expected": prompt}
        of = {
            name: {"version": v, "temperature": 0.0, "samples": [{**sample, "score": s}]}
            for name, v, s in (("start", 0, 0.0), ("latest", 9, 1.0))
        }
        (self.folder / "samples.json").write_text(json.dumps(of), encoding="utf-8")

    def write_incident(self, entry: Mapping[str, Any]) -> None:
        """One row of incidents.jsonl."""
        with (self.folder / "incidents.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(entry) + "\n")

    def go_silent(self) -> None:
        """As if its driver had been killed an hour ago."""
        for file in self.folder.iterdir():
            os.utime(file, (1e9, 1e9))


def reward_at(version: int) -> float:
    return 0.25 + 0.5 * (1 - math.exp(-version / 60))


def row_of(version: int) -> dict[str, float]:
    """What a driver writes after an update; two updates a second."""
    wave = math.sin(version)
    return {
        "update": version - 1,
        "version": version,
        "time_s": version / 2,
        "reward/mean": reward_at(version) + 0.03 * wave,
        "rollout/kl_k1_nats": version / 100,
        "policy/kl_k1_nats": version / 110,
        "rollout/length_tokens": 3.5,
        "queue/staleness_mean": 0.8 + 0.1 * wave,
        "queue/staleness_max": 1.0,
        "queue/depth_groups": 30 + 10 * wave,
        "queue/leased_groups": 40,
        "queue/scoring_groups": 8,
        "queue/wait_s": 0.1,
        "train/loss": 0.7 - version / 1000,
        "train/step_s": 0.3,
        "train/tokens_per_s": 4000 + 200 * wave,
        "train/idle_share": 0.4,
        "generate/tokens_per_s": 2000.0,
        "generate/groups_per_s": 140.0,
        "generate/idle_share": 0.25,
        "generate/running_requests": 200.0,
        "generate/waiting_requests": 3.0,
        "generate/kv_use_share": 0.13,
        "score/groups_per_s": 139.0,
        "score/idle_share": 0.9,
        "score/latency_s": 0.012,
        "weights/export_s": 0.03,
        "weights/install_s": 0.08,
        "supervision/restarts": 1,
    }
