"""The unpruned transformers model with everything masked that a plan removed; nothing here knows Megatron."""

from __future__ import annotations

import copy
import re

import torch
from references import Kept, Places, blocks
from torch import Tensor, nn
from transformers import PreTrainedModel

import mbridge_prune as mbp


@torch.no_grad()
def masked_dense(dense: PreTrainedModel, plan: mbp.Plan) -> PreTrainedModel:
    """Removed experts cannot be chosen, other units write nothing, norms see kept channels alone."""
    hf = copy.deepcopy(dense)
    stack = language_stack(hf)
    hidden = plan.kept["hidden_size"][0]
    norms = [stack.norm_f if hasattr(stack, "norm_f") else stack.norm]
    for number, layer in enumerate(stack.layers):
        kept = Kept(stack.config, plan, f"layers.{number}")
        norms += [child for name, child in layer.named_children() if "norm" in name]
        for name, module in layer.named_modules():
            _mask(name, module, kept)
    for norm in norms:
        norm_over(norm, hidden)
    if stack.config.model_type.startswith("gemma"):  # the embedding is scaled by sqrt(hidden size)
        share = (len(hidden) / plan.sizes_before["hidden_size"]) ** 0.5
        stack.embed_tokens.register_forward_hook(lambda module, args, out: out * share)
    stack.layers = nn.ModuleList(stack.layers[i] for i in plan.layers_kept)
    stack.config.num_hidden_layers = len(plan.layers_kept)
    return hf


def language_stack(hf: PreTrainedModel) -> nn.Module:
    """Embedding, layers and last norm of a transformers model."""
    inner = hf.backbone if hasattr(hf, "backbone") else hf.model
    return getattr(inner, "language_model", inner)


def _mask(name: str, module: nn.Module, kept: Kept) -> None:
    leaf, expert = name.rpartition(".")[2], re.search(r"\.experts\.(\d+)\.", name)
    if leaf == "o_proj":
        _keep_columns(module.weight, blocks(kept.heads[0], kept.head_dims[3]))
    elif leaf in ("q_norm", "k_norm") and len(module.weight) > kept.head_dims[3]:
        norm_over(module, blocks(kept.heads[leaf == "k_norm"], kept.head_dims[3]))
    elif leaf == "down_proj" and isinstance(module, nn.Linear):
        wide = (
            kept.shared
            if "shared_expert" in name
            else kept.ffn
            if expert is None
            else kept.channels(int(expert[1]))
        )
        _keep_columns(module.weight, wide)
    elif leaf == "experts" and hasattr(module, "down_proj"):
        for number, weight in enumerate(module.down_proj):
            _keep_columns(weight.t(), kept.channels(number))
    elif leaf in ("gate", "router"):
        _allow(module, kept.experts)
    elif name == "mixer.norm":  # the gated norm: a mean a group, over the channels that are left
        norm_over(module, kept.mamba_channels)


def _keep_columns(weight: Tensor, places: Places) -> None:
    mask = torch.zeros(weight.shape[-1])
    mask[places] = 1
    weight.mul_(mask)


def _allow(router: nn.Module, experts: Places) -> None:
    """Makes the score of all other experts minus infinity, so that no token is sent to them."""
    forbidden = torch.ones(len(router.weight), dtype=torch.bool)
    forbidden[experts] = False
    if isinstance(router, nn.Linear):
        router.register_forward_hook(lambda module, args, out: out.masked_fill(forbidden, -torch.inf))
    elif hasattr(router, "e_score_correction_bias"):  # added to what experts are chosen by
        router.e_score_correction_bias[forbidden] = -torch.inf
    elif hasattr(router, "bias"):
        router.bias[forbidden] = -torch.inf
    else:  # DeepSeek-V2 has its scores inside: a router over the others, and their numbers
        small = copy.deepcopy(router)
        small.weight, small.num_experts = nn.Parameter(router.weight[experts]), len(experts)
        numbers = torch.tensor(experts)

        def forward(x: Tensor) -> tuple[Tensor, Tensor]:
            chosen, probabilities = small(x)
            return numbers[chosen], probabilities

        router.forward = forward


def norm_over(norm: nn.Module, places: Places) -> None:
    """Makes a norm see these channels alone; the others come out as zero."""
    small = copy.deepcopy(norm)
    small.weight = nn.Parameter(norm.weight[places])
    if getattr(norm, "group_size", None):
        small.group_size = norm.group_size * len(places) // len(norm.weight)

    def forward(x: Tensor, *others: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        out[..., places] = small(x[..., places], *(other[..., places] for other in others))
        return out

    norm.forward = forward
