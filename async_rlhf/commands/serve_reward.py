"""`async-rlhf serve-reward`: a reward behind HTTP, for runs elsewhere."""

import os
import socket
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from async_rlhf.commands.say import say
from async_rlhf.config import load_config
from async_rlhf.config.load import split_arguments
from async_rlhf.config.rewards import RewardConfig, RewardPartConfig
from async_rlhf.errors import ConfigError
from async_rlhf.hub import model_folder, with_local_models
from async_rlhf.rewards import absolute_rewards, check_rewards, open_reward
from async_rlhf.rewards.client import is_loopback
from async_rlhf.tasks import load_task

TOKEN_VARIABLE = "ASYNC_RLHF_REWARD_TOKEN"
"""Environment variable with the token that callers must know."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where to serve, and how much one request may hold."""

    host: str = "127.0.0.1"
    port: int = 0
    """0: any free one."""
    max_request_mib: float = 64.0


def run_serve_reward(words: Sequence[str], function: str, model: Path | None, place: Place, console: Console) -> None:
    """Serve until a signal ends it. Exactly one of the first three says what.

    Raises:
        ConfigError: nothing to serve, no token where others can reach it, or a port that is taken.
    """
    config, default, name = _what(words, function, model)
    token = os.environ.get(TOKEN_VARIABLE, "")
    if not token and not is_loopback(place.host):
        raise ConfigError(
            f"serve-reward --host {place.host} can be reached by others: set {TOKEN_VARIABLE} in the environment to a secret (for "
            "instance of `openssl rand -hex 32`), and give the same to the run by token_env"
        )
    check_rewards(config, default)
    with _listen(place) as listening, closing(open_reward(config, default)) as reward:
        import uvicorn

        from async_rlhf.rewards.server import Guard, make_app

        port = listening.getsockname()[1]
        host = f"[{place.host}]" if ":" in place.host else place.host
        say(
            console,
            f"serving {name} at http://{host}:{port}/score {'to who knows the token' if token else 'to this machine, without a token'}",
        )
        app = Guard(make_app(reward, name), token, int(place.max_request_mib * (1 << 20)))
        settings = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=5)
        uvicorn.Server(settings).run(sockets=[listening])


def _what(words: Sequence[str], function: str, model: Path | None) -> tuple[RewardConfig, str, str]:
    """The reward's config, the task's own function, and a name."""
    if sum((bool(words), bool(function), model is not None)) != 1:
        raise ConfigError("serve-reward needs one thing to serve: config files (and key=value words), or --function, or --model")
    if function:
        return absolute_rewards(RewardConfig(function=function)), "", f"function {function}"
    if model is not None:
        part = RewardPartConfig(kind="model", path=str(model_folder("--model", str(model))))
        return absolute_rewards(RewardConfig(parts={"model": part})), "", f"model {model}"
    config = with_local_models(load_config(*split_arguments(list(words))).config)
    reward = absolute_rewards(config.reward)
    default = reward.function
    parts = reward.parts.values() or [RewardPartConfig()]
    if not default and any(part.kind == "function" and not part.function for part in parts):
        default = load_task(config.task).reward
    return reward, default, f"the weighted sum of {', '.join(reward.parts)}" if reward.parts else f"function {default}"


def _listen(place: Place) -> socket.socket:
    try:
        return socket.create_server((place.host, place.port), family=socket.AF_INET6 if ":" in place.host else socket.AF_INET)
    except OSError as error:
        raise ConfigError(f"cannot listen on {place.host} port {place.port}: {error}; choose another --host or --port") from error
