"""Every family times every hparam: tiny sources, what is cut of them, and how they are loaded.

What the right answer is stands in references.py and masks.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import torch
from models import GROUPS, HEADS, auto_class, hf_config, random_hf, tokens
from nemotron_h import copy_code, nemotron_h_config, random_nemotron_h
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

import mbridge_prune as mbp
from mbridge_prune.calibration.schedule import forward_only

PATTERNS = {"nemotron_h": "M*-M*-", "nemotron_h_moe": "M-M*ME"}
FAMILIES = ("qwen3_moe", *families.CONFIGS, *PATTERNS)
VISION = tuple(name for name in FAMILIES if "_vl" in name or "4v" in name)
TOLERANCE = 1e-5
EXPERT_NAMES = ("num_experts", "n_routed_experts", "num_local_experts")

SIZES = {
    "hidden_size": 40, "ffn_hidden_size": 56, "num_query_groups": 1, "num_attention_heads": 4,
    "num_moe_experts": 6, "moe_ffn_hidden_size": 16, "moe_shared_expert_intermediate_size": 16,
    "mamba_num_heads": 6, "mamba_head_dim": 8, "num_layers": 2,
}  # fmt: skip
OWN_SIZES: dict[str, dict[str, int]] = {
    "qwen3_moe": {"num_moe_experts": 3},
    "qwen3_moe_mixed": {"num_layers": 3},  # layers of every kind remain
    "qwen3_next": {"num_layers": 3},
    "olmoe": {"num_attention_heads": 5},
    "gemma3": {"num_layers": 4},
    "gemma3_vl": {"num_layers": 4},
    "nemotron_h": {"num_layers": 4},
    "nemotron_h_moe": {"num_layers": 4, "num_moe_experts": 5},
    "deepseek_v3": {"num_attention_heads": 5},
    **{name: {"moe_shared_expert_intermediate_size": 32, "num_attention_heads": 5}
       for name in ("deepseek_v2", "deepseek_v2_lite", "moonlight")},
}  # fmt: skip
TOGETHER = {
    # Its config derives a head's channels from both.
    "olmoe": ("hidden_size", "num_attention_heads"),
    # Their configs say the shared expert in widths of a routed one, and here it is one wide.
    **dict.fromkeys(("deepseek_v3", "glm4_moe", "glm4_moe_mtp", "glm4v_moe"),
                    ("moe_shared_expert_intermediate_size", "moe_ffn_hidden_size")),
}  # fmt: skip
"""Hparams that a family's config cannot say without others: the first takes the second along."""
UNSAYABLE = {
    **{name: {"hidden_size"} for name in VISION},  # the projector writes it
    "qwen2_5_vl": {"hidden_size", "num_query_groups", "num_attention_heads"},  # head channels come of it
}


def config_of(family: str, **changes: Any) -> PretrainedConfig:
    if family in PATTERNS:
        return nemotron_h_config(changes.pop("hybrid_override_pattern", PATTERNS[family]), **changes)
    return hf_config(family, **changes)


def full_sizes(config: PretrainedConfig) -> dict[str, int]:
    """hparam -> size, read off a Hugging Face config."""
    text = config.get_text_config()
    pattern = getattr(text, "hybrid_override_pattern", None)

    def says(*names: str) -> Any:
        return next((getattr(text, name) for name in names if getattr(text, name, None)), None)

    experts, heads = says(*EXPERT_NAMES), text.num_attention_heads
    expert = says("moe_intermediate_size") or text.intermediate_size
    shared = says("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size")
    dense = "-" in pattern if pattern else not experts or says("mlp_only_layers", "first_k_dense_replace")
    groups = text.num_key_value_heads if text.num_key_value_heads < heads else None
    sizes = {
        "hidden_size": text.hidden_size,
        "num_layers": text.num_hidden_layers,
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "ffn_hidden_size": text.intermediate_size if dense else None,
        "num_moe_experts": experts,
        "moe_ffn_hidden_size": expert if experts else None,
        "moe_shared_expert_intermediate_size": shared or (says("n_shared_experts") or 0) * expert,
        "mamba_num_heads": says("mamba_num_heads"),
        "mamba_head_dim": says("mamba_head_dim"),
    }
    return {hparam: size for hparam, size in sizes.items() if size}


def cuts(family: str) -> dict[str, dict[str, int]]:
    """Name -> sizes: every hparam of a family alone, and all of them at once."""
    own = {**SIZES, **OWN_SIZES.get(family, {})}
    full = full_sizes(config_of(family))
    sizes = {hparam: own[hparam] for hparam in full if hparam not in UNSAYABLE.get(family, ())}
    found = {hparam: {hparam: size} for hparam, size in sizes.items()}
    if family in TOGETHER:
        first, second = TOGETHER[family]
        found[first][second] = sizes[second]
        if family == "olmoe":
            del found[second]  # neither goes without the other
    found["all"] = dict(sizes)
    if "num_query_groups" in sizes:  # one group, and fewer heads in it than it had
        found["all"]["num_attention_heads"] = HEADS // GROUPS - 1
    if "num_moe_experts" in sizes and family != "qwen3_vl_moe":  # Bridge always groups those
        found["all_separate"] = found["all"]  # experts that are modules of their own
    return found


CASES = [(family, name) for family in FAMILIES for name in cuts(family)]


def write_source(
    family: str, path: Path, edit: Callable[[PreTrainedModel], None] | None = None, **changes: Any
) -> PreTrainedModel:
    """The folder of a tiny model whose every tensor matters; `edit` changes its weights before."""
    config = config_of(family, **changes)
    model = random_nemotron_h(config) if family in PATTERNS else random_hf(config)
    if edit is not None:
        with torch.no_grad():
            edit(model)
    model.save_pretrained(path)
    if family in PATTERNS:
        copy_code(path)
    if getattr(model.config, "num_nextn_predict_layers", 0):
        families.add_prediction_layer(path, model)
    return model


def load(path: Path, grouped: bool = True, **overrides: Any) -> Any:
    """The folder in Megatron, on this process."""
    return mbp.load_mbridge_model_from_hf(
        hf_model_name_or_path=path, provider_overrides={"seq_length": 16, **overrides},
        moe_grouped_gemm=grouped, trust_remote_code=True,
    )  # fmt: skip


def load_hf(path: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The folder in transformers, and what of it did not fit."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=True)
    exact = {"attn_implementation": "eager"} if config.model_type == "gemma2" else {}  # SDPA has no soft cap
    model, info = auto_class(config).from_pretrained(
        path, dtype=torch.float32, output_loading_info=True, trust_remote_code=True, **exact
    )
    return model.eval(), {name: names for name, names in info.items() if names}


def run_through(model: nn.Module) -> None:
    """A forward loop that also runs multi-token-prediction layers (no logits, for which they want labels)."""
    forward_only(model, tokens(), 3)
