"""Which channels of a network have to go together: a union of every channel that meets another one.

Each channel that a layer writes gets a number. Numbers travel with the tensors (`flow.py`); where two
channels are added, multiplied, or read by weights of the same place, they become one. Channels that
cannot go (of the input, the output, an operation without a rule) are one with number 0. What is left
falls into axes: channels that stand in the same tensors, equally often, are the units of one.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mbridge_prune.dynamic import Axis, Fixed, Layout, Scattered, Units

FROZEN = 0


@dataclass
class Row:
    """Dimension `dim` of `module.<name>` carries these channels.

    Args:
        ids_n: one number an entry.
        reads: the dimension multiplies what the channels hold; otherwise it writes or scales them.
    """

    module: nn.Module
    name: str
    dim: int
    ids_n: torch.Tensor
    reads: bool = False


@dataclass
class Attribute:
    """`module.<name>` is the number of these channels (`make` of it)."""

    module: nn.Module
    name: str
    ids_n: torch.Tensor
    make: Callable[[int], Any] = int


class Channels:
    """The channels of one network, and after `settle` their axes.

    Attributes:
        rows, attributes: what the layers have said, in the order of execution.
        paths: module -> its name.
        axes: key -> axis, in the order of execution.
    """

    def __init__(self, model: nn.Module):
        self.paths = {module: name for name, module in model.named_modules()}
        self.rows: list[Row] = []
        self.attributes: list[Attribute] = []
        self.axes: dict[str, Axis] = {}
        self.raw: dict[tuple[int, str], tuple[nn.Module, str, torch.Tensor]] = {}
        self._parent = [FROZEN]
        self._roots: torch.Tensor | None = None
        self._known: dict[tuple[int, int], torch.Tensor] = {}
        self._unit: dict[int, tuple[int, int]] = {}

    def new(self, n: int) -> torch.Tensor:
        """[n] numbers of channels not seen before."""
        first = len(self._parent)
        self._parent.extend(range(first, first + n))
        self._roots = None
        return torch.arange(first, first + n)

    def find(self, ids: torch.Tensor) -> torch.Tensor:
        """The number that stands for each channel: equal for channels that go together."""
        if self._roots is None:
            roots = torch.tensor(self._parent)
            while not torch.equal(roots, roots[roots]):
                roots = roots[roots]
            self._roots = roots
        return self._roots[ids]

    def unify(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Entry by entry, the channels of `a` and `b` go together from now on."""
        a, b = self.find(a), self.find(b)
        different = a != b
        if not different.any():
            return
        for one, other in torch.stack([a[different], b[different]], 1).unique(dim=0).tolist():
            one, other = self._root(one), self._root(other)
            self._parent[max(one, other)] = min(one, other)
        self._roots = None

    def freeze(self, ids: torch.Tensor) -> bool:
        """These channels stay; True if one of them could have gone before."""
        open_ = self.find(ids).unique()
        open_ = open_[open_ != FROZEN]
        self.unify(open_, torch.zeros_like(open_))
        return len(open_) > 0

    def tie(self, ids: torch.Tensor, dim: int) -> torch.Tensor:
        """All channels along `dim` go together; returns the numbers at its first place."""
        first = ids.select(dim, 0)
        self.unify(ids, first.unsqueeze(dim).expand_as(ids))
        return first

    def varies(self, ids: torch.Tensor, dim: int) -> bool:
        """True if different channels lie along `dim`."""
        found = self.find(ids)
        return bool((found != found.narrow(dim, 0, 1)).any()) if ids.shape[dim] > 1 else False

    def along(self, ids: torch.Tensor, dim: int) -> torch.Tensor:
        """[n] the channels along `dim`; those that stand at one place of it go together."""
        lines = ids.movedim(dim, -1).reshape(-1, ids.shape[dim])
        self.unify(lines, lines[0].expand_as(lines))
        return lines[0]

    def dimension(self, module: nn.Module, name: str, dim: int, reads: bool = False) -> torch.Tensor:
        """[n] the channels of a dimension of a tensor; the same ones for a tensor that is shared."""
        tensor = getattr(module, name)
        key = (id(tensor), dim)
        if key not in self._known:
            self._known[key] = self.new(tensor.shape[dim])
        ids_n = self._known[key]
        if not any(r.module is module and (r.name, r.dim) == (name, dim) for r in self.rows):
            self.rows.append(Row(module, name, dim, ids_n, reads))
        return ids_n

    def same(self, module: nn.Module, names: tuple[str, ...], ids_n: torch.Tensor) -> None:
        """Dimension 0 of these tensors (absent ones skipped) carries `ids_n`."""
        for name in names:
            if getattr(module, name, None) is not None:
                self.unify(self.dimension(module, name, 0), ids_n)

    def counts(
        self, module: nn.Module, name: str, ids_n: torch.Tensor, make: Callable[[int], Any] = int
    ) -> None:
        """`module.<name>` is the number of these channels."""
        if not any(a.module is module and a.name == name for a in self.attributes):
            self.attributes.append(Attribute(module, name, ids_n, make))

    def tensor(self, module: nn.Module, name: str) -> torch.Tensor:
        """Numbers of a plain parameter or buffer that the network uses as it is, one an element."""
        key = (id(getattr(module, name)), name)
        if key not in self.raw:
            value = getattr(module, name)
            self.raw[key] = (module, name, self.new(value.numel()).view(value.shape))
        return self.raw[key][2]

    def settle(self) -> None:
        """Makes the axes of all that was said."""
        self._settle_raw()
        places: dict[int, Tally[int]] = {}
        for number, row in enumerate(self.rows):
            for root in self.find(row.ids_n).tolist():
                if root != FROZEN:
                    places.setdefault(root, Tally())[number] += 1
        units: dict[tuple, list[int]] = {}
        for root, tally in places.items():
            units.setdefault(tuple(sorted(tally.items())), []).append(root)
        self.axes, self._unit = {}, {}
        for signature, roots in units.items():
            if len(roots) > 1:
                key = self._name(self.rows[signature[0][0]], roots[0])
                for unit, root in enumerate(roots):
                    self._unit[root] = (len(self.axes), unit)
                self.axes[key] = Axis(key, len(roots), key)

    def channels_of(self, axis: Axis) -> int:
        """Channels that one unit of an axis stands for, where it is first written."""
        number = list(self.axes).index(axis.key)
        for row in self.rows:
            found = [self._unit.get(root) for root in self.find(row.ids_n).tolist()]
            mine = [place for place in found if place is not None and place[0] == number]
            if mine:
                return len(mine) // axis.size
        raise KeyError(axis.key)

    def units_of(self, ids_n: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """([n] number of the axis, [n] unit) of each entry; -1 of those that stay."""
        places = [self._unit.get(root, (-1, -1)) for root in self.find(ids_n).tolist()]
        axis_n, unit_n = torch.tensor(places, dtype=torch.int64).reshape(-1, 2).T
        return axis_n, unit_n

    def layout(self, ids_n: torch.Tensor) -> Layout:
        """How the units of the axes lie along these entries."""
        axis_n, unit_n = self.units_of(ids_n)
        axes = list(self.axes.values())
        numbers = axis_n[axis_n >= 0].unique().tolist()
        if not numbers:
            return Fixed(len(ids_n))
        first = axes[numbers[0]]
        if len(numbers) == 1 and torch.equal(unit_n, torch.arange(first.size)):
            return Units(first)
        renumbered = torch.full_like(axis_n, -1)
        for place, number in enumerate(numbers):
            renumbered[axis_n == number] = place
        return Scattered([axes[number] for number in numbers], renumbered, unit_n)

    def rows_of(self, module: nn.Module) -> Iterator[Row]:
        """The rows of one module."""
        return (row for row in self.rows if row.module is module)

    def _settle_raw(self) -> None:
        """A plain tensor gets a row where its channels lie along one dimension alone.

        One that a layer uses as well (a tied weight) has the layer's channels.
        """
        rows = []
        for module, name, ids in self.raw.values():
            layers = [row for row in self.rows if getattr(row.module, row.name) is getattr(module, name)]
            for row in layers:
                self.unify(self.along(ids, row.dim), row.ids_n)
            if layers:
                continue
            found = self.find(ids)
            along = [dim for dim in range(ids.dim()) if self.varies(ids, dim)]
            if len(along) > 1:
                self.freeze(ids)
            elif along and (found != FROZEN).any():
                rows.append(Row(module, name, along[0], self.along(ids, along[0])))
        self.rows += rows
        self.raw.clear()

    def _name(self, row: Row, root: int) -> str:
        """`conv1.out_channels`: after the module that writes the channels first."""
        path = self.paths[row.module]
        mine = [a for a in self.attributes if a.module is row.module and a.name.startswith("out_")]
        counted = [a.name for a in mine if (self.find(a.ids_n) == root).any()]
        name = f"{path}.{counted[0] if counted else row.name}".lstrip(".")
        number = 2
        unique = name
        while unique in self.axes:
            unique, number = f"{name}.{number}", number + 1
        return unique

    def _root(self, number: int) -> int:
        while self._parent[number] != number:
            self._parent[number] = self._parent[self._parent[number]]
            number = self._parent[number]
        return number
