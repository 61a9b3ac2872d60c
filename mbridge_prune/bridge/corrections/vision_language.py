"""Vision-language models: the corrections of their language models, and the sections of their positions."""

from __future__ import annotations

from typing import Any

import transformers as hf
from megatron.bridge.models.gemma_vl.gemma3_vl_bridge import Gemma3VLBridge, Gemma3VLModel
from megatron.bridge.models.glm_vl.glm_45v_bridge import GLM45VBridge, GLM45VModel
from megatron.bridge.models.qwen_vl.qwen3_vl_bridge import Qwen3VLModel, Qwen3VLMoEBridge
from megatron.bridge.models.qwen_vl.qwen25_vl_bridge import Qwen25VLBridge, Qwen25VLModel

from mbridge_prune.bridge.corrections.common import (
    corrects,
    moe_pattern,
    require,
    require_v3_router,
    set_shared_size,
    set_windows,
)
from mbridge_prune.bridge.corrections.dense import set_gemma3_layers
from mbridge_prune.bridge.corrections.separate_experts import SeparateExperts

IMAGE_TOKENS = tuple(
    f"{kind}_{part}token_id" for kind in ("image", "video") for part in ("", "start_", "end_")
)


def set_mrope(provider: Any, config: Any) -> None:
    """How many channel pairs follow time, height and width."""
    provider.mrope_section = (config.rope_scaling or {}).get("mrope_section", provider.mrope_section)


@corrects(hf.Gemma3ForConditionalGeneration, Gemma3VLModel)
class Gemma3VL(Gemma3VLBridge):
    """As Gemma 3."""

    def provider_bridge(self, hf_pretrained: Any) -> Any:
        provider = super().provider_bridge(hf_pretrained)
        set_gemma3_layers(provider, hf_pretrained.config.text_config)
        return provider


@corrects(hf.Qwen2_5_VLForConditionalGeneration, Qwen25VLModel)
class Qwen25VL(Qwen25VLBridge):
    """`mrope_section` and `use_sliding_window` are not read."""

    def provider_bridge(self, hf_pretrained: Any) -> Any:
        provider, config = super().provider_bridge(hf_pretrained), hf_pretrained.config.text_config
        set_mrope(provider, config)
        set_windows(provider, config)
        return provider


@corrects(hf.Qwen3VLMoeForConditionalGeneration, Qwen3VLModel)
class Qwen3VLMoe(Qwen3VLMoEBridge):
    """`decoder_sparse_step` and `mlp_only_layers` are read and forgotten."""

    def provider_bridge(self, hf_pretrained: Any) -> Any:
        pattern = moe_pattern(hf_pretrained.config.text_config)
        require(all(pattern), "it builds an MoE in every layer, and this model has dense layers, too")
        return super().provider_bridge(hf_pretrained)


@corrects(hf.Glm4vMoeForConditionalGeneration, GLM45VModel)
class Glm4vMoe(SeparateExperts, GLM45VBridge):
    """`mrope_section` is not read, tokens of images are looked for in the wrong place, and zero
    multi-token-prediction layers are not none."""

    def provider_bridge(self, hf_pretrained: Any) -> Any:
        provider, config = super().provider_bridge(hf_pretrained), hf_pretrained.config.text_config
        for name in IMAGE_TOKENS:
            if hasattr(hf_pretrained.config, name):
                setattr(provider, name, getattr(hf_pretrained.config, name))
        set_mrope(provider, config)
        provider.mtp_num_layers = None
        set_shared_size(provider, config)
        require_v3_router(config)
        return provider
