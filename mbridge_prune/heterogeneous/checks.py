"""What the settings of every heterogeneous mode check alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from mbridge_prune.errors import UserError, nearest

Settings = TypeVar("Settings")


def made_from(cls: type[Settings], values: Mapping[str, Any], what: str) -> Settings:
    """A dataclass from a plain dict; an unknown key is refused with the nearest right one.

    Args:
        what: a key is called in messages: "config", "search-space".
    """
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in values:
        if key not in names:
            raise UserError(f"unknown {what} key {key!r}{nearest(key, names)}; keys: {', '.join(names)}")
    return cls(**values)


def check_count(name: str, value: Any) -> None:
    """Refuses what is no integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{name}={value!r} must be an integer of at least 1")


def check_share(name: str, value: Any) -> None:
    """Refuses what is no share below 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise UserError(f"{name}={value!r} is no share: give 0 to below 1, such as 0.9")


def check_names(name: str, value: Any) -> None:
    """Refuses what is no list of names; one name alone is none."""
    if (
        isinstance(value, str)
        or not isinstance(value, Sequence)
        or not all(isinstance(v, str) for v in value)
    ):
        raise UserError(f"{name}={value!r} is no list of names: give a list")
