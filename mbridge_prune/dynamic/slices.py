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
class Slice:
    """Dimension `dim` of `module.<name>` follows `layout` (an axis stands for its plain layout)."""

    module: nn.Module
    name: str
    dim: int
    layout: Layout | Axis

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
class Probe:
    """Where units of `axis` are observed during calibration.

    Args:
        axis: whose units are measured.
        module: the module whose call is watched.
        tensor: "input", "output", or "norm_output" (the normalised input of a fused norm+linear).
        channels: consecutive channels of the tensor that make up one unit (`head_dim` of a head).
        name: stable name in the whole model, for reports and for a fixed summation order.
    """

    axis: Axis
    module: nn.Module
    tensor: str
    name: str
    channels: int = 1
