"""What a prune did (or, dry, would do): the content of plan.json."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Plan:
    """What a prune did (or, dry, would do); `to_dict()` is what plan.json holds."""

    sizes_before: dict[str, int]
    sizes_after: dict[str, int]
    params_before: int
    params_after: int
    layers_kept: list[int]
    mode: str = "mcore_minitron"
    active_before: int = 0
    active_after: int = 0
    """Parameters that work on one token: all but the routed experts it is not sent to."""
    kept: dict[str, list] = field(default_factory=dict)
    """Axis key -> [groups][k] places kept inside each group, most important first (local layers
    of every pipeline stage together)."""
    costs: dict[str, dict[str, float]] = field(default_factory=dict)
    """Of fastnas and gradnas: "flops" of a forward of the dummy input, "params"; "before" and "after"."""
    importance: str = "minitron"
    repair: str = "none"
    fingerprint: str | None = None
    layer_scores: list[float] = field(default_factory=list)
    calibration: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, Any] = field(default_factory=dict)
    """Where it was measured: held-out loss "before" and "after", and the "kl" between, with errors."""
    repaired: list[dict[str, Any]] = field(default_factory=list)
    """With a repair that fits, of every weight: its error sliced and repaired, or why it was not."""
    search: dict[str, Any] = field(default_factory=dict)
    """Of an auto prune: budgets, the score, how many candidates there were and the best of them."""

    @property
    def export_config(self) -> dict[str, int]:
        """hparam -> size after the cut."""
        return self.sizes_after

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
