"""What each axis alone loses at each of its sizes: the sensitivity map."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mbridge_prune import runtime
from mbridge_prune.dynamic import SliceTable, select
from mbridge_prune.errors import UserError
from mbridge_prune.evaluate.mode import evaluating
from mbridge_prune.evaluate.score_functions import called
from mbridge_prune.heterogeneous.choices import Choices
from mbridge_prune.report.console import progress_bar
from mbridge_prune.search.callables import name_of
from mbridge_prune.search.store import Store
from mbridge_prune.search.waves import waves

KIND = "sensitivity"


def measure(
    table: SliceTable, choices: Choices, score: Callable[[nn.Module], float], store: Store
) -> tuple[float, dict[str, dict[int, float]]]:
    """The full model's score, and what it loses with one axis at a smaller size.

    Candidates are spread over the ranks, each of which holds the whole model; after each wave the store has
    them, and finds again what was measured before.

    Args:
        table: of the sorted model.
        score: higher is better. It is called with another candidate on each rank, so it must not wait for
            other ranks.
        store: of records {"kind": "sensitivity", "sizes": {axis: size}, "score": number}.

    Returns:
        (score of the full model, axis key -> {size: drop}).

    Raises:
        UserError: the score function fails, or gives no finite number.
    """
    cuts: list[dict[str, int]] = [{}]
    cuts += [{key: size} for key, sizes in choices.items() for size in sizes[:-1]]
    missing = [cut for cut in cuts if store.find(KIND, cut) is None]

    def one(cut: dict[str, int]) -> float:
        with select(table, cut) as model:
            return number(score, model, cut)

    with progress_bar("sensitivity", len(cuts), "candidates") as step:
        step(len(cuts) - len(missing))
        for done in waves(missing, one, runtime.rank(), runtime.world_size()):
            for cut, value in done:
                store.add({"kind": KIND, "sizes": cut, "score": value})
            step(len(done))
    scores = [store.find(KIND, cut) for cut in cuts]
    full = float(scores[0]["score"])  # type: ignore[index]
    drops: dict[str, dict[int, float]] = {key: {} for key in choices}
    for cut, record in zip(cuts[1:], scores[1:], strict=True):
        ((key, size),) = cut.items()
        drops[key][size] = full - float(record["score"])  # type: ignore[index]
    return full, drops


def number(score: Callable[[nn.Module], float], model: nn.Module, sizes: Any) -> float:
    """What a score function says of a model, in evaluation mode and without gradients.

    Raises:
        UserError: it fails, or it is no finite number.
    """
    with evaluating(model), torch.no_grad():
        value = called(name_of(score), score, model)
    try:
        found = float(value)
    except (TypeError, ValueError):
        raise UserError(
            f"the score function {name_of(score)} returned {type(value).__name__}, expected a number"
        ) from None
    if not math.isfinite(found):
        raise UserError(f"the score function {name_of(score)} gave {found} for {sizes or 'the full model'}")
    return found
