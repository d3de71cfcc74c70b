"""What every command that runs the application does first: read its words, and find the application's packages."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from async_rlhf.errors import ConfigError

if TYPE_CHECKING:
    from async_rlhf.config import Config


def config_of(words: list[str] | None) -> "Config":
    """The config that files and overrides on the command line make."""
    from async_rlhf.config import load_config
    from async_rlhf.config.load import split_arguments

    return load_config(*split_arguments(words or [])).config


def require_application() -> None:
    """The packages `actors` and `learners` run from a checkout; the wheel carries async_rlhf alone.

    Raises:
        ConfigError: they are not there, or are somebody else's.
    """
    checkout = Path(__file__).resolve().parents[2]
    for name in ("actors", "learners"):
        try:
            module = import_module(name)
        except ModuleNotFoundError:
            raise ConfigError(
                f"this command needs the application package {name!r}, which the wheel does not carry: run it from a checkout "
                "(as a job: --working-dir .), or install one with `pip install -e .`"
            ) from None
        place = Path(str(module.__file__)).resolve().parent
        if place != checkout / name:
            raise ConfigError(f"a foreign package {name!r} at {place} hides ours; remove it, or run from a checkout: python -m async_rlhf")
