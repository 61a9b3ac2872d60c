"""Fits a weight to what is missing behind it: ridge regression on what the weight reads.

W' = W + (E[z x^T] - W E[x x^T]) (E[x x^T] + ridge diag E[x x^T])^-1, where z is all that the weight should
write; where z is what it should write besides, W E[x x^T] falls away. The ridge is the one of several that
is best on the judging samples.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch

from mbridge_prune import runtime
from mbridge_prune.dynamic import Consumer
from mbridge_prune.repair.room import Room
from mbridge_prune.repair.solve import Record, judged, ridge_solve, too_little_text, verdict


class Sums:
    """Sums over tokens, for fitting (False) and for judging (True): x x^T, z x^T and each z^2, fp64.

    Args:
        inputs, outputs: channels of x and z.
        room: where the sums are kept; None for the device.
    """

    def __init__(self, inputs: int, outputs: int, room: Room | None = None):
        self.room = Room() if room is None else room

        def zeros(*shape: int) -> dict[bool, torch.Tensor]:
            return {
                judge: torch.zeros(shape, dtype=torch.float64, device=self.room.device)
                for judge in (False, True)
            }

        self.moment, self.cross, self.square = zeros(inputs, inputs), zeros(outputs, inputs), zeros(outputs)
        self.tokens = {False: 0, True: 0}

    @staticmethod
    def bytes_of(inputs: int, outputs: int) -> int:
        return 2 * 8 * inputs * (inputs + outputs)

    def add(
        self,
        x_sbk: torch.Tensor,
        z_sbd: torch.Tensor,
        state_sbh: torch.Tensor,
        judges: Sequence[bool],
        energy: float | None = None,
    ) -> None:
        """Adds a microbatch, on this rank's device.

        A token weighs 1 / (mean square of its dense hidden state): the norm that reads it divides by that;
        with `energy` 1 / energy more, for plain errors.

        Args:
            state_sbh: the dense hidden state behind what is missing.
            judges: which samples are kept for judging.
            energy: the mean square of all tokens' hidden states.
        """
        square_sb1 = state_sbh.float().square().mean(-1, keepdim=True).clamp(min=1e-12)
        weight_sb1 = (1 / square_sb1 + (1 / energy if energy else 0.0)).sqrt()
        for judge in set(judges):
            columns = [i for i, is_judge in enumerate(judges) if is_judge == judge]
            x_tk, z_td = ((t * weight_sb1)[:, columns].flatten(0, 1).float() for t in (x_sbk, z_sbd))
            self.moment[judge] += self.room.kept(x_tk.t() @ x_tk)
            self.cross[judge] += self.room.kept(z_td.t() @ x_tk)
            self.square[judge] += self.room.kept(z_td.square().sum(0, dtype=torch.float64))
            self.tokens[judge] += len(x_tk)

    def reduce(self) -> None:
        """Adds up the sums of data-parallel ranks."""
        if runtime.size("dp") == 1:
            return
        for sums in (self.moment, self.cross, self.square):
            for judge, total in sums.items():
                sums[judge] = self.room.reduced(total, "dp")
        everywhere = runtime.gather_objects(self.tokens, "dp")
        self.tokens = {judge: sum(tokens[judge] for tokens in everywhere) for judge in (False, True)}

    def _on(self, device: torch.device) -> Sums:
        """These sums on a device, where they are not to stay."""
        there = copy.copy(self)
        there.moment, there.cross, there.square = (
            {judge: total.to(device) for judge, total in sums.items()}
            for sums in (self.moment, self.cross, self.square)
        )
        return there

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
        rows, present, sums = rows.to(weight.device), weight.double(), self._on(weight.device)
        moment = sums.moment[False]
        done = torch.zeros_like(present) if besides else present
        wanting = sums.cross[False] - done @ moment

        def new(ridge: float) -> torch.Tensor:
            return (present + ridge_solve(moment, wanting, ridge)).to(weight.dtype)

        ridge, error, weight = judged(
            new, lambda fitted: sums.error(done + (fitted.double() - present), rows)
        )
        record = {**verdict(record, sums.error(done, rows), error), "ridge": ridge}
        return record, weight if record["repaired"] else None
