"""Mixtures of experts and hybrids for the layouts: models, what is cut, and which ranks do it.

Every model has six layers or more, of which two in the middle are weak, and its strong experts are where
a cut must bring them from one expert-parallel rank to another.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from models import write_hf
from nemotron_h import write_nemotron_h

EXPERTS = 12
WEAK = (1, 4)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {  # a pattern is a Nemotron-H
    "qwen3_moe": ("qwen3_moe_mixed", {"num_experts": EXPERTS, "mlp_only_layers": [0, 1, 2]}),
    "deepseek_v3": ("deepseek_v3", {"n_routed_experts": EXPERTS}),
    "gpt_oss": ("gpt_oss", {"num_local_experts": EXPERTS}),
    "glm4_mtp": ("glm4_moe_mtp", {"n_routed_experts": EXPERTS}),
    "qwen3_next": ("qwen3_next", {"num_experts": EXPERTS}),
    "vision": ("qwen3_vl_moe", {"num_experts": EXPERTS, "tie_word_embeddings": True}),
    "hybrid": ("MM-M*EME", {}),
    "hybrid_mixed": ("M-M*ME", {}),
}
STRONG = {
    0: range(EXPERTS // 2, EXPERTS),
    1: range(EXPERTS // 2),
    2: (0, 2, 3, 6, 7, 10),
}
"""Layer number mod 3 -> the experts that matter: all of the second rank, of the first, and of both."""
SILENT = {"gpt_oss": "mlp.router.bias", "deepseek_v3": "mlp.gate.e_score_correction_bias"}
"""What keeps every token away from the expert NOBODYS of layer 3."""
NOBODYS = 8

WIDTH = {"hidden_size": 48, "num_attention_heads": 4, "num_layers": 4}
DENSE, MOE = {"ffn_hidden_size": 64}, {"num_moe_experts": 6, "moe_ffn_hidden_size": 20}
SHARED = {"moe_shared_expert_intermediate_size": 20}
MAMBA = {"mamba_num_heads": 4, "mamba_head_dim": 8}
HYBRID = {**WIDTH, **DENSE, **MOE, **MAMBA, "num_moe_experts": 4, "num_layers": 6,
          "moe_shared_expert_intermediate_size": 32}  # fmt: skip


@dataclass(frozen=True)
class Cut:
    """A model, its sizes after the cut, and more entries of the job."""

    model: str
    sizes: dict[str, int]
    more: dict[str, Any] = field(default_factory=dict)


GROUPED, SAVED = {"grouped": True}, {"megatron": True}
CUTS = {
    "qwen3_moe": Cut("qwen3_moe", {**WIDTH, **DENSE, **MOE}, {**GROUPED, **SAVED}),
    "qwen3_moe_separate": Cut("qwen3_moe", {**WIDTH, **DENSE, **MOE}, SAVED),
    "deepseek_v3": Cut("deepseek_v3", {**WIDTH, **DENSE, **MOE, **SHARED}, GROUPED),
    "deepseek_v3_separate": Cut("deepseek_v3", {**WIDTH, **DENSE, **MOE, **SHARED}),
    "gpt_oss": Cut("gpt_oss", {**WIDTH, **MOE}, {**GROUPED, **SAVED}),
    "glm4_mtp": Cut("glm4_mtp", {**WIDTH, **DENSE, **MOE, **SHARED}, GROUPED),
    "qwen3_next": Cut("qwen3_next", {**WIDTH, **DENSE, **MOE, **SHARED}, GROUPED),
    "vision": Cut("vision", {"num_attention_heads": 4, "num_layers": 4, **MOE}, GROUPED),
    "hybrid": Cut("hybrid", HYBRID, {**GROUPED, **SAVED}),
    "hybrid_separate": Cut("hybrid", HYBRID),
    "hybrid_mixed": Cut("hybrid_mixed", {**HYBRID, "num_layers": 4}, GROUPED),
    "hybrid_groups": Cut("hybrid", {"num_query_groups": 1}, GROUPED),
}


@dataclass(frozen=True)
class Layout:
    ranks: int
    cuts: Iterable[str]
    pp: int = 1
    tp: int = 1
    ep: int = 1
    overrides: dict[str, int] = field(default_factory=dict)
    slow: bool = False

    @property
    def dp(self) -> int:
        return self.ranks // self.pp // self.tp


FIRST2 = {"num_layers_in_first_pipeline_stage": 2}
EXPERTS_ALIKE = ("deepseek_v3_separate", "hybrid_separate")  # a pipeline treats them like grouped ones
NO_NEWS = ("hybrid_mixed", "hybrid_groups")  # that expert-parallel ranks could make of them
LAYOUTS = {
    "single": Layout(1, CUTS),
    "pp2": Layout(2, [name for name in CUTS if name not in EXPERTS_ALIKE], pp=2),
    "pp2_first": Layout(2, ("hybrid", "qwen3_moe"), pp=2, overrides=FIRST2),
    "ep2": Layout(2, [name for name in CUTS if name not in NO_NEWS], ep=2),
    "dp2": Layout(2, ("qwen3_moe", "deepseek_v3", "gpt_oss", "hybrid")),
    "pp2_ep2": Layout(4, ("deepseek_v3",), pp=2, ep=2),
    "pp2_ep2_all": Layout(4, CUTS, pp=2, ep=2, slow=True),
    "dp4_ep2": Layout(4, CUTS, ep=2, slow=True),
    "pp2_dp2": Layout(4, CUTS, pp=2, slow=True),
}
CANDIDATES = ("qwen3_moe", "qwen3_moe_separate", "deepseek_v3", "hybrid")
CHECKPOINTS = [name for name, cut in CUTS.items() if "megatron" in cut.more]


def cases(layouts: dict[str, Layout]) -> list[Any]:
    """(layout, name) of everything that more ranks than one do."""
    return [
        pytest.param(layout, name, marks=[pytest.mark.slow] * of.slow, id=f"{layout}-{name}")
        for layout, of in layouts.items()
        for name in of.cuts
        if of.ranks > 1
    ]


def jobs(site: Path, ranks: int, slow: bool) -> list[dict[str, Any]]:
    """What so many ranks are asked to do at one start."""
    found = [
        job(site / layout / name, of, CUTS[name])
        for layout, of in LAYOUTS.items()
        for name in of.cuts
        if of.ranks == ranks and of.slow == slow
    ]
    for name in CANDIDATES if ranks == 2 else ():
        changes = {"kind": "candidate", "scores": str(site / "single" / name / "scores.safetensors")}
        found.append({**job(site / "candidate" / name, LAYOUTS["ep2"], CUTS[name]), **changes})
    if ranks == 2:
        out, few = site / "refused_by_one_stage" / "qwen3_moe", {"num_moe_experts": 3}
        one = job(out, LAYOUTS["pp2"], Cut("qwen3_moe", few, GROUPED))
        found.append({**one, "kind": "refused", "asks": "work"})
    for name in CHECKPOINTS if ranks == 2 else ():
        saved = site / "single" / name
        changes = {"kind": "reload", "megatron": str(saved / "megatron")}
        found.append({**job(site / "reloaded" / name, LAYOUTS["ep2"], CUTS[name]), **changes})
    return found


def job(out: Path, of: Layout, cut: Cut) -> dict[str, Any]:
    """A cut at a layout; `out` is <site>/<layout>/<name>."""
    site = out.parents[1]
    return {
        "model": str(site / "models" / cut.model), "pp": of.pp, "tp": of.tp, "ep": of.ep,
        "overrides": of.overrides, "sizes": cut.sizes, "score": True, "out": str(out),
        "scores": str(out / "scores.safetensors"), "tokens": str(site / "tokens.npy"),
        "prompts": str(site / "prompts.pt"), "trust": cut.model.startswith("hybrid"), **cut.more,
    }  # fmt: skip


def write(name: str, path: Path) -> None:
    """Writes a model of MODELS."""
    family, changes = MODELS[name]
    if name.startswith("hybrid"):
        model = write_nemotron_h(path, family, n_routed_experts=EXPERTS, **changes)
    else:
        model = write_hf(family, path, num_hidden_layers=6, **changes)
    with torch.no_grad():
        for number, layer in enumerate(text_layers(model)):
            for tensor_name, tensor in layer.named_parameters():
                if ".experts." in tensor_name and "down_proj" in tensor_name:
                    strengthen(tensor_name, tensor, STRONG[number % 3])
                if number in WEAK and any(
                    part in tensor_name for part in ("o_proj", "down_proj", "out_proj")
                ):
                    tensor.mul_(0.1)
        if name in SILENT:
            model.model.layers[3].state_dict()[SILENT[name]][NOBODYS] = -100
    model.save_pretrained(path)
    if getattr(model.config, "num_nextn_predict_layers", 0):
        families.add_prediction_layer(path, model)


def text_layers(model: Any) -> Any:
    trunk = getattr(model, "backbone", None) or model.model
    return getattr(trunk, "language_model", trunk).layers


def strengthen(name: str, tensor: torch.Tensor, experts: Any) -> None:
    """Makes the output of these experts larger; their tensors are one each, or one for all."""
    number = name.split(".experts.")[1].split(".")[0]
    if not number.isdigit():
        tensor[list(experts)] *= 3
    elif int(number) in experts:
        tensor.mul_(3)
