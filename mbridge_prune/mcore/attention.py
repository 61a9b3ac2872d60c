"""Self-attention: heads in query groups (MHA, GQA), fused QKV, its bias and QK norms."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.core.transformer.attention import SelfAttention

from mbridge_prune.dynamic import Follow, PerGroup, Probe, Repeat, Slice, Units, wraps
from mbridge_prune.errors import UserError
from mbridge_prune.mcore.linear import (
    Leaf,
    follow,
    has_fused_norm,
    linear_follows,
    linear_slices,
    owned,
)


@wraps(SelfAttention)
class DynamicSelfAttention(Leaf):
    """`linear_qkv` rows: for each query group its Q heads, then K, then V; `linear_proj` columns: heads.

    Heads are ranked inside their query group; every group keeps the same number. In multi-head
    attention each head is a group of its own, and heads cannot be pruned without their K and V.
    """

    def __init__(self, module, scope):
        super().__init__(module, scope)
        config = scope.config
        if getattr(config, "attention_output_gate", False):
            raise UserError(f"unsupported layer {scope.path}: attention with an output gate")
        self.hidden = scope.axes["hidden_size"]
        self.head_dim = module.hidden_size_per_attention_head
        heads, groups = config.num_attention_heads, config.num_query_groups or config.num_attention_heads
        self.is_mha = groups == heads
        self.heads = scope.axis("num_attention_heads", heads, groups=1 if self.is_mha else groups)
        norms = [f"{n}.{t}" for n in ("q_layernorm", "k_layernorm") for t in owned(getattr(module, n))]
        core = [f"core_attention.{t}" for t in owned(module.core_attention)]
        if core:
            raise UserError(
                f"unsupported layer {scope.path}.core_attention: it has tensors ({', '.join(core)}); "
                "attention sinks are not prunable"
            )
        self.untouched = tuple(norms)

    def _qkv(self):
        if self.is_mha:
            return Repeat(Units(self.heads), 3 * self.head_dim)
        return PerGroup(self.heads, self.head_dim, 2 * self.head_dim)

    def _proj(self):
        return Repeat(Units(self.heads), self.head_dim)

    def slices(self) -> Iterator[Slice]:
        yield from linear_slices(self.module.linear_qkv, self._qkv(), self.hidden)
        yield from linear_slices(self.module.linear_proj, self.hidden, self._proj())

    def follows(self) -> Iterator[Follow]:
        module, heads = self.module, self.heads
        yield from linear_follows(module.linear_qkv, self._qkv(), self.hidden)
        yield from linear_follows(module.linear_proj, self.hidden, self._proj())
        counts = ("num_attention_heads", "num_attention_heads_per_partition")
        groups = ("num_query_groups", "num_query_groups_per_partition", "num_gqa_groups",
                  "num_gqa_groups_per_partition")  # fmt: skip
        for owner in (self.scope.config, module.config, module, module.core_attention):
            yield from follow(owner, counts + (groups if self.is_mha else ()), heads)
        yield from follow(module, ("query_projection_size",), self._proj())
        yield from follow(module, ("linear_qkv_out_dim",), self._qkv())
        if self.is_mha:
            yield from follow(module, ("kv_projection_size",), self._proj())
        yield from follow(module.core_attention, ("hidden_size_per_partition",), self._proj())

    def probes(self) -> Iterator[Probe]:
        place = f"layers.{self.scope.layer}.self_attention"
        if has_fused_norm(self.module.linear_qkv):
            yield Probe(self.hidden, self.module.linear_qkv, "norm_output", f"{place}.linear_qkv")
        yield Probe(self.heads, self.module.linear_proj, "input", f"{place}.linear_proj", self.head_dim)
