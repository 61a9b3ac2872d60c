"""From sums to scores: the `minitron` ranking (Muralidharan et al. 2024, arXiv 2407.14679).

hidden_size: per probe sqrt(sum over samples of (mean over the sequence of |x|)^2), summed over the
probes of the model. ffn_hidden_size and moe_shared_expert_intermediate_size: the same at the input of
fc2. num_attention_heads, num_query_groups: the same at the input of linear_proj, then L2 over the
channels of the head, or of the whole group. mamba_num_heads, mamba_head_dim: the same at the x part of
in_proj's output, L2 over the head's channels, or a channel each (Nemotron-H, arXiv 2504.03624).
moe_ffn_hidden_size: mean over an expert's tokens of |x| at the input of its fc2. num_moe_experts: mean
over an expert's tokens of the L2 norm of its output times its router probability, or without it
(`experts="gate_free"`, see `statistics.RoutedNorm`). num_layers: mean over tokens of 1 - cosine(before,
after).
"""

from __future__ import annotations

import hashlib
import logging
import re
from dataclasses import dataclass, field
from typing import Any

import torch

from mbridge_prune import runtime
from mbridge_prune.dynamic import DEPTH, Axis, Probe, SliceTable
from mbridge_prune.errors import UserError
from mbridge_prune.importance.collector import Collector
from mbridge_prune.importance.statistics import STATISTICS

log = logging.getLogger("mbridge_prune")


