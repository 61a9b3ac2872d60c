"""The loss: forward KL from teacher to student over a vocabulary that tensor parallel ranks share.

KL(p || q) = sum over tokens v of p_v (log p_v - log q_v), with p = softmax(teacher / T) and
q = softmax(student / T), times T^2 so that gradients keep their size (Hinton et al., arXiv 1503.02531;
forward KL on logits alone: Minitron, arXiv 2407.14679). Its gradient by the student's logits is T (q - p).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

CHUNK = 2**25
"""Logits that are worked on at a time, in fp32: 128 MiB each of a few buffers."""


class Losses(NamedTuple):
    """Losses a token, fp32 [batch, sequence]: divergence from the teacher, next-token cross entropy."""

    kd: torch.Tensor
    lm: torch.Tensor


def divergence(
    student_bsv: torch.Tensor,
    teacher_bsv: torch.Tensor,
    labels_bs: torch.Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    group: Any = None,
) -> Losses:
    """Forward KL and next-token cross entropy of every position.

    No whole fp32 copy of the logits is made: sums run over chunks of positions, and the backward pass
    computes the probabilities again.

    Args:
        student_bsv: [batch, sequence, vocabulary / tp], this rank's shard; gradients flow into it.
        teacher_bsv: the same shard of the teacher's; written over where `top_k` is given.
        labels_bs: [batch, sequence] global token numbers.
        temperature: softens both distributions.
        top_k: keep the teacher's k likeliest tokens (ties at the last included), renormalised; 0 keeps all.
        group: the tensor parallel group.
    """
    if student_bsv.shape != teacher_bsv.shape:
        raise ValueError(f"student logits {tuple(student_bsv.shape)}, teacher {tuple(teacher_bsv.shape)}")
    shape = student_bsv.shape[:-1]
    student, teacher = student_bsv.flatten(0, -2), teacher_bsv.detach().flatten(0, -2)
    if top_k:
        keep_top_k(teacher, top_k, group)
    kd, lm = _Divergence.apply(student, teacher, labels_bs.flatten(), temperature, group)
    return Losses(kd.view(shape), lm.view(shape))


def keep_top_k(logits_nv: torch.Tensor, k: int, group: Any = None) -> None:
    """Writes -inf over all but each row's k greatest logits of the whole vocabulary, in place."""
    ranks = 1 if group is None else group.size()
    if k >= logits_nv.shape[-1] * ranks:
        return
    for rows in _chunks(logits_nv):
        part = logits_nv[rows]
        best = part.topk(min(k, part.shape[-1]), dim=-1).values.contiguous()
        if ranks > 1:
            all_best = [torch.empty_like(best) for _ in range(ranks)]
            dist.all_gather(all_best, best, group=group)
            best = torch.cat(all_best, dim=-1)
        threshold = best.topk(k, dim=-1).values[:, -1:]
        part.masked_fill_(part < threshold, float("-inf"))


def _chunks(logits_nv: torch.Tensor) -> Iterator[slice]:
    step = max(1, CHUNK // logits_nv.shape[-1])
    for begin in range(0, logits_nv.shape[0], step):
        yield slice(begin, begin + step)


def _all_reduce(tensor: torch.Tensor, group: Any, op: Any = dist.ReduceOp.SUM) -> torch.Tensor:
    if group is not None and group.size() > 1:
        dist.all_reduce(tensor, op=op, group=group)
    return tensor


def _log_sum_exp(local: torch.Tensor, group: Any) -> torch.Tensor:
    """log sum exp over the ranks of what is one already over each rank's shard."""
    greatest = _all_reduce(local.clone(), group, dist.ReduceOp.MAX)
    return greatest + _all_reduce((local - greatest).exp(), group).log()


class _Divergence(torch.autograd.Function):
    """(student [n, v], teacher [n, v], labels [n], temperature, group) -> kd [n], lm [n]."""

    @staticmethod
    def forward(ctx, student, teacher, labels, temperature, group):
        n, width = student.shape
        first = 0 if group is None else group.rank() * width
        # log sum exp of student / T, teacher / T and student.
        sums = torch.empty(3, n, dtype=torch.float32, device=student.device)
        for rows in _chunks(student):
            q, p = student[rows].float(), teacher[rows].float() / temperature
            sums[0, rows], sums[1, rows] = (q / temperature).logsumexp(-1), p.logsumexp(-1)
            sums[2, rows] = sums[0, rows] if temperature == 1 else q.logsumexp(-1)
        sums = _log_sum_exp(sums, group)
        kd = torch.empty(n, dtype=torch.float32, device=student.device)
        for rows in _chunks(student):
            log_p = teacher[rows].float() / temperature - sums[1, rows, None]
            log_q = student[rows].float() / temperature - sums[0, rows, None]
            # A token that the teacher rules out adds nothing: 0 log 0 = 0.
            kd[rows] = (log_p.exp() * (log_p.clamp_min(torch.finfo(torch.float32).min) - log_q)).sum(-1)
        kd = _all_reduce(kd, group) * temperature**2
        place, here = _places(labels, first, width)
        likely = _all_reduce(student.gather(-1, place[:, None]).squeeze(-1).float() * here, group)
        lm = sums[2] - likely
        ctx.set_materialize_grads(False)  # a loss that is not trained on costs nothing on the way back
        ctx.save_for_backward(student, teacher, labels, sums)
        ctx.temperature, ctx.first = temperature, first
        return kd, lm

    @staticmethod
    def backward(ctx, grad_kd, grad_lm):
        student, teacher, labels, sums = ctx.saved_tensors
        temperature, width = ctx.temperature, student.shape[-1]
        grad = torch.empty_like(student)
        for rows in _chunks(student):
            logits = student[rows].float()
            part = torch.zeros_like(logits)
            if grad_kd is not None:
                q = (logits / temperature - sums[0, rows, None]).exp()
                p = (teacher[rows].float() / temperature - sums[1, rows, None]).exp()
                part += (q - p) * (grad_kd[rows, None] * temperature)
            if grad_lm is not None:
                q = (logits - sums[2, rows, None]).exp()
                place, here = _places(labels[rows], ctx.first, width)
                q.scatter_add_(-1, place[:, None], -here[:, None].float())
                part += q * grad_lm[rows, None]
            grad[rows] = part
        return grad, None, None, None, None


def _places(labels: torch.Tensor, first: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Column of each label in this rank's shard (0 where it is another's), and whether it is ours."""
    here = (labels >= first) & (labels < first + width)
    return (labels - first).where(here, torch.zeros_like(labels)), here
