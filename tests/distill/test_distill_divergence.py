"""The loss and its gradient against PyTorch's own KL and cross entropy, differentiated by autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models import difference

from mbridge_prune.distill import divergence as module
from mbridge_prune.distill.divergence import divergence, keep_top_k

B, S, V = 2, 5, 23


def logits(seed: int, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(B, S, V, generator=torch.Generator().manual_seed(seed))


LABELS = torch.randint(0, V, (B, S), generator=torch.Generator().manual_seed(9))


def plain(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    log_q = F.log_softmax(student / temperature, -1)
    log_p = F.log_softmax(teacher / temperature, -1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1) * temperature**2


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("chunk", [2**25, V, 3 * V])
def test_kl_and_cross_entropy_and_their_gradients(monkeypatch, temperature, chunk):
    monkeypatch.setattr(module, "CHUNK", chunk)
    ours, theirs = logits(0).requires_grad_(), logits(0).requires_grad_()
    weights = torch.rand(2, B, S, generator=torch.Generator().manual_seed(1))
    got = divergence(ours, logits(1), LABELS, temperature=temperature)
    kd = plain(theirs, logits(1), temperature)
    lm = F.cross_entropy(theirs.flatten(0, 1), LABELS.flatten(), reduction="none").view(B, S)
    torch.testing.assert_close(got.kd, kd)
    torch.testing.assert_close(got.lm, lm)
    (got.kd * weights[0] + got.lm * weights[1]).sum().backward()
    (kd * weights[0] + lm * weights[1]).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    ours = logits(0).requires_grad_()
    got = divergence(ours, logits(0), LABELS)
    got.kd.sum().backward()
    assert got.kd.abs().max() < 1e-6 and ours.grad.abs().max() < 1e-6


def test_one_loss_alone_has_the_gradient_of_that_loss():
    for which in ("kd", "lm"):
        ours, theirs = logits(0).requires_grad_(), logits(0).requires_grad_()
        getattr(divergence(ours, logits(1), LABELS), which).sum().backward()
        if which == "kd":
            plain(theirs, logits(1), 1.0).sum().backward()
        else:
            F.cross_entropy(theirs.flatten(0, 1), LABELS.flatten(), reduction="sum").backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("k", [1, 4, V, 2 * V])
def test_top_k_is_the_teacher_renormalised_over_its_likeliest_tokens(k):
    ours, teacher = logits(0).requires_grad_(), logits(1)
    best = teacher.topk(min(k, V), dim=-1)
    p = torch.zeros_like(teacher).scatter(-1, best.indices, best.values.softmax(-1))
    theirs = logits(0).requires_grad_()
    kd = (torch.special.xlogy(p, p) - p * F.log_softmax(theirs, -1)).sum(-1)
    got = divergence(ours, teacher.clone(), LABELS, top_k=k)
    torch.testing.assert_close(got.kd, kd, rtol=1e-4, atol=1e-6)
    got.kd.sum().backward()
    kd.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_top_k_keeps_just_k():
    rows = logits(2).flatten(0, 1)
    keep_top_k(rows, 4)
    assert rows.isfinite().sum(-1).eq(4).all()


def test_bf16_logits_are_summed_in_fp32():
    exact = divergence(logits(0), logits(1), LABELS)
    half = divergence(logits(0).bfloat16(), logits(1).bfloat16(), LABELS)
    assert half.kd.dtype == torch.float32
    assert difference(half.kd, exact.kd) < 0.02


def test_nan_is_not_hidden():
    broken = logits(0)
    broken[0, 0, 0] = float("nan")
    got = divergence(broken, logits(1), LABELS).kd
    assert got[0, 0].isnan() and got[1].isfinite().all()


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match="student logits"):
        divergence(logits(0), logits(1)[..., :-1], LABELS)
