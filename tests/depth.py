"""Models whose layers differ, by every kind of per-layer pattern, and what their patterns become."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from masks import language_stack
from transformers import PreTrainedModel

SLIDING, FULL, LINEAR = "sliding_attention", "full_attention", "linear_attention"


@dataclass(frozen=True)
class Depth:
    """A model of several kinds of layers, of which the `weak` ones shall go.

    Args:
        changes: of the Hugging Face config.
        overrides: of the Megatron provider.
        megatron: fields of the pruned Megatron config.
        hf: fields of the exported config.
        rebuilds: False where Megatron-Bridge cannot import the export again.
    """

    family: str
    layers: int
    weak: tuple[int, ...]
    megatron: dict[str, Any]
    hf: dict[str, Any]
    changes: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)
    rebuilds: bool = True

    @property
    def kept(self) -> list[int]:
        return [i for i in range(self.layers) if i not in self.weak]

    @property
    def all_changes(self) -> dict[str, Any]:
        own = {} if "hybrid_override_pattern" in self.changes else {"num_hidden_layers": self.layers}
        return {**own, **self.changes}


DEPTHS = {
    "first_k_dense_replace": Depth(
        "deepseek_v3", 6, (1, 4), {"moe_layer_freq": [0, 0, 1, 1]}, {"first_k_dense_replace": 2},
        {"first_k_dense_replace": 3}),
    "first_k_dense_replace-none_left": Depth(
        "glm4_moe", 4, (0, 1), {"moe_layer_freq": [1, 1]}, {"first_k_dense_replace": 0}),
    "mlp_only_layers": Depth(
        "qwen3_moe_mixed", 6, (2, 4), {"moe_layer_freq": [0, 1, 0, 1]}, {"mlp_only_layers": [0, 2]},
        {"mlp_only_layers": [0, 2, 3]}),
    "mlp_only_layers-no_experts_left": Depth(
        "qwen3_moe_mixed", 5, (1, 4), {"moe_layer_freq": [0, 0, 0]}, {"mlp_only_layers": [0, 1, 2]},
        {"mlp_only_layers": [0, 2, 3]}),
    "decoder_sparse_step": Depth(
        "qwen3_moe_mixed", 6, (1, 4), {"moe_layer_freq": [0, 0, 1, 1]},
        {"mlp_only_layers": [0, 1], "decoder_sparse_step": 1},
        {"mlp_only_layers": [], "decoder_sparse_step": 2}),
    "moe_layer_freq-int": Depth(
        "qwen3_moe_mixed", 6, (1,), {"moe_layer_freq": [1, 1, 0, 1, 0]}, {"mlp_only_layers": [2, 4]},
        {"mlp_only_layers": [1, 3, 5]}, {"moe_layer_freq": 2}),
    "layer_types": Depth(
        "gpt_oss", 6, (2,), {"window_attn_skip_freq": [1, 0, 0, 1, 0]},
        {"layer_types": [SLIDING, FULL, FULL, SLIDING, FULL]}),
    "window_attn_skip_freq-int": Depth(
        "gpt_oss", 6, (1, 4), {"window_attn_skip_freq": [1, 1, 0, 0]},
        {"layer_types": [SLIDING, SLIDING, FULL, FULL]}, overrides={"window_attn_skip_freq": 2}),
    "max_window_layers": Depth(
        "qwen2_window", 6, (1, 4), {"window_attn_skip_freq": [0, 0, 0, 1]},
        {"max_window_layers": 3, "layer_types": [FULL, FULL, FULL, SLIDING]}, {"max_window_layers": 4}),
    "linear_attention_freq": Depth(
        "qwen3_next", 6, (2, 5), {"linear_attention_freq": [1, 0, 0, 1], "moe_layer_freq": [0, 1, 0, 1]},
        {"layer_types": [LINEAR, FULL, FULL, LINEAR], "mlp_only_layers": [0, 2]}),
    "linear_attention_freq-int": Depth(
        "qwen3_next", 6, (3,), {"linear_attention_freq": [1, 0, 1, 1, 0]},
        {"layer_types": [LINEAR, FULL, LINEAR, LINEAR, FULL]}, overrides={"linear_attention_freq": 2}),
    "hybrid_override_pattern": Depth(
        "nemotron_h_moe", 10, (2, 3, 8), {"hybrid_override_pattern": "M-MEM*-"},
        {"hybrid_override_pattern": "M-MEM*-"}, {"hybrid_override_pattern": "M-M*MEM*E-"}),
    "hybrid_override_pattern-no_attention_left": Depth(
        "nemotron_h", 5, (1, 3), {"hybrid_override_pattern": "MM-"},
        {"hybrid_override_pattern": "MM-"}, {"hybrid_override_pattern": "M*M*-"}),
    "gemma2": Depth(
        "gemma2", 6, (1, 2), {"window_attn_skip_freq": [1, 0, 1, 0]}, {"layer_types": [SLIDING, FULL, SLIDING, FULL]}),
    "gemma2-out_of_step": Depth(
        "gemma2", 6, (2,), {"window_attn_skip_freq": [1, 0, 0, 1, 0]},
        {"layer_types": [SLIDING, FULL, FULL, SLIDING, FULL]}),
    "gemma3": Depth(
        "gemma3", 8, (2,), {}, {"layer_types": [*[SLIDING] * 4, FULL, *[SLIDING] * 2]}, rebuilds=False),
    "gemma3-whole_periods": Depth(
        "gemma3", 8, (6,), {}, {"layer_types": [*[SLIDING] * 5, FULL, SLIDING]}),
}  # fmt: skip


def weaken(layers: tuple[int, ...]) -> Callable[[PreTrainedModel], None]:
    """An edit after which these layers add next to nothing to the hidden state."""

    def edit(model: PreTrainedModel) -> None:
        for number in layers:
            for name, p in language_stack(model).layers[number].named_parameters():
                gemma = model.config.model_type.startswith("gemma")
                if gemma and name.startswith("post_"):  # the norm comes behind the projection
                    p.copy_(0.001 * (1 + p) - 1)
                elif any(part in name for part in ("o_proj", "out_proj", "down_proj")):
                    p.mul_(0.001)

    return edit
