"""Multi-token prediction heads: pruned along with the trunk."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionLayer,
)
from torch import nn

from mbridge_prune.dynamic import DEPTH, Concat, Consumer, DynamicModule, Follow, Scope, Slice, Units, wraps
from mbridge_prune.mcore.linear import (
    linear_consumer,
    linear_follows,
    linear_slices,
    norm_follows,
    norm_slices,
)

NORMS = ("enorm", "hnorm", "final_layernorm")


@wraps(MultiTokenPredictionBlock)
class DynamicMultiTokenBlock(DynamicModule):
    """The heads, one after another; depth pruning leaves their number."""

    def children(self) -> Iterator[tuple[nn.Module, Scope]]:
        for number, layer in enumerate(self.module.layers):
            yield layer, self.scope.child(f"layers.{number}", place=f"mtp.{number}")


@wraps(MultiTokenPredictionLayer)
class DynamicMultiTokenLayer(DynamicModule):
    """`eh_proj` [hidden, embedding then hidden state]; a transformer layer with axes of its own."""

    def slices(self) -> Iterator[Slice]:
        hidden = Units(self.scope.axes["hidden_size"])
        yield from linear_slices(self.module.eh_proj, hidden, Concat(hidden, hidden))
        for name in NORMS:
            yield from norm_slices(getattr(self.module, name), hidden)

    def follows(self) -> Iterator[Follow]:
        hidden = Units(self.scope.axes["hidden_size"])
        yield from linear_follows(self.module.eh_proj, hidden, Concat(hidden, hidden))
        for name in NORMS:
            yield from norm_follows(getattr(self.module, name), hidden)
        for module in self.module.transformer_layer.modules():
            if isinstance(getattr(module, "layer_number", None), int):
                yield self._numbered_behind_the_trunk(module)

    def consumers(self) -> Iterator[Consumer]:
        hidden = Units(self.scope.axes["hidden_size"])
        yield from linear_consumer(self.module.eh_proj, Concat(hidden, hidden), f"{self.scope.place}.eh_proj")

    def _numbered_behind_the_trunk(self, module: nn.Module) -> Follow:
        depth = self.scope.axes[DEPTH]
        behind = module.layer_number - depth.size
        return Follow(module, "layer_number", depth, lambda n: n + behind)

    def children(self) -> Iterator[tuple[nn.Module, Scope]]:
        yield self.module.transformer_layer, self.scope.child("transformer_layer")
