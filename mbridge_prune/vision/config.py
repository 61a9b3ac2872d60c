"""The settings of the FastNAS mode: the keys of `prune(config=...)`, and the steps of sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from mbridge_prune.errors import UserError
from mbridge_prune.heterogeneous.checks import check_count, check_names, check_share, made_from
from mbridge_prune.vision.recalibration import first_of


@dataclass(kw_only=True)
class FastNASConfig:
    """The keys of `prune(mode="fastnas", config=...)`."""

    score_func: Callable[[nn.Module], float] | None = None
    """f(model) -> float, higher is better: accuracy on validation images. It has to be given."""
    data_loader: Iterable[Any] | None = None
    """Training batches that BatchNorm is recalibrated on before each score; needed if there is BatchNorm."""
    collect_func: Callable[[Any], Any] = first_of
    """batch -> input of the model (default: the batch, or its first part)."""
    max_iter_data_loader: int = 50
    """So many batches at most."""
    checkpoint: str | Path | None = None
    """File of the sensitivity map, one line a measurement; a killed run goes on from it."""
    verbose: bool = True
    """Log every axis: its sizes, drops and what was chosen."""

    def __post_init__(self) -> None:
        if self.score_func is None:
            raise UserError("config needs a score_func: f(model) -> float, higher is better")
        for name in ("score_func", "collect_func"):
            if not callable(getattr(self, name)):
                raise UserError(f"{name} is {type(getattr(self, name)).__name__}, not callable")
        if self.data_loader is not None and not isinstance(self.data_loader, Iterable):
            raise UserError(
                f"data_loader is {type(self.data_loader).__name__}: give something to iterate over"
            )
        if iter_once(self.data_loader):
            raise UserError(
                "data_loader can be read only once, and every candidate reads it: give a DataLoader or list"
            )
        check_count("max_iter_data_loader", self.max_iter_data_loader)
        if not isinstance(self.verbose, bool):
            raise UserError(f"verbose={self.verbose!r} is not True or False")

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> FastNASConfig:
        """From a plain dict; an unknown key is refused with the nearest right one."""
        return made_from(cls, config, "config")


@dataclass(frozen=True, kw_only=True)
class Space:
    """The search space of `mode=[("fastnas", get_fastnas_config(...))]`."""

    channel_divisor: int = 8
    feature_divisor: int = 8
    max_pruning: float = 0.9
    sizes_per_axis: int = 8
    axes_to_skip: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in ("channel_divisor", "feature_divisor", "sizes_per_axis"):
            check_count(name, getattr(self, name))
        check_share("max_pruning", self.max_pruning)
        check_names("axes_to_skip", self.axes_to_skip)


def get_fastnas_config(**space: Any) -> dict[str, Any]:
    """Search-space config of FastNAS.

    Args:
        **space: `channel_divisor` (8): sizes of convolutions are multiples of it; `feature_divisor` (8): of
            linear layers; `max_pruning` (0.9): the largest share of an axis that may go; `sizes_per_axis`
            (8): so many sizes of each are tried, spread evenly; `axes_to_skip` (none): keys of axes, or
            patterns, that keep their size.
    """
    return dataclasses.asdict(space_of(space))


def space_of(space: Mapping[str, Any]) -> Space:
    """Checked; an unknown key is refused with the nearest right one."""
    return made_from(Space, space, "search-space")


def iter_once(batches: Any) -> bool:
    """True for an iterator: a second reading would find it empty."""
    return batches is not None and iter(batches) is batches
