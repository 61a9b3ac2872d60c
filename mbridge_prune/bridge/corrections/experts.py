"""Mixtures of experts: routers, dense layers between MoE layers, windows, multi-token prediction."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import transformers as hf
from megatron.bridge.models.deepseek.deepseek_v2_bridge import DeepSeekV2Bridge
from megatron.bridge.models.deepseek.deepseek_v3_bridge import DeepSeekV3Bridge
from megatron.bridge.models.glm.glm45_bridge import GLM45Bridge
from megatron.bridge.models.gpt_oss.gpt_oss_bridge import GPTOSSBridge
from megatron.bridge.models.gpt_oss.gpt_oss_provider import GPTOSSProvider
from megatron.bridge.models.olmoe.olmoe_bridge import OlMoEBridge
from megatron.bridge.models.qwen.qwen3_moe_bridge import Qwen3MoEBridge
from megatron.bridge.models.qwen.qwen3_next_bridge import Qwen3NextBridge
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

from mbridge_prune.bridge.corrections.common import (
    DenseLayers,
    Windows,
    corrects,
    moe_pattern,
    require,
    require_v3_router,
    set_shared_size,
)
from mbridge_prune.bridge.corrections.separate_experts import SeparateExperts

log = logging.getLogger("mbridge_prune")


@corrects(hf.GptOssForCausalLM)
class GptOss(Windows, GPTOSSBridge):
    """The window is fixed at 129 tokens in every other layer, and YaRN's numbers are fixed, too.

    The provider with fields for these numbers, which a Megatron checkpoint would lose otherwise.
    """

    PROVIDER_CLASS = GPTOSSProvider

    def provider_bridge(self, hf_pretrained: Any) -> Any:
        provider = super().provider_bridge(hf_pretrained)
        scaling = hf_pretrained.config.rope_scaling or {"factor": 1.0}
        for name, field in [
            *self.YARN_ROPE_SCALING_MAPPING,
            ("truncate", "yarn_correction_range_round_to_int"),
        ]:
            if name in scaling:
                setattr(provider, field, scaling[name])
        return provider


@corrects(hf.OlmoeForCausalLM)
class Olmoe(SeparateExperts, OlMoEBridge):
    """`norm_topk_prob` and `clip_qkv` are not read."""

    def provider_bridge(self, hf_pretrained: Any) -> Any:
        provider, config = super().provider_bridge(hf_pretrained), hf_pretrained.config
        require(config.clip_qkv is None, "Megatron has no clip_qkv")
        provider.moe_router_pre_softmax = not config.norm_topk_prob
        return provider


@corrects(hf.Qwen3MoeForCausalLM)
class Qwen3Moe(Windows, SeparateExperts, DenseLayers, Qwen3MoEBridge):
    """`norm_topk_prob`, `decoder_sparse_step` and `mlp_only_layers` are not read."""

    def provider_bridge(self, hf_pretrained: Any) -> Any:
        provider, config = super().provider_bridge(hf_pretrained), hf_pretrained.config
        provider.moe_router_pre_softmax = not config.norm_topk_prob
        provider.moe_layer_freq = moe_pattern(config)
        if not all(provider.moe_layer_freq):
            provider.transformer_layer_spec = partial(get_gpt_decoder_block_spec, use_transformer_engine=True)
        return provider


@corrects(hf.Qwen3NextForCausalLM)
class Qwen3Next(SeparateExperts, DenseLayers, Qwen3NextBridge):
    """`layer_types`, `norm_topk_prob`, `decoder_sparse_step` and `mlp_only_layers` are not read."""

    def provider_bridge(self, hf_pretrained: Any) -> Any:
        config = hf_pretrained.config
        if not hasattr(config, "full_attention_interval"):
            config.full_attention_interval = 4
        provider = super().provider_bridge(hf_pretrained)
        provider.linear_attention_freq = [int(kind == "linear_attention") for kind in config.layer_types]
        provider.moe_router_pre_softmax = not config.norm_topk_prob
        provider.moe_layer_freq = moe_pattern(config)
        return provider


@corrects("DeepseekV2ForCausalLM")
class DeepSeekV2(SeparateExperts, DeepSeekV2Bridge):
    """A missing `q_lora_rank` becomes 512, and `topk_method` is not read."""

    def provider_bridge(self, hf_pretrained: Any) -> Any:
        provider, config = super().provider_bridge(hf_pretrained), hf_pretrained.config
        provider.q_lora_rank = config.q_lora_rank
        if config.topk_method == "greedy":
            provider.moe_router_num_groups = provider.moe_router_group_topk = None
        elif (best := config.num_experts_per_tok // config.topk_group) != 1:
            log.warning(
                "Megatron ranks groups of experts by the sum of their %d best scores, DeepSeek-V2 by the "
                "best one: a few tokens see other experts than in transformers",
                best,
            )
        return provider


@corrects("DeepseekV3ForCausalLM")
class DeepSeekV3(SeparateExperts, DeepSeekV3Bridge):
    """A missing `q_lora_rank` becomes 512, and without `scoring_func` the router is a softmax."""

    def provider_bridge(self, hf_pretrained: Any) -> Any:
        provider, config = super().provider_bridge(hf_pretrained), hf_pretrained.config
        provider.q_lora_rank = config.q_lora_rank
        provider.moe_router_score_function = "sigmoid"
        require_v3_router(config)
        return provider


@corrects(hf.Glm4MoeForCausalLM)
class Glm4Moe(SeparateExperts, GLM45Bridge):
    """Zero multi-token-prediction layers are not none, and those that are not there are not loaded."""

    def provider_bridge(self, hf_pretrained: Any) -> Any:
        provider, config = super().provider_bridge(hf_pretrained), hf_pretrained.config
        first = f"model.layers.{config.num_hidden_layers}.eh_proj.weight"
        absent = hasattr(hf_pretrained, "state") and first not in hf_pretrained.state.source.get_all_keys()
        provider.mtp_num_layers = None if absent else provider.mtp_num_layers or None
        set_shared_size(provider, config)
        require_v3_router(config)
        return provider
