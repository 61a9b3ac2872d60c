"""Tiny Nemotron-H checkpoints as NVIDIA ships them: config, weights, and the code that reads them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from .configuration_nemotron_h import NemotronHConfig
from .modeling_nemotron_h import NemotronHForCausalLM

CODE = ("configuration_nemotron_h.py", "modeling_nemotron_h.py")
AUTO_MAP = {
    "AutoConfig": "configuration_nemotron_h.NemotronHConfig",
    "AutoModelForCausalLM": "modeling_nemotron_h.NemotronHForCausalLM",
}
TINY = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "head_dim": 16,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "ssm_state_size": 8, "mamba_num_heads": 8,
    "mamba_head_dim": 12, "n_groups": 2, "pad_token_id": None,
}  # fmt: skip
TINY_MOE = {
    "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 48, "routed_scaling_factor": 2.5,
}  # fmt: skip


def nemotron_h_config(pattern: str = "M-M*ME", **changes: Any) -> NemotronHConfig:
    moe = TINY_MOE if "E" in pattern else {}
    return NemotronHConfig(
        hybrid_override_pattern=pattern, num_hidden_layers=len(pattern), auto_map=AUTO_MAP,
        architectures=["NemotronHForCausalLM"], **{**TINY, **moe, **changes},
    )  # fmt: skip


def random_nemotron_h(config: NemotronHConfig, seed: int = 0) -> NemotronHForCausalLM:
    """A model whose every tensor matters: none is near its default, every state decays at its own rate."""
    torch.manual_seed(seed)
    model = NemotronHForCausalLM(config).float().eval()
    with torch.no_grad():
        for name, p in [*model.named_parameters(), *model.named_buffers()]:
            part = name.removesuffix(".weight").rsplit(".", 1)[-1]
            if part == "A_log":
                p.uniform_(-1.0, 1.0)  # A from -2.7 to -0.4
            elif part == "dt_bias":
                p.uniform_(-3.0, -0.5)  # dt from 0.05 to 0.5 where the projection adds nothing
            elif part == "D" or "norm" in part:
                p.copy_(1 + 0.3 * torch.randn_like(p))
            elif part == "e_score_correction_bias":
                p.uniform_(-0.3, 0.3)
            elif part in ("embeddings", "conv1d", "bias", "gate"):
                p.copy_(0.5 * torch.randn_like(p))
            else:
                p.copy_(0.18 * torch.randn_like(p))
    return model


def write_nemotron_h(
    path: Path, pattern: str = "M-M*ME", seed: int = 0, **changes: Any
) -> NemotronHForCausalLM:
    """Writes config.json, the remote code and random safetensors weights; returns the model."""
    model = random_nemotron_h(nemotron_h_config(pattern, **changes), seed)
    model.save_pretrained(path)
    copy_code(path)
    return model


def copy_code(path: Path) -> None:
    """Puts the remote code beside a config.json."""
    for file in CODE:
        shutil.copyfile(Path(__file__).with_name(file), Path(path) / file)
