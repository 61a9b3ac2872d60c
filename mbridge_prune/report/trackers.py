"""TensorBoard and Weights & Biases, where they are asked for."""

from __future__ import annotations

import inspect
import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mbridge_prune import runtime
from mbridge_prune.errors import UserError
from mbridge_prune.report.search_record import read_search


class Trackers:
    """Sends numbers and texts to every tracker that was asked for; to none on ranks other than 0.

    A tracker's run begins with the first thing that is sent: a run that fails before leaves no empty one.

    Args:
        tensorboard_dir: folder of TensorBoard's event files.
        wandb_project: project of Weights & Biases; WANDB_* variables say the rest (WANDB_MODE=offline, ...).

    Raises:
        UserError: a tracker's package is missing, nobody is logged in, or the folder cannot be; later,
            with the first thing sent, it does not start.
    """

    def __init__(self, tensorboard_dir: str | Path | None = None, wandb_project: str | None = None):
        self._tensorboard: Any = None
        self._wandb: Any = None
        self._folder = None if tensorboard_dir is None else Path(tensorboard_dir)
        self._project = wandb_project
        if runtime.rank() != 0:
            self._folder = self._project = None
        if self._folder is not None:
            _check_tensorboard(self._folder)
        if self._project is not None:
            _check_wandb()

    def _start(self) -> None:
        """Begins what was asked for and has not begun."""
        if self._folder is not None:
            self._tensorboard, self._folder = _start_tensorboard(self._folder), None
        if self._project is not None:
            self._wandb, self._project = _start_wandb(self._project), None

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of one step: name -> value."""
        self._start()
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def text(self, name: str, text: str) -> None:
        """A text in Markdown: the settings, the table of sizes."""
        self._start()
        if self._tensorboard is not None:
            self._tensorboard.add_text(name, text)
        if self._wandb is not None:
            self._wandb.summary[name] = text

    def close(self) -> None:
        """Writes what is left; a second call does nothing."""
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def send_run(trackers: Trackers, plan: Mapping[str, Any], candidates: Path) -> None:
    """A finished run: sizes and counts, layer scores by layer, candidates in the order of their measurement.

    Args:
        plan: what plan.json holds.
        candidates: candidates.jsonl of a search; a run without one has no such file.
    """
    before, after = plan["sizes_before"], plan["sizes_after"]
    rows = [f"| {hparam} | {size} | {after[hparam]} |" for hparam, size in before.items()]
    trackers.text("sizes", "\n".join(["| | before | after |", "| --- | --- | --- |", *rows]))
    steps: defaultdict[int, dict[str, float]] = defaultdict(dict)  # W&B drops a step below the last one
    for count in ("params_before", "params_after", "active_before", "active_after"):
        steps[0][count] = float(plan[count])
    for when, found in (plan.get("loss") or {}).items():
        steps[0].update({f"{what}/{when}": found[what] for what in ("loss", "kl") if what in found})
    for layer, score in enumerate(plan.get("layer_scores") or []):
        steps[layer]["layer_score"] = score
    search = read_search(candidates) if runtime.rank() == 0 else None
    for step, one in enumerate(search.measured if search else []):
        told = {"params": one.params, "kl": one.kl, **one.scores}
        steps[step].update({f"candidate/{k}": float(v) for k, v in told.items() if v is not None})
    for step in sorted(steps):
        trackers.scalars(steps[step], step)


def _check_tensorboard(folder: Path) -> None:
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"TensorBoard was asked for and cannot be imported ({error}): pip install tensorboard"
        ) from error
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"TensorBoard cannot write to {folder}: {there} is no folder that can be written")


def _start_tensorboard(folder: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    try:
        return SummaryWriter(str(folder))
    except OSError as error:
        raise UserError(f"TensorBoard cannot write to {folder}: {error}") from error


def _check_wandb() -> None:
    """Without a network or a prompt: is it there, and is there a key?"""
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            f"Weights & Biases was asked for and cannot be imported ({error}): pip install wandb"
        ) from error
    if os.environ.get("WANDB_MODE", "online") != "online":
        return
    if "prompt" in inspect.signature(wandb.login).parameters and not wandb.login(prompt=False):
        raise UserError("Weights & Biases has no key: log in (wandb login), or set WANDB_MODE=offline")


def _start_wandb(project: str) -> Any:
    import wandb

    try:
        return wandb.init(project=project)
    except Exception as error:  # its own many kinds: not logged in, no network, a bad name
        raise UserError(
            f"Weights & Biases did not start ({error}); log in, or set WANDB_MODE=offline"
        ) from error
