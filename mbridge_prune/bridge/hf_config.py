"""The pruned model's Hugging Face config: every field that follows a size, and per-layer lists."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

FIELDS = {
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "ffn_hidden_size": ("intermediate_size", "n_inner", "ffn_dim"),
    "num_attention_heads": ("num_attention_heads", "n_head"),
    "num_query_groups": ("num_key_value_heads",),
    "num_layers": ("num_hidden_layers", "n_layer"),
    "kv_channels": ("head_dim",),
}
"""Megatron's field -> the names Hugging Face configs use for it."""


def pruned_hf_config(original: Any, megatron: Any, layers_kept: Sequence[int]) -> Any:
    """A copy of `original` that describes the pruned Megatron model.

    Args:
        original: the PretrainedConfig of the unpruned model.
        megatron: the pruned model's Megatron configuration.
        layers_kept: global numbers (from 0) of the layers that remain.
    """
    config = copy.deepcopy(original)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    layers_before = text.num_hidden_layers
    for field, names in FIELDS.items():
        value = getattr(megatron, field, None)
        if value is None:
            continue
        for name in names:
            if name == "head_dim":
                # Without this field, transformers would derive it from the pruned sizes.
                implied = megatron.hidden_size // megatron.num_attention_heads
                if getattr(text, name, None) is not None or implied != value:
                    setattr(text, name, value)
            elif getattr(text, name, None) is not None:
                setattr(text, name, value)
    for name, value in list(text.to_dict().items()):
        if name == "architectures" or name.endswith("_token_id"):
            continue  # lists that are not per layer, whatever their length
        if isinstance(value, list) and len(value) == layers_before:
            setattr(text, name, [value[i] for i in layers_kept])
    if getattr(text, "max_window_layers", None) is not None:
        # Qwen2: the layers from this number on use the sliding window.
        text.max_window_layers = sum(i < text.max_window_layers for i in layers_kept)
    config.torch_dtype = megatron.params_dtype
    return config
