"""Linear layers, whole or shared out over tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from mbridge_prune.reference.transformer_engine.base import TensorParallel, initialise, parameter
from mbridge_prune.reference.transformer_engine.norm import normalise


def _summed(x: torch.Tensor, group: Any) -> torch.Tensor:
    """A new tensor: the sum of `x` over the ranks of the group."""
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


class _SumGradient(torch.autograd.Function):
    """Identity; each rank's gradient covers its own outputs only, so gradients are summed over ranks."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _summed(grad, ctx.group), None


class _Sum(torch.autograd.Function):
    """Sum over the ranks; each rank already has the gradient of the whole sum."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


def _mark(tensor: Any, dim: int) -> None:
    """The attributes by which Megatron knows a tensor-parallel weight."""
    tensor.tensor_model_parallel = True
    tensor.partition_dim = dim
    tensor.partition_stride = 1


class _Cut(TensorParallel):
    """Makes this rank's weights and biases; `parallel_mode` "column" cuts their rows, "row" their columns.

    `in_features` and `out_features` of the constructor are those of the whole layer, the attributes
    those of this rank's weights.
    """

    def __init__(
        self,
        names: Sequence[tuple[str, str]],
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        return_bias: bool = False,
        init_method: Callable | None = None,
        params_dtype: torch.dtype | None = None,
        device: Any = "cuda",
        parallel_mode: str | None = None,
        tp_group: Any = None,
        tp_size: int = 1,
        sequence_parallel: bool = False,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        rng_tracker_name: str | None = None,
        **ignored: Any,
    ):
        super().__init__(tp_group, tp_size, sequence_parallel)
        if parallel_mode not in (None, "column", "row"):
            raise ValueError(f"parallel_mode is {parallel_mode!r}; expected None, 'column' or 'row'")
        self.parallel_mode, self.save_original_input = parallel_mode, False
        self.use_bias, self.return_bias = bias, return_bias
        self.in_features, self.out_features = in_features, out_features
        if parallel_mode == "column":
            self.out_features = self._share(out_features, "out_features")
        elif parallel_mode == "row":
            self.in_features = self._share(in_features, "in_features")
        for weight_name, bias_name in names:
            weight = parameter(self.out_features, self.in_features, device=device, dtype=params_dtype)
            initialise(weight, init_method, get_rng_state_tracker, rng_tracker_name)
            # A weight that is not cut gets a column's marks, as from Transformer Engine.
            _mark(weight, 1 if parallel_mode == "row" else 0)
            setattr(self, weight_name, weight)
            setattr(self, bias_name, self._bias(device, params_dtype) if bias else torch.empty(0))

    def _bias(self, device: Any, dtype: torch.dtype | None) -> nn.Parameter:
        bias = parameter(self.out_features, device=device, dtype=dtype)
        nn.init.zeros_(bias)
        if self.parallel_mode == "column":
            _mark(bias, 0)
        return bias


class Linear(_Cut):
    """y = x W^T + b; returns (y, b) with the bias not added where `return_bias`.

    "column": x is whole, y holds this rank's features. "row": x holds this rank's features, y is whole
    and the same on every rank.
    """

    weight: nn.Parameter
    bias: Any

    def __init__(self, in_features: int, out_features: int, **options: Any):
        super().__init__([("weight", "bias")], in_features, out_features, **options)

    def _group(self) -> Any:
        """The group to reduce over; None where this layer is whole."""
        if self.tp_size == 1 or self.parallel_mode is None:
            return None
        if self.tp_group is None:
            raise RuntimeError(
                f"this layer is shared out over {self.tp_size} tensor-parallel ranks and has no process "
                "group: call set_tensor_parallel_group() before the first forward pass"
            )
        return self.tp_group

    def _linear(self, x: torch.Tensor) -> torch.Tensor:
        added = self.bias if self.use_bias and not self.return_bias else None
        group = self._group()
        if group is None:
            return F.linear(x, self.weight, added)
        if self.parallel_mode == "column":
            return F.linear(_SumGradient.apply(x, group), self.weight, added)
        total = _Sum.apply(F.linear(x, self.weight), group)
        return total if added is None else total + added

    def forward(self, x: torch.Tensor, is_first_microbatch: bool | None = None, **ignored: Any) -> Any:
        out = self._linear(x)
        return (out, self.bias) if self.return_bias else out


class LayerNormLinear(Linear):
    """A norm, then a linear layer; with `return_layernorm_output` the normalised input comes last."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        eps: float = 1e-5,
        normalization: str = "LayerNorm",
        zero_centered_gamma: bool = False,
        return_layernorm_output: bool = False,
        params_dtype: torch.dtype | None = None,
        device: Any = "cuda",
        **options: Any,
    ):
        super().__init__(in_features, out_features, params_dtype=params_dtype, device=device, **options)
        self.eps, self.normalization = eps, normalization
        self.zero_centered_gamma = zero_centered_gamma
        self.return_layernorm_output = return_layernorm_output
        self.layer_norm_weight = parameter(in_features, device=device, dtype=params_dtype)
        nn.init.constant_(self.layer_norm_weight, 0.0 if zero_centered_gamma else 1.0)
        self.layer_norm_bias = None
        if normalization != "RMSNorm":
            self.layer_norm_bias = parameter(in_features, device=device, dtype=params_dtype)
            nn.init.zeros_(self.layer_norm_bias)

    def forward(self, x: torch.Tensor, is_first_microbatch: bool | None = None, **ignored: Any) -> Any:
        normed = normalise(
            x, self.layer_norm_weight, self.layer_norm_bias, self.eps,
            self.normalization == "RMSNorm", self.zero_centered_gamma,
        )  # fmt: skip
        out = self._linear(normed)
        result = (out, self.bias) if self.return_bias else (out,)
        if self.return_layernorm_output:
            result = (*result, normed)
        return result if len(result) > 1 else out


class GroupedLinear(_Cut):
    """`num_gemms` linear layers with weights of their own over consecutive blocks of rows.

    Cuts its weights like `Linear` and leaves the reductions to whoever brings the rows.
    """

    def __init__(self, num_gemms: int, in_features: int, out_features: int, **options: Any):
        self.num_gemms = num_gemms
        names = [(f"weight{i}", f"bias{i}") for i in range(num_gemms)]
        super().__init__(names, in_features, out_features, **options)
        if self.tp_size > 1 and self.use_bias:
            raise ValueError(
                "grouped experts have no bias over several tensor-parallel ranks; set bias=False"
            )

    def forward(self, x: torch.Tensor, m_splits: list[int], **ignored: Any) -> Any:
        biases = [getattr(self, f"bias{i}") for i in range(self.num_gemms)]
        added = self.use_bias and not self.return_bias
        parts = [
            F.linear(part, getattr(self, f"weight{i}"), biases[i] if added else None)
            for i, part in enumerate(x.split(m_splits))
        ]
        out = torch.cat(parts)
        return (out, biases) if self.return_bias else out
