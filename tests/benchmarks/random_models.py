"""Models with random weights, large enough on two cores for a ratio of times to mean something."""

from __future__ import annotations

from pathlib import Path

from models import write_hf
from nemotron_h import write_nemotron_h

COMMON = {"vocab_size": 1024, "hidden_size": 512, "num_attention_heads": 8, "head_dim": 64}


def write_mixture(path: Path, length: int) -> Path:
    """Qwen3-MoE: 4 layers, hidden 512, 64 experts of 256 channels, 8 of them a token; 102M parameters."""
    if not path.exists():
        write_hf("qwen3_moe", path, **COMMON, num_hidden_layers=4, num_experts=64, num_experts_per_tok=8,
                 moe_intermediate_size=256, max_position_embeddings=length, norm_topk_prob=True)  # fmt: skip
    return path


def write_hybrid(path: Path, length: int) -> Path:
    """Nemotron-H: 4 Mamba-2, 3 MLP and 1 attention layers, hidden 512, 16 Mamba heads of 64 channels."""
    if not path.exists():
        write_nemotron_h(path, "M-M*M-M-", **COMMON, intermediate_size=2048, ssm_state_size=64,
                         mamba_num_heads=16, mamba_head_dim=64, n_groups=2,
                         max_position_embeddings=length)  # fmt: skip
    return path
