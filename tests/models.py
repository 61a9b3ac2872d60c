"""Tiny random Hugging Face models, how to load and prune them, and plain references to compare with.

Everything here that says what the right answer is knows transformers' names only, never Megatron's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import families
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaConfig,
    MistralConfig,
    NemotronConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

import mbridge_prune as mbp

VOCAB, LENGTH, HIDDEN, FFN, HEADS, GROUPS, LAYERS = 128, 12, 64, 96, 8, 2, 4
COMMON = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": FFN, "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS, "num_hidden_layers": LAYERS, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip
CONFIGS: dict[str, tuple[Callable[..., PretrainedConfig], dict[str, Any]]] = {
    "llama_tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "llama": (LlamaConfig, {"tie_word_embeddings": False}),
    "llama_mha": (LlamaConfig, {"tie_word_embeddings": False, "num_key_value_heads": HEADS}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True, "max_window_layers": 3}),
    "qwen3": (Qwen3Config, {"tie_word_embeddings": False, "head_dim": 16}),
    "mistral": (MistralConfig, {"tie_word_embeddings": False, "head_dim": 16, "sliding_window": None}),
    "nemotron": (NemotronConfig, {"tie_word_embeddings": False}),
    "qwen3_moe": (Qwen3MoeConfig, {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
                                   "head_dim": 16}),
}  # fmt: skip
FAMILIES = [name for name in CONFIGS if name != "qwen3_moe"]
CONFIGS |= families.CONFIGS
WEAK_LAYER = 1
"""Its outputs are small, so depth pruning leaves a gap in the middle and not a prefix."""


def hf_config(family: str, **changes: Any) -> PretrainedConfig:
    cls, own = CONFIGS[family]
    return cls(**{**COMMON, **own, **changes})


def auto_class(config: PretrainedConfig) -> type:
    """The auto class that builds the model: one for text, one for vision-language models."""
    return AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM


def random_hf(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A model whose every tensor matters: norms, biases and weights far from their defaults."""
    torch.manual_seed(seed)
    model = auto_class(config).from_config(config).float().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("A_log"):
                p.copy_(torch.empty_like(p).uniform_(0.1, 4).log())
            elif name.endswith("sinks"):
                p.copy_(torch.randn_like(p))
            elif "norm" in name:
                p.copy_((p if name.endswith("weight") else 0) + 0.3 * torch.randn_like(p))
            elif name.endswith("bias"):
                p.copy_(0.3 * torch.randn_like(p))
            else:
                p.copy_(torch.randn_like(p) * (0.5 if "embed" in name else 0.18))
            if f"layers.{WEAK_LAYER}." in name and ("o_proj" in name or "down_proj" in name):
                p.mul_(0.05)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.uniform_(0, 0.3)  # transformers lets a negative choice lose to a group left out
    return model


def write_hf(family: str, path: Path, seed: int = 0, **changes: Any) -> PreTrainedModel:
    model = random_hf(hf_config(family, **changes), seed)
    model.save_pretrained(path)
    if getattr(model.config, "num_nextn_predict_layers", 0):
        families.add_prediction_layer(path, model)
    return model


def load(path: Path, moe_grouped_gemm: bool = False, **overrides: Any) -> Any:
    """The folder in Megatron, on this process."""
    return mbp.load_mbridge_model_from_hf(
        hf_model_name_or_path=path,
        provider_overrides={"seq_length": 16, **overrides},
        moe_grouped_gemm=moe_grouped_gemm,
    )


def load_hf(path: Path) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(path)
    exact = {"attn_implementation": "eager"} if config.model_type == "gemma2" else {}  # SDPA has no soft cap
    return auto_class(config).from_pretrained(path, dtype=torch.float32, **exact).eval()


def tokens(samples: int = 3, seed: int = 7, length: int = LENGTH, vocab: int = VOCAB) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab, (samples, length), generator=generator)


@torch.no_grad()
def run(model: nn.Module, ids_bs: torch.Tensor) -> torch.Tensor:
    """Logits [b, s, vocab] of a Megatron model."""
    positions_bs = torch.arange(ids_bs.shape[1]).expand_as(ids_bs)
    with without_prediction_layers(model):
        out = model(input_ids=ids_bs, position_ids=positions_bs, attention_mask=None)
    return out[0] if isinstance(out, tuple) else out  # some vision-language models add their loss mask


@contextmanager
def without_prediction_layers(model: nn.Module) -> Iterator[None]:
    """Behind multi-token-prediction layers Megatron computes losses only, no logits."""
    tower = getattr(model, "language_model", model)
    ahead = getattr(tower.config, "mtp_num_layers", None)
    if ahead:
        tower.mtp_process, tower.config.mtp_num_layers = False, None
    yield
    if ahead:
        tower.mtp_process, tower.config.mtp_num_layers = True, ahead


@torch.no_grad()
def run_hf(model: nn.Module, ids_bs: torch.Tensor) -> torch.Tensor:
    # GLM-4V's 3-d positions break transformers' search for packed sequences, which a mask switches off.
    mask = torch.ones_like(ids_bs) if model.config.model_type.startswith("glm4v") else None
    return model(input_ids=ids_bs, attention_mask=mask, use_cache=False).logits


