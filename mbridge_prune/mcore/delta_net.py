"""Gated DeltaNet (Qwen3-Next's linear attention): the hidden size goes, its own heads stay."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.core.ssm.gated_delta_net import GatedDeltaNet

from mbridge_prune.dynamic import Consumer, Cost, Follow, Gain, Layout, Probe, Reading, Slice, Units, wraps
from mbridge_prune.mcore.linear import (
    Leaf,
    all_tensors,
    fixed,
    follow,
    has_fused_norm,
    has_tensor,
    linear_consumer,
    linear_follows,
    linear_gains,
    linear_slices,
)


@wraps(GatedDeltaNet)
class DynamicGatedDeltaNet(Leaf):
    """`in_proj` rows: q, k, v, gate, beta, alpha; `out_proj` columns: v. None of them is prunable.

    Key heads feed several value heads each, and no hparam counts either: they keep their sizes.
    """

    def __init__(self, module, scope):
        super().__init__(module, scope)
        self.hidden = Units(scope.axes["hidden_size"])
        self.untouched = all_tensors(module, "out_norm")

    def _in_proj(self) -> Layout:
        m = self.module
        return fixed(m.qk_dim, m.qk_dim, m.v_dim, m.v_dim, m.num_value_heads, m.num_value_heads)

    def slices(self) -> Iterator[Slice]:
        m = self.module
        yield from linear_slices(m.in_proj, self._in_proj(), self.hidden)
        yield from linear_slices(m.out_proj, self.hidden, fixed(m.v_dim))
        for name in ("dt_bias", "A_log"):
            yield Slice(m, name, 0, fixed(m.num_value_heads))
        for name in ("weight", "bias"):
            if has_tensor(m.conv1d, name):
                yield Slice(m.conv1d, name, 0, fixed(m.qk_dim, m.qk_dim, m.v_dim))

    def follows(self) -> Iterator[Follow]:
        m = self.module
        yield from linear_follows(m.in_proj, self._in_proj(), self.hidden)
        yield from linear_follows(m.out_proj, self.hidden, fixed(m.v_dim))
        yield from follow(m, ("hidden_size",), self.hidden)

    def probes(self) -> Iterator[Probe]:
        if has_fused_norm(self.module.in_proj):
            name = f"{self.scope.place}.self_attention.in_proj"
            reading = Reading(self.scope.axes["hidden_size"])
            yield Probe(self.module.in_proj, "norm_output", name, (reading,))

    def consumers(self) -> Iterator[Consumer]:
        label = f"{self.scope.place}.self_attention.in_proj"
        yield from linear_consumer(self.module.in_proj, self.hidden, label)
        label = f"{self.scope.place}.self_attention.out_proj"
        yield from linear_consumer(self.module.out_proj, fixed(self.module.v_dim), label, adds=True)

    def gains(self) -> Iterator[Gain]:
        label = f"{self.scope.place}.self_attention.in_proj"
        yield from linear_gains(self.module.in_proj, self.hidden, self._in_proj(), self.scope, label)

    def costs(self) -> Iterator[Cost]:
        m = self.module
        state = m.num_value_heads * m.key_head_dim * m.value_head_dim
        yield Cost("cache", fixed(2 * m.qk_dim + m.v_dim), m.conv_kernel_dim)
        yield Cost("cache", fixed(state))
        # The state: decay, the delta's product with the key, its outer product, the query's product.
        yield Cost("flops", fixed(state), 7)
