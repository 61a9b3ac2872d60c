"""What a running distillation tells: lines of the log, losses.jsonl, and a stop at the first NaN."""

from __future__ import annotations

import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.bridge.training.callbacks import Callback, CallbackContext

from mbridge_prune import runtime
from mbridge_prune.errors import UserError
from mbridge_prune.files import replaced

log = logging.getLogger("mbridge_prune")
LOSSES = "losses.jsonl"


class Progress(Callback):
    """Records the losses of every step; rank 0 writes them every `log_interval` steps.

    Args:
        folder: the run folder.
        steps: of the whole run.
        tokens_a_step: for the speed.
        log_interval, save_interval: steps between writes; nothing that a checkpoint covers is lost.
        begin: the step that the run goes on from.
    """

    def __init__(
        self,
        folder: Path,
        *,
        steps: int,
        tokens_a_step: int,
        log_interval: int,
        save_interval: int,
        begin: int,
    ):
        self.path, self.steps, self.tokens_a_step = folder / LOSSES, steps, tokens_a_step
        self.log_interval, self.save_interval = log_interval, save_interval
        self.waiting: list[tuple[int, float, float, dict[str, torch.Tensor]]] = []
        self.since, self.last = time.monotonic(), begin
        if runtime.rank() == 0:
            forget_after(self.path, begin)

    def on_train_step_end(self, context: CallbackContext) -> None:
        step = context.state.train_state.step + 1  # the loop counts it after this call
        norm = float(context.grad_norm) if context.grad_norm is not None else math.nan
        if context.grad_norm is not None and not math.isfinite(norm):
            raise UserError(self._stopped(step, f"the gradient's norm is {norm}"))
        rate = next((group["lr"] for group in context.optimizer.param_groups if len(group["params"])), 0.0)
        self.waiting.append((step, rate, norm, dict(context.loss_dict or {})))
        if step % self.log_interval == 0 or step % self.save_interval == 0 or step == self.steps:
            self._write(step)

    def on_eval_end(self, context: CallbackContext) -> None:
        step = context.state.train_state.step
        losses = _from_last_stage([context.total_loss_dict or {}])[0]
        self._append([{"step": step, "valid": losses}])
        log.info("step %d  validation: %s", step, _say(losses))
        self.since, self.last = time.monotonic(), step  # the time of a validation is not training's

    def on_train_end(self, context: CallbackContext) -> None:
        state, step = context.state, context.state.train_state.step
        # Bridge saves and validates once more at the end: not what it did a moment ago.
        if step % self.save_interval == 0:
            state.cfg.checkpoint.save = None
        if state.cfg.train.eval_interval and step % state.cfg.train.eval_interval == 0:
            state.train_state.do_valid = False

    def flush(self) -> None:
        """Writes the steps that wait; every rank takes part."""
        if self.waiting:
            self._write(self.waiting[-1][0])

    def _write(self, step: int) -> None:
        losses = _from_last_stage([dict(names) for *_, names in self.waiting])
        lines: list[dict[str, Any]] = [
            {"step": number, "lr": rate, "grad_norm": None if math.isnan(norm) else norm, "train": values}
            for (number, rate, norm, _), values in zip(self.waiting, losses, strict=True)
        ]
        self.waiting.clear()
        bad = next((line for line in lines if not all(map(math.isfinite, line["train"].values()))), None)
        if bad:
            raise UserError(self._stopped(bad["step"], f"the loss is {bad['train']['loss']}"))
        self._append(lines)
        if step % self.log_interval == 0 or step == self.steps:
            seconds = max(time.monotonic() - self.since, 1e-9)
            speed = (step - self.last) * self.tokens_a_step / seconds
            log.info(
                "step %d/%d  %s  lr %.3g  gradient %.3g  %s tokens/s", step, self.steps, _say(losses[-1]),
                lines[-1]["lr"], lines[-1]["grad_norm"] or 0, f"{speed:,.0f}",
            )  # fmt: skip
            self.since, self.last = time.monotonic(), step

    def _stopped(self, step: int, what: str) -> str:
        return (
            f"stopped at step {step}: {what}. No checkpoint was written since; the same command goes on from "
            "the last one: lower train.lr, raise train.warmup_steps, or look at the data of this step"
        )

    def _append(self, lines: list[dict[str, Any]]) -> None:
        if runtime.rank() != 0:
            return
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error}") from error


def _from_last_stage(losses: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Every rank's copy of what the last pipeline stage knows."""
    known = [{name: float(value) for name, value in one.items()} for one in losses]
    if runtime.world_size() == 1:
        return known
    box = [known]
    dist.broadcast_object_list(box, src=runtime.world_size() - 1)  # the last rank is of the last stage
    return box[0]


def _say(losses: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in losses.items())


def read_losses(path: Path) -> list[dict[str, Any]]:
    """The lines of a losses.jsonl; one that a kill cut short is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def forget_after(path: Path, step: int) -> None:
    """Drops the lines of steps that a killed run made after its last checkpoint: they are made again."""
    if not path.is_file():
        return
    kept = [line for line in read_losses(path) if line["step"] <= step]
    with replaced(path) as aside:
        aside.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
