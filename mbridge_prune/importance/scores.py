"""From sums to scores: the `minitron` ranking (Muralidharan et al. 2024, arXiv 2407.14679).

hidden_size: per probe sqrt(sum over samples of (mean over the sequence of |x|)^2), summed over the
probes of the model. ffn_hidden_size: the same at the input of fc2. num_attention_heads: the same at
the input of linear_proj, then L2 over the head's channels. num_layers: mean over tokens of
1 - cosine(before, after).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch

from mbridge_prune import runtime
from mbridge_prune.dynamic import DEPTH, Axis, SliceTable
from mbridge_prune.errors import UserError
from mbridge_prune.importance.collector import Collector


@dataclass
class Scores:
    """Scores of a whole model, equal on every rank.

    Args:
        units: axis key (global layer numbers) -> [size] fp32 importance; `num_layers` among them.
        meta: ranking, tokens, fingerprints of the model and of the calibration tokens.
    """

    units: dict[str, torch.Tensor]
    meta: dict[str, Any] = field(default_factory=dict)

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
        if scores is None or scores.shape != (axis.size,):
            have = "none" if scores is None else f"{len(scores)}"
            raise UserError(
                f"the scores do not fit this model: {axis.key} has {axis.size} units, the scores {have}"
            )
        return scores


def score(table: SliceTable, collector: Collector) -> Scores:
    """Combines the sums of all ranks into scores.

    Data-parallel sums are added; pipeline stages bring their layers together; the probes of
    hidden_size are added in the order of their global names. So the number of ranks of either kind
    does not change a score.

    Raises:
        UserError: the forward loop never ran the model.
    """
    local = {
        probe.name: (probe.axis, probe.channels, collector.sums[probe.name].cpu())
        for probe in table.probes
        if probe.name in collector.sums
    }
    layers = {n: total.cpu() for n, total in collector.layers.items()}
    merged: dict[str, tuple[str, int, torch.Tensor]] = {}
    depth: dict[int, torch.Tensor] = {}
    mine = ({n: (a.key, c, s) for n, (a, c, s) in local.items()}, layers)
    for probes, layer_sums in runtime.gather_objects(mine):
        for name, (key, channels, sums) in probes.items():
            before = merged.get(name)
            merged[name] = (key, channels, sums if before is None else before[2] + sums)
        for number, total in layer_sums.items():
            depth[number] = total if number not in depth else depth[number] + total
    if not merged:
        raise UserError("the forward loop did not run the model: no activation was seen")
    units: dict[str, torch.Tensor] = {}
    for name in sorted(merged, key=_natural):
        key, channels, sums = merged[name]
        scores = sums.view(-1, channels).sum(1).sqrt()
        units[key] = scores if key not in units else units[key] + scores
    if depth:
        units[DEPTH] = torch.stack([depth[n][0] / depth[n][1] for n in sorted(depth)])
    tokens = int(next(iter(depth.values()))[1]) if depth else 0
    units = {key: value.float() for key, value in units.items()}
    bad = [key for key, value in units.items() if not torch.isfinite(value).all()]
    if bad:
        raise UserError(f"scores are not finite for {', '.join(bad[:3])}: check the model and the text")
    return Scores(units, {"ranking": "minitron", "tokens": tokens})


def _natural(name: str) -> list:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
