"""Counts parameters of any candidate from the table alone; vectorised over a whole grid."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from mbridge_prune.dynamic.axis import Axis, Sizes
from mbridge_prune.dynamic.layout import (
    Concat,
    Fixed,
    Layout,
    Members,
    OneGroup,
    PerGroup,
    Repeat,
    Scattered,
    Units,
)
from mbridge_prune.dynamic.slices import Unit
from mbridge_prune.dynamic.table import DEPTH, SliceTable


@dataclass(frozen=True)
class Shape:
    """The layouts of one tensor's dimensions, and the layer it dies with: what ranks exchange."""

    dims: tuple[Layout, ...]
    layer: int | None


def shapes(table: SliceTable) -> list[Shape]:
    """The counted tensors of the local model; those of experts once for all experts of all ranks."""
    return [
        Shape((*_members(e.unit), *e.dims), e.layer)
        for e in table.entries
        if e.counted and (e.unit is None or e.unit.number == e.unit.axis.local().start)
    ]


def _members(unit: Unit | None) -> tuple[Layout, ...]:
    return () if unit is None else (Members(unit.axis, unit.active),)


class Counter:
    """Parameters of any subnet of a model.

    Args:
        tensors: the shapes of all counted tensors, of every pipeline stage.
        layer_order: global layer numbers in descending importance: the first n remain at
            `num_layers=n`. None where depth is not ranked yet: layers are taken to be equal.
        layers: layers of the model; by default as many as the tensors name.
    """

    def __init__(
        self,
        tensors: Iterable[Shape],
        layer_order: Sequence[int] | None = None,
        layers: int | None = None,
    ):
        groups: dict[tuple, list[Shape]] = defaultdict(list)
        for tensor in tensors:
            groups[tuple(_signature(d) for d in tensor.dims)].append(tensor)
        self.groups = list(groups.values())
        named = max((s.layer for g in self.groups for s in g if s.layer is not None), default=-1) + 1
        self.layers = named if layers is None else layers
        rank = {layer: place for place, layer in enumerate(layer_order or range(self.layers))}
        self.tables = [_alive(group, rank, self.layers) for group in self.groups]

    def params(self, sizes: Sizes) -> int | np.ndarray:
        """Parameters under `sizes`: hparam -> int, or -> array over candidates (int64)."""
        return self._count(sizes, active=False)

    def active_params(self, sizes: Sizes) -> int | np.ndarray:
        """Parameters that work on one token: of the routed experts only those it is sent to."""
        return self._count(sizes, active=True)

    def _count(self, sizes: Sizes, active: bool) -> int | np.ndarray:
        total: int | np.ndarray = 0
        depth = sizes.get(DEPTH, self.layers)
        for group, alive in zip(self.groups, self.tables, strict=True):
            product: int | np.ndarray = 1
            for layout in group[0].dims:
                if active and isinstance(layout, Members):
                    product = product * layout.working(sizes)
                else:
                    product = product * layout.size(sizes)
            total = total + product * alive[depth]
        return total if isinstance(total, np.ndarray) and total.ndim else int(total)


def _alive(group: list[Shape], rank: dict[int, int], layers: int) -> np.ndarray:
    """[layers + 1] int64: how many tensors of the group remain at each depth."""
    alive = np.zeros(layers + 1, dtype=np.int64)
    for tensor in group:
        first_depth = 0 if tensor.layer is None else rank[tensor.layer] + 1
        alive[first_depth:] += 1
    return alive


def _signature(layout: Layout | Axis) -> tuple:
    """Equal for layouts that have the same size under any homogeneous subnet."""
    match layout:
        case Axis():
            within = layout.within and _signature(layout.within)
            return (layout.hparam, layout.size, layout.groups, layout.per_group, within)
        case Fixed():
            return (layout.n,)
        case Units():
            return ("units", _signature(layout.axis))
        case Repeat():
            return ("repeat", _signature(layout.inner), layout.n)
        case PerGroup():
            return ("groups", _signature(layout.axis), layout.n, layout.tail, layout.times)
        case OneGroup():
            return ("one group", _signature(layout.axis))
        case Members():
            return ("members", _signature(layout.axis), layout.active)
        case Scattered():
            parts = zip(layout.parts, layout.times, strict=True)
            return ("scattered", layout.fixed, *((_signature(axis), times) for axis, times in parts))
        case Concat():
            return ("concat", *map(_signature, layout.parts))
    raise TypeError(f"no signature for {type(layout).__name__}")
