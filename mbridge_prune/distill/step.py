"""The forward step that Megatron's schedules call, with the distillation loss."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

KEYS = ("tokens", "position_ids", "labels", "loss_mask")


class ForwardStep:
    """`pretrain`'s forward step: one microbatch through teacher and student.

    Args:
        lm_weight: share of the next-token loss in what is trained on; the rest is the divergence.
    """

    def __init__(self, lm_weight: float):
        self.lm_weight = lm_weight

    def __call__(
        self, data_iterator: Iterator[dict[str, torch.Tensor]] | None, model: torch.nn.Module
    ) -> Any:
        """(what this stage hands on, or losses [2, batch, sequence]; the function that sums them)"""
        batch = microbatch(data_iterator)
        losses = model(
            input_ids=batch["tokens"], position_ids=batch["position_ids"], attention_mask=None,
            labels=batch["labels"],
        )  # fmt: skip
        return losses, partial(summed, batch["loss_mask"], self.lm_weight)


def microbatch(data_iterator: Iterator[dict[str, torch.Tensor]] | None) -> dict[str, torch.Tensor | None]:
    """This rank's part of the next microbatch [batch, sequence / cp]; nothing on the stages in between."""
    from megatron.core import parallel_state
    from megatron.core.utils import get_batch_on_this_cp_rank

    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    if not (first or last) or data_iterator is None:
        return dict.fromkeys(KEYS)
    batch = next(data_iterator)
    device = torch.cuda.current_device()
    batch = get_batch_on_this_cp_rank({key: batch[key].to(device, non_blocking=True) for key in KEYS})
    return {key: batch[key] for key in KEYS}


def summed(
    mask_bs: torch.Tensor, lm_weight: float, losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Losses [2, batch, sequence] as Megatron wants them: a sum, the tokens in it, and what to report.

    Megatron divides the gradients by the tokens of the whole global batch, so that neither the split into
    microbatches nor that over ranks changes the step.
    """
    mask = mask_bs.flatten().float()
    kd, lm = (losses.flatten(1).float() * mask).sum(-1)
    total = (1 - lm_weight) * kd + lm_weight * lm  # no view: the schedule frees its output
    tokens = mask.sum().to(torch.int)
    report = {"loss": total, **({"kd loss": kd} if lm_weight else {}), "lm loss": lm}
    count = tokens.to(total.dtype).detach()
    return total, tokens, {name: torch.stack([value.detach(), count]) for name, value in report.items()}
