"""The rows of the table: which tensor dimension, which plain attribute, which probe follows which axis."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mbridge_prune.dynamic.axis import Axis
from mbridge_prune.dynamic.layout import Layout, as_layout


@dataclass(frozen=True)
class Unit:
    """What a tensor belongs to that exists only as unit `number` of `axis` (one expert's weight).

    Args:
        number: the unit's number in the whole axis (global under expert parallel).
        role: what the tensor is to its unit, the same for all of them: "linear_fc1.weight".
        active: how many of the units work on one token; None where all do.
    """

    axis: Axis
    number: int
    role: str = ""
    active: int | None = None


@dataclass(frozen=True)
class Slice:
    """Dimension `dim` of `module.<name>` follows `layout` (an axis stands for its plain layout)."""

    module: nn.Module
    name: str
    dim: int
    layout: Layout | Axis
    unit: Unit | None = None

    @property
    def tree(self) -> Layout:
        return as_layout(self.layout)

    def tensor(self) -> torch.Tensor:
        """The parameter or buffer this row is about."""
        return getattr(self.module, self.name)


@dataclass(frozen=True)
class Follow:
    """The plain attribute (or config field) `owner.<name>` holds the length of `layout`.

    `make` turns the length into the attribute's value where it is not the plain integer.
    """

    owner: Any
    name: str
    layout: Layout | Axis
    make: Callable[[int], Any] = int

    @property
    def tree(self) -> Layout:
        return as_layout(self.layout)


@dataclass(frozen=True)
class Reading:
    """How an axis's scores are read off what a probe accumulates.

    Args:
        axis: whose units are measured.
        channels: consecutive channels that make up one unit (`head_dim` of a head).
    """

    axis: Axis
    channels: int = 1


@dataclass(frozen=True)
class Probe:
    """Where units are observed during calibration.

    Args:
        module: the module whose call is watched.
        tensor: "input", "output", or "norm_output" (the normalised input of a fused norm+linear).
        name: stable name in the whole model, for reports and for a fixed summation order.
        readings: the axes that are read off it.
        statistic: a key of `mbridge_prune.importance.statistics.STATISTICS`.
        part: (first, length) of the channels that are watched; None for all.
        sharded: tensor-parallel ranks see contiguous shares of the channels, not all of them.
        first: the first unit that this rank sees, of an axis that is spread over ranks.
        router: the module whose output says which token went to which unit.
    """

    module: nn.Module
    tensor: str
    name: str
    readings: tuple[Reading, ...]
    statistic: str = "sequence_magnitude"
    part: tuple[int, int] | None = None
    sharded: bool = False
    first: int = 0
    router: nn.Module | None = None


@dataclass(frozen=True)
class Mendable:
    """A tensor `module.<name>` that a repair may change.

    Args:
        layout: of the dimension whose units go.
        label: stable name in the whole model, for reports.
    """

    module: nn.Module
    name: str
    layout: Layout | Axis
    label: str

    @property
    def tree(self) -> Layout:
        return as_layout(self.layout)

    def weight(self) -> torch.Tensor:
        return getattr(self.module, self.name)


@dataclass(frozen=True)
class Renorm:
    """An RMS norm over the units that go, so that those that stay are scaled anew.

    Its input is the first argument of `module`'s call, times silu(second argument) where there is one.

    Args:
        groups: equal consecutive parts of the channels, each normalised by itself.
        eps: what is added to the mean square.
    """

    module: nn.Module
    groups: int
    eps: float


@dataclass(frozen=True)
class Consumer(Mendable):
    """A weight [out, in] whose columns multiply what `layout`'s units write.

    Args:
        seen: the module whose call shows the weight's input.
        tensor: which tensor of that call it is: "input", "output" or "norm_output".
        adds: what it writes, with its bias, is added to the hidden state as it is.
        renorm: a norm over the units that go, right before it.
        unit: the expert that the weight belongs to, which reads the tokens it is sent alone.
        slot: the expert's place in a grouped call, whose second argument tells the tokens of each.
        router: the module whose second output says which token goes to which expert: [tokens, experts].
    """

    seen: nn.Module
    tensor: str
    adds: bool = False
    renorm: Renorm | None = None
    unit: Unit | None = None
    slot: int | None = None
    router: nn.Module | None = None

    def reads(self, x: torch.Tensor, args: tuple) -> torch.Tensor:
        """[..., in]: what this weight reads of the tensor of a call, which may be that of several experts."""
        if self.slot is None:
            return x
        splits = torch.as_tensor(args[1]).tolist()
        return x.narrow(0, sum(splits[: self.slot]), splits[self.slot])


@dataclass(frozen=True)
class Gain(Mendable):
    """The gain of a norm over `layout`, whose input is the input of `module`'s call.

    Args:
        centred: the norm subtracts the mean (LayerNorm).
        offset: what is added to the stored gain (1 for zero-centred gains).
    """

    centred: bool
    offset: float


@dataclass(frozen=True)
class Cost:
    """What a layer keeps or computes besides its weights, as a number that follows axes.

    Args:
        kind: "cache" (numbers kept of a sequence while it is generated) or "flops" (floating-point
            operations on one token besides those with weights).
        layout: its length, times `times`, is the number.
        per_token: the number counts for every token of the context, not once.
        window: the context is at most so many tokens.
        seen: the module whose call, on [..., tokens, channels], shows how many tokens there are where one
            forward is counted; all tokens of a sequence are the context.
    """

    kind: str
    layout: Layout | Axis
    times: int = 1
    per_token: bool = False
    window: int | None = None
    seen: nn.Module | None = None

    @property
    def tree(self) -> Layout:
        return as_layout(self.layout)
