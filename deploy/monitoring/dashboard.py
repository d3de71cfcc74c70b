# Write the Grafana dashboard anew:  python deploy/monitoring/dashboard.py
"""The Grafana dashboard as a table of panels; a test compares the file with it, and its metrics with async_rlhf/exported.py."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).resolve().parent / "grafana" / "async_rlhf.json"

RUN = '{run=~"$run"}'

OMITTED = {
    "queue_batch_digest": "a checksum, not a quantity",
    "queue_staleness_optimizer_steps_mean": "queue_staleness_mean in other units",
    "queue_depth_groups": "queue_groups{place=waiting}, but only at updates",
    "queue_leased_groups": "likewise, leased",
    "queue_scoring_groups": "likewise, scoring",
    "train_idle_share": "learner_busy_share, but only at updates",
    "train_step_s": "the sum of its parts, which are shown",
    "supervision_restarts": "restarts by part are shown",
    "weights_canary_error_nats": "an install beyond the tolerance ends its generator: it would show as a restart",
    "generate_groups_per_s": "tokens per second are shown",
    "generate_work_s": "the generators' processor seconds are shown",
    "generate_step_fixed_s": "for `async-rlhf plan`",
    "generate_step_completion_s": "likewise",
    "generate_step_prompt_s": "likewise",
    "policy_clip_share": "of some algorithms only; in TensorBoard",
    "policy_kl_k1_nats": "rollout_kl_k1_nats and policy_kl_k3_nats are shown",
    "reward_batch_std": "of one algorithm's interest; in TensorBoard",
}
"""Exported and not in the dashboard, with the reason."""

ALGORITHMS = "of some algorithms only; in TensorBoard"
OMITTED_STAGES = dict.fromkeys(("dpo", "listwise", "bok", "value", "mismatch", "correction"), ALGORITHMS)


@dataclass(frozen=True)
class Panel:
    title: str
    queries: Sequence[tuple[str, str]]
    """Expression, with $m before each metric's name; legend."""
    unit: str = "short"
    kind: str = "timeseries"
    stacked: bool = False
    width: int = 8


def of(name: str) -> str:
    """One series per run."""
    return f"max by (run) ($m{name}{RUN})"


def by(label: str, name: str) -> str:
    """One series per value of a label."""
    return f"max by (run, {label}) ($m{name}{RUN})"


def several(*names: str, strip: str = "") -> list[tuple[str, str]]:
    return [(of(name), name.removeprefix(strip)) for name in names]


