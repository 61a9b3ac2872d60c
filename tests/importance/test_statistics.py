"""What probes accumulate, against plain loops in fp64; the device's way of adding against the CPU's."""

from __future__ import annotations

import pytest
import torch

from mbridge_prune.importance import statistics
from mbridge_prune.importance.statistics import STATISTICS, Seen

SPLITS = [5, 0, 17, 1, 40]


def routed(dtype=torch.float32, channels=24):
    generator = torch.Generator().manual_seed(1)
    x_tc = torch.randn(sum(SPLITS), channels, generator=generator).to(dtype)
    return x_tc, torch.rand(len(x_tc), generator=generator) < 0.7


def plain(x_tc, splits, valid_t, of_rows):
    """A row an expert: the sum of `of_rows` over its valid tokens, and their number; fp64."""
    rows = []
    for part, valid in zip(x_tc.double().split(splits), valid_t.split(splits), strict=True):
        rows.append(torch.cat([of_rows(part[valid]).sum(0), valid.sum().double()[None]]))
    return torch.stack(rows)


OF_ROWS = {
    "routed_magnitude": lambda x: x.abs(),
    "routed_norm": lambda x: x.square().sum(1, keepdim=True).sqrt(),
}


@pytest.mark.parametrize("statistic", OF_ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padded", [False, True])
def test_routed_sums_equal_a_plain_loop(statistic, dtype, padded):
    x_tc, valid_t = routed(dtype)
    everywhere = torch.ones_like(valid_t)
    want = plain(x_tc, SPLITS, valid_t if padded else everywhere, OF_ROWS[statistic])
    for splits in (SPLITS, torch.tensor(SPLITS)):
        have = STATISTICS[statistic].rows(Seen(x_tc, splits, valid_t if padded else None))
        assert have.dtype == torch.float64
        assert torch.allclose(have, want, rtol=1e-6)
        assert torch.equal(have[:, -1], want[:, -1])


@pytest.mark.parametrize("padded", [False, True])
def test_an_expert_alone_is_a_row_of_the_group(padded):
    x_tc, valid_t = routed()
    valid_t = valid_t if padded else None
    group = STATISTICS["routed_magnitude"].rows(Seen(x_tc, SPLITS, valid_t))
    masks = [None] * len(SPLITS) if valid_t is None else valid_t.split(SPLITS)
    alone = [
        STATISTICS["routed_magnitude"].rows(Seen(x, None, valid))
        for x, valid in zip(x_tc.split(SPLITS), masks, strict=True)
    ]
    assert torch.equal(torch.cat(alone), group)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sequence_magnitude_equals_a_plain_loop(dtype):
    generator = torch.Generator().manual_seed(2)
    x_sbc = torch.randn(33, 3, 20, generator=generator).to(dtype)
    valid_sb = torch.rand(33, 3, generator=generator) < 0.6
    valid_sb[:, 1] = False
    for valid in (None, valid_sb):
        want = torch.zeros(20, dtype=torch.float64)
        for b in range(3):
            x_sc = x_sbc[:, b] if valid is None else x_sbc[:, b][valid[:, b]]
            want += x_sc.double().abs().mean(0).nan_to_num() ** 2
        have = STATISTICS["sequence_magnitude"].rows(Seen(x_sbc, None, valid))
        assert torch.allclose(have[:, 0], want, rtol=1e-5)


def test_the_number_of_threads_changes_no_bit():
    generator = torch.Generator().manual_seed(3)
    x_sbc = torch.randn(512, 2, 1531, generator=generator)
    splits, before = [300, 3, 0, 721], torch.get_num_threads()
    seen = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            sequence = STATISTICS["sequence_magnitude"].rows(Seen(x_sbc))
            experts = [STATISTICS[name].rows(Seen(x_sbc.flatten(0, 1), splits)) for name in OF_ROWS]
            seen.append([sequence, *experts])
    finally:
        torch.set_num_threads(before)
    for one, *others in zip(*seen, strict=True):
        assert all(torch.equal(one, other) for other in others)


def test_the_matrix_of_a_device_adds_the_same_rows():
    x_tc, _ = routed()
    belongs_et = statistics._belongs(torch.tensor(SPLITS), len(x_tc))
    assert belongs_et.sum(1).tolist() == SPLITS
    have = statistics._product(belongs_et, x_tc)
    assert torch.allclose(have, torch.stack([part.sum(0) for part in x_tc.split(SPLITS)]), atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("statistic", OF_ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
def test_a_device_gives_the_same_sums_and_is_never_waited_for(statistic, dtype, padded, grouped):
    x_tc, valid_t = routed(dtype)
    splits = torch.tensor(SPLITS) if grouped else None
    want = STATISTICS[statistic].rows(Seen(x_tc, splits, valid_t if padded else None))
    x, valid, splits = (None if t is None else t.cuda() for t in (x_tc, valid_t, splits))
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        have = STATISTICS[statistic].rows(Seen(x, splits, valid if padded else None))
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert torch.allclose(have.cpu(), want, rtol=1e-5)
