"""Self-attention: heads in query groups (MHA, GQA), fused QKV, output gates, QK norms, sinks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron.core.transformer.attention import SelfAttention

from mbridge_prune.dynamic import (
    Consumer,
    Cost,
    Follow,
    Gain,
    Layout,
    PerGroup,
    Probe,
    Reading,
    Repeat,
    Slice,
    Units,
    wraps,
)
from mbridge_prune.errors import UserError
from mbridge_prune.mcore.linear import (
    Leaf,
    all_tensors,
    follow,
    has_fused_norm,
    linear_consumer,
    linear_follows,
    linear_gains,
    linear_slices,
    norm_follows,
    norm_slices,
    owned,
)

HEAD_COUNTS = ("num_attention_heads", "num_attention_heads_per_partition")
GROUP_COUNTS = (
    "num_query_groups", "num_query_groups_per_partition", "num_gqa_groups", "num_gqa_groups_per_partition",
)  # fmt: skip


@wraps(SelfAttention)
class DynamicSelfAttention(Leaf):
    """`linear_qkv` rows: for each query group its Q heads, then K, then V; `linear_proj` columns: heads.

    Whole query groups can go (`num_query_groups`, with their Q heads, K and V), and heads inside
    them: heads are ranked inside their group, and every group keeps the same number. In multi-head
    attention each head is a group of its own, and `num_attention_heads` takes K and V along.
    """

    def __init__(self, module, scope):
        super().__init__(module, scope)
        config = scope.config
        self.hidden = scope.axes["hidden_size"]
        self.head_dim = module.hidden_size_per_attention_head
        heads, groups = config.num_attention_heads, config.num_query_groups or config.num_attention_heads
        self.is_mha = groups == heads
        if self.is_mha:
            self.heads = self.groups = scope.axis("num_attention_heads", heads)
        else:
            self.groups = scope.axis("num_query_groups", groups)
            self.heads = scope.axis("num_attention_heads", heads, groups=groups, within=self.groups)
        self.gated = bool(getattr(config, "attention_output_gate", False))
        others = [t for t in owned(module.core_attention) if t != "softmax_offset"]
        if others:
            raise UserError(
                f"unsupported layer {scope.path}.core_attention: {type(module.core_attention).__name__} "
                f"has tensors ({', '.join(others)}) that no axis is known for"
            )
        self.untouched = all_tensors(module, "q_layernorm", "k_layernorm")

    def _qkv(self) -> Layout:
        times = 2 if self.gated else 1
        if self.is_mha:
            return Repeat(Units(self.heads), (times + 2) * self.head_dim)
        return PerGroup(self.heads, self.head_dim, 2 * self.head_dim, times)

    def _proj(self) -> Layout:
        return Repeat(Units(self.heads), self.head_dim)

    def slices(self) -> Iterator[Slice]:
        yield from linear_slices(self.module.linear_qkv, self._qkv(), self.hidden)
        yield from linear_slices(self.module.linear_proj, self.hidden, self._proj())
        if owned(self.module.core_attention):
            yield Slice(self.module.core_attention, "softmax_offset", 0, self.heads)

    def follows(self) -> Iterator[Follow]:
        module = self.module
        yield from linear_follows(module.linear_qkv, self._qkv(), self.hidden)
        yield from linear_follows(module.linear_proj, self.hidden, self._proj())
        core = module.core_attention
        for owner in (self.scope.config, module.config, module, core, getattr(core, "config", None)):
            yield from follow(owner, HEAD_COUNTS, self.heads)
            yield from follow(owner, GROUP_COUNTS, self.groups)
        yield from follow(module, ("query_projection_size",), self._proj())
        yield from follow(module, ("linear_qkv_out_dim",), self._qkv())
        yield from follow(module, ("kv_projection_size",), Repeat(Units(self.groups), self.head_dim))
        yield from follow(core, ("hidden_size_per_partition",), self._proj())

    def probes(self) -> Iterator[Probe]:
        place = f"{self.scope.place}.self_attention"
        if has_fused_norm(self.module.linear_qkv):
            hidden = Reading(self.hidden)
            yield Probe(self.module.linear_qkv, "norm_output", f"{place}.linear_qkv", (hidden,))
        readings = [Reading(self.heads, self.head_dim)]
        if not self.is_mha:
            readings.append(Reading(self.groups, self.heads.width * self.head_dim))
        yield Probe(self.module.linear_proj, "input", f"{place}.linear_proj", tuple(readings), sharded=True)

    def consumers(self) -> Iterator[Consumer]:
        place = f"{self.scope.place}.self_attention"
        yield from linear_consumer(self.module.linear_qkv, self.hidden, f"{place}.linear_qkv")
        yield from linear_consumer(self.module.linear_proj, self._proj(), f"{place}.linear_proj", adds=True)

    def gains(self) -> Iterator[Gain]:
        place, scope = f"{self.scope.place}.self_attention", self.scope
        yield from linear_gains(
            self.module.linear_qkv, self.hidden, self._qkv(), scope, f"{place}.linear_qkv"
        )
        yield from linear_gains(
            self.module.linear_proj, self._proj(), self.hidden, scope, f"{place}.linear_proj"
        )

    def costs(self) -> Iterator[Cost]:
        window = attention_window(self.module.core_attention)
        yield Cost("cache", Repeat(Units(self.groups), 2 * self.head_dim), per_token=True, window=window)
        # Query times key, weight times value: a multiplication and an addition each.
        yield Cost("flops", self._proj(), 4, per_token=True, window=window)


def attention_window(core: Any) -> int | None:
    """Tokens that a sliding window spans; None where the layer sees the whole context."""
    window = getattr(core, "window_size", None)
    if isinstance(window, (tuple, list)) and window[0] is not None and window[0] >= 0:
        return window[0] + 1
    return None


class DynamicWideNormAttention(DynamicSelfAttention):
    """Attention whose QK norms run over all heads at once (OLMoE): their gains follow the heads."""

    def __init__(self, module, scope):
        super().__init__(module, scope)
        if scope.shards > 1:
            raise UserError(
                f"unsupported layer {scope.path}: its QK norm spans the heads of all tensor-parallel ranks; "
                "score the model with --tp 1"
            )
        self.untouched = ()

    def slices(self) -> Iterator[Slice]:
        yield from super().slices()
        for norm, axis in self._norms():
            yield from norm_slices(norm, Repeat(Units(axis), self.head_dim))

    def follows(self) -> Iterator[Follow]:
        yield from super().follows()
        for norm, axis in self._norms():
            yield from norm_follows(norm, Repeat(Units(axis), self.head_dim))

    def _norms(self):
        return ((self.module.q_layernorm, self.heads), (self.module.k_layernorm, self.groups))
