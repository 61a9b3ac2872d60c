"""Short pieces of the text beside the samples: which they are, and that fits see their first tokens."""

from __future__ import annotations

import pytest
import torch
from models import cut, load, tokens

import mbridge_prune as mbp
from mbridge_prune.repair.openings import BATCH, LENGTH, OPENINGS, with_openings
from mbridge_prune.repair.routing import judging

TEXT = tokens(203, length=24, seed=5)


def numbered(samples: int, length: int = 64) -> torch.Tensor:
    """Every token says where it stands: sample * length + place."""
    return torch.arange(samples * length).view(samples, length)


@pytest.mark.parametrize(("samples", "micro_batch_size"), [(203, 1), (203, 7), (2048, 4)])
def test_pieces_come_from_all_over_the_text_and_judge_where_their_sample_does(samples, micro_batch_size):
    pieces = with_openings(mbp.CalibrationLoop(numbered(samples, 256), micro_batch_size)).more
    flat = torch.cat(pieces)
    assert flat.shape == (OPENINGS, LENGTH) and all(len(piece) == BATCH for piece in pieces)
    assert torch.equal(flat - flat[:, :1], torch.arange(LENGTH).expand_as(flat)), "as they stand in the text"
    sample, place = flat[:, 0] // 256, flat[:, 0] % 256
    assert torch.equal(flat[:, -1] // 256, sample)
    assert len(sample.unique()) == min(samples, OPENINGS)
    assert sample.max() >= samples - 3 and place.min() > 0 and len(place.unique()) > 200
    assert abs(torch.corrcoef(torch.stack([sample, place]).double())[0, 1]) < 0.1
    before = samples // micro_batch_size
    judges = torch.tensor([j for n, piece in enumerate(pieces) for j in judging(before + n, len(piece))])
    assert torch.equal(sample % 10 == 9, judges)


@pytest.mark.parametrize(("samples", "microbatches"), [(64, 1), (200, 2), (800, 8)])
def test_short_text_gives_a_power_of_two_of_microbatches(samples, microbatches):
    """A quarter of the text's tokens at most."""
    pieces = with_openings(mbp.CalibrationLoop(numbered(samples, 16))).more
    assert [tuple(piece.shape) for piece in pieces] == [(BATCH, LENGTH)] * microbatches


@pytest.mark.parametrize(("dp", "microbatches"), [(1, 8), (4, 8), (3, 9), (64, 64)])
def test_ranks_that_share_experts_run_as_many_each(monkeypatch, dp, microbatches):
    loop = mbp.CalibrationLoop(numbered(800, 16))
    monkeypatch.setattr("mbridge_prune.runtime.size", lambda kind: {"ep": 2, "dp": dp}[kind])
    assert len(with_openings(loop).more) == microbatches


def test_nothing_is_added_where_all_samples_begin_alike_or_there_is_little_text():
    alike = numbered(203)
    alike[:, 0] = 1
    for loop in map(mbp.CalibrationLoop, (alike, numbered(9), numbered(63, 16))):
        assert with_openings(loop) is loop and loop.more == ()


def test_fits_see_samples_and_pieces_and_a_callers_loop_stays_as_it_is(hf_folder):
    loop = mbp.CalibrationLoop(TEXT, 7)
    for repair in ("least_squares", "sequential"):
        plan = cut(
            load(hf_folder("llama")).unwrapped_model,
            {"ffn_hidden_size": 64},
            forward_loop=loop,
            repair=repair,
        )
        microbatches, pieces = 203 // 7, 4 * BATCH
        first = microbatches * BATCH  # their numbers go on where the microbatches end
        fitted = sum(n % 10 != 9 for n in range(203)), sum(n % 10 != 9 for n in range(first, first + pieces))
        wanted = 24 * fitted[0] + LENGTH * fitted[1]
        assert {record["tokens"] for record in plan.repaired} == {wanted}
    assert loop.more == ()