ROWS: Sequence[tuple[str, Sequence[Panel]]] = (
    (
        "Who is slow, and why",
        (
            Panel(
                "Idle shares: whoever is not idle holds the others up",
                (
                    (of("generate_idle_share"), "generators"),
                    (of("score_idle_share"), "scorers"),
                    (of("reward_idle_share"), "reward actors"),
                    (f"1 - {of('learner_busy_share')}", "learner"),
                    (of("generate_wait_ticket_share"), "generators waiting for tickets"),
                ),
                unit="percentunit",
            ),
            Panel("Tokens per second", several("generate_tokens_per_s", "train_tokens_per_s"), unit="none"),
            Panel("Groups by place", ((f"max by (run, place) ($mqueue_groups{RUN})", "{{place}}"),), stacked=True),
            Panel(
                "Where an update's seconds go",
                several(
                    "queue_wait_s", "train_take_s", "train_prepare_s", "train_forward_backward_s", "train_optimizer_s", "weights_export_s"
                ),
                unit="s",
                stacked=True,
            ),
            Panel(
                "Staleness of trained groups, updates",
                ((f"sum by (le) (increase($mstaleness_updates_bucket{RUN}[$__rate_interval]))", "{{le}}"),),
                kind="heatmap",
            ),
            Panel("Staleness: mean, largest, bound", several("queue_staleness_mean", "queue_staleness_max", "bound_staleness_updates")),
            Panel("Restarts; generators", ((by("part", "restarts"), "{{part}}"), (of("generate_generators"), "generators"))),
            Panel("Groups dropped, by reason", ((by("reason", "dropped_groups"), "{{reason}}"),)),
            Panel(
                "Puts refused, rows skipped",
                ((by("reason", "refused_groups"), "{{reason}}"), (by("reason", "skipped_rows"), "row: {{reason}}")),
            ),
        ),
    ),
    (
        "Progress",
        (
            Panel("Updates", several("policy_version", "target_updates")),
            Panel("Seconds per update", several("time_update_s"), unit="s"),
            Panel("Reward", [*several("reward_mean", "reward_batch_mean"), (by("part", "reward_part"), "{{part}}")]),
            Panel("KL, nats", several("rollout_kl_k1_nats", "policy_kl_k3_nats")),
            Panel("Loss, gradient norm", several("train_loss", "train_grad_norm")),
            Panel("Learning rate", several("train_learning_rate"), unit="sci"),
            Panel("Entropy per token, nats", several("policy_entropy_nats")),
            Panel("Completions: tokens", several("rollout_length_tokens")),
            Panel("Completions cut, share; tied groups", several("rollout_cut_share", "rollout_tied_groups")),
        ),
    ),
    (
        "Generators",
        (
            Panel("Idle share", ((by("generator", "generator_idle_share"), "{{generator}}"),), unit="percentunit"),
            Panel("Tokens per second", ((by("generator", "generator_tokens_per_s"), "{{generator}}"),)),
            Panel("Installed version", ((by("generator", "generator_policy_version"), "{{generator}}"),)),
            Panel(
                "Requests now",
                (
                    (by("generator", "generator_running_requests"), "running {{generator}}"),
                    (by("generator", "generator_waiting_requests"), "waiting {{generator}}"),
                ),
            ),
            Panel("Requests, all generators, mean", several("generate_running_requests", "generate_waiting_requests")),
            Panel(
                "Key/value cache in use",
                ((by("generator", "generator_kv_use_share"), "{{generator}}"), (of("generate_kv_use_share"), "mean while stepping")),
                unit="percentunit",
            ),
        ),
    ),
    (
        "Scorers, learner, weights",
        (
            Panel("Latency of a scoring call", several("score_latency_s", "reward_latency_s"), unit="s"),
            Panel("Groups scored per second", several("score_groups_per_s"), unit="none"),
            Panel("Model FLOPs utilisation (GPU)", several("train_mfu_share"), unit="percentunit"),
            Panel(
                "Weight push, stages",
                several("weights_gather_s", "weights_transfer_s", "weights_install_s", "weights_pause_s", "weights_canary_s"),
                unit="s",
            ),
            Panel("Install, by generator", ((by("generator", "generator_install_s"), "{{generator}}"),), unit="s"),
            Panel(
                "Processor seconds per update, on the driver's node",
                several("generate_cpu_s", "score_cpu_s", "reward_cpu_s", "train_cpu_s", "queue_cpu_s", "time_driver_cpu_s"),
                unit="s",
                stacked=True,
            ),
        ),
    ),
)


def dashboard() -> dict[str, Any]:
    """What Grafana reads."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, of_row in ROWS:
        panels.append({"id": len(panels) + 1, "type": "row", "title": title, "gridPos": {"x": 0, "y": y, "w": 24, "h": 1}})
        y += 1
        for place, panel in enumerate(of_row):
            position = {"x": place % 3 * 8, "y": y + place // 3 * 8, "w": panel.width, "h": 8}
            panels.append(_panel(panel, len(panels) + 1, position))
        y += (len(of_row) + 2) // 3 * 8
    return {
        "uid": "async-rlhf",
        "title": "async-rlhf",
        "tags": ["ray", "async-rlhf"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": [_datasource(), _run()]},
        "panels": panels,
    }


def _panel(panel: Panel, number: int, position: dict[str, int]) -> dict[str, Any]:
    custom: dict[str, Any] = {"fillOpacity": 10, "stacking": {"mode": "normal" if panel.stacked else "none"}}
    source = {"type": "prometheus", "uid": "${datasource}"}
    targets = [
        {
            "refId": chr(ord("A") + index),
            "datasource": source,
            "expr": expression.replace("$m", "ray_async_rlhf_"),
            "legendFormat": legend,
            **({"format": "heatmap"} if panel.kind == "heatmap" else {}),
        }
        for index, (expression, legend) in enumerate(panel.queries)
    ]
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "gridPos": position,
        "datasource": source,
        "fieldConfig": {"defaults": {"unit": panel.unit, "custom": custom if panel.kind == "timeseries" else {}}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}} if panel.kind == "timeseries" else {},
        "targets": targets,
    }


def _datasource() -> dict[str, Any]:
    return {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus", "current": {}, "hide": 0}


def _run() -> dict[str, Any]:
    return {
        "name": "run",
        "label": "Run",
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "query": {"query": "label_values(ray_async_rlhf_target_updates, run)", "refId": "run"},
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def text() -> str:
    """The file's content."""
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
    sys.stdout.write(f"{FILE}\n")
