"""Fits a weight to what is missing behind it: ridge regression on what the weight reads.

W' = W + (E[z x^T] - W E[x x^T]) (E[x x^T] + ridge diag E[x x^T])^-1, where z is all that the weight should
write; where z is what it should write besides, W E[x x^T] falls away. The ridge is the one of several that
is best on the judging samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from mbridge_prune import runtime
from mbridge_prune.dynamic import Consumer
from mbridge_prune.repair.solve import RIDGES, Record, ridge_solve, too_little_text, verdict


class Sums:
    """Sums over tokens, for fitting (False) and for judging (True): x x^T, z x^T and each z^2, fp64."""

    def __init__(self, inputs: int, outputs: int):
        def zeros(*shape: int) -> dict[bool, torch.Tensor]:
            device = runtime.device()
            return {judge: torch.zeros(shape, dtype=torch.float64, device=device) for judge in (False, True)}

        self.moment, self.cross, self.square = zeros(inputs, inputs), zeros(outputs, inputs), zeros(outputs)
        self.tokens = {False: 0, True: 0}

    @staticmethod
    def bytes_of(inputs: int, outputs: int) -> int:
        return 2 * 8 * inputs * (inputs + outputs)

    def add(
        self, x_sbk: torch.Tensor, z_sbd: torch.Tensor, state_sbh: torch.Tensor, judges: Sequence[bool]
    ) -> None:
        """Adds a microbatch, on this rank's device.

        A token weighs 1 / (mean square of its dense hidden state): the norm that reads it divides by that.

        Args:
            state_sbh: the dense hidden state behind what is missing.
            judges: which samples are kept for judging.
        """
        size_sb1 = state_sbh.float().square().mean(-1, keepdim=True).clamp(min=1e-12).sqrt()
        for judge in set(judges):
            columns = [i for i, is_judge in enumerate(judges) if is_judge == judge]
            x_tk, z_td = ((t / size_sb1)[:, columns].flatten(0, 1).float() for t in (x_sbk, z_sbd))
            self.moment[judge] += (x_tk.t() @ x_tk).double()
            self.cross[judge] += (z_td.t() @ x_tk).double()
            self.square[judge] += z_td.square().sum(0, dtype=torch.float64)
            self.tokens[judge] += len(x_tk)

    def reduce(self) -> None:
        """Adds up the sums of data-parallel ranks."""
        if runtime.size("dp") == 1:
            return
        for sums in (self.moment, self.cross, self.square):
            for total in sums.values():
                dist.all_reduce(total, group=runtime.group("dp"))
        everywhere = runtime.gather_objects(self.tokens, "dp")
        self.tokens = {judge: sum(tokens[judge] for tokens in everywhere) for judge in (False, True)}

    def error(self, weight: torch.Tensor, rows: torch.Tensor) -> float:
        """Squared error of [outputs, inputs] on the judging share and in these rows, as a share of z^2."""
        weight, cross, square = weight[rows], self.cross[True][rows], self.square[True][rows].sum()
        apart = (weight @ self.moment[True] * weight).sum() - 2 * (weight * cross).sum() + square
        return float(apart / square) if float(square) else 0.0

    def fitted(
        self,
        consumer: Consumer,
        weight: torch.Tensor,
        target: str,
        besides: bool = False,
        rows: torch.Tensor | None = None,
    ) -> tuple[Record, torch.Tensor | None]:
        """The record of a weight, and its new values where they are better on the judging share.

        Args:
            weight: [outputs, inputs], what stays of the consumer's, as it is.
            target: what z is, for the record.
            besides: z is what the weight should write besides what it writes.
            rows: the outputs it is judged on; None for all.
        """
        inputs, tokens, judging = weight.shape[1], self.tokens[False], self.tokens[True]
        record: Record = {
            "weight": consumer.label, "channels": [consumer.tree.full(), inputs], "tokens": tokens,
            "target": target,
        }  # fmt: skip
        why = too_little_text(inputs, tokens, judging)
        if why:
            return {**record, "repaired": False, "why": why}, None
        rows = torch.arange(len(weight)) if rows is None else rows
        rows, present, moment = rows.to(weight.device), weight.double(), self.moment[False]
        done = torch.zeros_like(present) if besides else present
        wanting = self.cross[False] - done @ moment

        def new(ridge: float) -> torch.Tensor:
            return (present + ridge_solve(moment, wanting, ridge)).to(weight.dtype)

        errors = {ridge: self.error(done + (new(ridge).double() - present), rows) for ridge in RIDGES}
        ridge = min(RIDGES, key=lambda each: errors[each])
        record = {**verdict(record, self.error(done, rows), errors[ridge]), "ridge": ridge}
        return record, new(ridge) if record["repaired"] else None
