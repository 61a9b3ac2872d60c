"""Which sample the rows are of that a routed expert reads, so that the same are kept for judging.

An expert reads its tokens in their order, those of the first expert-parallel rank first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from mbridge_prune import runtime
from mbridge_prune.dynamic import Consumer
from mbridge_prune.errors import UserError

JUDGES = 10
"""One sample in so many is kept for judging."""


def judging(call: int, batch: int) -> list[bool]:
    """Which samples of this rank's microbatch number `call` are kept for judging."""
    first = (call * runtime.size("dp") + runtime.place("dp")) * batch
    return judges_of(first, batch).tolist()


def judges_of(first: int, count: int) -> torch.Tensor:
    """[count] bool: which samples from number `first` on are kept for judging."""
    return torch.arange(first, first + count) % JUDGES == JUDGES - 1


class Routing:
    """Context manager: inside it, every call of a router tells the rows of its experts apart.

    Args:
        routers: expert-parallel ranks meet at each call, whether they have weights behind it or not.
        consumers: weights of routed experts.
        tokens: consumer label -> tokens for fitting so far; counted on.
    """

    def __init__(self, routers: Sequence[nn.Module], consumers: Sequence[Consumer], tokens: dict[str, int]):
        self.tokens = tokens
        self._routers = {id(router): router for router in routers}
        self._of = {key: [c for c in consumers if id(c.router) == key] for key in self._routers}
        self._calls = dict.fromkeys(self._routers, -1)
        self._kinds: dict[tuple[int, int], torch.Tensor] = {}
        self._watches = ExitStack()

    def __enter__(self) -> Routing:
        for key, router in self._routers.items():
            self._watches.callback(router.register_forward_hook(self._seer(key)).remove)
        return self

    def __exit__(self, *exc: object) -> None:
        self._watches.close()
        self._kinds.clear()

    def _seer(self, key: int) -> Callable[[nn.Module, tuple, Any], None]:
        numbers = sorted({c.unit.number for c in self._of[key] if c.unit is not None})

        def see(router: nn.Module, args: tuple, out: Any) -> None:
            self._calls[key] += 1
            length, batch = args[0].shape[:2]
            judges = torch.tensor(judging(self._calls[key], batch), dtype=torch.bool).repeat(length)
            mine = out[1].cpu(), judges
            sent_te, judges_t = (
                torch.cat(part) for part in zip(*runtime.gather_objects(mine, "ep"), strict=True)
            )
            for number in numbers:
                self._kinds[key, number] = judges_t[sent_te[:, number]]
            for consumer in self._of[key]:
                assert consumer.unit is not None
                fitted = int((~self._kinds[key, consumer.unit.number]).sum())
                self.tokens[consumer.label] = self.tokens.get(consumer.label, 0) + fitted

        return see

    def shares(self, consumer: Consumer, x_tc: torch.Tensor) -> dict[bool, torch.Tensor]:
        """The rows of one call of an expert, for fitting (False) and for judging (True)."""
        assert consumer.unit is not None
        x_tc = x_tc.reshape(-1, x_tc.shape[-1])
        judges_t = self._kinds[id(consumer.router), consumer.unit.number]
        if len(judges_t) != len(x_tc):
            raise UserError(
                f"{consumer.label} reads {len(x_tc)} rows, its router sends it {len(judges_t)} tokens: "
                "experts whose tokens are padded or dropped cannot be fitted; use repair='norm'"
            )
        found = {}
        for judge in (False, True):
            rows = (judges_t == judge).nonzero().flatten()
            if len(rows):
                found[judge] = x_tc[rows.to(x_tc.device)]
        return found
