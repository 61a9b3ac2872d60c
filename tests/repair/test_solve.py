"""The least-squares problem against torch's own solver on the data itself."""

import pytest
import torch

from mbridge_prune.repair.solve import carried_over, judged, others, output_error, refit

GENERATOR = torch.Generator().manual_seed(3)
X_TC = torch.randn(200, 12, generator=GENERATOR, dtype=torch.float64) @ torch.randn(
    12, 12, generator=GENERATOR, dtype=torch.float64
)
WEIGHT = torch.randn(7, 12, generator=GENERATOR)
KEPT = torch.tensor([9, 0, 4, 5, 2, 11, 7])
MOMENT = X_TC.t() @ X_TC


@pytest.mark.parametrize("ridge", [0.0, 0.1, 2.0])
def test_ridge_regression_towards_the_plain_slice(ridge):
    inner = X_TC[:, KEPT]
    # Ridge as rows of data: what is added to the plain slice is pulled to zero by each channel's size.
    pull = torch.diag((ridge * inner.square().sum(0)).sqrt())
    missing = X_TC[:, others(KEPT, 12)] @ WEIGHT.double()[:, others(KEPT, 12)].t()
    rows = torch.cat([missing, torch.zeros(len(KEPT), 7, dtype=torch.float64)])
    added = torch.linalg.lstsq(torch.cat([inner, pull]), rows).solution
    found = refit(WEIGHT, KEPT, carried_over(MOMENT, KEPT, ridge))
    torch.testing.assert_close(found, WEIGHT.double()[:, KEPT] + added.t(), rtol=1e-6, atol=1e-6)


def test_the_error_is_that_of_the_outputs():
    columns = torch.randn(7, len(KEPT), generator=GENERATOR)
    wanted, got = X_TC @ WEIGHT.double().t(), X_TC[:, KEPT] @ columns.double().t()
    share = float((wanted - got).square().sum() / wanted.square().sum())
    assert output_error(WEIGHT, KEPT, columns, MOMENT) == pytest.approx(share, rel=1e-9)
    assert output_error(WEIGHT, torch.arange(12), WEIGHT, MOMENT) == 0


def test_a_copy_takes_over_what_its_twin_did():
    x_tc = torch.cat([X_TC, X_TC[:, :2] * 3], dim=1)  # 12 and 13 follow 0 and 1
    kept = torch.arange(12)
    weight = torch.randn(5, 14, generator=GENERATOR)
    columns = refit(weight, kept, carried_over(x_tc.t() @ x_tc, kept, 0.0))
    assert output_error(weight, kept, columns, x_tc.t() @ x_tc) < 1e-12


def test_a_channel_that_never_fires_is_no_trouble():
    moment = MOMENT.clone()
    moment[:, KEPT[0]] = moment[KEPT[0]] = 0
    columns = refit(WEIGHT, KEPT, carried_over(moment, KEPT, 0.1))
    assert torch.isfinite(columns).all()
    assert torch.equal(columns[:, 0].float(), WEIGHT[:, KEPT[0]])


def test_the_ridge_is_the_one_that_is_judged_best(monkeypatch):
    monkeypatch.setattr("mbridge_prune.repair.solve.RIDGES", [0.5, 2.0, 4.0])
    ridge, error, weight = judged(lambda ridge: torch.tensor([ridge]), lambda weight: abs(float(weight) - 3))
    assert (ridge, error, weight.tolist()) == (2.0, 1.0, [2.0]), "of equals the lighter one"
