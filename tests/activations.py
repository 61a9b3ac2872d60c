"""The minitron scores of mixtures of experts and hybrids, out of transformers' own activations, in fp64."""

from __future__ import annotations

from typing import Any

import torch
from masks import language_stack
from matrix import EXPERT_NAMES
from torch import Tensor, nn
from transformers import PreTrainedModel

FEEDING_NORMS = ("input_layernorm", "post_attention_layernorm", "norm")
FEEDING_NORMS_GEMMA = ("input_layernorm", "pre_feedforward_layernorm")


class Watch:
    """What goes into and comes out of the modules of a transformers model in one forward pass."""

    def __init__(self, hf: PreTrainedModel, ids_bs: Tensor):
        self.entered: dict[nn.Module, Tensor] = {}
        self.left: dict[nn.Module, Tensor] = {}
        hooks = [m.register_forward_hook(self._see, with_kwargs=True) for m in hf.modules()]
        hf(input_ids=ids_bs, use_cache=False)
        for hook in hooks:
            hook.remove()

    def _see(self, module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        before = args[0] if args else kwargs.get("hidden_states")
        after = out[0] if isinstance(out, tuple) else out
        if torch.is_tensor(before) and torch.is_tensor(after):
            self.entered[module], self.left[module] = before.detach(), after.detach()


@torch.no_grad()
def minitron_scores(
    hf: PreTrainedModel, ids_bs: Tensor, valid_bs: Tensor | None = None, gated: bool = True
) -> dict[str, Tensor]:
    """Axis key -> scores, by the definitions in `mbridge_prune/importance/scores.py`.

    Args:
        valid_bs: False at positions that count nowhere.
        gated: the outputs of experts are multiplied by the router's probability.
    """
    valid_bs = torch.ones_like(ids_bs, dtype=torch.bool) if valid_bs is None else valid_bs
    stack, seen = language_stack(hf), Watch(hf, ids_bs)
    norms = FEEDING_NORMS_GEMMA if stack.config.model_type.startswith("gemma") else FEEDING_NORMS
    want: dict[str, Any] = {"hidden_size": 0.0, "num_layers": []}
    for number, layer in enumerate(stack.layers):
        for name in norms:
            if hasattr(layer, name):
                want["hidden_size"] += squares(seen.left[getattr(layer, name)], valid_bs).sqrt()
        for name, module in layer.named_modules():
            scores = _of_module(name, module, layer, stack.config, seen, valid_bs, gated)
            want |= {f"layers.{number}.{hparam}": score for hparam, score in scores.items()}
        before, after = (x.double()[valid_bs] for x in (seen.entered[layer], seen.left[layer]))
        want["num_layers"].append((1 - torch.cosine_similarity(before, after, dim=-1)).mean())
    want["num_layers"] = torch.stack(want["num_layers"])
    return want


def squares(x_bsc: Tensor, valid_bs: Tensor) -> Tensor:
    """Sum over samples of the squared mean of |x| over the sequence: [c]; samples may lie flat."""
    total = torch.zeros(x_bsc.shape[-1], dtype=torch.float64)
    x_bsc = x_bsc.double().reshape(*valid_bs.shape, -1)
    for x_sc, valid_s in zip(x_bsc, valid_bs, strict=True):
        if valid_s.any():
            total += x_sc[valid_s].abs().mean(0) ** 2
    return total


def _of_module(
    name: str, module: nn.Module, layer: nn.Module, text: Any, seen: Watch, valid_bs: Tensor, gated: bool
) -> dict[str, Tensor]:
    leaf = name.rpartition(".")[2]
    if leaf == "o_proj":
        heads = squares(seen.entered[module], valid_bs).view(text.num_attention_heads, -1).sum(1)
        scores = {"num_attention_heads": heads.sqrt()}
        if text.num_key_value_heads < text.num_attention_heads:
            groups = heads.view(text.num_key_value_heads, -1).sum(1)
            scores["num_query_groups"] = groups.sqrt()
        return scores
    if leaf == "down_proj" and isinstance(module, nn.Linear) and ".experts." not in name:
        shared = "shared_expert" in name
        hparam = "moe_shared_expert_intermediate_size" if shared else "ffn_hidden_size"
        return {hparam: squares(seen.entered[module], valid_bs).sqrt()}
    if name == "mixer.in_proj":
        inner = text.mamba_num_heads * text.mamba_head_dim
        channels = squares(seen.left[module][..., inner : 2 * inner], valid_bs)
        heads = channels.view(text.mamba_num_heads, -1).sum(1)
        return {"mamba_num_heads": heads.sqrt(), "mamba_head_dim": channels.sqrt()}
    if leaf in ("gate", "router") and name.count(".") == 1:
        return _of_experts(layer.get_submodule(name.partition(".")[0]), module, text, seen, valid_bs, gated)
    return {}


def _of_experts(
    block: nn.Module, router: nn.Module, text: Any, seen: Watch, valid_bs: Tensor, gated: bool
) -> dict[str, Tensor]:
    """Means over an expert's tokens: of |x| before its down_proj, and of the norm of its output."""
    x_bsh, valid = seen.entered[block], valid_bs.reshape(-1)
    x = x_bsh.reshape(-1, x_bsh.shape[-1])
    probabilities, sent = routing(block, router, x_bsh, text)
    channels, outputs = [], []
    for expert in range(probabilities.shape[1]):
        mine = sent[:, expert] & valid
        inner, out = expert_io(block.experts, expert, x[mine])
        scale, tokens = probabilities[mine, expert, None].double(), max(int(mine.sum()), 1)
        channels.append((inner.double() * scale).abs().sum(0) / tokens)
        outputs.append((out.double() * (scale if gated else 1)).norm(dim=-1).sum() / tokens)
    return {"moe_ffn_hidden_size": torch.cat(channels), "num_moe_experts": torch.stack(outputs)}


def routing(block: nn.Module, router: nn.Module, x_bsh: Tensor, text: Any) -> tuple[Tensor, Tensor]:
    """Probability of every token and expert (0 where it is not sent), and whether it is sent."""
    experts = next(getattr(text, name) for name in EXPERT_NAMES if getattr(text, name, None))
    flat = x_bsh.reshape(-1, x_bsh.shape[-1])
    if isinstance(router, nn.Linear):
        probabilities, chosen = router(flat).softmax(-1).topk(text.num_experts_per_tok, dim=-1)
        if text.norm_topk_prob:
            probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    else:
        three_dim = text.model_type.startswith("deepseek")
        chosen, probabilities = router(x_bsh if three_dim else flat)
        if text.model_type == "gpt_oss":  # dense probabilities, then the experts
            probabilities, chosen = chosen.gather(1, probabilities), probabilities
    dense = torch.zeros(len(flat), experts)
    sent = torch.zeros(len(flat), experts, dtype=torch.bool)
    return dense.scatter_(1, chosen, probabilities), sent.scatter_(1, chosen, True)


def expert_io(experts: nn.Module, number: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """What one expert's down projection reads, and what it writes, for these tokens."""
    if isinstance(experts, nn.ModuleList):
        read: list[Tensor] = []
        hook = experts[number].down_proj.register_forward_pre_hook(lambda module, args: read.append(args[0]))
        out = experts[number](x)
        hook.remove()
        return read[0], out
    both = x @ experts.gate_up_proj[number] + experts.gate_up_proj_bias[number]
    gate = both[..., ::2].clamp(max=experts.limit)
    up = both[..., 1::2].clamp(-experts.limit, experts.limit)
    inner = (up + 1) * gate * torch.sigmoid(experts.alpha * gate)
    return inner, inner @ experts.down_proj[number] + experts.down_proj_bias[number]
