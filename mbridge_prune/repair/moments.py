"""Second moments of what weights read, and the energy of what norms normalise, over calibration text.

Sums are fp64 on the device, products of one microbatch fp32. Every tenth sample is kept for judging.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import TypeVar

import torch
import torch.distributed as dist

from mbridge_prune import runtime
from mbridge_prune.dynamic import Consumer, Gain
from mbridge_prune.importance.watch import watch

Item = TypeVar("Item")
JUDGES = 10
"""One sample in so many is kept for judging."""


class Moments:
    """Context manager: inside it, every forward of the model adds to the sums.

    Microbatches are numbered as `forward_only` deals them out to data-parallel ranks, so that the same
    samples are kept for judging under any layout.

    Attributes:
        fit, judge: consumer label -> [n, n] fp64, sum of x x^T over the tokens of either share.
        tokens: consumer label -> tokens in `fit`.
        energy: gain label -> [n] fp64, sum over tokens of x^2 over its mean over the token's channels.
    """

    def __init__(self, consumers: Sequence[Consumer], gains: Sequence[Gain]):
        self.consumers, self.gains = consumers, gains
        self.fit: dict[str, torch.Tensor] = {}
        self.judge: dict[str, torch.Tensor] = {}
        self.tokens: dict[str, int] = {}
        self.energy: dict[str, torch.Tensor] = {}
        self._calls: dict[str, int] = {}
        self._watches = ExitStack()

    def __enter__(self) -> Moments:
        for consumer in self.consumers:
            self._watches.enter_context(watch(consumer.seen, consumer.tensor, self._adder(consumer)))
        for gain in self.gains:
            self._watches.enter_context(watch(gain.module, "input", self._energy_adder(gain)))
        return self

    def __exit__(self, *exc: object) -> None:
        self._watches.close()

    def _adder(self, consumer: Consumer) -> Callable[[torch.Tensor, tuple], None]:
        label = consumer.label

        @torch.no_grad()
        def add(x_sbc: torch.Tensor, args: tuple) -> None:
            batch = x_sbc.shape[1]
            call = self._calls[label] = self._calls.get(label, -1) + 1
            judges = judging(call, batch)
            self.tokens[label] = self.tokens.get(label, 0) + len(x_sbc) * (batch - sum(judges))
            for sums, share in ((self.fit, False), (self.judge, True)):
                columns = [i for i, judge in enumerate(judges) if judge == share]
                if columns:
                    part_sbc = x_sbc if len(columns) == batch else x_sbc[:, columns]
                    x_tc = part_sbc.reshape(-1, x_sbc.shape[-1]).float()
                    product = (x_tc.t() @ x_tc).double()
                    sums[label] = product if label not in sums else sums[label].add_(product)

        return add

    def _energy_adder(self, gain: Gain) -> Callable[[torch.Tensor, tuple], None]:
        @torch.no_grad()
        def add(x_sbc: torch.Tensor, args: tuple) -> None:
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
        """There was something to see, and nothing came."""
        return bool(self.consumers or self.gains) and not (self.tokens or self.energy)

    def finish(self) -> None:
        """Adds up the sums of data-parallel ranks, in the same order on each."""
        if runtime.size("dp") == 1:
            return
        group = runtime.group("dp")
        for consumer in self.consumers:
            label, n = consumer.label, consumer.tree.full()
            for sums in (self.fit, self.judge):
                if any(runtime.gather_objects(label in sums, "dp")):
                    empty = torch.zeros(n, n, dtype=torch.float64, device=runtime.device())
                    dist.all_reduce(sums.setdefault(label, empty), group=group)
            self.tokens[label] = sum(runtime.gather_objects(self.tokens.get(label, 0), "dp"))
        for gain in self.gains:
            if any(runtime.gather_objects(gain.label in self.energy, "dp")):
                none = torch.zeros(gain.tree.full(), dtype=torch.float64, device=runtime.device())
                dist.all_reduce(self.energy.setdefault(gain.label, none), group=group)


def judging(call: int, batch: int) -> list[bool]:
    """Which samples of this rank's microbatch number `call` are kept for judging."""
    first = (call * runtime.size("dp") + runtime.place("dp")) * batch
    return [(first + i) % JUDGES == JUDGES - 1 for i in range(batch)]


def bytes_of(consumer: Consumer) -> int:
    """Memory of a consumer's sums: two fp64 matrices."""
    return 2 * 8 * consumer.tree.full() ** 2


def fitting_together(
    items: Sequence[Item], bytes_for: Callable[[Item], int], memory_gb: float
) -> Iterator[list[Item]]:
    """Items whose sums fit together, in order; one that is larger than the bound goes alone."""
    group: list[Item] = []
    used = 0
    for item in items:
        needs = bytes_for(item)
        if group and used + needs > memory_gb * 2**30:
            yield group
            group, used = [], 0
        group.append(item)
        used += needs
    if group:
        yield group
