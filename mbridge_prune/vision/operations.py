"""The operations whose effect on channels is known, by their names, and how their arguments are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

LARGEST = 1_000_000
"""Elements of a plain parameter that are followed one by one."""


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


ELEMENTWISE = _names("""
    abs absolute add addcdiv addcmul and bitwise_and bitwise_not bitwise_or celu ceil clamp clamp_max
    clamp_min clip cos div divide elu eq erf exp expm1 floor floordiv fmod ge gelu gt hardsigmoid
    hardshrink hardswish hardtanh iadd imul isnan isub itruediv le leaky_relu lerp log log1p log2
    logaddexp logical_and logical_not logical_or logit logsigmoid lt masked_fill maximum minimum mish
    mul multiply ne neg negative pow reciprocal relu relu6 remainder round rrelu rsqrt rsub selu sigmoid
    sign silu sin softplus softshrink softsign sqrt square sub subtract tan tanh tanhshrink threshold
    true_divide truediv trunc where
""")
"""Each element by itself; several tensors are broadcast to one shape."""

PASSED = _names("""
    alpha_dropout bfloat16 clone contiguous cpu cuda detach double dropout dropout1d dropout2d dropout3d
    feature_alpha_dropout feature_dropout float half identity nan_to_num requires_grad_ to type type_as
""")
"""The first tensor as it is."""

MOVED = _names("""
    cat concat concatenate flatten moveaxis movedim permute pixel_shuffle pixel_unshuffle repeat
    repeat_interleave squeeze stack swapaxes swapdims t transpose unsqueeze tile
""")
"""Elements at other places, however many there are."""

STRETCHED = _names("broadcast_to expand expand_as")
RESHAPED = STRETCHED | _names("reshape reshape_as unflatten view view_as")
"""Likewise, with lengths among the arguments."""

SPLIT = _names("""
    chunk narrow select split split_with_sizes tensor_split unbind unsafe_chunk flip roll
""")
"""Parts, or places, along one dimension."""

REDUCED = _names("amax amin argmax argmin logsumexp max mean min norm prod std sum var")
ALONG = _names("cumsum log_softmax normalize softmax softmin")
SPATIAL = r"(adaptive_)?(avg|max|lp)_pool[123]d(_with_indices)?|interpolate|upsample(_nearest|_bilinear)?"

_SINGLE = _names("""
    CELU ELU GELU Hardshrink Hardsigmoid Hardswish Hardtanh LeakyReLU LogSigmoid Mish ReLU ReLU6 RReLU SELU
    Sigmoid SiLU Softplus Softshrink Softsign Tanh Tanhshrink Threshold
""")
_DROPPED = _names("""
    AlphaDropout Dropout Dropout1d Dropout2d Dropout3d FeatureAlphaDropout Identity
""")
_POOLED = _names("Upsample UpsamplingNearest2d UpsamplingBilinear2d") | {
    f"{kind}{n}d"
    for kind in _names("""
        MaxPool AvgPool LPPool AdaptiveMaxPool AdaptiveAvgPool ZeroPad ConstantPad ReflectionPad
        ReplicationPad CircularPad
    """)
    for n in (1, 2, 3)
}
MODULES = {
    **dict.fromkeys(_SINGLE, "relu"),
    **dict.fromkeys(_DROPPED, "dropout"),
    **dict.fromkeys(_POOLED, "interpolate"),
    "Flatten": "flatten",
    "Unflatten": "unflatten",
    "PixelShuffle": "pixel_shuffle",
    "PixelUnshuffle": "pixel_unshuffle",
    "GLU": "glu",
    "Softmax": "softmax",
    "LogSoftmax": "log_softmax",
    "Softmin": "softmin",
}
"""Modules without tensors -> an operation that they are like."""

OURS = ("torch", "_operator", "operator", "builtins", "math")


def name_of(n: fx.Node) -> tuple[str, Callable[..., Any] | None]:
    """(name of an operation, without the underscore of in-place ones; what runs it)."""
    if n.op == "call_method":
        name = str(n.target)
        # A tensor of numbers has strides of its own, which a view may not fit.
        run = {"view": "reshape", "view_as": "reshape_as"}.get(name, name)
        return _plain(name), lambda x, *args, **kwargs: getattr(x, run)(*args, **kwargs)
    function: Any = n.target
    module = getattr(function, "__module__", None) or "torch"
    name = getattr(function, "__name__", str(function))
    if module.partition(".")[0] not in OURS:
        return f"{module}.{name}", function
    return _plain(name), function


def _plain(name: str) -> str:
    return name[:-1] if name.endswith("_") and not name.endswith("__") and name != "requires_grad_" else name


def dims_of(n: fx.Node) -> list[int] | None:
    """The dimensions that a reduction goes over; None for all."""
    dim = n.kwargs.get("dim", n.kwargs.get("axis"))
    if dim is None and len(n.args) > 1 and n.op != "call_module":
        place = 2 if name_of(n)[0] in ("norm", "normalize") else 1
        dim = n.args[place] if len(n.args) > place else None
    if dim is None:
        return [1] if name_of(n)[0] == "normalize" else None
    dims = tree_leaves(dim)
    # `std(False)`: no dimension, but whether it is corrected.
    return dims if all(isinstance(d, int) and not isinstance(d, bool) for d in dims) else None


def split_dims(n: fx.Node) -> list[int] | None:
    """The dimensions that are split, or whose elements change places; None where it may be any of them."""
    name = name_of(n)[0]
    found = next((n.kwargs[k] for k in ("dim", "dims", "axis") if n.kwargs.get(k) is not None), None)
    if found is None:
        place = 1 if name in ("flip", "narrow", "select", "unbind") else 2
        found = n.args[place:] if name == "flip" else n.args[place] if len(n.args) > place else None
        if found is None:
            return None if name == "roll" else [0]
    dims = tree_leaves(found)
    return dims if dims and all(isinstance(dim, int) for dim in dims) else None


def positions(n: fx.Node, value: Any, module: nn.Module | None) -> int:
    """How many of the last dimensions are positions."""
    name = type(module).__name__ if module is not None else name_of(n)[0]
    digits = [int(c) for c in name if c in "123"]
    first = next(leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))
    return digits[-1] if digits else first.dim() - 2


def written(n: fx.Node, value: torch.Tensor) -> set[int]:
    """The dimensions of a reshaped tensor whose length is a number in the network's own code."""
    name = name_of(n)[0] if n.op != "call_module" else "unflatten"
    if name in ("expand_as", "view_as", "reshape_as"):
        return set()
    if name == "unflatten":
        return set(range(value.dim()))
    lengths = n.args[1:] if n.op == "call_method" else n.args[1]
    if isinstance(lengths, (tuple, list)) and len(lengths) == 1 and isinstance(lengths[0], (tuple, list)):
        lengths = lengths[0]
    if isinstance(lengths, fx.Node):
        return set()
    lengths = list(lengths)  # type: ignore[arg-type]
    first = value.dim() - len(lengths)
    return {
        first + place
        for place, length in enumerate(lengths)
        if isinstance(length, int) and length not in (-1, 1)
    }


def indexed(index: Any, dims: int) -> Iterator[int]:
    """The dimensions of which not all is taken."""
    items = list(index) if isinstance(index, tuple) else [index]
    taken = sum(1 for item in items if item is not None and item is not Ellipsis)
    dim = 0
    for item in items:
        if item is Ellipsis:
            dim += dims - taken
        elif item is not None:
            if item != slice(None):
                yield dim
            dim += 1
