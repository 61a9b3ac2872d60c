"""Multi-head latent attention (DeepSeek-V2 and -V3, Kimi, Moonlight)."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch import nn

from mbridge_prune.dynamic import (
    Consumer,
    Cost,
    Fixed,
    Follow,
    Layout,
    Probe,
    Reading,
    Repeat,
    Slice,
    Units,
    wraps,
)
from mbridge_prune.mcore.attention import GROUP_COUNTS, HEAD_COUNTS
from mbridge_prune.mcore.linear import (
    Leaf,
    all_tensors,
    fixed,
    follow,
    linear_consumer,
    linear_follows,
    linear_slices,
)


@wraps(MLASelfAttention)
class DynamicLatentAttention(Leaf):
    """Down projections read the hidden state, up projections write the heads; the latents stay.

    Every head has its own rows of the up projections, so heads go one by one, as in MHA.
    """

    def __init__(self, module, scope):
        super().__init__(module, scope)
        self.hidden = Units(scope.axes["hidden_size"])
        self.heads = scope.axis("num_attention_heads", scope.config.num_attention_heads)
        self.untouched = all_tensors(module, "q_layernorm", "kv_layernorm", "rotary_pos_emb")

    def _linears(self) -> Iterator[tuple[nn.Module, Layout, Layout]]:
        module, config, heads = self.module, self.scope.config, Units(self.heads)
        q_dim = config.qk_head_dim + config.qk_pos_emb_head_dim
        if config.q_lora_rank is None:
            yield module.linear_q_proj, Repeat(heads, q_dim), self.hidden
        else:
            yield module.linear_q_down_proj, Fixed(config.q_lora_rank), self.hidden
            yield module.linear_q_up_proj, Repeat(heads, q_dim), Fixed(config.q_lora_rank)
        latent = fixed(config.kv_lora_rank + config.qk_pos_emb_head_dim)
        yield module.linear_kv_down_proj, latent, self.hidden
        kv = Repeat(heads, config.qk_head_dim + config.v_head_dim)
        yield module.linear_kv_up_proj, kv, Fixed(config.kv_lora_rank)
        yield module.linear_proj, self.hidden, Repeat(heads, config.v_head_dim)

    def slices(self) -> Iterator[Slice]:
        for linear, out, in_ in self._linears():
            yield from linear_slices(linear, out, in_)

    def follows(self) -> Iterator[Follow]:
        module, heads = self.module, self.heads
        for linear, out, in_ in self._linears():
            yield from linear_follows(linear, out, in_)
        for owner in (self.scope.config, module.config, module, module.core_attention):
            yield from follow(owner, HEAD_COUNTS + GROUP_COUNTS, heads)
        width = Repeat(Units(heads), self.scope.config.v_head_dim)
        yield from follow(module, ("query_projection_size",), width)
        # Of the base class, which latent attention does not use, but kept in step.
        yield from follow(
            module, ("kv_projection_size",), Repeat(Units(heads), self.scope.config.kv_channels)
        )

    def probes(self) -> Iterator[Probe]:
        reading = Reading(self.heads, self.scope.config.v_head_dim)
        name = f"{self.scope.place}.self_attention.linear_proj"
        yield Probe(self.module.linear_proj, "input", name, (reading,), sharded=True)

    def consumers(self) -> Iterator[Consumer]:
        names = {id(child): name for name, child in self.module.named_children()}
        place = f"{self.scope.place}.self_attention"
        for linear, _, in_ in self._linears():
            if not isinstance(in_, Fixed):
                adds = linear is self.module.linear_proj
                yield from linear_consumer(linear, in_, f"{place}.{names[id(linear)]}", adds)

    def costs(self) -> Iterator[Cost]:
        config, heads = self.scope.config, Units(self.heads)
        # The latent and the rotary part of the key, for all heads together.
        yield Cost("cache", Fixed(config.kv_lora_rank + config.qk_pos_emb_head_dim), per_token=True)
        width = config.qk_head_dim + config.qk_pos_emb_head_dim + config.v_head_dim
        yield Cost("flops", Repeat(heads, width), 2, per_token=True)
