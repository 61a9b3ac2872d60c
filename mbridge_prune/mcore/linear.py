"""Rows that Megatron's linear layers and norms share, in their Transformer Engine and local forms."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from mbridge_prune.dynamic import Axis, Follow, Layout, Slice
from mbridge_prune.dynamic.module import DynamicModule

OUT_ATTRIBUTES = ("out_features", "output_size", "output_size_per_partition")
IN_ATTRIBUTES = ("in_features", "input_size", "input_size_per_partition")


def linear_slices(linear: nn.Module, out: Layout | Axis, in_: Layout | Axis) -> Iterator[Slice]:
    """Rows of weight [out, in], bias [out] and, where the norm is fused, its gain and bias [in]."""
    yield Slice(linear, "weight", 0, out)
    yield Slice(linear, "weight", 1, in_)
    if has_tensor(linear, "bias"):
        yield Slice(linear, "bias", 0, out)
    for name in ("layer_norm_weight", "layer_norm_bias"):
        if has_tensor(linear, name):
            yield Slice(linear, name, 0, in_)


def linear_follows(linear: nn.Module, out: Layout | Axis, in_: Layout | Axis) -> Iterator[Follow]:
    """The plain size attributes of a linear layer."""
    for names, layout in ((OUT_ATTRIBUTES, out), (IN_ATTRIBUTES, in_)):
        yield from follow(linear, names, layout)


def norm_slices(norm: nn.Module, axis: Layout | Axis) -> Iterator[Slice]:
    """Rows of a norm's gain and bias; none for an identity in a norm's place."""
    for name in ("weight", "bias"):
        if has_tensor(norm, name):
            yield Slice(norm, name, 0, axis)


def norm_follows(norm: nn.Module, axis: Layout | Axis) -> Iterator[Follow]:
    """Torch and apex norms keep the shape they normalise; every norm's own spelling of it."""
    if isinstance(getattr(norm, "normalized_shape", None), tuple):
        yield Follow(norm, "normalized_shape", axis, lambda n: (n,))
    current = getattr(norm, "hidden_size", None)
    if isinstance(current, tuple):
        import torch

        yield Follow(norm, "hidden_size", axis, lambda n: torch.Size((n,)))
    elif isinstance(current, int):
        yield Follow(norm, "hidden_size", axis)


def follow(owner: object, names: tuple[str, ...], layout: Layout | Axis) -> Iterator[Follow]:
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


class Leaf(DynamicModule):
    """A wrapper that covers its whole subtree by itself."""

    def children(self):
        return iter(())


def owned(module: nn.Module) -> tuple[str, ...]:
    """Every tensor name of a submodule; empty for None."""
    if module is None:
        return ()
    return tuple(n for n, _ in [*module.named_parameters(), *module.named_buffers()])
