"""Tiny configs of the mixture-of-experts, latent-attention, hybrid and vision-language families.

Each mixes every kind of layer that its architecture has. The models of a vision-language family carry a
tiny vision tower; our tests read text through them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4MoeConfig,
    Glm4vMoeConfig,
    GptOssConfig,
    MistralConfig,
    OlmoeConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
)

EXPERTS = 9
MOE = {"num_experts_per_tok": 4, "moe_intermediate_size": 32}
MLA = {
    "num_key_value_heads": 8, "kv_lora_rank": 24, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8,
    "v_head_dim": 16, "n_routed_experts": EXPERTS,
}  # fmt: skip
YARN = {
    "type": "yarn", "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16,
    "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.707,
}  # fmt: skip
GLM = {
    **MOE, "head_dim": 16, "partial_rotary_factor": 0.5, "attention_bias": True, "n_routed_experts": EXPERTS,
    "n_shared_experts": 1, "first_k_dense_replace": 2, "routed_scaling_factor": 2.5,
}  # fmt: skip
GEMMA = {"head_dim": 16, "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh"}
GEMMA3 = {**GEMMA, "sliding_window": 5, "query_pre_attn_scalar": 24, "num_hidden_layers": 7}
VISION = {"hidden_size": 32, "intermediate_size": 48}
TOWER = {**VISION, "depth": 2, "num_heads": 4, "out_hidden_size": 64}
IMAGES = {
    "image_token_id": 120, "video_token_id": 121, "vision_start_token_id": 122, "vision_end_token_id": 123
}  # fmt: skip


def mrope(*section: int) -> dict[str, Any]:
    return {"rope_scaling": {"rope_type": "default", "mrope_section": list(section)}}


def with_vision(
    cls: type[PretrainedConfig], vision: dict[str, Any], **own: Any
) -> Callable[..., PretrainedConfig]:
    """A builder that takes the language model's settings and adds the vision tower's."""

    def build(**text: Any) -> PretrainedConfig:
        tied = text.get("tie_word_embeddings", False)
        return cls(text_config=text, vision_config=dict(vision), tie_word_embeddings=tied, **own)

    return build


CONFIGS: dict[str, tuple[Callable[..., PretrainedConfig], dict[str, Any]]] = {
    "qwen2_window": (Qwen2Config, {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
    "mistral_window": (MistralConfig, {"head_dim": 16, "sliding_window": 5, "tie_word_embeddings": False}),
    "gemma": (GemmaConfig, GEMMA),
    "gemma2": (Gemma2Config, {**GEMMA, "sliding_window": 5, "query_pre_attn_scalar": 24}),
    "gemma3": (Gemma3TextConfig, {**GEMMA3, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    "qwen3_moe_mixed": (Qwen3MoeConfig, {
        **MOE, "num_experts": EXPERTS, "head_dim": 16, "mlp_only_layers": [0, 2], "norm_topk_prob": True}),
    "olmoe": (OlmoeConfig, {
        "num_experts": EXPERTS, "num_experts_per_tok": 3, "intermediate_size": 32, "num_key_value_heads": 8,
        "tie_word_embeddings": False}),
    "gpt_oss": (GptOssConfig, {
        "head_dim": 16, "num_local_experts": EXPERTS, "num_experts_per_tok": 3, "intermediate_size": 32,
        "sliding_window": 5, "tie_word_embeddings": False}),
    "deepseek_v2": (DeepseekV2Config, {
        **MLA, **MOE, "q_lora_rank": 40, "n_shared_experts": 2, "first_k_dense_replace": 1, "n_group": 3,
        "topk_method": "group_limited_greedy", "topk_group": 2, "num_experts_per_tok": 3,
        "routed_scaling_factor": 2.5}),
    "deepseek_v2_lite": (DeepseekV2Config, {
        **MLA, **MOE, "q_lora_rank": None, "n_shared_experts": 2, "first_k_dense_replace": 1,
        "topk_method": "greedy", "n_group": 1, "topk_group": 1}),
    "deepseek_v3": (DeepseekV3Config, {
        **MLA, **MOE, "q_lora_rank": 40, "n_shared_experts": 1, "first_k_dense_replace": 2, "n_group": 3,
        "topk_group": 2, "num_nextn_predict_layers": 0, "rope_scaling": YARN}),
    "moonlight": (DeepseekV3Config, {
        **MLA, **MOE, "q_lora_rank": None, "n_shared_experts": 2, "first_k_dense_replace": 1, "n_group": 1,
        "topk_group": 1, "scoring_func": "sigmoid", "num_nextn_predict_layers": 0}),
    "glm4_moe": (Glm4MoeConfig, {**GLM, "use_qk_norm": True, "num_nextn_predict_layers": 0}),
    "glm4_moe_mtp": (Glm4MoeConfig, {**GLM, "num_nextn_predict_layers": 1}),
    "qwen3_next": (Qwen3NextConfig, {
        **MOE, "head_dim": 16, "partial_rotary_factor": 0.25, "num_experts": EXPERTS,
        "shared_expert_intermediate_size": 48, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 8, "linear_value_head_dim": 12, "full_attention_interval": 2,
        "mlp_only_layers": [0, 3], "tie_word_embeddings": False}),
    "gemma3_vl": (
        with_vision(Gemma3Config, {
            **VISION, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28, "patch_size": 14
        }, image_token_index=120),
        GEMMA3,
    ),
    "qwen2_5_vl": (
        with_vision(Qwen2_5_VLConfig, {**TOWER, "fullatt_block_indexes": [1]}, **IMAGES),
        mrope(1, 1, 2),
    ),
    "qwen3_vl": (
        with_vision(Qwen3VLConfig, {**TOWER, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16},
                    **IMAGES),
        {"head_dim": 16, **mrope(4, 2, 2)},
    ),
    "qwen3_vl_moe": (
        with_vision(Qwen3VLMoeConfig, {
            **TOWER, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16}, **IMAGES),
        {**MOE, "num_experts": EXPERTS, "head_dim": 16, **mrope(4, 2, 2)},
    ),
    "glm4v_moe": (
        with_vision(Glm4vMoeConfig, {**TOWER, "image_size": 28, "patch_size": 14}, image_token_id=120,
                    video_token_id=121),
        {**GLM, "use_qk_norm": False, **mrope(1, 1, 2)},
    ),
}  # fmt: skip


def add_prediction_layer(path: Path, model: PreTrainedModel) -> None:
    """Adds the multi-token-prediction layer that a checkpoint carries and transformers never builds."""
    file, last = path / "model.safetensors", model.config.num_hidden_layers - 1
    tensors, size = load_file(file), model.config.hidden_size
    old, new = f"model.layers.{last}.", f"model.layers.{last + 1}."
    for name in [name for name in tensors if name.startswith(old)]:
        tensors[name.replace(old, new)] = tensors[name] + 0.1 * torch.randn_like(tensors[name])
    for name in ("enorm", "hnorm", "shared_head.norm"):
        tensors[f"{new}{name}.weight"] = 1 + 0.3 * torch.randn(size)
    tensors[f"{new}eh_proj.weight"] = 0.18 * torch.randn(size, 2 * size)
    save_file(tensors, file, metadata={"format": "pt"})
