"""An axis is one place where a prunable dimension lives; its units are what is ranked and removed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

Sizes = Mapping[str, "int | np.ndarray"]
"""A size for every hparam (or, finer, for an axis key); arrays count a whole grid at once."""


@dataclass(frozen=True, eq=False)
class Axis:
    """`size` units of one hparam at one place of the model.

    Units lie in `groups` equal groups (query groups, SSM groups): they are ranked inside their
    group and every group keeps the same number. When the groups are themselves prunable,
    `within` names their axis: one group a unit of it.

    Args:
        hparam: the dimension this axis belongs to, e.g. "ffn_hidden_size".
        size: units in the whole axis, all groups together.
        key: unique name in the whole model, with global layer numbers: "layers.3.ffn_hidden_size".
        groups: number of equal groups the units lie in.
        within: the axis whose units are the groups, where groups can be pruned.
        per_group: True where the hparam counts the units of one group (Mamba's head_dim, which is
            the size inside one head) and not of all groups together (attention heads).
        ranks: the process group over which the units are spread in equal contiguous shares (experts
            under expert parallel); None where every rank holds them all.
    """

    hparam: str
    size: int
    key: str
    groups: int = 1
    within: Axis | None = None
    per_group: bool = False
    ranks: Any = None

    def __post_init__(self) -> None:
        if self.size % self.groups:
            raise ValueError(f"{self.key}: {self.size} units do not divide into {self.groups} groups")
        if self.within is not None and self.within.size != self.groups:
            raise ValueError(f"{self.key}: {self.groups} groups within {self.within.size} units")

    def __getstate__(self) -> dict[str, Any]:
        """What other ranks are told: a process group does not travel."""
        return {**vars(self), "ranks": None}

    @property
    def width(self) -> int:
        """Units in one group."""
        return self.size // self.groups

    @property
    def value(self) -> int:
        """The full size as the hparam states it."""
        return self.width if self.per_group else self.size

    def groups_in(self, sizes: Sizes) -> int | np.ndarray:
        """Groups left under `sizes`."""
        return self.within.size_in(sizes) if self.within is not None else self.groups

    def width_in(self, sizes: Sizes) -> int | np.ndarray:
        """Units left in one group under `sizes`."""
        value = sizes.get(self.key, sizes.get(self.hparam, self.value))
        return value if self.per_group else value // self.groups_in(sizes)

    def size_in(self, sizes: Sizes) -> int | np.ndarray:
        """Units left in the whole axis under `sizes` (int, or an array over candidates)."""
        return self.width_in(sizes) * self.groups_in(sizes)

    @property
    def shares(self) -> int:
        """Ranks that the units are spread over."""
        return 1 if self.ranks is None else self.ranks.size()

    def local(self) -> range:
        """The units that this rank holds."""
        each = self.size // self.shares
        first = 0 if self.ranks is None else self.ranks.rank() * each
        return range(first, first + each)

    def identity(self) -> torch.Tensor:
        """The order that changes nothing: [groups, width] int64."""
        return torch.arange(self.width).repeat(self.groups, 1)

    def order_by(self, scores: torch.Tensor) -> torch.Tensor:
        """Units in descending importance inside their group; ties keep their present order.

        Args:
            scores: [size] importance of every unit.

        Returns:
            [groups, width] int64, places inside the group.
        """
        if scores.shape != (self.size,):
            raise ValueError(f"{self.key}: {tuple(scores.shape)} scores for {self.size} units")
        grouped = scores.detach().cpu().view(self.groups, self.width)
        return torch.argsort(grouped, dim=1, descending=True, stable=True)
