"""BERT's block, and those of the models that were written after it; DistilBERT's, with other names."""

from __future__ import annotations

from mbridge_prune.dynamic import Units, wraps
from mbridge_prune.huggingface.block import FAMILY, FFN, HEADS, DynamicBlock, Part, plain_heads, tensors_of

LIKE_BERT = (
    "transformers.models.bert.modeling_bert.BertLayer",
    "transformers.models.roberta.modeling_roberta.RobertaLayer",
    "transformers.models.xlm_roberta.modeling_xlm_roberta.XLMRobertaLayer",
    "transformers.models.camembert.modeling_camembert.CamembertLayer",
    "transformers.models.electra.modeling_electra.ElectraLayer",
)


@wraps(*LIKE_BERT, family=FAMILY)
class DynamicBertLayer(DynamicBlock):
    """`attention.self` (query, key, value) and `attention.output`; `intermediate` and `output`."""

    heads_in_config = True
    ffn_in_config = "intermediate_size"

    def __init__(self, module, scope):
        super().__init__(module, scope)
        self.untouched = tensors_of(
            module, "attention.self.distance_embedding", "attention.output.LayerNorm", "output.LayerNorm"
        )
        # Relative positions: of each pair, its distance times the query, and times the key.
        kind = getattr(module.attention.self, "position_embedding_type", "absolute")
        self.pair_work += {"relative_key": 2, "relative_key_query": 4}.get(kind, 0)

    def attention(self) -> Part:
        outer = self.module.attention
        inner = outer.self
        axis = self.axis(HEADS, inner.num_attention_heads)
        before, head_dim = axis.size + len(outer.pruned_heads), inner.attention_head_size
        rows = plain_heads(axis, head_dim)
        return Part(
            axis,
            tuple((linear, rows) for linear in (inner.query, inner.key, inner.value)),
            outer.output.dense,
            head_dim,
            (
                (inner, "num_attention_heads", int),
                (inner, "all_head_size", lambda n: n * head_dim),
                (outer, "pruned_heads", lambda n: set(range(n, before))),
            ),
        )

    def ffn(self) -> Part:
        first, second = self.module.intermediate.dense, self.module.output.dense
        axis = self.axis(FFN, first.out_features)
        return Part(axis, ((first, Units(axis)),), second, 1)


@wraps("transformers.models.distilbert.modeling_distilbert.TransformerBlock", family=FAMILY)
class DynamicDistilBertBlock(DynamicBlock):
    """`attention` (q_lin, k_lin, v_lin, out_lin) and `ffn` (lin1, lin2)."""

    heads_in_config = True
    ffn_in_config = "hidden_dim"

    def __init__(self, module, scope):
        super().__init__(module, scope)
        self.untouched = tensors_of(module, "sa_layer_norm", "output_layer_norm")

    def attention(self) -> Part:
        attention = self.module.attention
        axis = self.axis(HEADS, attention.n_heads)
        before, head_dim = axis.size + len(attention.pruned_heads), attention.attention_head_size
        rows = plain_heads(axis, head_dim)
        return Part(
            axis,
            tuple((linear, rows) for linear in (attention.q_lin, attention.k_lin, attention.v_lin)),
            attention.out_lin,
            head_dim,
            (
                (attention, "n_heads", int),
                (attention, "dim", lambda n: n * head_dim),
                (attention, "pruned_heads", lambda n: set(range(n, before))),
            ),
        )

    def ffn(self) -> Part:
        first, second = self.module.ffn.lin1, self.module.ffn.lin2
        axis = self.axis(FFN, first.out_features)
        return Part(axis, ((first, Units(axis)),), second, 1)
