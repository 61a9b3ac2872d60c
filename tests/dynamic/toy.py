"""A small network with every kind of row: gated, grouped, nested, tied, a buffer, layers."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from mbridge_prune.dynamic import (
    DEPTH,
    Axis,
    Concat,
    DynamicModule,
    Follow,
    Layers,
    PerGroup,
    Repeat,
    Scope,
    Slice,
    SliceTable,
    Units,
    wraps,
)

HIDDEN, FFN, GROUPS, WIDTH, DIM, TAIL, LAYERS, VOCAB = 6, 8, 3, 4, 2, 2, 4, 11
HEADS = GROUPS * WIDTH


class ToyLayer(nn.Module):
    def __init__(self, number: int):
        super().__init__()
        self.layer_number = number
        self.groups, self.heads, self.ffn = GROUPS, HEADS, FFN
        self.gate_up = nn.Parameter(torch.randn(2 * FFN, HIDDEN))
        self.gate_up_bias = nn.Parameter(torch.randn(2 * FFN))
        self.down = nn.Parameter(torch.randn(HIDDEN, FFN))
        self.register_buffer("scale", torch.rand(FFN) + 0.5)
        self.fused = nn.Parameter(torch.randn(HEADS * DIM + GROUPS * TAIL, HIDDEN))
        self.out = nn.Parameter(torch.randn(HIDDEN, HEADS * DIM))
        self.temperature = nn.Parameter(torch.rand(()) + 0.5)

    def forward(self, x_bh):
        gate, up = (x_bh @ self.gate_up.T + self.gate_up_bias).tanh().split(self.ffn, dim=-1)
        x_bh = x_bh + (gate * up * self.scale) @ self.down.T
        blocks = (x_bh @ self.fused.T).view(len(x_bh), self.groups, -1)
        heads, tail = blocks[..., :-TAIL], blocks[..., -TAIL:]
        heads = (heads * tail.sum(-1, keepdim=True) * self.temperature).tanh().reshape(len(x_bh), -1)
        assert heads.shape[1] == self.heads * DIM
        return x_bh + heads @ self.out.T


class Toy(nn.Module):
    def __init__(self, tied: bool = True, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.config = SimpleNamespace(hidden_size=HIDDEN, num_layers=LAYERS)
        self.embed, self.head = nn.Embedding(VOCAB, HIDDEN), nn.Linear(HIDDEN, VOCAB)
        self.layers = nn.ModuleList(ToyLayer(i + 1) for i in range(LAYERS))
        if tied:
            self.head.weight = self.embed.weight
        self.double()
        for p in self.parameters():
            p.allreduce, p.tensor_model_parallel, p.partition_dim, p.shared = True, False, -1, "word"

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@wraps(Toy)
class DynamicToy(DynamicModule):
    untouched = ("head.bias",)

    def slices(self):
        yield Slice(self.module.embed, "weight", 1, self.scope.axes["hidden_size"])
        yield Slice(self.module.head, "weight", 1, self.scope.axes["hidden_size"])

    def follows(self):
        yield Follow(self.module.config, "hidden_size", self.scope.axes["hidden_size"])
        yield Follow(self.module.config, "num_layers", self.scope.axes[DEPTH])
        yield Follow(self.module.head, "in_features", self.scope.axes["hidden_size"])

    def layers(self):
        numbers = [layer.layer_number - 1 for layer in self.module.layers]
        return Layers(self.module, numbers, self.scope.axes[DEPTH])

    def children(self):
        for i, layer in enumerate(self.module.layers):
            yield layer, self.scope.child(f"layers.{i}", layer=layer.layer_number - 1)


@wraps(ToyLayer)
class DynamicToyLayer(DynamicModule):
    untouched = ("temperature",)

    def __init__(self, module, scope):
        super().__init__(module, scope)
        self.ffn = scope.axis("ffn", module.ffn)
        self.groups = scope.axis("groups", module.groups)
        # The width of a group is what is pruned: groups of heads can go too.
        self.heads = scope.axis(
            "width", module.heads, groups=module.groups, within=self.groups, per_group=True
        )

    def slices(self):
        hidden, m = self.scope.axes["hidden_size"], self.module
        yield Slice(m, "gate_up", 0, Concat(Units(self.ffn), Units(self.ffn)))
        yield Slice(m, "gate_up", 1, hidden)
        yield Slice(m, "gate_up_bias", 0, Units(self.ffn) + Units(self.ffn))
        yield Slice(m, "down", 0, hidden)
        yield Slice(m, "down", 1, self.ffn)
        yield Slice(m, "scale", 0, self.ffn)
        yield Slice(m, "fused", 0, PerGroup(self.heads, DIM, TAIL))
        yield Slice(m, "fused", 1, hidden)
        yield Slice(m, "out", 0, hidden)
        yield Slice(m, "out", 1, Repeat(Units(self.heads), DIM))

    def follows(self):
        yield Follow(self.module, "ffn", self.ffn)
        yield Follow(self.module, "groups", self.groups)
        yield Follow(self.module, "heads", self.heads)


def table_of(model: Toy) -> SliceTable:
    axes = {
        "hidden_size": Axis("hidden_size", model.config.hidden_size, "hidden_size"),
        DEPTH: Axis(DEPTH, model.config.num_layers, DEPTH),
    }
    return SliceTable.of(model, Scope(axes=axes, config=model.config))
