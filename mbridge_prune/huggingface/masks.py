"""A mask of value 1 on every unit: it changes no output, and its gradient says what the unit is worth."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch

from mbridge_prune.dynamic import Probe, SliceTable


class Masks:
    """While the context is open, the input of every probed layer is multiplied by masks of value 1.

    Attributes:
        masks: axis key -> [units], in the dtype and on the device of the layer that reads the units.
    """

    def __init__(self, table: SliceTable):
        self.table = table
        self.masks: dict[str, torch.Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Masks:
        for probe in self.table.probes:
            weight = probe.module.weight
            for reading in probe.readings:
                ones = torch.ones(reading.axis.size, dtype=weight.dtype, device=weight.device)
                self.masks[reading.axis.key] = ones.requires_grad_()
            self._handles.append(probe.module.register_forward_pre_hook(self._masking(probe)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _masking(self, probe: Probe):
        def mask(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x = args[0]
            for reading in probe.readings:
                x = x * self.masks[reading.axis.key].to(x.dtype).repeat_interleave(reading.channels)
            return (x, *args[1:])

        return mask