def loop_over(*batches: torch.Tensor) -> Callable[[nn.Module], None]:
    """A forward loop over the batches."""

    def loop(model: nn.Module) -> None:
        for ids_bs in batches:
            run(model, ids_bs)

    return loop


def cut(model: nn.Module, sizes: dict[str, int], **config: Any) -> mbp.Plan:
    """Prunes in place on the usual tokens: a plain Minitron slice, unless told otherwise."""
    config = {"importance": "minitron", "repair": "none", "forward_loop": loop_over(tokens()), **config}
    _, plan = mbp.prune(model, "mcore_minitron", {"export_config": sizes}, config=config)
    return plan


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, relative to the largest value."""
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max())


# References


def masked_dense(hf: PreTrainedModel, plan: mbp.Plan) -> PreTrainedModel:
    """The dense model with everything the plan removed zeroed, left out or skipped."""
    hf = copy.deepcopy(hf)
    head_dim = hf.model.layers[0].self_attn.head_dim
    hidden = kept_mask(plan.kept["hidden_size"], HIDDEN)
    with torch.no_grad():
        for i, layer in enumerate(hf.model.layers):
            ffn = kept_mask(plan.kept[f"layers.{i}.ffn_hidden_size"], FFN)
            heads = kept_mask([kept_heads(plan, i)[0]], HEADS)
            layer.mlp.down_proj.weight.mul_(ffn)
            layer.self_attn.o_proj.weight.mul_(heads.repeat_interleave(head_dim))
            layer.mlp.down_proj.weight.mul_(hidden[:, None])
            layer.self_attn.o_proj.weight.mul_(hidden[:, None])
        hf.model.embed_tokens.weight.mul_(hidden)
        if not hidden.all():
            for norm in [
                n for la in hf.model.layers for n in (la.input_layernorm, la.post_attention_layernorm)
            ]:
                _norm_over(norm, hidden)
            _norm_over(hf.model.norm, hidden)
    hf.model.layers = nn.ModuleList(hf.model.layers[i] for i in plan.layers_kept)
    hf.config.num_hidden_layers = len(plan.layers_kept)
    return hf


def kept_mask(kept: list[list[int]], size: int) -> torch.Tensor:
    """[size] of 0 and 1 from a plan's places inside each group."""
    mask = torch.zeros(len(kept), size // len(kept))
    for group, places in enumerate(kept):
        mask[group, places] = 1
    return mask.reshape(-1)


def _norm_over(norm: nn.Module, mask: torch.Tensor) -> None:
    """Makes a norm see the kept channels alone, without changing a shape."""
    share = float(mask.mean())
    if hasattr(norm, "variance_epsilon"):  # RMSNorm: the mean square is over fewer channels
        norm.weight.mul_(share**0.5)
        norm.variance_epsilon *= share
        return
    places = mask.nonzero()[:, 0]

    def forward(x: torch.Tensor) -> torch.Tensor:
        small = x[..., places]
        centred = small - small.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()
        out = torch.zeros_like(x)
        out[..., places] = scaled * (1 + norm.weight[places]) + norm.bias[places]
        return out

    norm.forward = forward


def kept_heads(plan: mbp.Plan, layer: int | str) -> tuple[list[int], list[int]]:
    """Query heads and key/value heads that a layer keeps, in their new order."""
    places = plan.kept[f"layers.{layer}.num_attention_heads"]
    groups = plan.kept.get(f"layers.{layer}.num_query_groups")
    if groups is None:  # multi-head attention: every head with its own key and value
        return places[0], places[0]
    width = HEADS // len(places)
    return [g * width + p for g in groups[0] for p in places[g]], groups[0]


def sliced_state(hf: PreTrainedModel, plan: mbp.Plan) -> dict[str, torch.Tensor]:
    """The tensors a pruned checkpoint must hold, indexed out of the dense one by their HF names."""
    out = {}
    head_dim = hf.model.layers[0].self_attn.head_dim
    hidden = plan.kept["hidden_size"][0]
    for name, tensor in hf.state_dict().items():
        if ".layers." not in name:
            out[name] = tensor[hidden] if name.startswith("model.norm") else tensor[:, hidden]
            continue
        number, rest = name.removeprefix("model.layers.").split(".", 1)
        if int(number) not in plan.layers_kept:
            continue
        ffn = plan.kept[f"layers.{number}.ffn_hidden_size"][0]
        heads, groups = kept_heads(plan, number)
        q = [h * head_dim + c for h in heads for c in range(head_dim)]
        kv = [g * head_dim + c for g in groups for c in range(head_dim)]
        part = rest.rsplit(".", 1)[0].rsplit(".", 1)[-1]
        rows = {
            "q_proj": q, "k_proj": kv, "v_proj": kv, "o_proj": hidden, "gate_proj": ffn, "up_proj": ffn,
            "down_proj": hidden, "input_layernorm": hidden, "post_attention_layernorm": hidden,
        }  # fmt: skip
        columns = {"o_proj": q, "down_proj": ffn}.get(part, hidden)
        tensor = tensor[rows.get(part, slice(None))]
        out[f"model.layers.{plan.layers_kept.index(int(number))}.{rest}"] = (
            tensor[:, columns] if tensor.ndim == 2 else tensor
        )
    return out
