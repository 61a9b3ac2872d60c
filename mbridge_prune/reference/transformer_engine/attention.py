"""Attention by PyTorch's scaled dot product."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mbridge_prune.reference.transformer_engine.base import TensorParallel, parameter


class DotProductAttention(TensorParallel):
    """Softmax attention over [s, b, heads, head_dim]; causal, sliding window, GQA, explicit masks.

    The constructor's heads and groups are those of the whole layer; q, k and v hold this
    tensor-parallel rank's.
    """

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int | tuple[int, int],
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        softmax_scale: float | None = None,
        attn_mask_type: str = "causal",
        window_size: tuple[int, int] | None = None,
        softmax_type: str = "vanilla",
        tp_group: Any = None,
        tp_size: int = 1,
        sequence_parallel: bool = False,
        cp_group: Any = None,
        **ignored: Any,
    ):
        super().__init__(tp_group, tp_size, sequence_parallel)
        self.set_context_parallel_group(cp_group)
        if softmax_type not in ("vanilla", "learnable"):
            raise NotImplementedError(f"softmax_type {softmax_type!r}: the reference has no such softmax")
        self.softmax_type = softmax_type
        self.softmax_offset: torch.Tensor | None = None
        if softmax_type == "learnable":
            heads = self._share(num_attention_heads, "num_attention_heads")
            self.softmax_offset = parameter(heads, device="cuda", dtype=None)
            nn.init.zeros_(self.softmax_offset)
        self.num_attention_heads = num_attention_heads
        self.num_gqa_groups = num_gqa_groups or num_attention_heads
        self.num_gqa_groups_per_partition = self.num_gqa_groups // self.tp_size
        self.attention_dropout, self.softmax_scale = attention_dropout, softmax_scale
        self.attn_mask_type, self.window_size = attn_mask_type, window_size

    def set_context_parallel_group(self, cp_group: Any, *ignored: Any) -> None:
        if cp_group is not None and cp_group.size() > 1:
            raise NotImplementedError(
                "the PyTorch reference attention sees whole sequences; set context_parallel_size=1, "
                "or install Transformer Engine"
            )

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: str | None = None,
        core_attention_bias_type: str = "no_bias",
        core_attention_bias: torch.Tensor | None = None,
        qkv_format: str = "sbhd",
        **ignored: Any,
    ) -> torch.Tensor:
        if qkv_format != "sbhd":
            raise NotImplementedError(f"qkv_format {qkv_format!r}: the reference takes sbhd only")
        if key.shape[-2] != self.num_gqa_groups_per_partition:
            raise ValueError(
                f"keys have {key.shape[-2]} heads; expected {self.num_gqa_groups_per_partition}, "
                f"{self.num_gqa_groups} groups over {self.tp_size} tensor-parallel ranks"
            )
        mask_type = attn_mask_type or self.attn_mask_type
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        if mask_type == "padding_causal" and attention_mask is not None:
            raise NotImplementedError(
                "padding_causal with a mask: the reference takes packed or full sequences"
            )
        causal = mask_type in ("causal", "padding_causal", "causal_bottom_right")
        window = self.window_size if self.window_size not in (None, (-1, -1), (-1, 0)) else None
        mask = None
        # SDPA aligns its own causal mask to the first key, where this one is aligned to the last.
        behind = mask_type == "causal_bottom_right" and q.shape[2] != k.shape[2]
        explicit = attention_mask is not None and not causal
        if window or behind or explicit or core_attention_bias is not None:
            mask = _mask(q, k, causal, window, None if causal else attention_mask, core_attention_bias)
        if self.softmax_offset is not None:
            mask = _mask(q, k, causal, window, None, None) if mask is None else mask
            k, v, mask = _with_sink(k, v, mask, self.softmax_offset)
        out = F.scaled_dot_product_attention(
            q, k, v,
            attn_mask=mask,
            is_causal=causal and mask is None and q.shape[2] > 1,
            dropout_p=self.attention_dropout if self.training else 0.0,
            scale=self.softmax_scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
        return out.permute(2, 0, 1, 3).reshape(*query.shape[:2], -1)


def _with_sink(
    k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, offset: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One more key that every query sees with the logit `offset` [heads], and whose value is zero."""
    k, v = (F.pad(t, (0, 0, 0, 1)) for t in (k, v))
    column = offset.to(mask.dtype).view(-1, 1, 1).expand(*mask.shape[:-3], len(offset), mask.shape[-2], 1)
    return k, v, torch.cat([mask.expand(*column.shape[:-1], mask.shape[-1]), column], dim=-1)


def _mask(q, k, causal, window, blocked, bias) -> torch.Tensor:
    """Additive mask [.., sq, sk]; `blocked` is True where attention is not allowed."""
    places_q = torch.arange(q.shape[2], device=q.device)[:, None] + k.shape[2] - q.shape[2]
    places_k = torch.arange(k.shape[2], device=q.device)[None]
    allowed = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    if causal:
        allowed &= places_k <= places_q
    if window:
        left, right = window
        if left >= 0:
            allowed &= places_k >= places_q - left
        if right >= 0:
            allowed &= places_k <= places_q + right
    if blocked is not None:
        allowed = allowed & ~blocked
    mask = torch.zeros_like(allowed, dtype=q.dtype).masked_fill(~allowed, float("-inf"))
    return mask if bias is None else mask + bias
