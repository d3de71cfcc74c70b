"""The verdict on a run, from what its folder tells."""

import socket

from async_rlhf.config import Config, load_config
from async_rlhf.dashboard.folder import CONFIG, RunFolder
from async_rlhf.dashboard.reading import read_object, read_text, text
from async_rlhf.dashboard.samples import shown
from async_rlhf.errors import ConfigError
from async_rlhf.run_lock import NAME as LOCK
from async_rlhf.run_verdict import own_cores
from async_rlhf.stage_times import WINDOW
from async_rlhf.verdict import Bottleneck, verdict_of

BOXES = {
    Bottleneck.GENERATION: "generators",
    Bottleneck.SCORING: "scorers",
    Bottleneck.TRAINING: "learner",
    Bottleneck.WEIGHTS: "broadcaster",
    Bottleneck.WAITING: "queue",
    Bottleneck.PROMPTS: "prompts",
}
"""Which box of the picture it is."""


def verdict(run: RunFolder) -> dict[str, object]:
    """`verdict`: one sentence, who holds the run up and what to change; `bottleneck`: the box of the picture. Or empty."""
    config = run.cached(CONFIG, "config", lambda: _config(run))
    if config is None or not len(run.table):
        return {"verdict": "", "bottleneck": ""}
    found = verdict_of(run.table.rows(WINDOW + 1), config, _cores(run, config))
    return {"verdict": shown(text(run.summary.get("verdict"), found.text)), "bottleneck": BOXES.get(found.bottleneck, "")}


def _cores(run: RunFolder, config: Config) -> int | None:
    """This machine's, where the run goes on here in a Ray of its own; None elsewhere."""
    here = (read_text(run.folder, LOCK, 1000) or "").endswith(f" on {socket.gethostname()}")
    return own_cores(config) if run.live and here and read_object(run.folder, "ray.json").get("token_path") else None


def _config(run: RunFolder) -> Config | None:
    """None where it is not one that this version reads. Only a file that was found harmless is looked into."""
    if not run.settings:
        return None
    try:
        return load_config([run.folder / CONFIG]).config
    except (ConfigError, OSError, ValueError):
        return None
