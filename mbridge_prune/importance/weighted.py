"""The `weighted` ranking: what a unit adds to what the weights that read it write.

A channel j of the input x of a weight W: E[x_j^2] ||W_:j||^2. A unit of several channels h (a head):
tr(W_h C_hh W_h^T), with C = E[x x^T]; a query group: the sum over its heads. An axis that several weights
read (hidden_size) sums each weight's shares, which add up to 1. This is the squared error of the weight's
output if the unit alone were removed, where units are uncorrelated.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack

import torch

from mbridge_prune import runtime
from mbridge_prune.dynamic import Axis, Consumer, Repeat, SliceTable, Units
from mbridge_prune.errors import UserError
from mbridge_prune.importance.scores import natural
from mbridge_prune.importance.watch import watch

ROWS = 8192
"""Rows of a weight that stand in fp64 at a time."""


class WeightedRanking:
    """Context manager: inside it, every forward of the model adds to the second moments of units.

    Attributes:
        axes: keys of this rank's axes that it ranks: those whose every reader is a declared consumer.
            Experts, their channels and Mamba's heads are not among them, nor is the hidden size of a
            model with routed experts.
        sums: consumer label -> [units, channels, channels] fp64, sum of x_h x_h^T over tokens.
    """

    def __init__(self, table: SliceTable):
        experts = any(runtime.gather_objects(any(e.unit is not None for e in table.entries), "pp"))
        self.consumers = [
            consumer
            for _, consumer in table.consumers
            if _readings(consumer) and not (experts and "hidden_size" in _hparams(consumer))
        ]
        self.axes = {axis.key for consumer in self.consumers for axis, _ in _readings(consumer)}
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
        shares: dict[str, list[tuple[str, torch.Tensor]]] = defaultdict(list)
        parts = runtime.gather_objects({label: total.cpu() for label, total in self.sums.items()}, "dp")
        for consumer in self.consumers:
            seen = [part[consumer.label] for part in parts if consumer.label in part]
            if not seen:
                continue
            moment_ucc = torch.stack(seen).sum(0)
            energy_u = (moment_ucc * _gram(consumer).cpu()).sum((1, 2))
            energy_u = energy_u / energy_u.sum().clamp(min=1e-300)
            for axis, width in _readings(consumer):
                shares[axis.key].append((consumer.label, energy_u.view(-1, width).sum(1)))
        whole: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
        for part in runtime.gather_objects(dict(shares), "pp"):
            for key, found in part.items():
                whole[key].update(found)
        ordered = {key: sorted(found, key=natural) for key, found in whole.items()}
        units = {key: torch.stack([whole[key][n] for n in names]).sum(0) for key, names in ordered.items()}
        if not units:
            raise UserError("the forward loop did not run the model: no activation was seen")
        return {key: value.float() for key, value in units.items()}


def _readings(consumer: Consumer) -> list[tuple[Axis, int]]:
    """The axes that a consumer ranks, and how many of its units make up one of theirs."""
    tree = consumer.tree
    if isinstance(tree, Units) and tree.axis.within is None:
        return [(tree.axis, 1)]
    if isinstance(tree, Repeat) and isinstance(tree.inner, Units):
        axis = tree.inner.axis
        return [(axis, 1), *([(axis.within, axis.width)] if axis.within is not None else [])]
    return []


def _hparams(consumer: Consumer) -> set[str]:
    return {axis.hparam for axis, _ in _readings(consumer)}


def _channels(consumer: Consumer) -> int:
    return consumer.tree.n if isinstance(consumer.tree, Repeat) else 1


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
