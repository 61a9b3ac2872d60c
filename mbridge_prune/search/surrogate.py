"""A surrogate of the loss: what each dimension costs alone, added up.

Every hparam is cut alone to a few sizes and measured (KL to the full model on held-out text). Between
them the curve is linear in the size; a smaller size never costs less. The prediction for a candidate is
the sum of its curves: exact where dimensions do not interact, checked by rank correlation on candidates
that are cut in several dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mbridge_prune.search.space import Grid, Space

POINTS = 3


@dataclass
class Surrogate:
    """Curves hparam -> [(size, KL), ...], ascending in size, ending at the full size with 0."""

    curves: dict[str, list[tuple[int, float]]]

    @classmethod
    def fit(cls, full: Mapping[str, int], measured: Mapping[str, Mapping[int, float]]) -> Surrogate:
        """Curves through measured single cuts, made monotone.

        Args:
            full: hparam -> its full size, which costs nothing.
            measured: hparam -> {size: KL in nats}.
        """
        curves = {}
        for hparam, size in full.items():
            points = {**{s: max(k, 0.0) for s, k in measured.get(hparam, {}).items()}, size: 0.0}
            ordered = sorted(points.items(), reverse=True)  # from the full size down
            losses = np.maximum.accumulate([kl for _, kl in ordered])
            curves[hparam] = [(s, float(kl)) for (s, _), kl in zip(ordered, losses, strict=True)][::-1]
        return cls(curves)

    def __call__(self, grid: Grid) -> np.ndarray:
        """[candidates] predicted KL in nats."""
        total = np.zeros(len(next(iter(grid.values()))))
        for hparam, points in self.curves.items():
            sizes, losses = zip(*points, strict=True)
            total += np.interp(grid[hparam], sizes, losses)
        return total

    def of(self, sizes: Mapping[str, int]) -> float:
        """The prediction for one candidate."""
        return float(self({h: np.array([n]) for h, n in sizes.items()})[0])


def single_cuts(space: Space, full: Mapping[str, int]) -> list[tuple[str, int]]:
    """The cuts to measure: each hparam alone, at up to three sizes from the smallest up."""
    cuts = []
    for hparam, sizes in space.choices.items():
        smaller = [size for size in sizes if size < full[hparam]]
        if smaller:
            places = np.linspace(0, len(smaller) - 1, min(POINTS, len(smaller))).round().astype(int)
            cuts += [(hparam, smaller[place]) for place in np.unique(places)]
    return cuts


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation, ties sharing their mean rank; nan for fewer than three pairs."""
    if len(a) < 3:
        return float("nan")
    ranks = [_ranks(np.asarray(x, dtype=float)) for x in (a, b)]
    if any(r.std() == 0 for r in ranks):
        return float("nan")
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _ranks(x: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return ((last - counts + last - 1) / 2)[inverse]
