"""What a plan keeps, as indices of the unpruned Hugging Face checkpoint, and the tensors that makes.

Nothing here knows Megatron.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import mbridge_prune as mbp

VISION_PARTS = ("visual.", "vision_tower.", "multi_modal_projector.")
Places = list[int]


def blocks(units: Sequence[int], n: int) -> Places:
    """The entries of units that are `n` consecutive ones each."""
    return [unit * n + i for unit in units for i in range(n)]


def shifted(places: Sequence[int], by: int) -> Places:
    return [place + by for place in places]


class Kept:
    """The units that one layer keeps, as indices of the unpruned layer, in their new order."""

    def __init__(self, text: Any, plan: mbp.Plan, place: str):
        self.text, self.plan, self.place = text, plan, place
        self.hidden: Places = plan.kept["hidden_size"][0]

    def _of(self, hparam: str) -> list[Places]:
        return self.plan.kept[f"{self.place}.{hparam}"]

    @property
    def ffn(self) -> Places:
        return self._of("ffn_hidden_size")[0]

    @property
    def shared(self) -> Places:
        return self._of("moe_shared_expert_intermediate_size")[0]

    @property
    def experts(self) -> Places:
        groups = self._of("num_moe_experts")
        width = self.plan.sizes_before["num_moe_experts"] // len(groups)
        return [group * width + place for group, places in enumerate(groups) for place in places]

    def channels(self, expert: int) -> Places:
        return self._of("moe_ffn_hidden_size")[expert]

    @property
    def heads(self) -> tuple[Places, Places]:
        """Query heads, and key/value heads."""
        places, groups = self._of("num_attention_heads"), f"{self.place}.num_query_groups"
        if groups not in self.plan.kept:  # every head has a key and value of its own
            return places[0], places[0]
        width = self.plan.sizes_before["num_attention_heads"] // len(places)
        kept = self.plan.kept[groups][0]
        return [group * width + place for group in kept for place in places[group]], kept

    @property
    def mamba_heads(self) -> Places:
        groups = self._of("mamba_num_heads")
        width = self.plan.sizes_before["mamba_num_heads"] // len(groups)
        return [group * width + place for group, places in enumerate(groups) for place in places]

    @property
    def mamba_channels(self) -> Places:
        width = self.plan.sizes_before["mamba_head_dim"]
        channels = self._of("mamba_head_dim")
        return [head * width + place for head in self.mamba_heads for place in channels[head]]

    @property
    def head_dims(self) -> tuple[int, int, int, int]:
        """Rows a head of q_proj, k_proj, kv_b_proj; columns a head of o_proj."""
        text = self.text
        if getattr(text, "kv_lora_rank", None):
            q = text.qk_nope_head_dim + text.qk_rope_head_dim
            return q, 0, text.qk_nope_head_dim + text.v_head_dim, text.v_head_dim
        dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        gated = text.model_type.startswith("qwen3_next")  # a head's query, then its output gate
        return dim * (2 if gated else 1), dim, 0, dim


def sliced_state(state: dict[str, Tensor], text: Any, plan: mbp.Plan) -> dict[str, Tensor]:
    """The tensors of the unpruned checkpoint, indexed by what the plan keeps, under their new names.

    Args:
        state: names and tensors as they are in the unpruned folder.
        text: the language model's part of its config.
    """
    out = {}
    for name, tensor in state.items():
        found = re.fullmatch(r"(.*?\blayers\.)(\d+)\.(.+)", name)
        if any(part in name for part in VISION_PARTS):
            out[name] = tensor
        elif found is None:
            hidden = plan.kept["hidden_size"][0]
            out[name] = tensor[hidden] if tensor.ndim == 1 else tensor[:, hidden]
        else:
            head, number, rest = found[1], int(found[2]), found[3]
            ahead = number - text.num_hidden_layers  # from 0 on: multi-token-prediction layers
            if ahead < 0 and number not in plan.layers_kept:
                continue
            new = len(plan.layers_kept) + ahead if ahead >= 0 else plan.layers_kept.index(number)
            kept = Kept(text, plan, f"layers.{number}" if ahead < 0 else f"mtp.{ahead}")
            expert = re.fullmatch(r"(.*\.experts\.)(\d+)(\..+)", rest)
            if expert is not None:
                if int(expert[2]) not in kept.experts:
                    continue
                renamed = f"{expert[1]}{kept.experts.index(int(expert[2]))}{expert[3]}"
            else:
                renamed = rest
            out[f"{head}{new}.{renamed}"] = _sliced(rest, tensor, kept, expert and int(expert[2]))
    return out


def _sliced(name: str, tensor: Tensor, kept: Kept, expert: int | None) -> Tensor:
    if ".experts." in f"{name}." and expert is None:
        return _sliced_together(name, tensor, kept)
    rows, columns = _places(name, tensor, kept, expert)
    tensor = tensor if rows is None else tensor[rows]
    return tensor if columns is None or tensor.ndim < 2 else tensor[:, columns]


def _places(name: str, tensor: Tensor, kept: Kept, expert: int | None) -> tuple[Places | None, Places | None]:
    """Rows and columns that remain of a layer's tensor; None for all of them."""
    block, hidden = name.partition(".")[0], kept.hidden
    module, _, attribute = name.rpartition(".")
    leaf = module.rpartition(".")[2]
    if block == "linear_attn":  # gated delta net: its own heads stay
        return {"in_proj_qkvz": (None, hidden), "in_proj_ba": (None, hidden), "out_proj": (hidden, None)}.get(
            leaf, (None, None)
        )
    if leaf in ("gate", "router") or attribute == "e_score_correction_bias":
        return kept.experts, hidden
    if leaf == "shared_expert_gate":
        return None, hidden
    if leaf in ("gate_proj", "up_proj", "down_proj"):
        wide = (
            kept.shared if "shared_expert" in name else kept.ffn if expert is None else kept.channels(expert)
        )
        return (hidden, wide) if leaf == "down_proj" else (wide, hidden)
    if leaf in ("q_a_proj", "kv_a_proj_with_mqa"):
        return None, hidden
    if leaf in ("q_a_layernorm", "kv_a_layernorm"):
        return None, None
    if leaf == "eh_proj":  # the embedding's channels, then the hidden state's
        return hidden, hidden + shifted(hidden, tensor.shape[0])
    if re.fullmatch(r"[qkvo]_proj|q_b_proj|kv_b_proj|[qk]_norm", leaf) or attribute == "sinks":
        return _head_places(leaf, attribute, tensor, kept)
    if block == "mixer":
        return _mamba_places(leaf, attribute, tensor, kept)
    assert "norm" in leaf, f"no reference for {name}"
    return hidden, None


