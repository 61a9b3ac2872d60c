"""Every family times every hparam: tiny sources, what is cut of them, and what a cut leaves.

Nothing here says what the right answer is; references are in masks.py and sliced.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import families
import torch
from models import GROUPS, HEADS, auto_class, cut, hf_config, random_hf
from nemotron_h import copy_code, nemotron_h_config, random_nemotron_h
from torch import nn
from transformers import AutoConfig, PreTrainedModel

import mbridge_prune as mbp
from mbridge_prune.mcore_minitron import table_of

PATTERNS = {"nemotron_h": "M*-M*-", "nemotron_h_moe": "M-M*ME"}
FAMILIES = ("qwen3_moe", *families.CONFIGS, *PATTERNS)
TOLERANCE = 1e-5
SIZES = {
    "hidden_size": 40, "ffn_hidden_size": 56, "num_query_groups": 1, "num_attention_heads": 4,
    "num_moe_experts": 6, "moe_ffn_hidden_size": 16, "moe_shared_expert_intermediate_size": 16,
    "mamba_num_heads": 6, "mamba_head_dim": 8, "num_layers": 2,
}  # fmt: skip
OWN_SIZES = {
    "qwen3_moe": {"num_moe_experts": 3},
    "olmoe": {"num_attention_heads": 5},
    "gemma3": {"num_layers": 4},
    "gemma3_vl": {"num_layers": 4},
    "nemotron_h": {"num_layers": 4},
    "nemotron_h_moe": {"num_layers": 4, "num_moe_experts": 5},
    **dict.fromkeys(("deepseek_v2", "deepseek_v2_lite", "moonlight"), {
        "moe_shared_expert_intermediate_size": 32, "num_attention_heads": 5}),
    "deepseek_v3": {"num_attention_heads": 5},
}  # fmt: skip
TOGETHER = {
    # Its config derives a head's channels from both.
    "olmoe": ("hidden_size", "num_attention_heads"),
    # Their config counts the shared expert in routed experts, and here it is one.
    **dict.fromkeys(("deepseek_v3", "glm4_moe", "glm4_moe_mtp", "glm4v_moe"),
                    ("moe_shared_expert_intermediate_size", "moe_ffn_hidden_size")),
}  # fmt: skip
"""Hparams that these architectures can only say together: the first takes the others along."""
FIXED = {"qwen2_5_vl": {"num_query_groups", "num_attention_heads"}}
"""Hparams that an export could not say: a head's channels come of the hidden size, which stays."""
VISION = tuple(name for name in FAMILIES if "_vl" in name or "4v" in name)
MOE = tuple(
    name for name in FAMILIES if name not in ("qwen2_window", "mistral_window", "nemotron_h")
    and not name.startswith("gemma") and name not in ("qwen2_5_vl", "qwen3_vl")
)  # fmt: skip


def write_source(family: str, path: Path, edit: Any = None, **changes: Any) -> PreTrainedModel:
    """The folder of a tiny model whose every tensor matters; `edit(model)` changes its weights first."""
    if family in PATTERNS:
        pattern = changes.pop("hybrid_override_pattern", PATTERNS[family])
        model: PreTrainedModel = random_nemotron_h(nemotron_h_config(pattern, **changes))
    else:
        model = random_hf(hf_config(family, **changes))
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


def load_hf(path: Path) -> tuple[PreTrainedModel, dict[str, list[str]]]:
    """The folder in transformers, and what did not fit while it was read."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=True)
    exact = {"attn_implementation": "eager"} if config.model_type == "gemma2" else {}  # SDPA has no soft cap
    model, info = auto_class(config).from_pretrained(
        path, dtype=torch.float32, output_loading_info=True, trust_remote_code=True, **exact
    )
    return model.eval(), info


def hparams(model: nn.Module) -> dict[str, int]:
    return table_of(model).hparams()


def cuts(family: str, full: dict[str, int]) -> dict[str, dict[str, int]]:
    """Name -> sizes: every hparam of a family alone, and all of them at once."""
    fixed = FIXED.get(family, set()) | ({"hidden_size"} if family in VISION else set())
    sizes = {name: {**SIZES, **OWN_SIZES.get(family, {})}[name] for name in full if name not in fixed}
    first, *others = TOGETHER.get(family, (None,))
    found = {name: {name: size} for name, size in sizes.items()}
    for other in others:
        found[first][other] = sizes[other]
        if family == "olmoe":
            del found[other]
    found["all"] = dict(sizes)
    if "num_query_groups" in sizes:  # one group: at most as many heads as it had
        found["all"]["num_attention_heads"] = HEADS // GROUPS - 1
    return found