@dataclass
class Scores:
    """Scores of a whole model, equal on every rank.

    Args:
        units: axis key (global layer numbers) -> [size] fp32 importance; `num_layers` among them.
        meta: ranking, tokens, fingerprints of the model and of the calibration tokens.
    """

    units: dict[str, torch.Tensor]
    meta: dict[str, Any] = field(default_factory=dict)

    def digest(self) -> str:
        """A fingerprint of all scores: what is kept at any size."""
        digest = hashlib.sha256()
        for key, scores in sorted(self.units.items()):
            digest.update(key.encode())
            digest.update(scores.float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def orders(self, table: SliceTable) -> dict[str, torch.Tensor]:
        """Axis key -> [groups, width] order, for every local axis but depth.

        Raises:
            UserError: the scores lack an axis of this model or have another size for it.
        """
        return {
            key: axis.order_by(self._of(axis)) for key, axis in table.axes.items() if axis.hparam != DEPTH
        }

    def layers_kept(self, n: int) -> list[int]:
        """The `n` most important layers by global number, ascending."""
        return sorted(self.layer_order()[:n])

    def layer_order(self) -> list[int]:
        """Global layer numbers, most important first; ties in favour of the earlier layer."""
        return torch.argsort(self.units[DEPTH], descending=True, stable=True).tolist()

    def _of(self, axis: Axis) -> torch.Tensor:
        scores = self.units.get(axis.key)
        if scores is None:
            raise UserError(
                f"the scores say nothing of {axis.key}: the forward loop did not run that layer, or the "
                "scores are of another model"
            )
        if scores.shape != (axis.size,):
            raise UserError(
                f"the scores do not fit this model: {axis.key} has {axis.size} units, "
                f"the scores {len(scores)}"
            )
        return scores


@dataclass
class _Observed:
    """The sums of one probe in the whole model, and how scores are read off them."""

    statistic: str
    readings: list[tuple[str, int]]
    sums: torch.Tensor

    def add(self, first: int, rows: torch.Tensor) -> None:
        self.sums[first : first + len(rows)] += rows


def score(table: SliceTable, collector: Collector) -> Scores:
    """Combines the sums of all ranks into scores.

    Data-parallel sums are added; pipeline stages bring their layers together, tensor- and
    expert-parallel ranks their shares of channels and experts; the probes of hidden_size are added
    in the order of their global names. So the number of ranks of any kind does not change a score.

    Raises:
        UserError: the forward loop never ran the model.
    """
    probes = _observed(table, collector)
    depth = _depth(collector)
    if not probes and not depth:
        raise UserError("the forward loop did not run the model: no activation was seen")
    units: dict[str, torch.Tensor] = {}
    for name in sorted(probes, key=natural):
        probe = probes[name]
        for key, channels in probe.readings:
            scores = STATISTICS[probe.statistic].score(probe.sums, channels)
            units[key] = scores if key not in units else units[key] + scores
    meta: dict[str, Any] = {"ranking": "minitron", "tokens": 0}
    if depth:
        units[DEPTH] = torch.stack([depth[n][0] / depth[n][1] for n in sorted(depth)])
        meta["tokens"] = int(next(iter(depth.values()))[1])
    units = {key: value.float() for key, value in units.items()}
    bad = [key for key, value in units.items() if not torch.isfinite(value).all()]
    if bad:
        raise UserError(f"scores are not finite for {', '.join(bad[:3])}: check the model and the text")
    silent = _silent_experts(probes)
    if silent:
        meta["experts_without_tokens"] = silent
    return Scores(units, meta)


def _observed(table: SliceTable, collector: Collector) -> dict[str, _Observed]:
    """Probe name -> its sums over the whole model."""
    mine = [
        (probe.name, probe.statistic, [(r.axis.key, r.channels) for r in probe.readings], first, total, rows)
        for probe in table.probes
        if (probe.name, probe.first) in collector.sums
        for first, total, rows in [_place(probe, collector.sums[probe.name, probe.first].cpu())]
        if rows is not None
    ]
    probes: dict[str, _Observed] = {}
    for part in runtime.gather_objects(mine):
        for name, statistic, readings, first, total, rows in part:
            if name not in probes:
                probes[name] = _Observed(statistic, readings, rows.new_zeros(total, rows.shape[1]))
            probes[name].add(first, rows)
    return probes


def _place(probe: Probe, rows: torch.Tensor) -> tuple[int, int, torch.Tensor | None]:
    """(first row in the whole model, rows of the whole model, this rank's rows or None).

    Tensor-parallel ranks hold shares of what is sharded and copies of everything else, of which
    one counts. Experts live somewhere in the world; where several ranks send them the same tokens,
    the ratio of their sums is the same.
    """
    if probe.router is not None:
        return probe.first, _experts(probe), rows
    rank, ranks = runtime.place("tp"), runtime.size("tp")
    if probe.sharded:
        return rank * len(rows), ranks * len(rows), rows
    return 0, len(rows), rows if rank == 0 else None


def _experts(probe: Probe) -> int:
    """Experts of the layer: the axis's units, or the groups that its channels lie in."""
    axis = probe.readings[0].axis
    return axis.groups if axis.per_group else axis.size


def _depth(collector: Collector) -> dict[int, torch.Tensor]:
    """Global layer number -> (sum of 1 - cosine, tokens) over all ranks."""
    mine = {n: total.cpu() for n, total in collector.layers.items()} if runtime.place("tp") == 0 else {}
    depth: dict[int, torch.Tensor] = {}
    for part in runtime.gather_objects(mine):
        for number, total in part.items():
            depth[number] = total if number not in depth else depth[number] + total
    return depth


def _silent_experts(probes: dict[str, _Observed]) -> dict[str, list[int]]:
    """Layer -> experts that calibration sent no token; said once, in the log."""
    silent: dict[str, list[int]] = {}
    for name, probe in probes.items():
        if probe.statistic == "routed_norm" and (probe.sums[:, -1] == 0).any():
            silent[name.partition(".mlp.")[0]] = (probe.sums[:, -1] == 0).nonzero().flatten().tolist()
    if silent:
        said = "; ".join(f"{layer}: {', '.join(map(str, experts))}" for layer, experts in silent.items())
        log.warning("experts that calibration sent no token (ranked last, their order kept): %s", said)
    return silent


def natural(name: str) -> list:
    """A key that sorts names with the numbers in them by value."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
