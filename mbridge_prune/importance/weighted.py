"""The `weighted` ranking: what a unit adds to what the weights that read it write.

A channel j of the input x of a weight W: E[x_j^2] ||W_:j||^2. A unit of several channels h (a head, also
Mamba's): tr(W_h C_hh W_h^T), with C = E[x x^T]; a query group: the sum over its heads. An axis that several
weights read (hidden_size) sums each weight's shares, which add up to 1. This is the squared error of the
weight's output if the unit alone were removed, where units are uncorrelated.

Routed experts: the same, over the tokens that an expert is sent; what its fc2 reads has the router's
probability in it. As readers of the hidden state the experts of a layer are one weight: their parts are
added up before they are made shares.

Mamba's out_proj reads what a gated norm has scaled. Without a unit the norm scales the others by another
number a token; that is left out, as their common scale is none of the unit's own writing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import NamedTuple

import torch

from mbridge_prune import runtime
from mbridge_prune.dynamic import Axis, Concat, Consumer, OneGroup, Repeat, SliceTable, Units
from mbridge_prune.errors import UserError
from mbridge_prune.importance.scores import natural
from mbridge_prune.importance.watch import watch

ROWS = 8192
"""Rows of a weight that stand in fp64 at a time."""


class Part(NamedTuple):
    """What one weight says of an axis of `size` units: energies of those from `first` on, fp64."""

    size: int
    first: int
    energies: torch.Tensor


class WeightedRanking:
    """Context manager: inside it, every forward of the model adds to the second moments of units.

    Attributes:
        axes: keys of this rank's axes that it ranks: those that declared consumers read. Experts as
            such are not among them.
        sums: consumer label -> [units, channels, channels] fp64, sum of x_h x_h^T over tokens.
    """

    def __init__(self, table: SliceTable):
        self.consumers = [consumer for _, consumer in table.consumers if _axes(consumer)]
        self.axes = {axis.key for consumer in self.consumers for axis in _axes(consumer)}
        self.sums: dict[str, torch.Tensor] = {}
        self._watches = ExitStack()

    def __enter__(self) -> WeightedRanking:
        for consumer in self.consumers:
            self._watches.enter_context(watch(consumer.seen, consumer.tensor, self._adder(consumer)))
        return self

    def __exit__(self, *exc: object) -> None:
        self._watches.close()

    def _adder(self, consumer: Consumer) -> Callable[[torch.Tensor, tuple], None]:
        label, channels = consumer.label, _channels(consumer)

        @torch.no_grad()
        def add(x: torch.Tensor, args: tuple) -> None:
            x = consumer.reads(x, args)
            if not x.numel():  # an expert without tokens
                return
            x_tuc = x.reshape(-1, x.shape[-1] // channels, channels).float()
            if channels == 1:
                moment_ucc = x_tuc.square().sum(0)[..., None].double()
            else:
                moment_ucc = torch.einsum("tuc,tud->ucd", x_tuc, x_tuc).double()
            known = self.sums.get(label)
            self.sums[label] = moment_ucc if known is None else known.add_(moment_ucc)

        return add

    @torch.no_grad()
    def units(self) -> dict[str, torch.Tensor]:
        """Axis key -> [size] fp32, of all pipeline stages; the same on every rank."""
        mine: dict[str, dict[str, Part]] = {}
        for consumer in self.consumers:
            if consumer.label in self.sums:
                energy_ucc = self.sums[consumer.label] * _gram(consumer)
                for axis, part in _parts(consumer, energy_ucc):
                    part = part._replace(energies=part.energies.cpu())
                    mine.setdefault(axis.key, {})[consumer.label] = part
        # A unit's energy is linear in its moment: ranks exchange one number a unit. Those that say the same
        # of a weight are its replicas, which read other tokens.
        whole: dict[str, dict[str, Part]] = {}
        for found in runtime.gather_objects(mine):
            for key, of_weights in found.items():
                known = whole.setdefault(key, {})
                for label, part in of_weights.items():
                    before = known[label].energies if label in known else 0
                    known[label] = part._replace(energies=part.energies + before)
        if not whole:
            raise UserError("the forward loop did not run the model: no activation was seen")
        return {key: _added_up(of_weights).float() for key, of_weights in whole.items()}


def _added_up(of_weights: dict[str, Part]) -> torch.Tensor:
    """[size] fp64: the shares of every weight; the experts of a layer are one."""
    energies: dict[str, torch.Tensor] = {}
    for label in sorted(of_weights, key=natural):
        size, first, part = of_weights[label]
        weight = re.sub(r"\.experts\.\d+\.", ".experts.", label)
        energy = energies.setdefault(weight, torch.zeros(size, dtype=torch.float64))
        energy[first : first + len(part)] += part
    shares = [energy / energy.sum().clamp(min=1e-300) for energy in energies.values()]
    return torch.stack(shares).sum(0)


def _parts(consumer: Consumer, energy_ucc: torch.Tensor) -> Iterator[tuple[Axis, Part]]:
    """The axes that a consumer ranks, and what it says of them.

    Args:
        energy_ucc: [units, channels, channels] of what a unit's channels write, in pairs.
    """
    tree, energy_u = consumer.tree, energy_ucc.sum((1, 2))
    if isinstance(tree, OneGroup):
        yield tree.axis, Part(tree.axis.size, tree.group * tree.axis.width, energy_u)
        return
    axis, *outer = _axes(consumer)
    if isinstance(tree, Concat):  # the axis several times over
        yield axis, Part(axis.size, 0, energy_u.view(-1, axis.size).sum(0))
    elif isinstance(tree, Units) and outer:  # Mamba's channels, a head a block
        yield axis, Part(axis.size, 0, energy_ucc.diagonal(dim1=1, dim2=2).flatten())
    else:
        yield axis, Part(axis.size, 0, energy_u)
    for groups in outer:
        yield groups, Part(groups.size, 0, energy_u.view(groups.size, -1).sum(1))


def _axes(consumer: Consumer) -> list[Axis]:
    """The axes that a consumer ranks: its units, then the groups they lie in where those can go."""
    tree = consumer.tree
    if isinstance(tree, OneGroup):
        return [tree.axis]
    if isinstance(tree, Concat) and all(isinstance(part, Units) for part in tree.parts):
        axes = {part.axis.key: part.axis for part in tree.parts if isinstance(part, Units)}
        return list(axes.values()) if len(axes) == 1 else []
    units = tree.inner if isinstance(tree, Repeat) else tree
    if not isinstance(units, Units):
        return []
    return [units.axis, *([units.axis.within] if units.axis.within is not None else [])]


def _channels(consumer: Consumer) -> int:
    """Input channels of a unit whose cross moments count: of a head, attention's or Mamba's."""
    tree = consumer.tree
    if isinstance(tree, Repeat):
        return tree.n
    return tree.axis.width if isinstance(tree, Units) and tree.axis.within is not None else 1


def _gram(consumer: Consumer) -> torch.Tensor:
    """[units, channels, channels] fp64: W_h^T W_h of every unit."""
    weight, channels = consumer.weight().detach(), _channels(consumer)
    parts = []
    for rows in weight.split(ROWS):
        w_ouc = rows.double().view(len(rows), -1, channels)
        parts.append(
            w_ouc.square().sum(0)[..., None] if channels == 1 else torch.einsum("ouc,oud->ucd", w_ouc, w_ouc)
        )
    return torch.stack(parts).sum(0)
