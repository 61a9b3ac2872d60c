"""Qwen, Mistral and Gemma: sliding windows, and Gemma's norms."""

from __future__ import annotations

import copy
from typing import Any

import transformers as hf
from megatron.bridge.models.gemma import gemma2_provider, gemma3_provider
from megatron.bridge.models.gemma.gemma2_bridge import Gemma2Bridge
from megatron.bridge.models.gemma.gemma3_bridge import Gemma3ModelBridge
from megatron.bridge.models.gemma.gemma_bridge import GemmaBridge
from megatron.bridge.models.mistral.mistral_bridge import MistralBridge
from megatron.bridge.models.qwen.qwen2_bridge import Qwen2Bridge
from megatron.bridge.models.qwen.qwen3_bridge import Qwen3Bridge
from megatron.core.transformer.utils import is_layer_window_attention
from torch import nn

from mbridge_prune.bridge.corrections.common import Windows, corrects, free_attention_backend, require


@corrects(hf.Qwen2ForCausalLM)
class Qwen2(Windows, Qwen2Bridge):
    """`use_sliding_window` is not read."""


@corrects(hf.Qwen3ForCausalLM)
class Qwen3(Windows, Qwen3Bridge):
    """`use_sliding_window` is not read."""


@corrects(hf.MistralForCausalLM)
class Mistral(Windows, MistralBridge):
    """The window is one token too wide."""


@corrects(hf.GemmaForCausalLM)
class Gemma(GemmaBridge):
    def provider_bridge(self, hf_pretrained: Any) -> Any:
        provider = super().provider_bridge(hf_pretrained)
        free_attention_backend(provider)
        return provider


POST_NORMS = (gemma2_provider.TERowParallelLinearLayerNorm, gemma3_provider.TERowParallelLinearLayerNorm)


def correct_gemma_layers(chunks: list[nn.Module]) -> list[nn.Module]:
    """Gives Gemma 2's attention its windows and the norms behind Gemma 2's and 3's blocks their epsilon.

    Megatron-Bridge puts the window into the other half of the layers, applies it only where a mask is
    passed in, and leaves these norms at 1e-5.
    """
    for module in (module for chunk in chunks for module in chunk.modules()):
        if isinstance(module, POST_NORMS):
            module.post_layernorm.eps = module.config.layernorm_epsilon
        if isinstance(module, gemma2_provider.Gemma2DotProductAttention):
            config, softmax = module.config, module.scale_mask_softmax
            module.window_size = None
            if is_layer_window_attention(
                config.window_size, config.window_attn_skip_freq, module.layer_number
            ):
                softmax.window_size, softmax.scaled_masked_softmax_fusion = config.window_size, False
    return chunks


@corrects(hf.Gemma2ForCausalLM)
class Gemma2(Windows, Gemma2Bridge):
    """See `correct_gemma_layers`; the window is one token too wide, too."""

    def provider_bridge(self, hf_pretrained: Any) -> Any:
        provider = super().provider_bridge(hf_pretrained)
        provider.register_pre_wrap_hook(correct_gemma_layers)
        return provider


def set_gemma3_layers(provider: Any, config: Any) -> None:
    """One token less, as for the others; the pattern is fixed in Megatron-Bridge's modules."""
    free_attention_backend(provider)
    provider.register_pre_wrap_hook(correct_gemma_layers)
    provider.window_size = config.sliding_window - 1
    local, whole = provider.interleaved_attn_pattern
    kinds = ["full_attention" if (i + 1) % (local + whole) == 0 else "sliding_attention"
             for i in range(config.num_hidden_layers)]  # fmt: skip
    require(
        list(config.layer_types) == kinds,
        f"it has {local} sliding and {whole} full attention layer of Gemma 3 in turn, and this model's "
        "layer_types differ",
    )


@corrects(hf.Gemma3ForCausalLM)
class Gemma3(Gemma3ModelBridge):
    """The window is one token too wide; a config without a folder is not read."""

    def provider_bridge(self, hf_pretrained: Any) -> Any:
        if not hasattr(hf_pretrained, "_model_name_or_path"):
            hf_pretrained = copy.copy(hf_pretrained)
            hf_pretrained._model_name_or_path = hf_pretrained.config.name_or_path
        provider = super().provider_bridge(hf_pretrained)
        set_gemma3_layers(provider, hf_pretrained.config)
        return provider
