"""Layers that do not divide over the stages: the error names a split, and the split works."""

from __future__ import annotations

import itertools
import re
from types import SimpleNamespace

import pytest

from mbridge_prune import UserError
from mbridge_prune.bridge.stages import check_stages, split_that_works


def provider(layers: int, stages: int, first: int | None = None, last: int | None = None) -> SimpleNamespace:
    return SimpleNamespace(
        num_layers=layers, pipeline_model_parallel_size=stages, num_layers_in_first_pipeline_stage=first,
        num_layers_in_last_pipeline_stage=last,
    )  # fmt: skip


def largest(layers: int, stages: int, first: int | None, last: int | None) -> int:
    """Layers of the largest stage."""
    ends = [n for n in (first, last) if n is not None]
    middle = stages - len(ends)
    return max([*ends, (layers - sum(ends)) // middle if middle else 0])


@pytest.mark.parametrize("layers, stages", [(5, 2), (7, 3), (10, 4), (30, 4), (61, 8), (61, 16)])
def test_the_split_that_is_named_works_and_is_the_most_even(layers, stages):
    with pytest.raises(UserError, match=f"{layers} layers do not divide over {stages}") as refused:
        check_stages(provider(layers, stages))
    named = [re.search(rf"in-{end}-pipeline-stage (\d+)", str(refused.value)) for end in ("first", "last")]
    first, last = (int(found[1]) if found else None for found in named)
    check_stages(provider(layers, stages, first, last))
    fine = []
    for ends in itertools.product([None, *range(1, layers)], repeat=2):
        try:
            check_stages(provider(layers, stages, *ends))
        except UserError:
            continue
        fine.append(largest(layers, stages, *ends))
    assert largest(layers, stages, first, last) == min(fine)


def test_flags_that_are_not_needed_and_stages_that_are_too_many():
    with pytest.raises(
        UserError, match="6 layers .* with 5 in the first and 2 in the last; leave .* out: 3 layers"
    ):
        check_stages(provider(6, 2, 5, 2))
    assert split_that_works(3, 4) == "use --pp 3 at most"
