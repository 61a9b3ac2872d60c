"""The beginning that many prompts share, computed once: keys and values from Megatron's inference context.

Prompts of a subject begin with the same few-shot examples. Megatron's static inference context keeps
every layer's keys and values of that beginning; each batch of continuations then attends to them. What
Megatron lacks is a mask for several tokens behind a cache (it turns masking off there, for one token at
a time), so the mask is given here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mbridge_prune import mcore, runtime
from mbridge_prune.evaluate.forward import NOWHERE, each_logits, is_transformers


def cannot_share(model: nn.Module) -> str | None:
    """Why this model's prompts are computed whole; None where prefixes are shared. The same on every rank.

    Shared are models of plain causal self-attention in every layer. Mamba and DeltaNet layers carry a
    state, latent attention and sliding windows cache or mask in their own ways.
    """
    if is_transformers(model):
        return "a transformers model"
    return next((reason for reason in runtime.gather_objects(_reason(model), "pp") if reason), None)


def _reason(model: nn.Module) -> str | None:
    tower = mcore.language_model(model)
    config: Any = getattr(tower, "config", None)
    if type(tower).__name__ != "GPTModel" or tower is not model:
        return f"a {type(model).__name__}"
    if getattr(config, "window_size", None) is not None:
        return "sliding-window attention"
    if getattr(config, "softmax_type", "vanilla") != "vanilla":
        return "attention sinks"
    if getattr(config, "flash_decode", False):
        return "flash decoding"
    for layer in tower.decoder.layers:
        attention = layer.self_attention
        kinds = type(attention).__name__, type(getattr(attention, "core_attention", None)).__name__
        if kinds != ("SelfAttention", "TEDotProductAttention"):
            return f"{kinds[0]} with {kinds[1]}"
    return None


@contextmanager
def shared_prefix(model: nn.Module, prefix_p: torch.Tensor, rows: int, longest: int) -> Iterator[None]:
    """Inside, the model reads every sequence as a continuation of the prefix.

    Holds 2 x layers of this stage x (prefix + longest) x rows x key/value channels in the model's dtype.
    Runs the prefix once on every rank of the pipeline.

    Args:
        prefix_p: [p] int64, shared by all.
        rows: continuations of a microbatch at most.
        longest: tokens of a continuation at most.
    """
    from megatron.core.inference.contexts import StaticInferenceContext
    from megatron.core.transformer.enums import AttnMaskType

    length = len(prefix_p)
    context = StaticInferenceContext(rows, length + longest)
    context.materialize_only_last_token_logits = False

    def give_context(module: nn.Module, arguments: tuple, named: dict[str, Any]) -> tuple[tuple, dict]:
        named["position_ids"] = named["position_ids"] + context.sequence_len_offset
        return arguments, {**named, "inference_context": context, "runtime_gather_output": True}

    def see_prefix(module: nn.Module, arguments: tuple, named: dict[str, Any]) -> tuple[tuple, dict] | None:
        query, key, value, *_ = arguments
        ahead = key.shape[0] - query.shape[0]
        if ahead == 0:
            return None
        blocked = torch.ones(query.shape[0], key.shape[0], dtype=torch.bool, device=query.device)
        blocked = blocked.triu(ahead + 1)[None, None]
        return (query, key, value, blocked), {**named, "attn_mask_type": AttnMaskType.arbitrary}

    def ignore(first: int, logits: torch.Tensor) -> None:
        """What the prefix predicts is nobody's answer."""

    hooks = [model.register_forward_pre_hook(give_context, with_kwargs=True)] + [
        layer.self_attention.core_attention.register_forward_pre_hook(see_prefix, with_kwargs=True)
        for layer in model.decoder.layers  # type: ignore[union-attr]
    ]
    try:
        each_logits(model, prefix_p[None], 1, ignore, places=lambda first, past: NOWHERE, deal=False)
        for memory in context.key_value_memory_dict.values():
            for cache_tbgd in memory:
                cache_tbgd[:length, 1:] = cache_tbgd[:length, :1]
        context.sequence_len_offset = length
        yield
    finally:
        for hook in hooks:
            hook.remove()
