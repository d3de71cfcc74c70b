"""From YAML files and `key=value` overrides to a checked, frozen Config.

Sources merge from left to right: the schema's defaults, each YAML file, each override. A key that names a folder of
`conf/` and has a plain word as its value (`algorithm=rloo`) merges `conf/<key>/<value>.yaml` at that place.
"""

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from async_rlhf.config.checks import check_config
from async_rlhf.config.fields import NAME, named_section
from async_rlhf.config.schema import Config
from async_rlhf.errors import ConfigError

CONF_FOLDER = Path(__file__).resolve().parents[2] / "conf"


@dataclass(frozen=True, kw_only=True)
class LoadedConfig:
    """A checked config and where each of its values came from."""

    config: Config
    origins: Mapping[str, str]
    """Full key -> file or override that set it last; absent: the schema's default."""


def load_config(files: Sequence[str | Path] = (), overrides: Sequence[str] = ()) -> LoadedConfig:
    """Merge the sources, check every value, and return the frozen result.

    Args:
        files: YAML files, merged from left to right.
        overrides: `key=value` strings, applied after the files, from left to right.
    Raises:
        ConfigError: a missing file, unknown key, wrong type, value out of range, or settings that contradict.
    """
    merged = _defaults()
    origins: dict[str, str] = {}
    for origin, tree in _sources(files, overrides):
        for key, value in _flatten(tree):
            _check_key(key, value, origin)
            origins[key] = origin
        try:
            merged = OmegaConf.merge(merged, OmegaConf.create(tree))
        except (OmegaConfBaseException, ValueError) as error:
            raise ConfigError(_explain(error, tree, origin)) from None
    try:
        config = cast(Config, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:  # an interpolation that leads nowhere
        key = str(error.full_key or "?")
        raise ConfigError(f"{key} (in {origins.get(key, 'defaults')}): {str(error).splitlines()[0]}") from None
    check_config(config)
    return LoadedConfig(config=config, origins=origins)


def to_yaml(config: Config) -> str:
    """The resolved config as YAML; load_config of it gives the same config again."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Sort command-line words into config files (no `=`) and overrides (`key=value`)."""
    files = [word for word in arguments if "=" not in word]
    return files, [word for word in arguments if "=" in word]


def _sources(files: Sequence[str | Path], overrides: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for file in files:
        yield from _with_groups(str(file), _read_yaml(Path(file)))
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key.strip():
            raise ConfigError(f"an override must look like key=value, got {override!r}")
        try:
            value = yaml.safe_load(text) if text else ""
        except yaml.YAMLError as error:
            raise ConfigError(f"the value of {key} is not YAML, got {text!r}: {error}") from None
        key = key.strip()
        if value is not None and _is_text(key) and not isinstance(value, str):
            value = text  # YAML would make a number of run.name=12e3 and a bool of env.FLAG=on
        tree: Any = value
        for part in reversed(key.split(".")):
            tree = {part: tree}
        yield from _with_groups(override, _number_like(tree))


def _with_groups(origin: str, tree: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the group files that `tree` names, then the rest of `tree`."""
    rest: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, str) and "." not in key and (CONF_FOLDER / key).is_dir() and _is_section(key):
            file = CONF_FOLDER / key / f"{value}.yaml"
            known = sorted(path.stem for path in (CONF_FOLDER / key).glob("*.yaml"))
            if value not in known:
                raise ConfigError(f"{key}={value}: no such file {file}; known: {', '.join(known) or 'none'}{_hint(value, known)}")
            yield f"{origin} -> conf/{key}/{value}.yaml", _read_yaml(file)
        else:
            rest[key] = value
    if rest:
        yield origin, rest


def _is_section(key: str) -> bool:
    return key == "cluster" or any(f.name == key and dataclasses.is_dataclass(f.type) for f in dataclasses.fields(Config))


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        known = sorted(str(file.relative_to(CONF_FOLDER.parent)) for file in CONF_FOLDER.glob("*.yaml"))
        raise ConfigError(f"config file not found: {path}; shipped ones: {', '.join(known) or 'none'} (overrides look like key=value)")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in cast(dict[Any, Any], tree)):
        raise ConfigError(f"{path} must hold a mapping of setting names to values, got {type(tree).__name__}")
    return cast(dict[str, Any], _number_like(tree))


def _number_like(value: Any, key: str = "") -> Any:
    """YAML 1.1 reads `3e-4` as a string; users mean the number, where `key` is one."""
    if isinstance(value, dict):
        return {part: _number_like(item, f"{key}.{part}" if key else str(part)) for part, item in cast(dict[Any, Any], value).items()}
    if isinstance(value, bool) and (word := "on" if value else "off") in get_args(_types_by_key().get(_canonical(key))):
        return word  # YAML 1.1 reads `off` as a boolean
    if isinstance(value, str) and "e" in value.lower() and not _is_text(key):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        full = f"{prefix}{key}"
        if isinstance(value, Mapping) and full != "env":
            yield from _flatten(cast(Mapping[str, Any], value), f"{full}.")
        else:
            yield full, value


@cache
def _defaults() -> Any:
    """The schema as OmegaConf's tree, which takes longer to build than all else here; a merge copies it."""
    return OmegaConf.structured(Config)


def _is_text(key: str) -> bool:
    """The setting is free text, which must reach it unchanged."""
    return key.startswith("env.") or _types_by_key().get(_canonical(key)) is str


@cache
def known_keys() -> tuple[str, ...]:
    """Every settable key, sections as `section.key`, and `section.NAME.key` where users name the sections."""
    return tuple(_types_by_key())


@cache
def _types_by_key() -> dict[str, Any]:
    return dict(_walk(Config))


def _walk(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for item in dataclasses.fields(section):
        named = named_section(item.type)
        if named or dataclasses.is_dataclass(item.type):
            yield from _walk(named or item.type, f"{prefix}{item.name}.{NAME}." if named else f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", item.type


def _canonical(key: str) -> str:
    """The key with NAME in place of the names that users give to sections."""
    parts: list[str] = []
    section: Any = Config
    named = False
    for part in key.split("."):
        parts.append(NAME if named else part)
        if named:
            named = False
        elif dataclasses.is_dataclass(section):
            kind = next((f.type for f in dataclasses.fields(section) if f.name == part), None)
            named = named_section(kind) is not None
            section = named_section(kind) or kind
    return ".".join(parts)


def _check_key(key: str, value: Any, origin: str) -> None:
    keys, canonical = known_keys(), _canonical(key)
    sections = {known.rsplit(".", depth)[0] for known in keys for depth in range(1, known.count(".") + 1)}
    if canonical in sections:
        raise ConfigError(f"{key} is a section of settings, got {value!r} (in {origin}); set one of its keys: {_inside(canonical, keys)}")
    if canonical not in keys and not key.startswith("env."):
        raise ConfigError(f"unknown setting {key!r} (in {origin}){_hint(canonical, keys)}; `async-rlhf config` lists all settings")
    if value == "???":
        raise ConfigError(f"{key} must have a value, got '???' (in {origin}); leave the setting out for its default")
    texts = {f"env.{name}": text for name, text in cast(Mapping[str, Any], value).items()} if isinstance(value, Mapping) else {key: value}
    for name, text in texts.items():
        if _is_text(name) and (isinstance(text, bool) or not isinstance(text, str | int)):
            raise ConfigError(f"{name} must be text, got {text!r} (in {origin}); put it in quotes")


def _inside(section: str, keys: Sequence[str]) -> str:
    return ", ".join(key for key in keys if key.startswith(f"{section}."))


def _hint(word: str, known: Sequence[str]) -> str:
    """`; did you mean ...?` for the nearest known word, also when only its last part was given."""
    last_parts = {key.rsplit(".", 1)[-1]: key for key in known}
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    near = near or [last_parts[part] for part in difflib.get_close_matches(word.rsplit(".", 1)[-1], list(last_parts), n=1, cutoff=0.6)]
    return f"; did you mean {near[0]!r}?" if near else ""


def _explain(error: Exception, tree: Mapping[str, Any], origin: str) -> str:
    key = str(getattr(error, "full_key", None) or next(iter(dict(_flatten(tree))), "?"))
    value = dict(_flatten(tree)).get(key)
    return f"{key}: got {value!r} (in {origin}): {str(error).splitlines()[0]}"