def _head_places(
    leaf: str, attribute: str, tensor: Tensor, kept: Kept
) -> tuple[Places | None, Places | None]:
    (heads, groups), (q_dim, kv_dim, kv_b_dim, o_dim) = kept.heads, kept.head_dims
    if attribute == "sinks":
        return heads, None
    if leaf in ("q_norm", "k_norm"):  # over one head, or (OLMoE) over all of them
        wide = len(tensor) > o_dim
        return (blocks(heads if leaf == "q_norm" else groups, o_dim) if wide else None), None
    if leaf == "o_proj":
        return kept.hidden, blocks(heads, o_dim)
    if leaf in ("q_b_proj", "kv_b_proj"):
        return blocks(heads, q_dim if leaf == "q_b_proj" else kv_b_dim), None
    rows = blocks(heads, q_dim) if leaf == "q_proj" else blocks(groups, kv_dim)
    return rows, kept.hidden


def _mamba_places(
    leaf: str, attribute: str, tensor: Tensor, kept: Kept
) -> tuple[Places | None, Places | None]:
    heads, channels, text = kept.mamba_heads, kept.mamba_channels, kept.text
    inner, state = text.mamba_num_heads * text.mamba_head_dim, text.n_groups * text.ssm_state_size
    bc = list(range(2 * state))
    if leaf == "in_proj":  # z, x, B, C, dt
        rows = channels + shifted(channels, inner) + shifted(bc, 2 * inner)
        return rows + shifted(heads, 2 * inner + 2 * state), kept.hidden
    if leaf == "conv1d":  # x, B, C
        return channels + shifted(bc, inner), None
    if leaf == "out_proj":
        return kept.hidden, channels
    return (channels if leaf == "norm" else heads), None


def _sliced_together(name: str, tensor: Tensor, kept: Kept) -> Tensor:
    """Experts that are one tensor: [experts, in, out] weights and [experts, out] biases."""
    out = []
    for expert in kept.experts:
        one, channels = tensor[expert], kept.channels(expert)
        if "gate_up" in name:
            ffn = one.shape[-1] // 2
            interleaved = kept.text.model_type.startswith("gpt_oss")
            both = blocks(channels, 2) if interleaved else channels + shifted(channels, ffn)
            one = one[..., both]
            out.append(one if one.ndim == 1 else one[kept.hidden])
        else:
            one = one[..., kept.hidden]
            out.append(one if one.ndim == 1 else one[channels])
    return torch.stack(out)
