"""The architectures a search may choose from: a grid of sizes, and which of its points are real."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mbridge_prune import runtime
from mbridge_prune.dynamic import DEPTH, SliceTable
from mbridge_prune.errors import UserError, nearest

CHUNK = 1 << 18
FFN_LIKE = ("ffn_hidden_size", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size")
NOT_UNLESS_ASKED = ("num_query_groups",)
"""Searched only where their range is given: the KV cache is rarely worth a group's heads."""

Grid = dict[str, np.ndarray]
"""hparam -> its size in every candidate of a chunk, [candidates] int64."""


@dataclass(frozen=True)
class _Inside:
    """`hparam` counts units that lie in the groups which `within` counts: so many at most in each."""

    hparam: str
    within: str
    width: int


@dataclass
class Space:
    """All combinations of the choices, less those that no model can have and twins of others.

    Args:
        choices: hparam -> its sizes, ascending, the full size last.
        inside: which hparam lies in the groups of another.
        layers_with: hparam -> the layers that have it; one whose layers are all gone changes nothing.
        layer_order: layers, most important first: the first n remain at `num_layers=n`.
    """

    choices: dict[str, list[int]]
    inside: list[_Inside] = field(default_factory=list)
    layers_with: dict[str, set[int]] = field(default_factory=dict)
    layer_order: Sequence[int] = ()

    @classmethod
    def of(
        cls,
        table: SliceTable,
        layer_order: Sequence[int],
        divisors: Mapping[str, int],
        *,
        max_width_pruning: float = 0.4,
        max_depth_pruning: float = 0.2,
        hparams_to_skip: Sequence[str] = (),
        bounds: Mapping[str, Mapping[str, int]] | None = None,
    ) -> Space:
        """The space of a model, the same on every rank.

        Args:
            divisors: "<hparam>_divisor" -> step; FFN-like sizes share `ffn_hidden_size_divisor`.
            max_width_pruning, max_depth_pruning: the largest share of a size that may go.
            hparams_to_skip: keep their size.
            bounds: hparam -> {"min": n, "max": n}, in place of the shares.

        Raises:
            UserError: a name that is no hparam of this model, or bounds without a choice between.
        """
        full, bounds = table.hparams(), dict(bounds or {})
        for what, names in (("hparams_to_skip", hparams_to_skip), ("search_space", bounds)):
            for name in names:
                if name not in full:
                    raise UserError(f"{what}: {name!r} is no hparam of this model{nearest(name, full)}; "
                                    f"it has: {', '.join(full)}")  # fmt: skip
        choices = {}
        for hparam, size in full.items():
            skip = hparam in hparams_to_skip or (hparam in NOT_UNLESS_ASKED and hparam not in bounds)
            largest_cut = max_depth_pruning if hparam == DEPTH else max_width_pruning
            low = math.ceil(size * (1 - largest_cut) - 1e-9)
            choices[hparam] = [size] if skip else _between(hparam, size, low, bounds.get(hparam, {}),
                                                           _step(table, hparam, divisors))  # fmt: skip
        allowed = runtime.gather_objects(
            {h: [s for s in sizes if _allowed(table, h, s, full[h])] for h, sizes in choices.items()}, "pp"
        )
        for hparam in choices:
            possible = sorted(set.intersection(*(set(part[hparam]) for part in allowed)))
            if not possible:
                sizes_said = ", ".join(map(str, choices[hparam]))
                raise UserError(
                    f"search_space: the model can have none of {hparam} {sizes_said}: "
                    + _why_not(table, hparam, choices[hparam][-1])
                )
            choices[hparam] = possible
        inside, layers = _relations(table)
        return cls(choices, inside, layers, list(layer_order))

    def size(self) -> int:
        """Points of the grid, impossible ones and twins included."""
        return math.prod(len(sizes) for sizes in self.choices.values())

    def grid(self) -> Iterator[Grid]:
        """The real candidates, chunk by chunk, in a fixed order."""
        names, lengths = list(self.choices), [len(sizes) for sizes in self.choices.values()]
        values = [np.array(sizes, dtype=np.int64) for sizes in self.choices.values()]
        for first in range(0, self.size(), CHUNK):
            places = np.unravel_index(np.arange(first, min(first + CHUNK, self.size())), lengths)
            chunk = {name: v[place] for name, v, place in zip(names, values, places, strict=True)}
            real = self._real(chunk)
            yield {name: sizes[real] for name, sizes in chunk.items()}

    def smallest(self) -> dict[str, int]:
        """The smallest size of every hparam."""
        return {hparam: sizes[0] for hparam, sizes in self.choices.items()}

    def _real(self, chunk: Grid) -> np.ndarray:
        """[candidates] bool: groups divide, and what no surviving layer has keeps its full size."""
        real = np.ones(len(next(iter(chunk.values()))), dtype=bool)
        for relation in self.inside:
            groups = chunk[relation.within]
            size = chunk[relation.hparam]
            real &= (size % groups == 0) & (size // groups <= relation.width)
        for hparam, layers in self.layers_with.items():
            if hparam in chunk and layers:
                # The depth at which the first of its layers is among those that remain.
                first = min(self.layer_order.index(layer) for layer in layers) + 1
                real &= (chunk[DEPTH] >= first) | (chunk[hparam] == self.choices[hparam][-1])
        return real


def _step(table: SliceTable, hparam: str, divisors: Mapping[str, int]) -> int:
    name = "ffn_hidden_size" if hparam in FFN_LIKE else hparam
    own = divisors.get(f"{name}_divisor", 1)
    groups = [
        a.groups for a in table.axes.values() if a.hparam == hparam and not a.per_group and a.within is None
    ]
    shares = [a.shares for a in table.axes.values() if a.hparam == hparam and not a.per_group]
    return max(runtime.gather_objects(math.lcm(own, *groups, *shares), "pp"))


def _between(hparam: str, size: int, low: int, bounds: Mapping[str, int], step: int) -> list[int]:
    if not isinstance(bounds, Mapping):
        raise UserError(
            f'search_space: {hparam}={bounds!r} is no range; give {{"{hparam}": {{"min": n, "max": n}}}}'
        )
    for key in bounds:
        if key not in ("min", "max"):
            raise UserError(f"search_space: {hparam}.{key} is not min or max")
    low, high = bounds.get("min", low), bounds.get("max", size)
    for name, value in (("min", low), ("max", high)):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= size:
            raise UserError(f"search_space: {hparam}.{name}={value!r} is outside 1..{size}")
    steps = [n for n in range(step, size + 1, step) if low <= n <= high]
    if high == size and size not in steps:
        steps.append(size)
    if not steps:
        raise UserError(f"search_space: no multiple of {step} in {hparam} {low}..{high}")
    return steps


def _allowed(table: SliceTable, hparam: str, size: int, full: int) -> bool:
    if size == full:
        return True
    try:
        table.check({hparam: size})
    except UserError:
        return False
    return True


def _why_not(table: SliceTable, hparam: str, size: int) -> str:
    """What a size is refused for; another stage may know."""
    try:
        table.check({hparam: size})
    except UserError as error:
        return str(error)
    return "another pipeline stage refuses them"


def _relations(table: SliceTable) -> tuple[list[_Inside], dict[str, set[int]]]:
    """Nested hparams, and the layers that every hparam lives in; of all pipeline stages."""
    inside = {
        (a.hparam, a.within.hparam, a.width)
        for a in table.axes.values()
        if a.within is not None and not a.per_group
    }
    layers: dict[str, set[int]] = {}
    for entry in table.entries:
        for layout in entry.dims:
            for axis in layout.axes():
                layers.setdefault(axis.hparam, set()).add(-1 if entry.layer is None else entry.layer)
    everything: dict[str, set[int]] = {}
    for part in runtime.gather_objects((inside, layers), "pp"):
        inside |= part[0]
        for hparam, numbers in part[1].items():
            everything.setdefault(hparam, set()).update(numbers)
    alive = {h: n for h, n in everything.items() if -1 not in n and h != DEPTH}
    return [_Inside(*relation) for relation in sorted(inside)], alive


def as_sizes(grid: Grid, place: int) -> dict[str, int]:
    """One candidate of a chunk."""
    return {hparam: int(sizes[place]) for hparam, sizes in grid.items()}


def describe(space: Space) -> list[tuple[str, str, Any]]:
    """(hparam, its choices, how many) for the console."""
    return [(h, ", ".join(map(str, sizes)), len(sizes)) for h, sizes in space.choices.items()]
