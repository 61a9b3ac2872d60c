"""Megatron-Bridge's own variants of Megatron-core's layers, by name: it need not be imported for them."""

from __future__ import annotations

from mbridge_prune.dynamic import ignores, wraps
from mbridge_prune.mcore.attention import DynamicSelfAttention, DynamicWideNormAttention
from mbridge_prune.mcore.gpt import DynamicGPTModel, DynamicTransformerBlock

MODELS = "megatron.bridge.models"

wraps(f"{MODELS}.gemma.gemma3_provider.Gemma3SelfAttention")(DynamicSelfAttention)
wraps(f"{MODELS}.olmoe.olmoe_provider.OLMoESelfAttention")(DynamicWideNormAttention)
wraps(f"{MODELS}.qwen_vl.modelling_qwen3_vl.text_model.Qwen3VLGPTModel")(DynamicGPTModel)
wraps(f"{MODELS}.qwen_vl.modelling_qwen3_vl.transformer_block.Qwen3VLTransformerBlock")(
    DynamicTransformerBlock
)
# Gemma 1 and 2 scale the embedding by sqrt(hidden_size), read from the configuration at every call.
ignores(f"{MODELS}.gemma.modules.EmbeddingScalingMixin")
