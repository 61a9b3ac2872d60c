"""The settings of launch/prune_vision.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from mbridge_prune.config import RECIPES, option
from mbridge_prune.heterogeneous.settings import Budget, Output, RunFolder


@dataclass(kw_only=True)
class Model:
    """The network to prune."""

    factory: str | None = option(None, "module:function() -> nn.Module, the full network", "--model")
    weights: str | None = option(
        None, "its state_dict, as .safetensors (default: as it is built)", "--weights"
    )
    input_shape: str | None = option(None, "of one forward: 1,3,224,224", "--input-shape")


@dataclass(kw_only=True)
class Data:
    """What it is measured on."""

    loader: str | None = option(
        None, "module:function() -> training batches, for BatchNorm's statistics", "--data-loader"
    )
    collect: str | None = option(
        None, "module:function(batch) -> input (default: the batch, or its first part)", "--collect-func"
    )
    max_iter: int = option(50, "batches at most", "--max-iter-data-loader")


@dataclass(kw_only=True)
class Prune:
    """What may be cut."""

    channel_divisor: int = option(8, "sizes of convolutions are multiples of it", "--channel-divisor")
    feature_divisor: int = option(8, "sizes of linear layers are multiples of it", "--feature-divisor")
    max_pruning: float = option(0.9, "largest share of an axis that may go", "--max-pruning")
    sizes_per_axis: int = option(8, "sizes of each axis that are tried", "--sizes-per-axis")
    axes_to_skip: list[str] = option([], "axes (or patterns) that keep their size", "--axes-to-skip")


@dataclass(kw_only=True)
class Search(Budget):
    """The budget, and the score to maximise."""

    score_func: str | None = option(
        None, "module:function(model) -> float, higher is better", "--prune-score-func", "--prune_score_func"
    )


@dataclass(kw_only=True)
class Settings(RunFolder):
    """All settings of `launch/prune_vision.py`."""

    PROGRAM: ClassVar[str] = "prune_vision.py"
    DESCRIPTION: ClassVar[str] = (
        "Prunes a PyTorch vision network with FastNAS, every layer to a size of its own."
    )
    EXAMPLE: ClassVar[str] = "prune.channel_divisor=16"
    RECIPES: ClassVar[Path] = RECIPES / "vision"

    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    prune: Prune = field(default_factory=Prune)
    search: Search = field(default_factory=Search)
    output: Output = field(default_factory=Output)
