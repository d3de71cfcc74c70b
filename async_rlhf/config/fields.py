"""A setting with a range."""

import dataclasses
from dataclasses import field
from typing import Any, get_args, get_origin

NAME = "NAME"
"""Stands in a key for the name that the user gives to one of several equal sections, for instance `prompts.sources.NAME.path`."""


def number(default: Any, *, ge: float | None = None, gt: float | None = None, le: float | None = None, lt: float | None = None) -> Any:
    """A numeric field with its range; `None` leaves a side open."""
    limits = {"ge": ge, "gt": gt, "le": le, "lt": lt}
    return field(default=default, metadata={key: value for key, value in limits.items() if value is not None})


def named_section(kind: Any) -> Any:
    """The dataclass of the values where `kind` is a mapping of names to sections; else None."""
    value = get_args(kind)[1] if get_origin(kind) is dict else None
    return value if dataclasses.is_dataclass(value) else None
