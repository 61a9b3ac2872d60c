"""The dense MLP: plain or gated, with and without bias."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.core.transformer.mlp import MLP

from mbridge_prune.dynamic import Concat, Follow, Layout, Probe, Slice, Units, wraps
from mbridge_prune.mcore.linear import Leaf, follow, has_fused_norm, linear_follows, linear_slices


@wraps(MLP)
class DynamicMLP(Leaf):
    """`linear_fc1` rows: FFN channels (gated: gate then up); `linear_fc2` columns: FFN channels."""

    def __init__(self, module, scope):
        super().__init__(module, scope)
        self.hidden = scope.axes["hidden_size"]
        self.ffn = scope.axis("ffn_hidden_size", scope.config.ffn_hidden_size)

    def _fc1(self) -> Layout:
        units = Units(self.ffn)
        return Concat(units, units) if self.scope.config.gated_linear_unit else units

    def slices(self) -> Iterator[Slice]:
        yield from linear_slices(self.module.linear_fc1, self._fc1(), self.hidden)
        yield from linear_slices(self.module.linear_fc2, self.hidden, self.ffn)

    def follows(self) -> Iterator[Follow]:
        yield from linear_follows(self.module.linear_fc1, self._fc1(), self.hidden)
        yield from linear_follows(self.module.linear_fc2, self.hidden, self.ffn)
        yield from follow(self.module, ("input_size",), self.hidden)
        yield Follow(self.scope.config, "ffn_hidden_size", self.ffn)

    def probes(self) -> Iterator[Probe]:
        place = f"layers.{self.scope.layer}.mlp"
        if has_fused_norm(self.module.linear_fc1):
            yield Probe(self.hidden, self.module.linear_fc1, "norm_output", f"{place}.linear_fc1")
        yield Probe(self.ffn, self.module.linear_fc2, "input", f"{place}.linear_fc2")
