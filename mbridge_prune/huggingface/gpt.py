"""The blocks of GPT-J, GPT-NeoX and GPT-2."""

from __future__ import annotations

from mbridge_prune.dynamic import Concat, Units, wraps
from mbridge_prune.huggingface.block import FAMILY, FFN, HEADS, DynamicBlock, Part, plain_heads, tensors_of


@wraps("transformers.models.gptj.modeling_gptj.GPTJBlock", family=FAMILY)
class DynamicGPTJBlock(DynamicBlock):
    """`attn` (q_proj, k_proj, v_proj, out_proj) beside `mlp` (fc_in, fc_out)."""

    ffn_in_config = "n_inner"

    def __init__(self, module, scope):
        super().__init__(module, scope)
        self.untouched = tensors_of(module, "ln_1")

    def attention(self) -> Part:
        attention = self.module.attn
        axis = self.axis(HEADS, attention.num_attention_heads)
        rows = plain_heads(axis, attention.head_dim)
        return Part(
            axis,
            tuple((linear, rows) for linear in (attention.q_proj, attention.k_proj, attention.v_proj)),
            attention.out_proj,
            attention.head_dim,
            ((attention, "num_attention_heads", int),),
        )

    def ffn(self) -> Part:
        first, second = self.module.mlp.fc_in, self.module.mlp.fc_out
        axis = self.axis(FFN, first.out_features)
        return Part(axis, ((first, Units(axis)),), second, 1)


@wraps("transformers.models.gpt_neox.modeling_gpt_neox.GPTNeoXLayer", family=FAMILY)
class DynamicGPTNeoXLayer(DynamicBlock):
    """`attention.query_key_value` (of each head its query, key and value); `mlp`."""

    ffn_in_config = "intermediate_size"

    def __init__(self, module, scope):
        super().__init__(module, scope)
        self.untouched = tensors_of(module, "input_layernorm", "post_attention_layernorm")

    def attention(self) -> Part:
        attention = self.module.attention
        fused, head_dim = attention.query_key_value, attention.head_size
        axis = self.axis(HEADS, fused.out_features // (3 * head_dim))
        return Part(axis, ((fused, plain_heads(axis, 3 * head_dim)),), attention.dense, head_dim)

    def ffn(self) -> Part:
        first, second = self.module.mlp.dense_h_to_4h, self.module.mlp.dense_4h_to_h
        axis = self.axis(FFN, first.out_features)
        return Part(axis, ((first, Units(axis)),), second, 1)


@wraps("transformers.models.gpt2.modeling_gpt2.GPT2Block", family=FAMILY)
class DynamicGPT2Block(DynamicBlock):
    """`attn.c_attn` (all queries, then all keys, then all values) and `mlp`; weights are [in, out]."""

    heads_in_config = True
    ffn_in_config = "n_inner"

    def __init__(self, module, scope):
        super().__init__(module, scope)
        masks = [f"attn.{name}" for name, _ in module.attn.named_buffers(recurse=False)]
        self.untouched = (*tensors_of(module, "ln_1", "ln_2"), *masks)

    def attention(self) -> Part:
        attention = self.module.attn
        axis, head_dim = self.axis(HEADS, attention.num_heads), attention.head_dim
        before, rows = axis.size + len(attention.pruned_heads), plain_heads(axis, head_dim)
        return Part(
            axis,
            ((attention.c_attn, Concat(rows, rows, rows)),),
            attention.c_proj,
            head_dim,
            (
                (attention, "num_heads", int),
                (attention, "split_size", lambda n: n * head_dim),
                (attention, "pruned_heads", lambda n: set(range(n, before))),
            ),
        )

    def ffn(self) -> Part:
        first, second = self.module.mlp.c_fc, self.module.mlp.c_proj
        axis = self.axis(FFN, first.nf)
        return Part(axis, ((first, Units(axis)),), second, 1)
