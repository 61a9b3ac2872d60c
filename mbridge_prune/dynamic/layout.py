"""A layout says how the units of axes lie along one dimension of a tensor.

Layouts are small trees. Each answers two questions, from the same structure: how long is the
dimension for given sizes (counting), and which of its entries remain (slicing). What is counted is
therefore what is sliced.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mbridge_prune.dynamic.axis import Axis, Sizes

Kept = Mapping[str, torch.Tensor]
"""Axis key -> [groups, k] places kept inside each group, in the order they shall have."""


class Layout:
    """One dimension of a tensor; `+` puts two after one another."""

    def size(self, sizes: Sizes) -> int | np.ndarray:
        """Length of the dimension under `sizes`."""
        raise NotImplementedError

    def entries(self, kept: Kept) -> torch.Tensor:
        """[length] int64 entries of the full dimension that remain, in their new order."""
        raise NotImplementedError

    def axes(self) -> Iterator[Axis]:
        """Every axis that this dimension follows."""
        raise NotImplementedError

    def full(self) -> int:
        """Length of the unpruned dimension."""
        return int(self.size({}))

    def share(self, rank: int, ranks: int) -> torch.Tensor:
        """[length / ranks] int64: the entries that a tensor-parallel rank holds.

        Every part is dealt out in contiguous shares, as Megatron shards each of its fused weights.
        """
        each = self.full() // ranks
        return torch.arange(rank * each, (rank + 1) * each)

    def __add__(self, other: Layout) -> Concat:
        return Concat(self, other)


@dataclass(frozen=True)
class Fixed(Layout):
    """`n` entries that follow no axis."""

    n: int

    def size(self, sizes: Sizes) -> int:
        return self.n

    def entries(self, kept: Kept) -> torch.Tensor:
        return torch.arange(self.n)

    def axes(self) -> Iterator[Axis]:
        return iter(())


@dataclass(frozen=True)
class Units(Layout):
    """One entry a unit, group after group."""

    axis: Axis

    def size(self, sizes: Sizes) -> int | np.ndarray:
        return self.axis.size_in(sizes)

    def entries(self, kept: Kept) -> torch.Tensor:
        axis = self.axis
        groups = kept_groups(axis, kept)
        places = kept.get(axis.key)
        places = axis.identity() if places is None else places
        return (groups[:, None] * axis.width + places[groups]).reshape(-1)

    def axes(self) -> Iterator[Axis]:
        if self.axis.within is not None:
            yield from Units(self.axis.within).axes()
        yield self.axis


@dataclass(frozen=True)
class Repeat(Layout):
    """Every entry of `inner` is a block of `n` entries (the `head_dim` rows of a head)."""

    inner: Layout
    n: int

    def size(self, sizes: Sizes) -> int | np.ndarray:
        return self.inner.size(sizes) * self.n

    def entries(self, kept: Kept) -> torch.Tensor:
        blocks = self.inner.entries(kept)
        return (blocks[:, None] * self.n + torch.arange(self.n)).reshape(-1)

    def axes(self) -> Iterator[Axis]:
        return self.inner.axes()


class Concat(Layout):
    """Parts one after another (GLU: gate then up)."""

    def __init__(self, *parts: Layout):
        self.parts = parts

    def size(self, sizes: Sizes) -> int | np.ndarray:
        return sum(part.size(sizes) for part in self.parts)

    def entries(self, kept: Kept) -> torch.Tensor:
        starts = np.cumsum([0, *(part.full() for part in self.parts)])
        return torch.cat([part.entries(kept) + int(s) for part, s in zip(self.parts, starts, strict=False)])

    def share(self, rank: int, ranks: int) -> torch.Tensor:
        starts = np.cumsum([0, *(part.full() for part in self.parts)])
        shares = [part.share(rank, ranks) + int(s) for part, s in zip(self.parts, starts, strict=False)]
        return torch.cat(shares)

    def axes(self) -> Iterator[Axis]:
        for part in self.parts:
            yield from part.axes()


@dataclass(frozen=True)
class OneGroup(Layout):
    """One entry a unit of one group: a tensor that belongs to a single expert."""

    axis: Axis
    group: int

    def size(self, sizes: Sizes) -> int | np.ndarray:
        return self.axis.width_in(sizes)

    def entries(self, kept: Kept) -> torch.Tensor:
        places = kept.get(self.axis.key)
        return torch.arange(self.axis.width) if places is None else places[self.group]

    def axes(self) -> Iterator[Axis]:
        yield self.axis


@dataclass(frozen=True)
class Members(Layout):
    """For counting: one whole tensor a unit of `axis`, of which `active` work on a token."""

    axis: Axis
    active: int | None = None

    def size(self, sizes: Sizes) -> int | np.ndarray:
        return self.axis.size_in(sizes)

    def working(self, sizes: Sizes) -> int | np.ndarray:
        """Units that work on one token."""
        size = self.size(sizes)
        return size if self.active is None else np.minimum(size, self.active)

    def axes(self) -> Iterator[Axis]:
        yield self.axis


@dataclass(frozen=True)
class PerGroup(Layout):
    """Each group of `axis` is a block: its units (`n` entries each), then `tail` fixed entries.

    Megatron's fused QKV is this: for each query group the rows of its Q heads, then its K rows and
    its V rows. In gated attention the gates of the heads stand between Q and K: the units come
    `times` = 2 times.
    """

    axis: Axis
    n: int
    tail: int
    times: int = 1

    def size(self, sizes: Sizes) -> int | np.ndarray:
        return self.axis.size_in(sizes) * self.n * self.times + self.axis.groups_in(sizes) * self.tail

    def entries(self, kept: Kept) -> torch.Tensor:
        axis, units = self.axis, self.axis.width * self.n
        block = units * self.times + self.tail
        groups = kept_groups(axis, kept)
        places = kept.get(axis.key)
        places = (axis.identity() if places is None else places)[groups]
        rows = (places[:, :, None] * self.n + torch.arange(self.n)).flatten(1)
        rows = torch.cat([rows + i * units for i in range(self.times)], dim=1)
        tail = torch.arange(units * self.times, block).expand(len(groups), self.tail)
        return (groups[:, None] * block + torch.cat([rows, tail], dim=1)).reshape(-1)

    def axes(self) -> Iterator[Axis]:
        return Units(self.axis).axes()


class Scattered(Layout):
    """Entries in any order: entry i belongs to unit `unit_n[i]` of `axes[axis_n[i]]`, or to none (-1).

    What a traced network needs, where reshapes, concatenations and shuffles put units anywhere: the inputs of
    a linear layer after a flatten (each unit once a position), a dimension of which a part cannot be pruned.
    Every unit of an axis has equally many entries; the axes have no groups.
    """

    def __init__(self, axes: Sequence[Axis], axis_n: torch.Tensor, unit_n: torch.Tensor):
        self.parts, self.axis_n, self.unit_n = list(axes), axis_n, unit_n
        self.fixed = int((axis_n < 0).sum())
        self.times: list[int] = []
        self._entries: list[tuple[torch.Tensor, torch.Tensor]] = []
        for number, axis in enumerate(self.parts):
            entries = (axis_n == number).nonzero().flatten()
            by_unit = entries[torch.argsort(unit_n[entries], stable=True)]
            times, rest = divmod(len(entries), axis.size)
            if rest or not torch.equal(unit_n[by_unit], torch.arange(axis.size).repeat_interleave(times)):
                raise ValueError(f"{axis.key}: its units have {len(entries)} entries, not equally many each")
            self.times.append(times)
            self._entries.append((entries, by_unit.view(axis.size, times)))

    def size(self, sizes: Sizes) -> int | np.ndarray:
        lengths = (axis.size_in(sizes) * n for axis, n in zip(self.parts, self.times, strict=True))
        return sum(lengths, self.fixed)

    def entries(self, kept: Kept) -> torch.Tensor:
        found = torch.arange(len(self.axis_n))
        stays = torch.ones(len(self.axis_n), dtype=torch.bool)
        for axis, (entries, of_unit) in zip(self.parts, self._entries, strict=True):
            units = kept.get(axis.key)
            units = torch.arange(axis.size) if units is None else units.reshape(-1)
            # The place of unit u takes the entries of the unit that is kept at u, in their order.
            occurrence = torch.empty_like(found)
            occurrence[of_unit] = torch.arange(of_unit.shape[1]).expand_as(of_unit)
            there = self.unit_n[entries] < len(units)
            stays[entries] = there
            left = entries[there]
            found[left] = of_unit[units[self.unit_n[left]], occurrence[left]]
        return found[stays]

    def axes(self) -> Iterator[Axis]:
        yield from self.parts


def kept_groups(axis: Axis, kept: Kept) -> torch.Tensor:
    """[groups left] int64: the groups of `axis` that remain."""
    if axis.within is None:
        return torch.arange(axis.groups)
    return Units(axis.within).entries(kept)


def as_layout(layout: Layout | Axis) -> Layout:
    """An axis stands for its units laid out plainly."""
    return Units(layout) if isinstance(layout, Axis) else layout
