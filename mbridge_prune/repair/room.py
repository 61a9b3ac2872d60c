"""Where the sums of a repair are kept, and how many of them at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from mbridge_prune import runtime

Item = TypeVar("Item")


@dataclass(frozen=True)
class Room:
    """Memory for fp64 sums.

    Args:
        gb: of the sums of one pass; more passes of the text are made where they do not fit.
        offload: they are kept in host memory. On the device there is then one product of a microbatch at a
            time, in fp32, and the sums of one weight while it is fitted.
    """

    gb: float = 8.0
    offload: bool = False

    @property
    def device(self) -> torch.device:
        """Where sums are kept."""
        return torch.device("cpu") if self.offload else runtime.device()

    def fitting(self, items: Sequence[Item], bytes_for: Callable[[Item], int]) -> Iterator[list[Item]]:
        """Items whose sums fit together, in order; one that is larger than the bound goes alone."""
        group: list[Item] = []
        used = 0
        for item in items:
            needs = bytes_for(item)
            if group and used + needs > self.gb * 2**30:
                yield group
                group, used = [], 0
            group.append(item)
            used += needs
        if group:
            yield group

    def kept(self, product: torch.Tensor) -> torch.Tensor:
        """A microbatch's product where sums are kept; as it is until it is added: no further copy in fp64."""
        return product.to(self.device)

    def reduced(self, total: torch.Tensor, kind: str) -> torch.Tensor:
        """The sum over the ranks of a group, where sums are kept."""
        on_device = total.to(runtime.device())
        dist.all_reduce(on_device, group=runtime.group(kind))
        return on_device.to(self.device)
