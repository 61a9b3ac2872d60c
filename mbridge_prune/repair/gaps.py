"""Gaps: runs of layers that go, and the layer that stays before each, on whatever stages they lie."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from mbridge_prune import runtime
from mbridge_prune.dynamic import SliceTable


@dataclass(frozen=True)
class Gap:
    """Layers `first` to `last` go (global numbers); `before` stays right before them, None at the front."""

    before: int | None
    first: int
    last: int

    def __str__(self) -> str:
        return f"layers.{self.first}" + (f"-{self.last}" if self.last > self.first else "")


def gaps_between(layers: Sequence[int] | None, total: int) -> list[Gap]:
    """Every gap, in order.

    Args:
        layers: global numbers of those that stay; None for all.
        total: layers of the full model.
    """
    if layers is None:
        return []
    edges = [-1, *sorted(layers), total]
    return [
        Gap(None if left < 0 else left, left + 1, right - 1)
        for left, right in itertools.pairwise(edges)
        if right - left > 1
    ]


def stage_of_layers(table: SliceTable) -> dict[int, int]:
    """Global layer number -> the pipeline stage that holds it, in the full model; the same on every rank."""
    mine = [] if table.layers is None else list(table.layers.numbers)
    parts = runtime.gather_objects(mine, "pp")
    return {number: stage for stage, numbers in enumerate(parts) for number in numbers}
