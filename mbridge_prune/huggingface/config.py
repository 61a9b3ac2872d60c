"""The settings of the GradNAS mode: the keys of `prune(config=...)`, and the steps of sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mbridge_prune.errors import UserError
from mbridge_prune.heterogeneous.checks import check_count, check_names, check_share, made_from


@dataclass(kw_only=True)
class GradNASConfig:
    """The keys of `prune(mode="gradnas", config=...)`."""

    data_loader: Iterable[Any] | None = None
    """Batches of the task, read once."""
    loss_func: Callable[[Any, Any], torch.Tensor] | None = None
    """f(model output, batch) -> scalar loss that the gradient flows from."""
    collect_func: Callable[[Any], Any] | None = None
    """f(batch) -> the model's input: a dict of named arguments, a tuple, or a tensor (default: a mapping
    whole, of a list or tuple the first part)."""
    max_iter_data_loader: int | None = None
    """Batches that are read, on every rank; None reads all."""
    checkpoint: str | Path | None = None
    """Scores file: read if it exists (no batch is read then), written otherwise."""
    verbose: bool = True
    """Log every axis: its size, and what its cut adds to the loss."""

    def __post_init__(self) -> None:
        for name in ("loss_func", "collect_func"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise UserError(f"{name} is {type(value).__name__}, not callable")
        if self.max_iter_data_loader is not None:
            check_count("max_iter_data_loader", self.max_iter_data_loader)
        if not isinstance(self.verbose, bool):
            raise UserError(f"verbose={self.verbose!r} is not True or False")

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> GradNASConfig:
        """From a plain dict; an unknown key is refused with the nearest right one."""
        return made_from(cls, config, "config")

    def require_data(self) -> None:
        """Refuses settings that no score can be made from.

        Raises:
            UserError: neither a scores file nor data and loss.
        """
        if self.checkpoint is not None and Path(self.checkpoint).exists():
            return
        for name in ("data_loader", "loss_func"):
            if getattr(self, name) is None:
                where = f" ({self.checkpoint} does not exist)" if self.checkpoint else ""
                raise UserError(
                    f"config of mode gradnas needs {name}{where}: data_loader gives batches, "
                    "loss_func(model output, batch) their loss"
                )


@dataclass(frozen=True, kw_only=True)
class Space:
    """The search space of `mode=[("gradnas", get_gradnas_config(...))]`."""

    num_attention_heads_divisor: int = 1
    ffn_hidden_size_divisor: int = 64
    max_pruning: float = 0.95
    axes_to_skip: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in ("num_attention_heads_divisor", "ffn_hidden_size_divisor"):
            check_count(name, getattr(self, name))
        check_share("max_pruning", self.max_pruning)
        check_names("axes_to_skip", self.axes_to_skip)

    @classmethod
    def of(cls, space: Mapping[str, Any]) -> Space:
        """Checked; an unknown key is refused with the nearest right one."""
        return made_from(cls, space, "search-space")

    def divisor(self, hparam: str) -> int:
        """The step of an hparam's sizes."""
        return getattr(self, f"{hparam}_divisor")


def get_gradnas_config(**space: Any) -> dict[str, Any]:
    """Search-space config of GradNAS.

    Args:
        **space: `num_attention_heads_divisor` (1) and `ffn_hidden_size_divisor` (64): sizes are multiples of
            them; `max_pruning` (0.95): the largest share of an axis that may go; `axes_to_skip` (none): keys
            of axes, or patterns such as "layers.0.*", that keep their size.
    """
    return dataclasses.asdict(Space.of(space))
