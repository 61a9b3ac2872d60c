"""The space: choices by value, groups, twins; and the budgets' form."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from models import load

from mbridge_prune import UserError
from mbridge_prune.mcore_minitron import table_of
from mbridge_prune.search.budget import budgets_of, parse_budget
from mbridge_prune.search.space import CHUNK, Space

STEPS = {"hidden_size_divisor": 8, "ffn_hidden_size_divisor": 16, "num_layers_divisor": 1}


@pytest.fixture(scope="module")
def table(hf_folder):
    return table_of(load(hf_folder("llama")).unwrapped_model)


def space(table, **options):
    return Space.of(table, [0, 2, 3, 1], STEPS, **options)


def candidates(found: Space) -> list[dict[str, int]]:
    return [
        dict(zip(chunk, map(int, row), strict=True))
        for chunk in found.grid()
        for row in zip(*chunk.values(), strict=True)
    ]


def test_shares_are_of_the_size_and_not_of_the_list(table):
    """40 % of 64 may go: not 40 % of the choices."""
    assert space(table).choices == {
        "hidden_size": [40, 48, 56, 64],
        "num_query_groups": [2],
        "num_attention_heads": [6, 8],
        "ffn_hidden_size": [64, 80, 96],
        "num_layers": [4],
    }
    wide = space(table, max_width_pruning=0.75, max_depth_pruning=0.5).choices
    assert wide["hidden_size"] == [16, 24, 32, 40, 48, 56, 64] and wide["num_layers"] == [2, 3, 4]
    assert wide["num_attention_heads"] == [2, 4, 6, 8], "a multiple of the query groups"


def test_bounds_and_what_is_skipped(table):
    found = space(table, hparams_to_skip=["hidden_size"], bounds={"ffn_hidden_size": {"min": 16, "max": 48}})
    assert found.choices["hidden_size"] == [64]
    assert found.choices["ffn_hidden_size"] == [16, 32, 48]
    asked = space(table, bounds={"num_query_groups": {"min": 1}})
    assert asked.choices["num_query_groups"] == [1, 2], "searched where its range is given"


def test_a_size_off_the_divisor_keeps_its_full_choice(table):
    found = Space.of(table, [0, 1, 2, 3], {"hidden_size_divisor": 24, "ffn_hidden_size_divisor": 512})
    assert found.choices["hidden_size"] == [48, 64] and found.choices["ffn_hidden_size"] == [96]


def test_the_grid_is_the_product_less_what_groups_forbid(table):
    found = space(
        table,
        max_depth_pruning=0.5,
        bounds={"num_query_groups": {"min": 1}, "num_attention_heads": {"min": 1}},
    )
    every = [dict(zip(found.choices, row, strict=True)) for row in itertools.product(*found.choices.values())]
    want = [c for c in every if c["num_attention_heads"] % c["num_query_groups"] == 0
            and c["num_attention_heads"] // c["num_query_groups"] <= 4]  # fmt: skip
    assert candidates(found) == want and len(want) < len(every) == found.size()
    for sizes in want[:: len(want) // 20]:
        table.check(sizes)


def test_a_dimension_whose_layers_are_gone_has_no_twins():
    """Layer 1 alone has experts and goes first: at one layer their number changes nothing."""
    found = Space({"experts": [2, 4], "num_layers": [1, 2]}, [], {"experts": {1}}, layer_order=[0, 1])
    assert candidates(found) == [
        {"experts": 2, "num_layers": 2}, {"experts": 4, "num_layers": 1}, {"experts": 4, "num_layers": 2},
    ]  # fmt: skip


def test_more_points_than_a_chunk_are_all_seen():
    found = Space({"a": list(range(1, 601)), "b": list(range(1, 601))})
    chunks = list(found.grid())
    assert found.size() == 360_000 > CHUNK and len(chunks) == 2
    seen = np.concatenate([c["a"] * 1000 + c["b"] for c in chunks])
    assert len(np.unique(seen)) == 360_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"hparams_to_skip": ["hiden_size"]},
            "hparams_to_skip: 'hiden_size' is no hparam.*did you mean 'hidden_size'",
        ),
        (
            {"bounds": {"mamba_num_heads": {"min": 1}}},
            "search_space: 'mamba_num_heads' is no hparam of this model",
        ),
        ({"bounds": {"hidden_size": {"min": 65}}}, r"hidden_size.min=65 is outside 1\.\.64"),
        ({"bounds": {"hidden_size": {"min": 41, "max": 47}}}, "no multiple of 8 in hidden_size 41..47"),
        ({"bounds": {"hidden_size": {"least": 8}}}, "hidden_size.least is not min or max"),
    ],
)
def test_what_no_space_can_be(table, options, message):
    with pytest.raises(UserError, match=message):
        space(table, **options)


def test_budgets_are_numbers_or_shares():
    assert parse_budget("params", "70%", 1000) == pytest.approx(700)
    assert parse_budget("params", "6e9", 1000) == parse_budget("params", 6e9) == 6e9
    assert budgets_of({"params": "70%", "memory_mb": 100}) == {"params": "70%", "memory_mb": 100}
    assert budgets_of({"export_config": {"hidden_size": 8}}) == {}


@pytest.mark.parametrize(
    ("constraints", "message"),
    [
        ({"parms": 6e9}, "unknown constraint 'parms'.*did you mean 'params'"),
        ({"params": "much"}, "params='much' is no budget"),
        ({"params": -1}, "must be above 0"),
        ({"params": 0}, "must be above 0"),
        ({"params": "nan"}, "must be above 0"),
        ({"params": True}, "must be above 0|no budget"),
        ({"params": 1, "export_config": {}}, "both an export_config and a budget"),
    ],
)
def test_budgets_that_are_none(constraints, message):
    with pytest.raises(UserError, match=message):
        budgets_of(constraints)
