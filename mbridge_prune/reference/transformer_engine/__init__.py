"""Transformer Engine's modules in plain PyTorch, under its own names.

Megatron's classes (`TELayerNormColumnParallelLinear`, `TEDotProductAttention`, ...) derive from
these where Transformer Engine is not installed: same class, parameter and checkpoint key names, same
return values, tensor parallel, without sequence parallelism and FP8.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from typing import Any

import torch

from mbridge_prune.reference.transformer_engine.attention import DotProductAttention
from mbridge_prune.reference.transformer_engine.linear import GroupedLinear, LayerNormLinear, Linear
from mbridge_prune.reference.transformer_engine.norm import LayerNorm, RMSNorm

VERSION = "2.8.0"
"""The first whose attention has a learnable softmax offset (GPT-OSS's sinks)."""


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
    routers = {
        name: type(name, (_Unavailable,), {})
        for name in ("fused_compute_score_for_moe_aux_loss", "fused_moe_aux_loss",
                     "fused_topk_with_score_function")
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
        "pytorch.router": routers,
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
