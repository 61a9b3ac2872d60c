"""Rows that Megatron's linear layers and norms share, in their Transformer Engine and local forms."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from mbridge_prune.dynamic import Axis, Consumer, Fixed, Follow, Gain, Layout, Slice, Unit
from mbridge_prune.dynamic.module import DynamicModule, Scope

OUT_ATTRIBUTES = ("out_features", "output_size", "output_size_per_partition")
IN_ATTRIBUTES = ("in_features", "input_size", "input_size_per_partition")
POST_NORM = "post_layernorm"
"""Where Gemma 2 and 3 keep the norm after a projection: inside the projection."""


def linear_slices(
    linear: nn.Module, out: Layout | Axis, in_: Layout | Axis, unit: Unit | None = None
) -> Iterator[Slice]:
    """Rows of weight [out, in], bias [out], a fused norm before [in] and a norm after it [out]."""
    yield Slice(linear, "weight", 0, out, unit_of(unit, "weight"))
    yield Slice(linear, "weight", 1, in_, unit_of(unit, "weight"))
    if has_tensor(linear, "bias"):
        yield Slice(linear, "bias", 0, out, unit_of(unit, "bias"))
    for name in ("layer_norm_weight", "layer_norm_bias"):
        if has_tensor(linear, name):
            yield Slice(linear, name, 0, in_, unit_of(unit, name))
    yield from norm_slices(getattr(linear, POST_NORM, None), out)


def linear_follows(linear: nn.Module, out: Layout | Axis, in_: Layout | Axis) -> Iterator[Follow]:
    """The plain size attributes of a linear layer."""
    for names, layout in ((OUT_ATTRIBUTES, out), (IN_ATTRIBUTES, in_)):
        yield from follow(linear, names, layout)
    yield from norm_follows(getattr(linear, POST_NORM, None), out)


def linear_consumer(
    linear: nn.Module, in_: Layout | Axis, label: str, adds: bool = False, **more: Any
) -> Iterator[Consumer]:
    """The weight of a linear layer, whose input is what a fused norm writes, or its own input.

    Args:
        adds: what the layer writes goes to the hidden state, unless a norm comes after it.
        **more: see `Consumer`.
    """
    tensor = "norm_output" if has_fused_norm(linear) else "input"
    adds = adds and getattr(linear, POST_NORM, None) is None
    yield Consumer(linear, "weight", in_, label, linear, tensor, adds, **more)


def linear_gains(
    linear: nn.Module, in_: Layout | Axis, out: Layout | Axis, scope: Scope, label: str
) -> Iterator[Gain]:
    """The norms inside a linear layer: one before it, fused, and one after it."""
    if has_fused_norm(linear):
        yield _gain(linear, "layer_norm_weight", in_, scope.config, label)
    yield from norm_gains(getattr(linear, POST_NORM, None), out, scope, f"{label}.{POST_NORM}")


def norm_gains(norm: nn.Module | None, axis: Layout | Axis, scope: Scope, label: str) -> Iterator[Gain]:
    """The gain of a norm; none for an identity, or nothing, in a norm's place."""
    if norm is not None and has_tensor(norm, "weight"):
        yield _gain(norm, "weight", axis, scope.config, label)


def _gain(module: nn.Module, name: str, axis: Layout | Axis, config: Any, label: str) -> Gain:
    centred = getattr(config, "normalization", "RMSNorm") == "LayerNorm"
    offset = 1.0 if getattr(config, "layernorm_zero_centered_gamma", False) else 0.0
    return Gain(module, name, axis, label, centred, offset)


def norm_slices(norm: nn.Module | None, axis: Layout | Axis) -> Iterator[Slice]:
    """Rows of a norm's gain and bias; none for an identity, or nothing, in a norm's place."""
    for name in ("weight", "bias"):
        if norm is not None and has_tensor(norm, name):
            yield Slice(norm, name, 0, axis)


def norm_follows(norm: nn.Module | None, axis: Layout | Axis) -> Iterator[Follow]:
    """Torch and apex norms keep the shape they normalise; every norm's own spelling of it."""
    if norm is None:
        return
    if isinstance(getattr(norm, "normalized_shape", None), tuple):
        yield Follow(norm, "normalized_shape", axis, lambda n: (n,))
    current = getattr(norm, "hidden_size", None)
    if isinstance(current, tuple):
        yield Follow(norm, "hidden_size", axis, lambda n: torch.Size((n,)))
    elif isinstance(current, int):
        yield Follow(norm, "hidden_size", axis)


def follow(owner: object, names: Iterable[str], layout: Layout | Axis) -> Iterator[Follow]:
    """Follow rows for those of `names` that `owner` has as plain integers."""
    for name in names:
        if isinstance(getattr(owner, name, None), int):
            yield Follow(owner, name, layout)


def has_tensor(module: nn.Module, name: str) -> bool:
    """True for a registered parameter or buffer (TE keeps an empty plain tensor for "no bias")."""
    return module._parameters.get(name) is not None or module._buffers.get(name) is not None


def has_fused_norm(linear: nn.Module) -> bool:
    """True where the norm before a linear layer lives inside it."""
    return has_tensor(linear, "layer_norm_weight")


def unit_of(unit: Unit | None, tensor: str) -> Unit | None:
    """The unit of a tensor inside a module of `unit`: its role gets the tensor's name."""
    if unit is None:
        return None
    return Unit(unit.axis, unit.number, f"{unit.role}.{tensor}", unit.active)


def fixed(*lengths: int) -> Layout:
    """Parts that follow no axis, one after another (each is sharded by itself)."""
    layout: Layout = Fixed(lengths[0])
    for n in lengths[1:]:
        layout = layout + Fixed(n)
    return layout


class Leaf(DynamicModule):
    """A wrapper that covers its whole subtree by itself."""

    def children(self):
        return iter(())


def owned(module: nn.Module | None) -> tuple[str, ...]:
    """Every tensor name of a submodule; empty for None."""
    if module is None:
        return ()
    return tuple(n for n, _ in [*module.named_parameters(), *module.named_buffers()])


def all_tensors(module: nn.Module, *names: str) -> tuple[str, ...]:
    """The names, inside `module`, of every tensor of its submodules `names` (absent ones skipped)."""
    return tuple(f"{name}.{tensor}" for name in names for tensor in owned(getattr(module, name, None)))
