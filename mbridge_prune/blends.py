"""Several sources of text or data in one setting, each with its weight or all without."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from mbridge_prune.errors import UserError

BLOCK = 10
"""Samples that are dealt out to the sources and shuffled at a time."""


def blend(words: Sequence[str], what: str = "prefix") -> tuple[list[str], list[float] | None]:
    """(sources, weights) of `source,source` or `weight,source,weight,source`, split at the commas.

    Args:
        what: what the error calls a source.

    Raises:
        UserError: the list is neither.
    """
    if not all(words):
        raise UserError(f"data: {','.join(words)} has an empty {what}: a comma too many")
    weights = [_number(word) for word in words]
    if all(weight is None for weight in weights):
        return list(words), None
    pairs = list(zip(weights[::2], words[1::2], strict=False))
    if len(words) % 2 or any(w is None for w, _ in pairs) or any(w is not None for w in weights[1::2]):
        raise UserError(
            f"data: {','.join(words)} is neither {what},{what},... nor weight,{what},weight,{what},..."
        )
    if not all(0 < w < math.inf for w, _ in pairs):  # type: ignore[operator]
        raise UserError(f"data: weights must be numbers above 0, got {','.join(words)}")
    return [source for _, source in pairs], [float(w) for w, _ in pairs]  # type: ignore[arg-type]


def mixed(n: int, weights: Sequence[float], seed: int) -> list[int]:
    """Which source each of `n` samples is of: near to the weights' shares everywhere, and in no pattern.

    A longer list begins with the shorter one.
    """
    generator = random.Random(seed)
    order: list[int] = []
    given = [0] * len(weights)
    while len(order) < n:
        for place in range(len(order) + 1, len(order) + BLOCK + 1):
            behind = [place * weight / sum(weights) - g for weight, g in zip(weights, given, strict=True)]
            given[behind.index(max(behind))] += 1
            order.append(behind.index(max(behind)))
        block = order[-BLOCK:]
        generator.shuffle(block)
        order[-BLOCK:] = block
    return order[:n]


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None
