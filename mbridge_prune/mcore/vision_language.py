"""Vision-language models: the language tower is pruned, everything else stays as it is."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from mbridge_prune.dynamic import DynamicModule, Scope, Sizes, wraps
from mbridge_prune.errors import UserError
from mbridge_prune.mcore.linear import owned

MODELS = "megatron.bridge.models"
TOWER = "language_model"


def language_model(model: nn.Module) -> nn.Module:
    """The language tower of a vision-language model; the model itself otherwise."""
    return getattr(model, TOWER, model)


@wraps(
    f"{MODELS}.qwen_vl.modeling_qwen25_vl.Qwen25VLModel",
    f"{MODELS}.qwen_vl.modelling_qwen3_vl.model.Qwen3VLModel",
    f"{MODELS}.gemma_vl.modeling_gemma3_vl.Gemma3VLModel",
    f"{MODELS}.glm_vl.modeling_glm_45v.GLM45VModel",
    f"{MODELS}.ministral3.modeling_ministral3.Ministral3Model",
)
class DynamicVisionLanguage(DynamicModule):
    """Vision tower and projector are untouched; they write `hidden_size`, which therefore stays."""

    def __init__(self, module, scope):
        super().__init__(module, scope)
        outside = [name for name in owned(module) if not name.startswith(f"{TOWER}.")]
        self.untouched = tuple(outside)

    def check(self, sizes: Sizes) -> None:
        full = self.scope.axes["hidden_size"].size
        if sizes["hidden_size"] != full:
            raise UserError(
                f"hidden_size={sizes['hidden_size']}: the vision projector of {type(self.module).__name__} "
                f"writes {full} channels and is not pruned; keep hidden_size and prune its other dimensions"
            )

    def children(self) -> Iterator[tuple[nn.Module, Scope]]:
        yield self.module.language_model, self.scope.child(TOWER)
