"""The sizes that a search may give each axis."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence

from mbridge_prune.dynamic import Axis, SliceTable
from mbridge_prune.errors import UserError, nearest

Choices = Mapping[str, Sequence[int]]
"""Axis key -> its sizes, ascending; the full size is the last."""


def choices_of(
    table: SliceTable,
    divisors: Mapping[str, int] | int,
    *,
    largest_cut: float = 0.9,
    at_most: int = 8,
    skip: Sequence[str] = (),
) -> dict[str, list[int]]:
    """The multiples of its divisor that keep enough of each axis, and its full size.

    Args:
        table: whose axes each are an hparam of their own.
        divisors: axis key -> step, or one step for all.
        largest_cut: the largest share of an axis that may go.
        at_most: so many sizes an axis, spread evenly.
        skip: axes that keep their size: keys, or patterns such as "blocks.0.*".

    Raises:
        UserError: a pattern that meets no axis.
    """
    kept = {key for pattern in skip for key in _meets(pattern, table)}
    found = {}
    for key, axis in table.axes.items():
        step = divisors if isinstance(divisors, int) else divisors.get(key, 1)
        found[key] = [axis.value] if key in kept else _sizes(axis, step, largest_cut, at_most)
    return found


def _meets(pattern: str, table: SliceTable) -> list[str]:
    keys = fnmatch.filter(table.axes, pattern)
    if not keys:
        raise UserError(
            f"axes_to_skip: no axis {pattern!r}{nearest(pattern, table.axes)}; axes: {', '.join(table.axes)}"
        )
    return keys


def _sizes(axis: Axis, step: int, largest_cut: float, at_most: int) -> list[int]:
    step = math.lcm(step, 1 if axis.per_group else axis.groups)
    low = max(1, math.ceil(axis.value * (1 - largest_cut) - 1e-9))
    smaller = [n for n in range(step, axis.value, step) if n >= low]
    if len(smaller) >= at_most:  # the smallest one stays, the rest is thinned out evenly
        last = len(smaller) - 1
        places = {round(i * last / max(1, at_most - 2)) for i in range(at_most - 1)}
        smaller = [smaller[place] for place in sorted(places)]
    return [*smaller, axis.value]
