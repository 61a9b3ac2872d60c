"""The root and the frame of Megatron's GPT: embeddings, the stack of layers, norms, output layer."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import nn

from mbridge_prune.dynamic import DEPTH, Axis, DynamicModule, Follow, Layers, Probe, Scope, Slice, wraps
from mbridge_prune.errors import UserError
from mbridge_prune.mcore.linear import Leaf, follow, has_tensor, norm_follows, norm_slices, owned


def root_scope(model: nn.Module) -> Scope:
    """The scope of a Megatron language model: its model-wide axes.

    Sizes come from the configuration, so that every pipeline stage makes equal axes.
    """
    config = model.config
    axes = {
        "hidden_size": Axis("hidden_size", config.hidden_size, "hidden_size"),
        DEPTH: Axis(DEPTH, config.num_layers, DEPTH),
    }
    return Scope(axes=axes, config=config)


@wraps(GPTModel)
class DynamicGPTModel(DynamicModule):
    """GPTModel: `output_layer` [vocab, hidden]; model-wide config fields follow."""

    def slices(self) -> Iterator[Slice]:
        head = getattr(self.module, "output_layer", None)
        if head is not None and has_tensor(head, "weight"):
            yield Slice(head, "weight", 1, self.scope.axes["hidden_size"])

    def copies(self) -> Iterator[str]:
        """The last stage of a tied model holds a second copy of the embedding: not counted."""
        if self.module.share_embeddings_and_output_weights and not self.module.pre_process:
            yield "output_layer.weight"

    def follows(self) -> Iterator[Follow]:
        hidden, depth = self.scope.axes["hidden_size"], self.scope.axes[DEPTH]
        yield Follow(self.scope.config, "hidden_size", hidden)
        yield Follow(self.scope.config, "num_layers", depth)
        head = getattr(self.module, "output_layer", None)
        if head is not None:
            yield from follow(head, ("in_features", "input_size"), hidden)

    def children(self) -> Iterator[tuple[nn.Module, Scope]]:
        if getattr(self.module, "mtp", None) is not None:
            raise UserError(
                "unsupported layer mtp: multi-token prediction heads are not prunable; "
                "load the model with provider_overrides mtp_num_layers=None"
            )
        head = getattr(self.module, "output_layer", None)
        self.untouched = ("output_layer.bias",) if head is not None else ()
        for name, child in self.module.named_children():
            if name != "output_layer":
                yield child, self.scope.child(name)


@wraps(LanguageModelEmbedding)
class DynamicEmbedding(Leaf):
    """Word, learned position and token-type embeddings: [rows, hidden]."""

    def tables(self) -> Iterator[nn.Module]:
        for name in ("word_embeddings", "position_embeddings", "tokentype_embeddings"):
            table = getattr(self.module, name, None)
            if table is not None:
                yield table

    def slices(self) -> Iterator[Slice]:
        for table in self.tables():
            yield Slice(table, "weight", 1, self.scope.axes["hidden_size"])

    def follows(self) -> Iterator[Follow]:
        for table in self.tables():
            yield from follow(table, ("embedding_dim",), self.scope.axes["hidden_size"])


@wraps(TransformerBlock)
class DynamicTransformerBlock(DynamicModule):
    """The stack of layers and the final norm."""

    def layers(self) -> Layers:
        numbers = [layer.layer_number - 1 for layer in self.module.layers]
        return Layers(self.module, numbers, self.scope.axes[DEPTH])

    def slices(self) -> Iterator[Slice]:
        yield from norm_slices(self._norm(), self.scope.axes["hidden_size"])

    def follows(self) -> Iterator[Follow]:
        yield from norm_follows(self._norm(), self.scope.axes["hidden_size"])

    def _norm(self) -> nn.Module:
        norm = getattr(self.module, "final_layernorm", None)
        return nn.Identity() if norm is None else norm

    def children(self) -> Iterator[tuple[nn.Module, Scope]]:
        for place, layer in enumerate(self.module.layers):
            yield layer, self.scope.child(f"layers.{place}", layer=layer.layer_number - 1)


@wraps(TransformerLayer)
class DynamicTransformerLayer(DynamicModule):
    """Separate norms of a layer; attention and MLP have wrappers of their own."""

    def _norms(self) -> Iterator[tuple[str, nn.Module]]:
        for name in ("input_layernorm", "pre_mlp_layernorm"):
            norm = getattr(self.module, name, None)
            if norm is not None and not isinstance(norm, IdentityOp):
                yield name, norm

    def slices(self) -> Iterator[Slice]:
        for _, norm in self._norms():
            yield from norm_slices(norm, self.scope.axes["hidden_size"])

    def follows(self) -> Iterator[Follow]:
        for _, norm in self._norms():
            yield from norm_follows(norm, self.scope.axes["hidden_size"])

    def probes(self) -> Iterator[Probe]:
        for name, norm in self._norms():
            place = f"layers.{self.scope.layer}.{name}"
            yield Probe(self.scope.axes["hidden_size"], norm, "output", place)

    def children(self) -> Iterator[tuple[nn.Module, Scope]]:
        for name in ("cross_attention", "pre_cross_attn_layernorm"):
            if owned(getattr(self.module, name, None)):
                raise UserError(f"unsupported layer {self.scope.path}.{name}: cross attention")
        yield self.module.self_attention, self.scope.child("self_attention")
        yield self.module.mlp, self.scope.child("mlp")


def after_depth(model: nn.Module, stage_layers: list[int]) -> None:
    """Tells Megatron how many layers each pipeline stage holds now.

    Args:
        stage_layers: layers of every stage, in stage order.
    """
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    config = model.config
    if len(stage_layers) > 1:
        stages = [["decoder"] * n for n in stage_layers]
        stages[0].insert(0, "embedding")
        stages[-1].append("loss")
        layout = PipelineParallelLayerLayout(stages, len(stage_layers))
        config.pipeline_model_parallel_layout = layout
        config.num_layers_in_first_pipeline_stage = None
        config.num_layers_in_last_pipeline_stage = None
