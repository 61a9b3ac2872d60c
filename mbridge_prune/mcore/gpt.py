"""The root and the frame of Megatron's GPT: embeddings, the stack of layers, norms, output layer."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_layer import MoETransformerLayer, TransformerLayer
from torch import nn

from mbridge_prune.dynamic import (
    DEPTH,
    Axis,
    Consumer,
    DynamicModule,
    Fixed,
    Follow,
    Gain,
    Layers,
    Probe,
    Reading,
    Scope,
    Slice,
    wraps,
)
from mbridge_prune.errors import UserError
from mbridge_prune.mcore.linear import (
    Leaf,
    all_tensors,
    follow,
    has_tensor,
    norm_follows,
    norm_gains,
    norm_slices,
    owned,
)
from mbridge_prune.mcore.whole_model import patterns, reads_layer_number


def root_scope(model: nn.Module) -> Scope:
    """The scope of a Megatron language model: its model-wide axes.

    Sizes come from the configuration, so that every pipeline stage makes equal axes.
    """
    config = model.config
    axes = {
        "hidden_size": Axis("hidden_size", config.hidden_size, "hidden_size"),
        DEPTH: Axis(DEPTH, config.num_layers, DEPTH),
    }
    return Scope(axes=axes, config=config, shards=getattr(config, "tensor_model_parallel_size", 1) or 1)


def vocabulary(module: nn.Module, scope: Scope) -> Fixed:
    """The rows of an embedding or output layer, of all tensor-parallel ranks together."""
    return Fixed(len(module.weight) * scope.shards)


@wraps(GPTModel)
class DynamicGPTModel(DynamicModule):
    """GPTModel: `output_layer` [vocab, hidden]; model-wide config fields follow."""

    def slices(self) -> Iterator[Slice]:
        head = getattr(self.module, "output_layer", None)
        if head is not None and has_tensor(head, "weight"):
            yield Slice(head, "weight", 0, vocabulary(head, self.scope))
            yield Slice(head, "weight", 1, self.scope.axes["hidden_size"])
        if head is not None and has_tensor(head, "bias"):
            yield Slice(head, "bias", 0, vocabulary(head, self.scope))

    def copies(self) -> Iterator[str]:
        """Copies of the embedding on a stage that is not the first: not counted.

        The output layer of a tied model is one; a stage with MTP heads has another for them.
        """
        if not self.module.pre_process:
            if self.module.share_embeddings_and_output_weights:
                yield "output_layer.weight"
            if getattr(self.module, "mtp_process", False):
                yield "embedding.word_embeddings.weight"

    def follows(self) -> Iterator[Follow]:
        hidden, depth = self.scope.axes["hidden_size"], self.scope.axes[DEPTH]
        yield Follow(self.scope.config, "hidden_size", hidden)
        yield Follow(self.scope.config, "num_layers", depth)
        head = getattr(self.module, "output_layer", None)
        if head is not None:
            yield from follow(head, ("in_features", "input_size"), hidden)

    def consumers(self) -> Iterator[Consumer]:
        head, stack = getattr(self.module, "output_layer", None), self.module.decoder
        norm = getattr(stack, "final_layernorm", None) or getattr(stack, "final_norm", None)
        tied = self.module.share_embeddings_and_output_weights
        if head is not None and norm is not None and has_tensor(head, "weight") and not tied:
            yield Consumer(head, "weight", self.scope.axes["hidden_size"], "output_layer", norm, "output")

    def children(self) -> Iterator[tuple[nn.Module, Scope]]:
        self.untouched = all_tensors(self.module, "rotary_pos_emb")
        for name, child in self.module.named_children():
            if name not in ("output_layer", "rotary_pos_emb"):
                yield child, self.scope.child(name)


@wraps(
    LanguageModelEmbedding,
    "megatron.bridge.models.gemma.gemma3_provider.Gemma3LanguageModelEmbedding",
)
class DynamicEmbedding(Leaf):
    """Word, learned position and token-type embeddings: [rows, hidden]."""

    def tables(self) -> Iterator[nn.Module]:
        for name in ("word_embeddings", "position_embeddings", "tokentype_embeddings"):
            table = getattr(self.module, name, None)
            if table is not None:
                yield table

    def slices(self) -> Iterator[Slice]:
        yield Slice(
            self.module.word_embeddings, "weight", 0, vocabulary(self.module.word_embeddings, self.scope)
        )
        for table in self.tables():
            yield Slice(table, "weight", 1, self.scope.axes["hidden_size"])

    def follows(self) -> Iterator[Follow]:
        for table in self.tables():
            yield from follow(table, ("embedding_dim",), self.scope.axes["hidden_size"])


@wraps(YarnRotaryEmbedding)
class DynamicYarn(Leaf):
    """Cached cosines and sines: positions by head channels, neither of them pruned."""

    def __init__(self, module, scope):
        super().__init__(module, scope)
        self.untouched = owned(module)


@wraps(TransformerBlock)
class DynamicTransformerBlock(DynamicModule):
    """The stack of layers and the final norm."""

    norm_name = "final_layernorm"

    def layers(self) -> Layers:
        numbers = [layer.layer_number - 1 for layer in self.module.layers]
        lists = list(patterns(self.scope.config, *self.pattern_owners()))
        return Layers(self.module, numbers, self.scope.axes[DEPTH], lists, reads_layer_number)

    def pattern_owners(self) -> tuple[nn.Module, ...]:
        """Modules that keep the hybrid pattern besides the configuration."""
        return ()

    def slices(self) -> Iterator[Slice]:
        yield from norm_slices(self._norm(), self.scope.axes["hidden_size"])

    def follows(self) -> Iterator[Follow]:
        yield from norm_follows(self._norm(), self.scope.axes["hidden_size"])

    def gains(self) -> Iterator[Gain]:
        yield from norm_gains(self._norm(), self.scope.axes["hidden_size"], self.scope, self.norm_name)

    def _norm(self) -> nn.Module | None:
        return getattr(self.module, self.norm_name, None)

    def children(self) -> Iterator[tuple[nn.Module, Scope]]:
        for place, layer in enumerate(self.module.layers):
            yield layer, self.scope.child(f"layers.{place}", layer=layer.layer_number - 1)


@wraps(TransformerLayer, MoETransformerLayer)
class DynamicTransformerLayer(DynamicModule):
    """Separate norms of a layer; attention and MLP have wrappers of their own."""

    norm_names: tuple[str, ...] = ("input_layernorm", "pre_mlp_layernorm")

    def _norms(self) -> Iterator[tuple[str, nn.Module]]:
        for name in self.norm_names:
            norm = getattr(self.module, name, None)
            if norm is not None and not isinstance(norm, IdentityOp):
                yield name, norm

    def slices(self) -> Iterator[Slice]:
        for _, norm in self._norms():
            yield from norm_slices(norm, self.scope.axes["hidden_size"])

    def follows(self) -> Iterator[Follow]:
        for _, norm in self._norms():
            yield from norm_follows(norm, self.scope.axes["hidden_size"])

    def gains(self) -> Iterator[Gain]:
        for name, norm in self._norms():
            yield from norm_gains(
                norm, self.scope.axes["hidden_size"], self.scope, f"{self.scope.place}.{name}"
            )

    def probes(self) -> Iterator[Probe]:
        reading = Reading(self.scope.axes["hidden_size"])
        for name, norm in self._norms():
            yield Probe(norm, "output", f"{self.scope.place}.{name}", (reading,))

    def children(self) -> Iterator[tuple[nn.Module, Scope]]:
        for name in ("cross_attention", "pre_cross_attn_layernorm"):
            if owned(getattr(self.module, name, None)):
                raise UserError(f"unsupported layer {self.scope.path}.{name}: cross attention")
        yield self.module.self_attention, self.scope.child("self_attention")
        yield self.module.mlp, self.scope.child("mlp")
