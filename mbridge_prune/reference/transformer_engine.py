"""Transformer Engine's modules in plain PyTorch, under its own names.

Megatron's classes (`TELayerNormColumnParallelLinear`, `TEDotProductAttention`, ...) derive from
these where Transformer Engine is not installed: same class and parameter names, same return values,
one tensor-parallel rank, no FP8.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

VERSION = "2.6.0"
"""Old enough that Megatron does not ask for fused routers, new enough for all else."""


def _device(device: Any) -> Any:
    """Megatron passes the CUDA device's index; without CUDA that is the CPU."""
    if isinstance(device, int) or str(device).startswith("cuda"):
        return device if torch.cuda.is_available() else "cpu"
    return device


def _parameter(*shape: int, device: Any, dtype: Any) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, device=_device(device), dtype=dtype))


def _refuse_parallel(tp_size: int, sequence_parallel: bool) -> None:
    if tp_size > 1 or sequence_parallel:
        raise NotImplementedError(
            "the PyTorch reference modules run on one tensor-parallel rank; use pipeline or data "
            "parallel ranks, or install Transformer Engine"
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


class _Norm(nn.Module):
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
        _refuse_parallel(1, sequence_parallel)
        size = hidden_size if isinstance(hidden_size, int) else hidden_size[0]
        self.eps, self.zero_centered_gamma = eps, zero_centered_gamma
        self.weight = _parameter(size, device=device, dtype=params_dtype)
        self.bias = None if self.rms else _parameter(size, device=device, dtype=params_dtype)
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


class Linear(nn.Module):
    """y = x W^T + b; returns (y, b) with the bias not added where `return_bias`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        return_bias: bool = False,
        init_method: Callable | None = None,
        params_dtype: torch.dtype | None = None,
        device: Any = "cuda",
        parallel_mode: str | None = None,
        tp_size: int = 1,
        sequence_parallel: bool = False,
        **ignored: Any,
    ):
        super().__init__()
        _refuse_parallel(tp_size, sequence_parallel)
        self.in_features, self.out_features = in_features, out_features
        self.tp_size, self.tp_rank, self.parallel_mode = tp_size, 0, parallel_mode
        self.sequence_parallel, self.save_original_input = sequence_parallel, False
        self.use_bias, self.return_bias = bias, return_bias
        self.weight = _parameter(out_features, in_features, device=device, dtype=params_dtype)
        if not self.weight.is_meta:
            (init_method or _default_init)(self.weight)
        self.bias: Any = torch.empty(0)
        if bias:
            self.bias = _parameter(out_features, device=device, dtype=params_dtype)
            nn.init.zeros_(self.bias)
        if parallel_mode is not None:
            self._mark(self.weight, 0 if parallel_mode == "column" else 1)
            if bias and parallel_mode == "column":
                self._mark(self.bias, 0)

    @staticmethod
    def _mark(tensor: torch.Tensor, dim: int) -> None:
        """The attributes by which Megatron knows a tensor-parallel weight."""
        tensor.tensor_model_parallel = True
        tensor.partition_dim = dim
        tensor.partition_stride = 1

    def _linear(self, x: torch.Tensor) -> Any:
        added = self.bias if self.use_bias and not self.return_bias else None
        return F.linear(x, self.weight, added)

    def forward(self, x: torch.Tensor, is_first_microbatch: bool | None = None, **ignored: Any) -> Any:
        out = self._linear(x)
        return (out, self.bias) if self.return_bias else out

    def set_tensor_parallel_group(self, group: Any) -> None:
        self.tp_group = group


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
        self.layer_norm_weight = _parameter(in_features, device=device, dtype=params_dtype)
        nn.init.constant_(self.layer_norm_weight, 0.0 if zero_centered_gamma else 1.0)
        self.layer_norm_bias = None
        if normalization != "RMSNorm":
            self.layer_norm_bias = _parameter(in_features, device=device, dtype=params_dtype)
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


class GroupedLinear(nn.Module):
    """`num_gemms` linear layers with weights of their own over consecutive blocks of rows."""

    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        return_bias: bool = False,
        init_method: Callable | None = None,
        params_dtype: torch.dtype | None = None,
        device: Any = "cuda",
        tp_size: int = 1,
        sequence_parallel: bool = False,
        parallel_mode: str | None = None,
        **ignored: Any,
    ):
        super().__init__()
        _refuse_parallel(tp_size, sequence_parallel)
        self.num_gemms, self.in_features, self.out_features = num_gemms, in_features, out_features
        self.tp_size, self.parallel_mode, self.save_original_input = tp_size, parallel_mode, False
        self.use_bias, self.return_bias = bias, return_bias
        for i in range(num_gemms):
            weight = _parameter(out_features, in_features, device=device, dtype=params_dtype)
            if not weight.is_meta:
                (init_method or _default_init)(weight)
            setattr(self, f"weight{i}", weight)
            if bias:
                setattr(self, f"bias{i}", _parameter(out_features, device=device, dtype=params_dtype))
                nn.init.zeros_(getattr(self, f"bias{i}"))

    def forward(self, x: torch.Tensor, m_splits: list[int], **ignored: Any) -> Any:
        biases = [getattr(self, f"bias{i}") if self.use_bias else None for i in range(self.num_gemms)]
        parts = [
            F.linear(part, getattr(self, f"weight{i}"), None if self.return_bias else biases[i])
            for i, part in enumerate(x.split(m_splits))
        ]
        out = torch.cat(parts)
        return (out, biases) if self.return_bias else out


class DotProductAttention(nn.Module):
    """Softmax attention over [s, b, heads, head_dim]; causal, sliding window, GQA, explicit masks."""

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int | tuple[int, int],
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        softmax_scale: float | None = None,
        attn_mask_type: str = "causal",
        window_size: tuple[int, int] | None = None,
        softmax_type: str = "vanilla",
        tp_size: int = 1,
        sequence_parallel: bool = False,
        **ignored: Any,
    ):
        super().__init__()
        _refuse_parallel(tp_size, sequence_parallel)
        if softmax_type != "vanilla":
            raise NotImplementedError(f"softmax_type {softmax_type!r}: the reference has plain softmax")
        self.num_attention_heads = num_attention_heads
        self.num_gqa_groups = num_gqa_groups or num_attention_heads
        self.num_gqa_groups_per_partition = self.num_gqa_groups
        self.hidden_size_per_attention_head = kv_channels
        self.attention_dropout, self.softmax_scale = attention_dropout, softmax_scale
        self.attn_mask_type, self.window_size = attn_mask_type, window_size

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: str | None = None,
        core_attention_bias_type: str = "no_bias",
        core_attention_bias: torch.Tensor | None = None,
        qkv_format: str = "sbhd",
        **ignored: Any,
    ) -> torch.Tensor:
        if qkv_format != "sbhd":
            raise NotImplementedError(f"qkv_format {qkv_format!r}: the reference takes sbhd only")
        mask_type = attn_mask_type or self.attn_mask_type
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        if mask_type == "padding_causal" and attention_mask is not None:
            raise NotImplementedError(
                "padding_causal with a mask: the reference takes packed or full sequences"
            )
        causal = mask_type in ("causal", "padding_causal", "causal_bottom_right")
        window = self.window_size if self.window_size not in (None, (-1, -1), (-1, 0)) else None
        mask = None
        if window or core_attention_bias is not None or (attention_mask is not None and not causal):
            mask = _mask(q, k, causal, window, None if causal else attention_mask, core_attention_bias)
        out = F.scaled_dot_product_attention(
            q, k, v,
            attn_mask=mask,
            is_causal=causal and mask is None and q.shape[2] > 1,
            dropout_p=self.attention_dropout if self.training else 0.0,
            scale=self.softmax_scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
        return out.permute(2, 0, 1, 3).reshape(*query.shape[:2], -1)


def _mask(q, k, causal, window, blocked, bias) -> torch.Tensor:
    """Additive mask [.., sq, sk]; `blocked` is True where attention is not allowed."""
    places_q = torch.arange(q.shape[2], device=q.device)[:, None] + k.shape[2] - q.shape[2]
    places_k = torch.arange(k.shape[2], device=q.device)[None]
    allowed = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    if causal:
        allowed &= places_k <= places_q
    if window:
        left, right = window
        if left >= 0:
            allowed &= places_k >= places_q - left
        if right >= 0:
            allowed &= places_k <= places_q + right
    if blocked is not None:
        allowed = allowed & ~blocked
    mask = torch.zeros_like(allowed, dtype=q.dtype).masked_fill(~allowed, float("-inf"))
    return mask if bias is None else mask + bias


def _default_init(weight: torch.Tensor) -> None:
    nn.init.normal_(weight, std=0.023)


class _Unavailable:
    """A name Megatron imports and never uses on these paths; using it says what is missing."""

    def __init__(self, *args: Any, **kwargs: Any):
        raise NotImplementedError(f"{type(self).__name__} needs Transformer Engine")


class FP8GlobalStateManager:
    """FP8 is always off."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        return False

    @staticmethod
    def is_fp8_calibration() -> bool:
        return False

    @staticmethod
    def reset() -> None:
        return None


@contextlib.contextmanager
def fp8_autocast(enabled: bool = False, **ignored: Any):
    """FP8 cannot be switched on here."""
    if enabled:
        raise NotImplementedError("FP8 needs Transformer Engine on a CUDA device")
    yield


def checkpoint(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """Activation recomputation by torch.utils.checkpoint."""
    for name in ("distribute_saved_activations", "get_rng_state_tracker", "tp_group"):
        kwargs.pop(name, None)
    return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False, **kwargs)


def register() -> None:
    """Puts these modules into sys.modules under Transformer Engine's names."""
    unavailable = {
        name: type(name, (_Unavailable,), {})
        for name in ("TransformerLayer", "MultiheadAttention", "LayerNormMLP", "UserBufferQuantizationMode")
    }
    pytorch = {
        "Linear": Linear, "LayerNormLinear": LayerNormLinear, "LayerNorm": LayerNorm,
        "RMSNorm": RMSNorm, "GroupedLinear": GroupedLinear,
        "DotProductAttention": DotProductAttention, "fp8_autocast": fp8_autocast,
        "fp8_model_init": fp8_autocast, "checkpoint": checkpoint, **unavailable,
    }  # fmt: skip
    ops = {
        name: type(name, (_Unavailable,), {})
        for name in ("Sequential", "FusibleOperation", "SwiGLU", "GEGLU", "ReGLU", "GELU", "ReLU",
                     "SiLU", "LayerNorm", "RMSNorm", "BasicLinear", "Bias", "Linear")
    }  # fmt: skip
    recipes = {
        name: type(name, (_Unavailable,), {})
        for name in ("Recipe", "DelayedScaling", "Float8CurrentScaling", "MXFP8BlockScaling",
                     "Float8BlockScaling", "NVFP4BlockScaling", "Format", "CustomRecipe")
    }  # fmt: skip
    fp8 = {"FP8GlobalStateManager": FP8GlobalStateManager, "fp8_autocast": fp8_autocast,
           "fp8_model_init": fp8_autocast}  # fmt: skip
    graph = {n: (lambda *a, **k: None) for n in ("restore_fp8_tensors", "save_fp8_tensors",
             "set_capture_start", "set_capture_end")}  # fmt: skip
    tree: dict[str, dict[str, Any]] = {
        "": {"__version__": VERSION},
        "common": {},
        "common.recipe": recipes,
        "pytorch": pytorch,
        "pytorch.ops": ops,
        "pytorch.fp8": fp8,
        "pytorch.graph": graph,
        "pytorch.distributed": {
            "checkpoint": checkpoint,
            "activation_recompute_forward": lambda *args, **kwargs: contextlib.nullcontext(),
            "is_fp8_activation_recompute_enabled": lambda: False,
            "CudaRNGStatesTracker": unavailable["TransformerLayer"],
        },
        "pytorch.tensor": {"QuantizedTensor": type("QuantizedTensor", (), {})},
        "pytorch.module": {},
        "pytorch.module.base": {"TransformerEngineBaseModule": type("TransformerEngineBaseModule", (), {})},
        "pytorch.utils": {"make_weak_ref": lambda x: x},
        "pytorch.float8_tensor": {"Float8Tensor": type("Float8Tensor", (), {})},
    }
    for path, names in tree.items():
        full = "transformer_engine" + (f".{path}" if path else "")
        module = types.ModuleType(full, __doc__)
        module.__spec__ = ModuleSpec(full, None, is_package=True)
        module.__path__ = []
        module.__dict__.update(names)
        sys.modules[full] = module
        parent, _, name = full.rpartition(".")
        if parent:
            setattr(sys.modules[parent], name, module)
