"""What a candidate costs: parameters, active parameters, memory and operations, over a whole grid at once.

All of it is read off the slice table (weights) and the costs that wrappers declare (caches, attention,
scans); no formula here knows a layer type.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mbridge_prune import runtime
from mbridge_prune.dynamic import Cost, Counter, Fixed, Shape, Sizes, SliceTable, shapes

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Serving:
    """The use that memory and operations are counted for.

    Args:
        batch_size: sequences at a time.
        seq_length: tokens of each, all of them in the cache.
        kv_dtype: of the cache and the states.
    """

    batch_size: int = 1
    seq_length: int = 4096
    kv_dtype: torch.dtype = torch.bfloat16


class Costs:
    """Counts candidates of a model, all pipeline stages together.

    Args:
        table: of this rank's stage, or of the whole model.
        layer_order: global layer numbers, most important first.
        serving: what memory and operations are counted for.
        weight_bytes: of one parameter.
        whole: every rank has the whole model's table.
    """

    def __init__(
        self,
        table: SliceTable,
        layer_order: Sequence[int] | None,
        serving: Serving,
        weight_bytes: int,
        whole: bool = False,
    ):
        self.serving, self.weight_bytes = serving, weight_bytes
        weights = shapes(table)
        products = [s for entry, s in zip(_counted(table), weights, strict=True) if _is_product(table, entry)]
        here = (weights, products, table.costs)
        parts = [here] if whole else runtime.gather_objects(here, "pp")
        self.weights = Counter([s for part in parts for s in part[0]], layer_order)
        self.products = Counter([s for part in parts for s in part[1]], layer_order)
        self.caches, self.work = (
            _by_window([c for part in parts for c in part[2]], kind, layer_order, self.weights.layers)
            for kind in ("cache", "flops")
        )

    def of(self, budget: str, sizes: Sizes) -> int | float | np.ndarray:
        """The cost that a budget bounds: "params", "active_params", "memory_mb" or "flops"."""
        return getattr(self, budget)(sizes)

    def params(self, sizes: Sizes) -> int | np.ndarray:
        """Parameters; a tied output layer counts once."""
        return self.weights.params(sizes)

    def active_params(self, sizes: Sizes) -> int | np.ndarray:
        """Parameters that work on one token."""
        return self.weights.active_params(sizes)

    def memory_mb(self, sizes: Sizes) -> float | np.ndarray:
        """Weights, key-value caches and states of a full batch, in MiB."""
        tokens = self.serving.seq_length
        kept: int | np.ndarray = 0
        for (per_token, window), counter in self.caches.items():
            kept = kept + counter.params(sizes) * (min(tokens, window or tokens) if per_token else 1)
        width = torch.empty(0, dtype=self.serving.kv_dtype).element_size()
        bytes_ = self.params(sizes) * self.weight_bytes + kept * self.serving.batch_size * width
        return bytes_ / MIB

    def flops(self, sizes: Sizes) -> float | np.ndarray:
        """Floating-point operations on one token, at the mean context of a full sequence.

        Two a weight that multiplies it, and what attention and scans add.
        """
        tokens = self.serving.seq_length
        total: float | np.ndarray = 2 * self.products.active_params(sizes)
        for (per_token, window), counter in self.work.items():
            total = total + counter.params(sizes) * (_mean_context(tokens, window) if per_token else 1)
        return total


def _mean_context(tokens: int, window: int | None) -> float:
    """Tokens that the average token of a causal sequence sees, itself included."""
    if window is None or window >= tokens:
        return (tokens + 1) / 2
    return (window * (window + 1) / 2 + (tokens - window) * window) / tokens


def _counted(table: SliceTable) -> list:
    return [
        e
        for e in table.entries
        if e.counted and (e.unit is None or e.unit.number == e.unit.axis.local().start)
    ]


def _is_product(table: SliceTable, entry) -> bool:
    """True for a weight that every token is multiplied with: an embedding is only looked up, unless tied."""
    if len(entry.dims) < 2:
        return False
    if ".embedding." not in f".{entry.name}":
        return True
    tower = getattr(table.model, "language_model", table.model)
    tied = getattr(tower, "share_embeddings_and_output_weights", False)
    return tied and entry.name.endswith("word_embeddings.weight")


def _by_window(
    costs: list[tuple[int | None, Cost]], kind: str, order: Sequence[int] | None, layers: int
) -> dict[tuple[bool, int | None], Counter]:
    """Counters of what costs alike in tokens: (per token, window) -> the numbers of all layers."""
    groups: dict[tuple[bool, int | None], list[Shape]] = defaultdict(list)
    for layer, cost in costs:
        if cost.kind == kind:
            groups[cost.per_token, cost.window].append(Shape((Fixed(cost.times), cost.tree), layer))
    return {key: Counter(shapes_, order, layers) for key, shapes_ in groups.items()}
