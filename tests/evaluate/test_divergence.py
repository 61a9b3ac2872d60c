"""KL against its definition, and standard errors against a hand computation."""

from __future__ import annotations

import math

import pytest
import torch
from evaluate.conftest import CHILD, VOCAB
from models import run_hf, tokens

from mbridge_prune.errors import UserError
from mbridge_prune.evaluate import divergence
from mbridge_prune.evaluate.divergence import Reference, estimate, paired, sample


def kl_of(full, candidate, ids_ns):
    """[samples, positions] KL by definition, in fp64."""
    p, q = (run_hf(model, ids_ns).double().log_softmax(-1) for model in (full, candidate))
    return (p.exp() * (p - q)).sum(-1)


def test_kl_is_the_definition_at_every_sampled_place(megatron, plain, text_ns, monkeypatch):
    monkeypatch.setattr(divergence, "CHUNK", 3)
    reference = Reference.of(megatron(), text_ns, positions=33, seed=1, batch=2)
    found = reference.kl(megatron(CHILD))
    expected = kl_of(plain(), plain(CHILD), text_ns)[reference.sequence, reference.column]
    assert found.shape == (33,) and float(expected.min()) > 0.01
    assert torch.allclose(found.double(), expected, rtol=2e-3)  # logits are kept in fp16
    assert float(found.double().mean()) == pytest.approx(float(expected.mean()), rel=2e-4)


def test_a_model_is_at_no_distance_from_itself(megatron, text_ns):
    reference = Reference.of(megatron(), text_ns, positions=10_000)
    assert len(reference.sequence) == text_ns.numel()  # all there are
    itself = reference.kl(megatron())
    assert float(itself.abs().max()) < 2e-6
    assert float(itself.min()) > -1e-6
    assert float(reference.kl(megatron(CHILD)).min()) > 0


def test_the_first_samples_alone(megatron, text_ns):
    reference = Reference.of(megatron(), text_ns, positions=33, batch=2)
    whole, some = reference.kl(megatron(CHILD)), reference.kl(megatron(CHILD), samples=4)
    assert torch.equal(some, whole[: len(some)])
    assert reference.sequence[: len(some)].unique().tolist() == [0, 1, 2, 3]


def test_transformers_and_megatron_meet(megatron, plain, text_ns):
    ours = Reference.of(megatron(), text_ns, positions=20).kl(megatron(CHILD))
    theirs = Reference.of(plain(), text_ns, positions=20).kl(plain(CHILD))
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert float(ours.mean()) == pytest.approx(float(theirs.mean()), rel=1e-4)


def test_fewer_places_than_sequences(megatron, text_ns):
    reference = Reference.of(megatron(), text_ns, positions=3)
    assert len(reference.kl(megatron(CHILD))) == 3
    assert len(reference.kl(megatron(CHILD), samples=1)) in (0, 1)


def test_the_sample_is_seeded_even_and_without_repeats():
    rows, columns = sample(6, 50, 100, seed=3)
    assert len(set(zip(rows.tolist(), columns.tolist(), strict=True))) == 100
    assert rows.bincount().min() >= 16 and rows.bincount().max() <= 17
    assert torch.equal(sample(6, 50, 100, seed=3)[1], columns)
    assert not torch.equal(sample(6, 50, 100, seed=4)[1], columns)
    assert columns[rows == 0].tolist() != list(range(16))
    with pytest.raises(UserError, match="positions=0"):
        sample(6, 50, 0, seed=0)


def test_another_vocabulary_is_refused(megatron, hf_folder):
    from models import load

    reference = Reference.of(megatron(), tokens(2), positions=5)
    with pytest.raises(UserError, match=f"vocabulary of 128, the full model of {VOCAB}"):
        reference.kl(load(hf_folder("llama_tied")).unwrapped_model)


def test_the_fingerprint_tells_samples_apart(megatron, text_ns):
    facts = [
        Reference.of(megatron(), *what).fingerprint
        for what in ((text_ns, 8), (text_ns, 9), (text_ns, 8, 1), (text_ns[:4], 8))
    ]
    assert len({str(fact) for fact in facts}) == 4


def test_paired_standard_error_by_hand():
    a = torch.tensor([[1.0, 2.0, 4.0], [2.0, 2.0, 2.0], [0.0, 1.0, 1.0]])
    b = torch.tensor([[0.0, 1.0, 1.0], [1.0, 3.0, 2.0], [0.0, 0.0, 0.0]])
    # differences: 1 1 3 | 1 -1 0 | 0 1 1; mean 7/9; deviations summed by sequence: 24/9, -21/9, -3/9
    result = paired(a, b)
    assert result.mean == pytest.approx(7 / 9)
    by_hand = math.sqrt(3 / 2 * (24**2 + 21**2 + 3**2) / 81) / 9
    assert result.se == pytest.approx(by_hand)
    assert result.n == 9
    flat = torch.arange(3).repeat_interleave(3)
    assert paired(a.flatten(), b.flatten(), flat) == result
    # Positions taken as independent, as a naive error would have them:
    difference = (a - b).double().flatten()
    alone = estimate(difference, torch.arange(9))
    assert alone.se == pytest.approx(float(difference.std()) / 3)
    assert estimate(a[:1]).se == math.inf


def test_clusters_of_unequal_size():
    values, of = torch.tensor([1.0, 5.0, 3.0, 3.0, 3.0]), torch.tensor([0, 0, 4, 4, 4])
    result = estimate(values, of)
    assert (result.mean, result.se, result.n) == (3.0, 0.0, 5)
