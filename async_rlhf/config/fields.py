"""A setting with a range."""

from dataclasses import field
from typing import Any


def number(default: Any, *, ge: float | None = None, gt: float | None = None, le: float | None = None, lt: float | None = None) -> Any:
    """A numeric field with its range; `None` leaves a side open."""
    limits = {"ge": ge, "gt": gt, "le": le, "lt": lt}
    return field(default=default, metadata={key: value for key, value in limits.items() if value is not None})
