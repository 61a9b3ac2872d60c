"""Stacks: whole modules or tensors that are the units of an axis (layers, experts), and their moves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mbridge_prune.dynamic.axis import Axis


@dataclass(frozen=True)
class Pattern:
    """What every layer of the whole model is, in `owner.<name>`: a list, or a string of symbols."""

    owner: Any
    name: str
    values: Sequence[Any]

    def keep(self, layers: Sequence[int]) -> None:
        values = [self.values[i] for i in layers]
        setattr(self.owner, self.name, "".join(values) if isinstance(self.values, str) else values)


@dataclass
class Layers:
    """A stack of layers that depth pruning shortens: `owner.layers` holds these global numbers.

    Args:
        patterns: per-layer lists that follow.
        fixed_number: True for a module whose function depends on the layer number it was built
            with: its `layer_number` stays.
    """

    owner: nn.Module
    numbers: list[int]
    axis: Axis
    patterns: Sequence[Pattern] = ()
    fixed_number: Callable[[nn.Module], bool] = lambda module: False

    def keep(self, layers: Sequence[int]) -> None:
        """Keeps these global layers; Megatron's `layer_number` (from 1) follows everywhere inside."""
        place = {n: i for i, n in enumerate(sorted(layers))}
        kept = [(n, layer) for n, layer in zip(self.numbers, self.owner.layers, strict=True) if n in place]
        self.numbers = [n for n, _ in kept]
        self.owner.layers = _list([layer for _, layer in kept], self.owner.layers)
        for number, layer in kept:
            for module in layer.modules():
                if hasattr(module, "layer_number") and not self.fixed_number(module):
                    module.layer_number = place[number] + 1
        for pattern in self.patterns:
            pattern.keep(sorted(layers))

    def state(self) -> Any:
        numbered = [
            (m, m.layer_number)
            for layer in self.owner.layers
            for m in layer.modules()
            if hasattr(m, "layer_number")
        ]
        patterns = [getattr(p.owner, p.name) for p in self.patterns]
        return self.owner.layers, list(self.numbers), numbered, patterns

    def restore(self, state: Any) -> None:
        self.owner.layers, self.numbers, numbered, patterns = state
        for module, number in numbered:
            module.layer_number = number
        for pattern, value in zip(self.patterns, patterns, strict=True):
            setattr(pattern.owner, pattern.name, value)


@dataclass
class Modules:
    """A ModuleList `owner.<attribute>` whose members are this rank's units of `axis`."""

    axis: Axis
    owner: nn.Module
    attribute: str

    def keep(self, n: int) -> None:
        """Keeps the first `n` members."""
        members = getattr(self.owner, self.attribute)
        setattr(self.owner, self.attribute, _list(list(members)[:n], members))

    def state(self) -> Any:
        return getattr(self.owner, self.attribute)

    def restore(self, state: Any) -> None:
        setattr(self.owner, self.attribute, state)


@dataclass
class Tensors:
    """Parameters `<name>0`, `<name>1`, ... of one module: this rank's units of `axis`."""

    axis: Axis
    module: nn.Module
    names: tuple[str, ...]

    def keep(self, n: int) -> None:
        """Keeps the first `n` of each."""
        for name in self.names:
            place = n
            while f"{name}{place}" in self.module._parameters:
                del self.module._parameters[f"{name}{place}"]
                place += 1

    def state(self) -> Any:
        return dict(self.module._parameters)

    def restore(self, state: Any) -> None:
        self.module._parameters.clear()
        self.module._parameters.update(state)


Stack = Modules | Tensors


def _list(members: list[nn.Module], before: nn.ModuleList) -> nn.ModuleList:
    """A shorter list in the place of `before`, in its training mode."""
    after = nn.ModuleList(members)
    after.training = before.training
    return after


def rearrange(axis: Axis, roles: Iterable[Sequence[torch.Tensor]], wanted: Sequence[int]) -> None:
    """Moves units between slots, and between ranks where they are spread, without computing.

    Args:
        roles: for every role the tensors of this rank's slots, in slot order, all of one shape.
        wanted: global numbers of the units that shall stand, in this order, in the slots of all
            ranks: an equal contiguous share each. Slots beyond the share keep what they have.
    """
    each = len(wanted) // axis.shares
    held = axis.size // axis.shares
    for tensors in roles:
        before = [t.data for t in tensors]
        if axis.shares == 1:
            after: list[torch.Tensor] = [before[unit] for unit in wanted]
        else:
            after = _exchange(axis, before, wanted, each, held)
        for tensor, data in zip(tensors, after, strict=False):
            tensor.data = data


def _exchange(
    axis: Axis, before: list[torch.Tensor], wanted: Sequence[int], each: int, held: int
) -> list[torch.Tensor]:
    """What this rank's slots shall hold; units that live on other ranks are received from them."""
    me, names = axis.ranks.rank(), dist.get_process_group_ranks(axis.ranks)
    after: list[torch.Tensor] = []
    transfers: list[dist.P2POp] = []
    for slot, unit in enumerate(wanted):
        target, (source, place) = slot // each, divmod(unit, held)
        if target == me and source == me:
            after.append(before[place])
        elif target == me:
            after.append(torch.empty_like(before[0]))
            transfers.append(dist.P2POp(dist.irecv, after[-1], names[source], axis.ranks))
        elif source == me:
            sent = before[place].contiguous()
            transfers.append(dist.P2POp(dist.isend, sent, names[target], axis.ranks))
    for work in dist.batch_isend_irecv(transfers) if transfers else []:
        work.wait()
    return after
