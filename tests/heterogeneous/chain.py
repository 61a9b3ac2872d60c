"""A chain of linear layers with a hand-written table: every hidden width is an axis and an hparam of its own."""

from __future__ import annotations

import itertools

import torch
from torch import nn

from mbridge_prune.dynamic import Axis, DynamicModule, Fixed, Follow, Scope, Slice, SliceTable, wraps

FAMILY = "chain"


class Chain(nn.Module):
    """in - w1 - w2 - ... - out, with ReLU between."""

    def __init__(self, *widths: int, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))

    def forward(self, x_nc: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:-1]:
            x_nc = layer(x_nc).relu()
        return self.layers[-1](x_nc)


@wraps(Chain, family=FAMILY)
class DynamicChain(DynamicModule):
    def __init__(self, module: Chain, scope: Scope):
        super().__init__(module, scope)
        names = [f"layers.{n}.out_features" for n in range(len(module.layers) - 1)]
        sizes = [layer.out_features for layer in module.layers]
        self.axes = [Axis(name, n, name) for name, n in zip(names, sizes, strict=False)]

    def slices(self):
        layers = self.module.layers
        for axis, writer, reader in zip(self.axes, layers, layers[1:], strict=False):
            yield Slice(writer, "weight", 0, axis)
            yield Slice(writer, "bias", 0, axis)
            yield Slice(reader, "weight", 1, axis)
        yield Slice(layers[-1], "bias", 0, Fixed(layers[-1].out_features))

    def follows(self):
        layers = self.module.layers
        for axis, writer, reader in zip(self.axes, layers, layers[1:], strict=False):
            yield Follow(writer, "out_features", axis)
            yield Follow(reader, "in_features", axis)

    def children(self):
        return iter(())


def table_of(model: Chain) -> SliceTable:
    return SliceTable.of(model, Scope(family=FAMILY))
