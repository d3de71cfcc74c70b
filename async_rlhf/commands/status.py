"""`async-rlhf status`: where a run stands, from its living TrainingState actor or from its folder."""

import json
import logging
import os
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from async_rlhf.commands.say import say
from async_rlhf.run_verdict import last_word, verdict_of_folder
from async_rlhf.state import LIVE_PHASES, STATE_ACTOR_FILE, TrainingState, read_state


def run_status(folder: Path, console: Console) -> None:
    """Print the state as a table.

    Raises:
        ConfigError: no run folder.
    """
    state, source = read_state(folder), "state.json"
    if state.phase in LIVE_PHASES:
        live = _ask_actor(folder)
        if live is not None:
            state, source = live, "the live TrainingState actor"
        else:
            source = (
                f"state.json; the run itself does not answer: it was killed, or runs where {folder / 'ray.json'} does not lead "
                "(one on a cluster is asked on its driver's node, with RAY_ADDRESS=auto and the cluster's token)"
            )
    console.print(_table(state))
    if state.phase not in (*LIVE_PHASES, "finished"):
        say(console, f"{state.phase}: {last_word(folder, 'error') or 'its driver did not say why'}", f"go on: async-rlhf resume {folder}")
    verdict = verdict_of_folder(folder)
    if verdict is not None:
        say(console, f"verdict: {verdict.text}")
    age_s = time.time() - state.updated_at
    say(console, f"as of {age_s:.0f} s ago, from {source}")


def _table(state: TrainingState) -> Table:
    table = Table(title=Text(f"run {state.run_id}"), show_header=False)
    known = state.reward_mean is not None and state.best_reward_mean is not None
    reward = f"{state.reward_mean:.3f} (best {state.best_reward_mean:.3f})" if known else "-"
    for name, value in (
        ("phase", state.phase),
        ("version", f"{state.version} of {state.num_updates} updates ({state.optimizer_steps} optimizer steps)"),
        ("reward", reward),
        ("trained", f"{state.prompts} prompts, {state.completions} completions, {state.tokens} tokens"),
        ("largest staleness", str(state.staleness_max)),
        ("queue", ", ".join(f"{count} {place}" for place, count in state.queue.items()) or "-"),
        ("actors", ", ".join(f"{name}: {what}" for name, what in state.actors.items()) or "-"),
        ("seed", str(state.seed)),
    ):
        table.add_row(name, Text(value))  # a stranger's folder may hold markup
    return table


def _is_ours(address: str, token_path: str) -> bool:
    """Whether to follow the folder's word to a Ray: a stranger's folder must not make us talk to a stranger's cluster.

    A local run of this user: its token lies in a session folder that only we can have made, on this machine. A joined cluster:
    only the one that RAY_ADDRESS names anyway.
    """
    if not token_path or os.environ.get("RAY_ADDRESS"):
        return os.environ.get("RAY_ADDRESS") in ("auto", address)
    token = Path(token_path)
    in_session = token.parent.parent == Path(tempfile.gettempdir()) and token.parent.name.startswith("arlhf-")
    if not in_session or not token.is_file() or token.stat().st_uid != os.getuid():
        return False
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token))
    host = address.rpartition(":")[0]
    return host in {"127.0.0.1", *socket.gethostbyname_ex(socket.gethostname())[2], _own_address()}


def _own_address() -> str:
    """The address from which this machine would reach others; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def _ask_actor(folder: Path) -> TrainingState | None:
    """The actor's latest state, or None where it cannot be reached."""
    try:
        entry: dict[str, Any] = json.loads((folder / "ray.json").read_text(encoding="utf-8"))
        address, namespace, token_path = (str(entry[key]) for key in ("address", "namespace", "token_path"))
        name = (folder / STATE_ACTOR_FILE).read_text(encoding="utf-8")
        os.kill(int(entry["pid"]), 0)
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None  # it has no driver now, or somebody else's process has that number, or the files say nothing of the kind
    if not _is_ours(address, token_path):
        return None
    import ray

    try:
        ray.init(address=address, namespace=namespace, log_to_driver=False, logging_level=logging.ERROR)
        latest: list[Any] = ray.get(ray.get_actor(name).latest.remote(), timeout=10)
        return ray.get(latest[0], timeout=10) if latest else None
    except Exception as error:  # any failure to reach it means: not reachable
        logging.getLogger(__name__).info("the TrainingState actor does not answer: %s", error)
        return None
    finally:
        ray.shutdown()
