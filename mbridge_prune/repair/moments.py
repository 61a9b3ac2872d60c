"""Second moments of what weights read, and the energy of what norms normalise, over calibration text.

Sums are fp64, where `Room` says; products of one microbatch are fp32. Every tenth sample is kept for judging.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import nn

from mbridge_prune import runtime
from mbridge_prune.dynamic import Consumer, Gain
from mbridge_prune.dynamic.layout import Kept
from mbridge_prune.importance.watch import watch
from mbridge_prune.repair.room import Room
from mbridge_prune.repair.routing import Routing, judging

Shares = dict[bool, torch.Tensor]
"""Rows for fitting (False) and for judging (True): [tokens, channels]; a share without rows is left out."""


class Moments:
    """Context manager: inside it, every forward of the model adds to the sums.

    Microbatches are numbered as `forward_only` deals them out to data-parallel ranks, so that the same
    samples are kept for judging under any layout.

    Args:
        consumers: whose inputs are summed.
        counted: routed experts' weights besides, of which the tokens alone are counted.
        kept: what stays, for inputs that a norm scales anew.
        room: where the sums are kept.
        routers: of all routed experts of this stage, if any rank has weights of some here.

    Attributes:
        fit, judge: consumer label -> [n, n] fp64, sum of x x^T over the tokens of either share; behind
            a norm [n + k, n + k], see `_renormed`.
        tokens: consumer label -> tokens in `fit`.
        energy: gain label -> [n] fp64, sum over tokens of x^2 over its mean over the token's channels.
    """

    def __init__(
        self,
        consumers: Sequence[Consumer],
        gains: Sequence[Gain],
        kept: Kept,
        room: Room,
        counted: Sequence[Consumer] = (),
        routers: Sequence[nn.Module] = (),
    ):
        self.consumers, self.gains, self.kept, self.room = consumers, gains, kept, room
        self.counted, self.routers = counted, routers
        self.fit: dict[str, torch.Tensor] = {}
        self.judge: dict[str, torch.Tensor] = {}
        self.tokens: dict[str, int] = {}
        self.energy: dict[str, torch.Tensor] = {}
        self._calls: dict[str, int] = {}
        self._seen = False
        self._watches = ExitStack()

    def __enter__(self) -> Moments:
        routed = [consumer for consumer in (*self.consumers, *self.counted) if consumer.router is not None]
        routing = self._watches.enter_context(Routing(self.routers, routed, self.tokens))
        for consumer in self.consumers:
            see = self._adder(consumer, self._shares(consumer, routing))
            self._watches.enter_context(watch(consumer.seen, consumer.tensor, see))
        for gain in self.gains:
            self._watches.enter_context(watch(gain.module, "input", self._energy_adder(gain)))
        return self

    def __exit__(self, *exc: object) -> None:
        self._watches.close()

    def _adder(
        self, consumer: Consumer, shares: Callable[[torch.Tensor, tuple], Shares]
    ) -> Callable[[torch.Tensor, tuple], None]:
        label = consumer.label

        @torch.no_grad()
        def add(x: torch.Tensor, args: tuple) -> None:
            self._seen = True
            for judge, x_tc in shares(x, args).items():
                sums, wide_tc = self.judge if judge else self.fit, x_tc.float()
                product = self.room.kept(wide_tc.t() @ wide_tc)
                sums[label] = sums[label].add_(product) if label in sums else product.double()

        return add

    def _shares(self, consumer: Consumer, routing: Routing) -> Callable[[torch.Tensor, tuple], Shares]:
        """How the rows of a call are told apart: by the sample that they are of."""
        if consumer.router is not None:
            return lambda x, args: routing.shares(consumer, consumer.reads(x, args))
        renormed = self._renormed(consumer) if consumer.renorm is not None else None

        def of_samples(x_sbc: torch.Tensor, args: tuple) -> Shares:
            x_sbc = x_sbc if renormed is None else renormed(x_sbc)
            batch = x_sbc.shape[1]
            call = self._calls[consumer.label] = self._calls.get(consumer.label, -1) + 1
            judges = judging(call, batch)
            before = self.tokens.get(consumer.label, 0)
            self.tokens[consumer.label] = before + len(x_sbc) * (batch - sum(judges))
            found: Shares = {}
            for share in sorted(set(judges)):
                columns = [i for i, judge in enumerate(judges) if judge == share]
                part_sbc = x_sbc if len(columns) == batch else x_sbc[:, columns]
                found[share] = part_sbc.reshape(-1, x_sbc.shape[-1])
            return found

        return of_samples

    def _renormed(self, consumer: Consumer) -> Callable[[torch.Tensor], torch.Tensor]:
        """[s, b, n] of what a weight reads behind a norm -> [s, b, n + k] that its fit is a plain one of.

        With fewer channels in the norm the k that stay are scaled by another number r a token and group:
        the cut weight reads r x_S. The last k channels are those; the first n are what they lack, x less
        r x_S at their places. So W x = W (first) + W_S (last), and the last k are what is kept.
        """
        norm, in_ = consumer.renorm, consumer.tree.entries(self.kept)
        assert norm is not None
        scales: list[torch.Tensor] = []

        def see(y_sbn: torch.Tensor, args: tuple) -> None:
            y_sbn = y_sbn.float()
            if len(args) > 1:
                y_sbn = y_sbn * torch.nn.functional.silu(args[1].float())
            square_sbgc = y_sbn.square().unflatten(-1, (norm.groups, -1))
            left_sbgc = y_sbn[..., in_.to(y_sbn.device)].square().unflatten(-1, (norm.groups, -1))
            ratio_sbg = (square_sbgc.mean(-1) + norm.eps) / (left_sbgc.mean(-1) + norm.eps)
            scales[:] = [ratio_sbg.sqrt().repeat_interleave(left_sbgc.shape[-1], dim=-1)]

        self._watches.enter_context(watch(norm.module, "input", see))

        def renormed(x_sbn: torch.Tensor) -> torch.Tensor:
            columns, lacking_sbn = in_.to(x_sbn.device), x_sbn.float().clone()
            last_sbk = lacking_sbn[..., columns] * scales[0]
            lacking_sbn[..., columns] -= last_sbk
            return torch.cat([lacking_sbn, last_sbk], dim=-1)

        return renormed

    def _energy_adder(self, gain: Gain) -> Callable[[torch.Tensor, tuple], None]:
        @torch.no_grad()
        def add(x_sbc: torch.Tensor, args: tuple) -> None:
            self._seen = True
            x_tc = x_sbc.reshape(-1, x_sbc.shape[-1]).float()
            if gain.centred:
                x_tc = x_tc - x_tc.mean(-1, keepdim=True)
            square_tc = x_tc.square()
            share_tc = square_tc / square_tc.mean(-1, keepdim=True).clamp(min=1e-30)
            energy = share_tc.sum(0, dtype=torch.float64)
            known = self.energy.get(gain.label)
            self.energy[gain.label] = energy if known is None else known.add_(energy)

        return add

    @property
    def silent(self) -> bool:
        """There was something to see, and nothing came to any data-parallel rank."""
        seen = any(runtime.gather_objects(self._seen, "dp"))
        return bool(self.consumers or self.gains) and not seen

    def finish(self) -> None:
        """Adds up the sums of data-parallel ranks (an expert's: of those that hold it), alike on each."""
        for consumer in self.consumers:
            label, n = consumer.label, width(consumer, self.kept)
            for sums in (self.fit, self.judge):
                _add_up(sums, label, n, n, kind=_replicas(consumer), room=self.room)
        for consumer in (*self.consumers, *self.counted):
            counts = runtime.gather_objects(self.tokens.get(consumer.label, 0), _replicas(consumer))
            self.tokens[consumer.label] = sum(counts)
        for gain in self.gains:
            _add_up(self.energy, gain.label, gain.tree.full(), kind="dp", room=Room())


def _add_up(sums: dict[str, torch.Tensor], label: str, *shape: int, kind: str, room: Room) -> None:
    if runtime.size(kind) > 1 and any(runtime.gather_objects(label in sums, kind)):
        none = torch.zeros(shape, dtype=torch.float64, device=room.device)
        sums[label] = room.reduced(sums.get(label, none), kind)


def _replicas(consumer: Consumer) -> str:
    """The ranks that hold the same weight and read other tokens."""
    return "dp" if consumer.unit is None else "edp"


def width(consumer: Consumer, kept: Kept) -> int:
    """Channels of a consumer's sums."""
    behind = len(consumer.tree.entries(kept)) if consumer.renorm is not None else 0
    return consumer.tree.full() + behind


def bytes_of(consumer: Consumer, kept: Kept) -> int:
    """Memory of a consumer's sums: two fp64 matrices."""
    return 2 * 8 * width(consumer, kept) ** 2
