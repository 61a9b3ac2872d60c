"""A layout says how the units of axes lie along one dimension of a tensor.

Layouts are small trees. Each answers two questions, from the same structure: how long is the
dimension for given sizes (counting), and which of its entries remain (slicing). What is counted is
therefore what is sliced.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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

    def axes(self) -> Iterator[Axis]:
        for part in self.parts:
            yield from part.axes()


@dataclass(frozen=True)
class PerGroup(Layout):
    """Each group of `axis` is a block: its units (`n` entries each), then `tail` fixed entries.

    Megatron's fused QKV is this: for each query group the rows of its Q heads (and, in gated
    attention, of their gates), then its K rows and its V rows.
    """

    axis: Axis
    n: int
    tail: int

    def size(self, sizes: Sizes) -> int | np.ndarray:
        return self.axis.size_in(sizes) * self.n + self.axis.groups_in(sizes) * self.tail

    def entries(self, kept: Kept) -> torch.Tensor:
        axis, block = self.axis, self.axis.width * self.n + self.tail
        groups = kept_groups(axis, kept)
        places = kept.get(axis.key)
        places = (axis.identity() if places is None else places)[groups]
        rows = (places[:, :, None] * self.n + torch.arange(self.n)).flatten(1)
        tail = torch.arange(axis.width * self.n, block).expand(len(groups), self.tail)
        return (groups[:, None] * block + torch.cat([rows, tail], dim=1)).reshape(-1)

    def axes(self) -> Iterator[Axis]:
        return Units(self.axis).axes()


def kept_groups(axis: Axis, kept: Kept) -> torch.Tensor:
    """[groups left] int64: the groups of `axis` that remain."""
    if axis.within is None:
        return torch.arange(axis.groups)
    return Units(axis.within).entries(kept)


def as_layout(layout: Layout | Axis) -> Layout:
    """An axis stands for its units laid out plainly."""
    return Units(layout) if isinstance(layout, Axis) else layout
