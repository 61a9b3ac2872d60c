"""The pruned model's Hugging Face config: every field that follows a size, and per-layer patterns."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mbridge_prune.errors import UserError

FIELDS = {
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "ffn_hidden_size": ("intermediate_size", "n_inner", "ffn_dim"),
    "num_attention_heads": ("num_attention_heads", "n_head"),
    "num_query_groups": ("num_key_value_heads",),
    "num_layers": ("num_hidden_layers", "n_layer"),
    "kv_channels": ("head_dim",),
    "mamba_num_heads": ("mamba_num_heads",),
    "mamba_head_dim": ("mamba_head_dim",),
    "num_moe_experts": ("num_experts", "n_routed_experts", "num_local_experts"),
    "moe_ffn_hidden_size": ("moe_intermediate_size",),
    "moe_shared_expert_intermediate_size": (
        "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size",
    ),
}  # fmt: skip
"""Megatron's field -> the names Hugging Face configs use for it."""

SHARED_COUNT = "n_shared_experts"
"""Where the shared expert's size is so many times `moe_intermediate_size` (DeepSeek, GLM, Kimi)."""

NOT_PER_LAYER = ("architectures", "time_step_limit")
"""Lists that say nothing of single layers, whatever their length."""
PREDICTION_HEADS = "num_nextn_predict_layers"

Keep = Callable[[Any, Sequence[int], int], Any]


def pruned_hf_config(original: Any, megatron: Any, layers_kept: Sequence[int]) -> Any:
    """A copy of `original` that describes the pruned Megatron model.

    Args:
        original: the PretrainedConfig of the unpruned model.
        megatron: the pruned model's Megatron configuration.
        layers_kept: global numbers (from 0) of the layers that remain.
    """
    config = copy.deepcopy(original)
    text = text_config(config)
    layers_before = text.num_hidden_layers
    for field, names in FIELDS.items():
        value = getattr(megatron, field, None)
        if value is None or (field == "ffn_hidden_size" and experts_only(text)):
            continue
        for name in names:
            if name == "head_dim":
                _set_head_dim(text, megatron, value)
            elif getattr(text, name, None) is not None:
                _set(text, name, value)
    if experts_only(text):
        _set(text, "intermediate_size", megatron.moe_ffn_hidden_size)
    if derives_shared_size(text):
        _set(text, SHARED_COUNT, megatron.moe_shared_expert_intermediate_size // megatron.moe_ffn_hidden_size)
    if len(layers_kept) < layers_before:
        _keep_layers(text, layers_kept, layers_before)
    if lost_prediction_heads(config, megatron):
        _set(text, PREDICTION_HEADS, getattr(megatron, "mtp_num_layers", None) or 0)
    config.torch_dtype = megatron.params_dtype
    return config


def text_config(config: Any) -> Any:
    """The part of a config that describes the language model."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def experts_only(text: Any) -> bool:
    """True where `intermediate_size` is the experts' size: no dense layers (OLMoE, gpt-oss)."""
    names = FIELDS["num_moe_experts"]
    has_experts = any(getattr(text, name, None) for name in names)
    return has_experts and getattr(text, FIELDS["moe_ffn_hidden_size"][0], None) is None


def derives_shared_size(text: Any) -> bool:
    """True where the shared expert's size is `n_shared_experts` times the size of a routed one."""
    has_own = any(getattr(text, n, None) for n in FIELDS["moe_shared_expert_intermediate_size"])
    return bool(getattr(text, SHARED_COUNT, None)) and not has_own


def check_shared_size(config: Any, sizes: Mapping[str, int]) -> None:
    """Refuses a shared expert that is no whole number of routed ones where the config counts it so.

    Args:
        sizes: every hparam of the model and its size.
    """
    text = text_config(config)
    expert, shared = sizes.get("moe_ffn_hidden_size"), sizes.get("moe_shared_expert_intermediate_size")
    if expert and shared and derives_shared_size(text) and shared % expert:
        raise UserError(
            f"moe_shared_expert_intermediate_size={shared} is no multiple of moe_ffn_hidden_size={expert}: "
            f"{_name(config)} says it as {SHARED_COUNT} times that; give "
            f"moe_shared_expert_intermediate_size={getattr(text, SHARED_COUNT) * expert}"
        )


def _name(config: Any) -> str:
    return (getattr(config, "architectures", None) or [type(config).__name__])[0]


def _set(text: Any, name: str, value: Any) -> None:
    try:
        setattr(text, name, value)
    except AttributeError as error:  # a property of the config class, derived from other fields
        if getattr(text, name) != value:
            raise UserError(f"{type(text).__name__}.{name} cannot be set to {value}: {error}") from error


def _set_head_dim(text: Any, megatron: Any, value: int) -> None:
    if getattr(megatron, "multi_latent_attention", False):
        return  # its head sizes have names of their own
    # Without this field, transformers would derive it from the pruned sizes.
    implied = megatron.hidden_size // megatron.num_attention_heads
    if getattr(text, "head_dim", None) is not None or implied != value:
        _set(text, "head_dim", value)


def _keep_layers(text: Any, kept: Sequence[int], before: int) -> None:
    """Everything that says what a layer is: lists, strings, counts of leading layers, layer numbers."""
    for name, value in list(text.to_dict().items()):
        if name in NOT_PER_LAYER or name.endswith("_token_id") or name in LAYER_FIELDS:
            continue
        if isinstance(value, list) and len(value) == before:
            _set(text, name, [value[i] for i in kept])
    for name, keep in LAYER_FIELDS.items():
        if getattr(text, name, None) is not None:
            _set(text, name, keep(getattr(text, name), kept, before))
    if getattr(text, "decoder_sparse_step", 1) not in (None, 1):
        # Qwen: every so many layers have experts; what is left says it layer by layer.
        step = text.decoder_sparse_step
        dense = {new for new, old in enumerate(kept) if (old + 1) % step}
        text.mlp_only_layers = sorted(dense | set(text.mlp_only_layers or ()))
        text.decoder_sparse_step = 1


def _leading(value: int, kept: Sequence[int], before: int) -> int:
    return sum(i < value for i in kept)


def _numbers(value: Sequence[int], kept: Sequence[int], before: int) -> list[int]:
    return [new for new, old in enumerate(kept) if old in set(value)]


def _symbols(value: str, kept: Sequence[int], before: int) -> str:
    layers = value.replace("|", "")  # Megatron-LM's pipeline separators
    return "".join(layers[i] for i in kept)


LAYER_FIELDS: dict[str, Keep] = {
    "max_window_layers": _leading,  # Qwen2: the layers from this number on use the window
    "first_k_dense_replace": _leading,  # DeepSeek, GLM: so many leading layers are dense
    "mlp_only_layers": _numbers,  # Qwen-MoE: these layers are dense
    "hybrid_override_pattern": _symbols,  # Nemotron-H
}
"""Fields that say what layers are, other than by a list of the model's length."""


def lost_prediction_heads(config: Any, megatron: Any) -> int:
    """Multi-token-prediction heads of the checkpoint that the Megatron model does not have."""
    said = getattr(text_config(config), PREDICTION_HEADS, None) or 0
    return max(0, said - (getattr(megatron, "mtp_num_layers", None) or 0))
