"""How far two runs of one model agree on what matters: units kept by both, how alike they rank them."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

import numpy as np

from mbridge_prune.report.data import Axis, Run
from mbridge_prune.report.numbers import spearman


@dataclass(frozen=True)
class Overlap:
    """Two runs on one axis.

    Args:
        shared: of the units that the smaller run kept, the share that the other kept, too.
        chance: what two rankings that know nothing of each other would share.
        rank: Spearman's correlation of the scores; None without scores or where they do not vary.
    """

    axis: Axis
    shared: float
    chance: float
    rank: float | None


def overlaps(a: Run, b: Run) -> dict[str, list[Overlap]]:
    """hparam -> its axes that both runs kept something of, in layers that neither removed."""
    gone = {*a.layers_removed, *b.layers_removed}
    found: dict[str, list[Overlap]] = {}
    for hparam, axes in a.axes.items():
        others = {axis.place: axis for axis in b.axes.get(hparam, [])}
        for axis in axes:
            other = others.get(axis.place)
            if other is None or other.units != axis.units or axis.layer in gone:
                continue
            found.setdefault(hparam, []).append(_overlap(axis, other))
    return found


def _overlap(a: Axis, b: Axis) -> Overlap:
    kept_a, kept_b = int(a.kept.sum()), int(b.kept.sum())
    both = int((a.kept & b.kept).sum())
    rank = None
    if a.scores is not None and b.scores is not None:
        rank = 1.0 if np.array_equal(a.scores, b.scores) else spearman(a.scores.tolist(), b.scores.tolist())
    return Overlap(a, both / max(min(kept_a, kept_b), 1), max(kept_a, kept_b) / max(a.units, 1), rank)


def middle_rank(found: list[Overlap]) -> float | None:
    """The median rank correlation over layers."""
    ranks = [overlap.rank for overlap in found if overlap.rank is not None]
    return median(ranks) if ranks else None
