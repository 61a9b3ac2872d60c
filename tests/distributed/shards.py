"""Models that two tensor-parallel ranks score, for one rank to cut: dense ones, and mixtures and hybrids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mixtures
from mixtures import Cut, Layout
from models import write_hf

WIDTH = {"hidden_size": 48, "ffn_hidden_size": 64, "num_attention_heads": 4, "num_layers": 2}
GROUPS = {**WIDTH, "num_query_groups": 1}
DENSE = {
    "llama": GROUPS, "llama_tied": WIDTH, "llama_mha": WIDTH, "qwen2": WIDTH, "qwen3": GROUPS,
    "nemotron": WIDTH, "gemma2": WIDTH, "gemma3": {**WIDTH, "num_layers": 7},
}  # fmt: skip
EXPERTS = ("qwen3_moe", "qwen3_moe_separate", "deepseek_v3", "gpt_oss", "glm4_mtp", "qwen3_next", "hybrid")
SAVED = ("llama_tied", "gemma2", "gemma3")
CUTS = {**{name: Cut(name, sizes, {"megatron": name in SAVED}) for name, sizes in DENSE.items()},
        **{name: mixtures.CUTS[name] for name in EXPERTS}}  # fmt: skip
LAYOUTS = {
    "tp2": Layout(2, CUTS, tp=2),
    "tp2_ep2": Layout(2, ("qwen3_moe_separate", "deepseek_v3", "gpt_oss", "hybrid"), tp=2, ep=2),
    "tp2_pp2": Layout(4, [name for name in CUTS if name != "gemma3"], tp=2, pp=2, slow=True),  # of 7 layers
    "tp2_pp2_ep2": Layout(4, EXPERTS, tp=2, pp=2, ep=2, slow=True),
}
REFUSED = {"prune": ("work", "llama"), "norm_of_all_heads": ("score", "olmoe")}
"""name: (what is asked for with two tensor-parallel ranks, of which model)."""


def jobs(site: Path, ranks: int, slow: bool) -> list[dict[str, Any]]:
    """What so many ranks are asked to do at one start; one rank prunes and exports."""
    if ranks == 1:
        return [mixtures.job(site / "single" / name, Layout(1, ()), CUTS[name]) for name in DENSE]
    found = [
        {**mixtures.job(site / layout / name, of, CUTS[name]), "kind": "score"}
        for layout, of in LAYOUTS.items()
        for name in of.cuts
        if of.ranks == ranks and of.slow == slow
    ]
    for name, (asks, model) in REFUSED.items() if ranks == 2 else ():
        one = mixtures.job(site / "refused" / name, LAYOUTS["tp2"], Cut(model, WIDTH))
        found.append({**one, "kind": "refused", "asks": asks})
    return found


def write(root: Path) -> None:
    for family in (*DENSE, "olmoe"):
        write_hf(family, root / family)
