"""Repairs a sorted model for a cut that is about to be made: the steps, in order.

`norm`: a norm divides by the root mean square of the channels it sees; for fewer of them its gain is
multiplied by sqrt(mean over kept channels of u / mean over all of u), u a channel's mean share of a
token's energy.

`least_squares`: that, and every weight whose input channels go is refitted, W_S + W_R B with B the ridge
regression of the removed inputs on the kept ones (`repair.solve`). Inputs are those of the model with the
layers that stay. A weight keeps its plain slice where calibration gave it too few tokens, or where
samples that the fit has not seen say that the slice is better.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from mbridge_prune import mcore, runtime
from mbridge_prune.dynamic import DEPTH, Consumer, Gain, Layout, Sizes, SliceTable, select
from mbridge_prune.repair.moments import Moments, bytes_of
from mbridge_prune.repair.solve import carried_over, output_error, refit

log = logging.getLogger("mbridge_prune")

RIDGE = 0.1
TOKENS = 20
"""Tokens that a weight's fit needs for each input channel it keeps."""

Record = dict[str, Any]


def repair(
    table: SliceTable,
    sizes: Sizes,
    layers: Sequence[int] | None,
    loop: Callable[[nn.Module], Any],
    kind: str,
    memory_gb: float,
) -> list[Record]:
    """Changes the weights that `shrink(table, sizes, layers)` will keep. Call it right before.

    Args:
        table: of the sorted model.
        layers: global layers that stay; None for all.
        loop: runs the model on calibration data, the same each time.
        kind: "norm" or "least_squares".
        memory_gb: of the sums at a time; more passes of the loop are made where they do not fit.

    Returns:
        One record a weight, of all pipeline stages: its label, whether it is repaired or why not, and
        the error of what it writes, sliced and repaired, on samples kept for judging (shares of what
        the full weight writes).
    """
    kept = table.first(sizes)

    def touched(layer: int | None, tree: Layout) -> bool:
        stays = layers is None or layer is None or layer in layers
        return stays and len(tree.entries(kept)) < tree.full()

    gains = [gain for layer, gain in table.gains if touched(layer, gain.tree)]
    consumers = [consumer for layer, consumer in table.consumers if touched(layer, consumer.tree)]
    passes = list(_passes(consumers if kind == "least_squares" else [], memory_gb)) or [[]]
    rows = {(id(e.module), e.attribute): e.dims[0].entries(kept) for e in table.entries if e.dims}
    records: list[Record] = []
    changes: list[tuple[Consumer, torch.Tensor]] = []
    energy: dict[str, torch.Tensor] = {}
    for number in range(max(runtime.gather_objects(len(passes), "pp"))):
        wanted = passes[number] if number < len(passes) else []
        moments = Moments(wanted, [] if number else gains)
        _run(table, layers, loop, moments)
        energy.update(moments.energy)
        for consumer in wanted:
            out, in_ = rows[id(consumer.module), consumer.name], consumer.tree.entries(kept)
            record, columns = _fitted(consumer, out, in_, moments)
            records.append(record)
            if columns is not None:  # later passes must still see the full weight
                changes.append((consumer, columns.cpu()))
    with torch.no_grad():
        for consumer, columns in changes:
            weight = consumer.weight()
            out, in_ = rows[id(consumer.module), consumer.name], consumer.tree.entries(kept)
            weight[out[:, None].to(weight.device), in_.to(weight.device)] = columns.to(weight.device)
        for gain in gains:
            if gain.label in energy:
                _rescale(gain, gain.tree.entries(kept), energy[gain.label])
    everything = [record for part in runtime.gather_objects(records, "pp") for record in part]
    _say(everything, kind)
    return everything


def _passes(consumers: Sequence[Consumer], memory_gb: float) -> Iterator[list[Consumer]]:
    """Consumers whose sums fit together, in order; one that is larger than the bound goes alone."""
    group: list[Consumer] = []
    used = 0
    for consumer in consumers:
        needs = bytes_of(consumer.tree.full())
        if group and used + needs > memory_gb * 2**30:
            yield group
            group, used = [], 0
        group.append(consumer)
        used += needs
    if group:
        yield group


def _run(
    table: SliceTable,
    layers: Sequence[int] | None,
    loop: Callable[[nn.Module], Any],
    moments: Moments,
) -> None:
    """One pass over the text, at full width, with the layers that stay."""
    with contextlib.ExitStack() as stack:
        if layers is not None:
            sizes = {**table.hparams(), DEPTH: len(layers)}
            stack.enter_context(select(table, sizes, layers))
            stack.enter_context(mcore.whole_config(table.model, sizes))
        training = table.model.training
        stack.callback(table.model.train, training)
        stack.enter_context(torch.no_grad())
        stack.enter_context(moments)
        table.model.eval()
        loop(table.model)
    moments.reduce()


def _fitted(
    consumer: Consumer, out: torch.Tensor, in_: torch.Tensor, moments: Moments
) -> tuple[Record, torch.Tensor | None]:
    """The record of a weight, and its new columns where they are better than its own.

    Args:
        out, in_: the rows and columns of the weight that stay.
    """
    label = consumer.label
    fit, judge, tokens = moments.fit.get(label), moments.judge.get(label), moments.tokens.get(label, 0)
    record: Record = {"weight": label, "channels": [consumer.tree.full(), len(in_)], "tokens": tokens}
    if fit is None or tokens < TOKENS * len(in_):
        return {**record, "repaired": False, "why": f"needs {TOKENS * len(in_):,} calibration tokens"}, None
    if judge is None:
        return {**record, "repaired": False, "why": "needs 10 calibration samples, one to judge it on"}, None
    weight, in_ = consumer.weight().detach(), in_.to(fit.device)
    weight = weight[out.to(weight.device)]
    columns = refit(weight, in_, carried_over(fit, in_, RIDGE)).to(weight.dtype)
    sliced = output_error(weight, in_, weight[:, in_], judge)
    mended = output_error(weight, in_, columns, judge)
    record |= {"sliced_error": sliced, "repaired_error": mended}
    if not mended < sliced:
        return {**record, "repaired": False, "why": "no better on samples that the fit has not seen"}, None
    return {**record, "repaired": True}, columns


def _rescale(gain: Gain, kept: torch.Tensor, energy: torch.Tensor) -> None:
    kept, weight = kept.to(energy.device), gain.weight()
    factor = (energy[kept].mean() / energy.mean().clamp(min=1e-30)).sqrt()
    weight[kept] = ((weight[kept].double() + gain.offset) * factor - gain.offset).to(weight.dtype)


def _say(records: Sequence[Record], kind: str) -> None:
    if kind == "norm":
        log.info("repair: gains of norms rescaled where hidden channels go")
    done = [record for record in records if record["repaired"]]
    if done:
        sliced, mended = (sum(r[f"{how}_error"] for r in done) / len(done) for how in ("sliced", "repaired"))
        log.info(
            "repair: %d of %d weights refitted; error of what they write, on samples kept for judging: "
            "%.3f sliced, %.3f repaired", len(done), len(records), sliced, mended,
        )  # fmt: skip
    for why in sorted({record["why"] for record in records if not record["repaired"]}):
        plain = [record["weight"] for record in records if record.get("why") == why]
        more = f" and {len(plain) - 3} more" if len(plain) > 3 else ""
        log.warning("repair: %s%s: sliced only: %s", ", ".join(plain[:3]), more, why)
