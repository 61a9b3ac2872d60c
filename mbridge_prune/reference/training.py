"""What Megatron's training loop needs where there is no CUDA device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch

from mbridge_prune.reference.cuda import claims_cuda


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Inside, Megatron-Bridge's `pretrain` runs on the CPU.

    It asks whether CUDA is there and is told yes; and gradients are clipped by plain PyTorch, since
    Megatron's own clipping asserts CUDA tensor types.
    """
    from megatron.core.optimizer import optimizer

    original = optimizer.clip_grad_by_total_norm_fp32
    optimizer.clip_grad_by_total_norm_fp32 = clip
    try:
        with claims_cuda():
            yield
    finally:
        optimizer.clip_grad_by_total_norm_fp32 = original


@torch.no_grad()
def clip(
    parameters: Iterable[torch.Tensor] | torch.Tensor,
    max_norm: float,
    total_norm: float,
    use_decoupled_grad: bool = False,
) -> None:
    """Scales gradients in place to `max_norm` where their norm, which Megatron has taken, is greater."""
    if use_decoupled_grad:
        raise NotImplementedError("precision-aware optimizers keep their gradients elsewhere: GPUs only")
    share = max_norm / (total_norm + 1.0e-6)
    if share < 1.0:
        parameters = [parameters] if torch.is_tensor(parameters) else parameters
        torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], share)
