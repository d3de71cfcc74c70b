"""Weights & Biases, in a process of its own: it gets lines of JSON on its standard input, and whatever becomes of it, the run goes on.

The first line says how to begin, each further one holds a row, an incident, or nothing but the end of the input.
"""

import json
import sys
from collections.abc import Iterable
from typing import Any


def main(lines: Iterable[str]) -> None:
    """Write until the lines end."""
    import wandb

    start, *_ = [json.loads(line) for line in _first(lines)]
    settings = wandb.Settings(
        # Nothing that nobody asked for: no console, command line, environment, code or machine leaves this process.
        console="off",
        disable_code=True,
        disable_git=True,
        disable_job_creation=True,
        save_code=False,
        x_disable_meta=True,
        x_disable_stats=True,
        x_disable_machine_info=True,
        init_timeout=60,
    )
    run = wandb.init(
        id=start["id"],
        name=start["name"],
        project=start["project"],
        entity=start["entity"] or None,
        dir=start["folder"],
        mode=start["mode"],
        config=start["config"],
        resume="allow",
        settings=settings,
    )
    # By version and not by W&B's own step, which cannot go back: after a rewind the same versions are logged once more.
    run.define_metric("version")
    run.define_metric("*", step_metric="version")
    num_incidents = 0
    for line in lines:
        entry: dict[str, Any] = json.loads(line)
        if "incident" in entry:
            num_incidents += 1
            run.summary.update({"incidents": num_incidents, "last_incident": json.dumps(entry["incident"])})
        else:
            run.log(entry["row"])
    run.finish()


def _first(lines: Iterable[str]) -> Iterable[str]:
    for line in lines:
        yield line
        return


if __name__ == "__main__":
    main(iter(sys.stdin))
