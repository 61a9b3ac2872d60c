"""What the commands of heterogeneous pruning have in common: budgets, and the run folder."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mbridge_prune.config import Command, option
from mbridge_prune.errors import UserError
from mbridge_prune.heterogeneous.costs import BUDGETS

PRUNED = "pruned.safetensors"


@dataclass(kw_only=True)
class Budget:
    """Upper bounds, alone or together: a number, or a share of the model."""

    flops: str | None = option(
        None, "operations of one forward: 4e9, or 50%%", "--prune-target-flops", "--prune_target_flops"
    )
    params: str | None = option(None, "parameters", "--prune-target-params", "--prune_target_params")
    latency_ms: str | None = option(
        None, "milliseconds of one forward, measured here", "--prune-target-latency-ms"
    )

    def budgets(self) -> dict[str, str]:
        """The bounds that were given.

        Raises:
            UserError: none was.
        """
        given = {name: getattr(self, name) for name in BUDGETS if getattr(self, name) is not None}
        if not given:
            raise UserError("nothing to prune: give a budget such as --prune-target-flops 50%")
        return given


@dataclass(kw_only=True)
class Output:
    """What the run leaves."""

    path: str | None = option(
        None, f"run folder: {PRUNED}, plan.json, report.html, run.log", "--output", "-o"
    )


class RunFolder(Command):
    """Settings with an `output` section."""

    output: Output

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    def run_folder(self) -> Path:
        if not self.output.path:
            raise UserError("no output folder: give --output")
        return Path(self.output.path)

    def result(self) -> Path:
        """What is there when a run is finished."""
        return self.run_folder() / PRUNED
