"""What the corrected bridges of several families share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.models.conversion.param_mapping import AutoMapping, GatedMLPMapping
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.enums import AttnBackend

from mbridge_prune import runtime


def corrects(source: type | str, target: type = GPTModel) -> Callable[[type], type]:
    """Registers the class in the place of Megatron-Bridge's own bridge of that architecture."""
    return MegatronModelBridge.register_bridge(source=source, target=target)


def require(fits: bool, message: str) -> None:
    """Refuses a config; the message continues "Megatron-Bridge cannot import <path>: ..."."""
    if not fits:
        raise ValueError(message)


def free_attention_backend(provider: Any) -> None:
    """Without a GPU no backend is to be excluded; the choice would outlive this model in the environment."""
    if runtime.device().type == "cpu":
        provider.attention_backend = AttnBackend.auto


def set_windows(provider: Any, config: Any) -> None:
    """Sliding windows as transformers has them.

    `sliding_window` counts the query's own token, Megatron's left window does not; `layer_types`
    names the layers.
    """
    kinds = getattr(config, "layer_types", None)
    used = getattr(config, "use_sliding_window", True) and config.sliding_window
    if not used or (kinds and "sliding_attention" not in kinds):
        provider.window_size = None
        return
    provider.window_size = (config.sliding_window - 1, 0)
    if kinds:
        provider.window_attn_skip_freq = [int(kind == "sliding_attention") for kind in kinds]


class Windows:
    """A bridge that reads `sliding_window`, `use_sliding_window` and `layer_types`."""

    def provider_bridge(self, hf_pretrained: Any) -> Any:
        provider = super().provider_bridge(hf_pretrained)  # type: ignore[misc]
        set_windows(provider, hf_pretrained.config)
        return provider


def moe_pattern(config: Any) -> list[int]:
    """1 for an MoE layer, 0 for one that `decoder_sparse_step` or `mlp_only_layers` leaves dense."""
    step, dense = config.decoder_sparse_step, config.mlp_only_layers
    return [int(i not in dense and (i + 1) % step == 0) for i in range(config.num_hidden_layers)]


def require_v3_router(config: Any) -> None:
    """Megatron's sigmoid router always normalises, and ranks groups by the best top_k / topk_group scores."""
    require(config.norm_topk_prob, "Megatron's sigmoid router has no norm_topk_prob=False")
    if (config.n_group or 1) > 1:
        best = config.num_experts_per_tok // config.topk_group
        require(
            best == 2,
            f"Megatron ranks groups of experts by their {best} best scores, this model by the best 2",
        )


def set_shared_size(provider: Any, config: Any) -> None:
    """`n_shared_experts` says how many routed experts wide the shared one is."""
    provider.moe_shared_expert_intermediate_size = config.n_shared_experts * config.moe_intermediate_size


class DenseLayers:
    """A bridge that also maps the gated MLP of dense layers between MoE layers."""

    def mapping_registry(self) -> MegatronMappingRegistry:
        ours, theirs = "decoder.layers.*.mlp.linear_", "model.layers.*."
        return MegatronMappingRegistry(
            *super().mapping_registry(),  # type: ignore[misc]
            GatedMLPMapping(
                f"{ours}fc1.weight", gate=f"{theirs}mlp.gate_proj.weight", up=f"{theirs}mlp.up_proj.weight"
            ),
            AutoMapping(f"{ours}fc2.weight", f"{theirs}mlp.down_proj.weight"),
            AutoMapping(f"{ours}fc1.layer_norm_weight", f"{theirs}post_attention_layernorm.weight"),
        )
