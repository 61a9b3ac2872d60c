"""Numbers as the page says them, and the scales they stand on."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbridge_prune.report import numbers
from mbridge_prune.report.charts.cloud import front
from mbridge_prune.report.plot import Bands, Linear, Log, spread

GAP, LESS = "\N{NO-BREAK SPACE}", "\N{MINUS SIGN}"


@pytest.mark.parametrize("n, said", [
    (512, "512"), (9999, "9,999"), (12_345, "12.35k"), (999_600, "1.00M"), (134_515_008, "134.5M"),
    (5_994_000_000, "5.99B"), (235e9, "235.0B"), (0.4921, "0.492"), (0, "0"),
])  # fmt: skip
def test_short(n, said):
    assert numbers.short(n) == said


@pytest.mark.parametrize("x, se, said", [
    (2.8412, 0.0121, "2.841 ± 0.012"), (0.3921, 0.0074, "0.392 ± 0.007"), (1.0563, 0.0524, "1.06 ± 0.05"),
    (3.2, None, "3.200"), (3.2, 0.0, "3.200"), (-0.5, 0.2, f"{LESS}0.5 ± 0.2"), (12.34, 1.9, "12.3 ± 1.9"),
])  # fmt: skip
def test_an_error_decides_the_places(x, se, said):
    assert numbers.with_error(x, se).replace(GAP, " ") == said


def test_other_words():
    assert numbers.ranges([5, 0, 1, 2, 8, 9]).replace("\N{WORD JOINER}", "") == f"0{numbers.DASH}2, 5, 8, 9"
    assert numbers.duration(3605).replace(GAP, " ") == "1 h 00 min"
    assert numbers.duration(200.4).replace(GAP, " ") == "3 min 20 s"
    assert numbers.change(100, 68).replace(GAP, " ") == f"{LESS}32.0 %"
    assert numbers.significant(0.000012) == "1.20e-05"
    assert numbers.significant(1234.5) == "1,234"


def test_spearman_is_pearson_of_ranks_with_ties_shared():
    a, b = [1.0, 2.0, 2.0, 5.0, 9.0], [3.0, 1.0, 4.0, 4.0, 8.0]
    ranked = np.corrcoef([0, 1.5, 1.5, 3, 4], [1, 0, 2.5, 2.5, 4])[0, 1]
    assert numbers.spearman(a, b) == pytest.approx(ranked)
    assert numbers.spearman(a, a[::-1]) != pytest.approx(1.0)
    assert numbers.spearman([1.0, 1.0], [1.0, 2.0]) is None


@given(st.floats(-1e9, 1e12), st.floats(1e-6, 1e12), st.booleans())
def test_linear_ticks_say_where_they_stand(low, span, big):
    scale = Linear(low, low + span, 5, big=big)
    if scale.high - scale.low < abs(low) * 1e-6:
        return  # finer than a label can say
    ticks = scale.ticks()
    labels = [name for _, name in ticks]
    assert len(set(labels)) == len(labels)
    assert len(ticks) <= 9
    for value, name in ticks:
        size = {"k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}.get(name[-1], 1)
        said = float(name.rstrip("kMBT").replace(",", "").replace(LESS, "-")) * size
        assert said == pytest.approx(value, rel=1e-6, abs=span * 1e-6)
        assert -1e-6 <= scale.at(value) <= 1 + 1e-6


@given(st.lists(st.floats(1e-8, 1e8), min_size=1, max_size=30))
def test_a_spread_scale_holds_its_values(values):
    scale = spread(values)
    places = [scale.at(v) for v in sorted(values)]
    assert all(-1e-9 <= place <= 1 + 1e-9 for place in places)
    assert places == sorted(places)
    assert len(scale.ticks()) <= 16


def test_uneven_values_stand_on_a_log_scale():
    scale = spread([0.01, 0.1, 10.0])
    assert isinstance(scale, Log)
    assert scale.at(0.1) - scale.at(0.01) == pytest.approx((scale.at(10.0) - scale.at(0.1)) / 2)
    assert isinstance(spread([1.0, 2.0]), Linear)
    assert isinstance(spread([0.0, 0.0]), Linear)
    assert scale.at(0.0) == 0.0


def test_layers_are_named_sparingly():
    assert len(Bands([str(n) for n in range(12)]).ticks()) == 12
    names = [name for _, name in Bands([*(str(n) for n in range(60)), "mtp 0"]).ticks()]
    assert names == [*(str(n) for n in range(0, 60, 5)), "mtp 0"]


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=40))
def test_the_front_is_the_lowest_value_at_no_more_parameters(points):
    steps = front(points)
    for x in {x for x, _ in points}:
        lowest = min(y for other, y in points if other <= x)
        assert min(y for at, y in steps if at <= x) == lowest
    assert [y for _, y in steps] == sorted((y for _, y in steps), reverse=True)
    assert all(math.isfinite(y) for _, y in steps)
