"""LayerNorm and RMSNorm, also as the first half of `LayerNormLinear`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mbridge_prune.reference.transformer_engine.base import (
    QuantisationFree,
    parameter,
    refuse_sequence_parallel,
)


def normalise(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    rms: bool,
    zero_centered: bool,
) -> torch.Tensor:
    """RMSNorm or LayerNorm over the last dimension, in fp32, returned in x's dtype."""
    gain = weight + 1 if zero_centered else weight
    if not rms:
        offset = None if bias is None else bias.float()
        return F.layer_norm(x.float(), x.shape[-1:], gain.float(), offset, eps).to(x.dtype)
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return gain * normed.to(x.dtype)


class _Norm(QuantisationFree):
    rms = False

    def __init__(
        self,
        hidden_size: int | Sequence[int],
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        zero_centered_gamma: bool = False,
        params_dtype: torch.dtype | None = None,
        device: Any = "cuda",
        **ignored: Any,
    ):
        super().__init__()
        refuse_sequence_parallel(sequence_parallel)
        size = hidden_size if isinstance(hidden_size, int) else hidden_size[0]
        self.eps, self.zero_centered_gamma = eps, zero_centered_gamma
        self.weight = parameter(size, device=device, dtype=params_dtype)
        self.bias = None if self.rms else parameter(size, device=device, dtype=params_dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 0.0 if self.zero_centered_gamma else 1.0)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return normalise(x, self.weight, self.bias, self.eps, self.rms, self.zero_centered_gamma)


class LayerNorm(_Norm):
    """LayerNorm with gain and bias."""


class RMSNorm(_Norm):
    """RMSNorm with gain."""

    rms = True
