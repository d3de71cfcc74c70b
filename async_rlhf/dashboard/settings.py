"""config.yaml as a flat table: what a run was asked to do, for the page and for comparisons."""

from collections.abc import Mapping
from pathlib import Path
from typing import cast

from async_rlhf.dashboard.reading import number, read_text
from async_rlhf.recorder import HIDDEN, is_secret

MAX_CONFIG_BYTES = 1 << 20
MAX_SETTINGS = 5000
"""Also limits what YAML's aliases may unfold to."""
MAX_DEPTH, MAX_KEY = 8, 300

Settings = Mapping[str, object]
"""Dotted key -> text, number, bool, None, or a list of such."""


def read_settings(folder: Path) -> Settings:
    """The settings in the folder's config.yaml; none where there is no such file, or one that no run wrote."""
    import yaml

    written = read_text(folder, "config.yaml", MAX_CONFIG_BYTES)
    if written is None:
        return {}
    try:
        loaded: object = yaml.load(written, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    flat: dict[str, object] = {}
    return flat if isinstance(loaded, dict) and _flatten("", loaded, flat, MAX_SETTINGS) >= 0 else {}


def setting(settings: Settings, key: str, default: float) -> float:
    """A number among the settings."""
    found = number(settings.get(key))
    return default if found is None else found


def differing(runs: Mapping[str, Settings]) -> dict[str, dict[str, object]]:
    """Setting -> run -> value, of the settings that are not the same in all; `run.` and `env.` say where and how, not what."""
    keys = {key for settings in runs.values() for key in settings if not key.startswith(("run.", "env."))}
    absent = object()
    return {
        key: {name: settings.get(key) for name, settings in runs.items()}
        for key in sorted(keys)
        if len({repr(settings.get(key, absent)) for settings in runs.values()}) > 1
    }


def _flatten(prefix: str, value: object, flat: dict[str, object], left: int) -> int:
    """Returns how many more values there may be; negative: there were too many, or too deep."""
    if isinstance(value, dict) and value:
        for name, of in cast("dict[object, object]", value).items():
            key = f"{prefix}.{name}" if prefix else str(name)
            left = _flatten(key, of, flat, left - 1) if left > 0 and len(key) <= MAX_KEY and key.count(".") <= MAX_DEPTH else -1
            if left < 0:
                return left
        return left
    if isinstance(value, str | int | float | bool | None):
        flat[prefix] = HIDDEN if prefix.startswith("env.") and is_secret(prefix) else value
    else:
        flat[prefix] = _short(value)
    return left


def _short(value: object) -> str:
    """A list, an empty section, a date: as text, unless it is deep."""
    items = cast("list[object]", value) if isinstance(value, list) else []
    if len(items) > 50 or any(isinstance(item, dict | list) for item in items):
        return f"a list of {len(items)}"
    return f"[{', '.join(str(item)[:200] for item in items)}]" if isinstance(value, list) else str(value)[:200]
