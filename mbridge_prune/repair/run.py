"""Repairs a sorted model for a cut that is about to be made: the steps, in order.

`norm`: a norm divides by the root mean square of the channels it sees; for fewer of them its gain is
multiplied by sqrt(mean over kept channels of u / mean over all of u), u a channel's mean share of a
token's energy.

`least_squares`: that, and every weight whose input channels go is refitted, W_S + W_R B with B the ridge
regression of the removed inputs on the kept ones (`repair.solve`). Inputs are those of the model with the
layers that stay, and with all experts; where layers go, the weight before them has taken over what it can
of what they did (`repair.removed`). Each expert is fitted on the tokens that it is sent. A weight keeps its
plain slice where calibration gave it too few tokens, or where samples that the fit has not seen say that
the slice is better.

`sequential`: that, and then those that add to the hidden state are fitted layer by layer, in every layer
that stays (`repair.sequential`).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from mbridge_prune import mcore, runtime
from mbridge_prune.calibration.loop import CalibrationLoop
from mbridge_prune.dynamic import DEPTH, Consumer, Gain, Layout, SliceTable, Unit, Units, select
from mbridge_prune.dynamic.layout import Kept
from mbridge_prune.errors import UserError
from mbridge_prune.evaluate.mode import evaluating
from mbridge_prune.repair.moments import Moments, bytes_of
from mbridge_prune.repair.openings import with_openings
from mbridge_prune.repair.removed import Contributions, Folds
from mbridge_prune.repair.room import Room
from mbridge_prune.repair.sequential import Calls, Walk
from mbridge_prune.repair.solve import (
    HIDDEN_STATE,
    REMOVED_LAYERS,
    TOKENS,
    Record,
    carried_over,
    judged,
    output_error,
    refit,
    too_little_text,
    verdict,
)

log = logging.getLogger("mbridge_prune")

TEXT = 1_000_000
"""Tokens that are enough for every fit; a wider weight's needs go before."""


@dataclass(frozen=True)
class Repair:
    """How cuts of a model are repaired.

    Args:
        kind: "none", "norm", "least_squares" or "sequential".
        loop: runs the model on calibration data, the same each time.
        room: for the sums.
    """

    kind: str = "none"
    loop: Callable[[nn.Module], Any] | None = None
    room: Room = field(default_factory=Room)

    def make(self, table: SliceTable, sizes: Mapping[str, int], layers: Sequence[int] | None) -> list[Record]:
        """Repairs the sorted model for a cut that is made next, and logs it; the records of `repair`."""
        records = self._made(table, sizes, layers)
        if self.kind != "none":
            _say(records, self.kind)
        return records

    def _made(
        self, table: SliceTable, sizes: Mapping[str, int], layers: Sequence[int] | None
    ) -> list[Record]:
        if self.kind == "none":
            return []
        assert self.loop is not None
        return repair(table, sizes, layers, self.loop, self.kind, self.room)

    @contextlib.contextmanager
    def tried(
        self, table: SliceTable, sizes: Mapping[str, int], layers: Sequence[int] | None
    ) -> Iterator[None]:
        """Inside, the sorted model is repaired for this cut; the full one comes back exactly.

        What may change waits in host memory meanwhile.
        """
        rows: list[tuple[int | None, Gain | Consumer]] = [*table.gains] if self.kind != "none" else []
        rows += table.consumers if self.kind not in ("none", "norm") else []
        weights = {id(row.weight()): row.weight() for _, row in rows}.values()
        before = [(weight, weight.detach().to("cpu", copy=True)) for weight in weights]
        try:
            self._made(table, sizes, layers)
            yield
        finally:
            with torch.no_grad():
                for weight, values in before:
                    weight.copy_(values)


NO_REPAIR = Repair()
SAID = {
    REMOVED_LAYERS: ("what removed layers did", "nothing is taken over of what removed layers did"),
    None: ("what they write", "sliced only"),
    HIDDEN_STATE: ("what is missing behind them", "not fitted to the hidden state"),
}
"""What the log says of the records of each target: the error of what, and what else comes of a weight."""


def repair(
    table: SliceTable,
    sizes: Mapping[str, int],
    layers: Sequence[int] | None,
    loop: Callable[[nn.Module], Any],
    kind: str,
    room: Room,
) -> list[Record]:
    """Changes the weights that `shrink(table, sizes, layers)` will keep. Call it right before.

    Args:
        table: of the sorted model.
        layers: global layers that stay; None for all.
        loop: runs the model on calibration data, the same each time.
        kind: "norm", "least_squares" or "sequential".
        room: for the sums.

    Returns:
        One record a weight, of all pipeline stages: its label, whether it is repaired or why not, and
        the error of what it writes, sliced and repaired, on samples kept for judging (shares of what
        the full weight writes).
    """
    kept = table.first(sizes)

    def touched(layer: int | None, tree: Layout, unit: Unit | None = None) -> bool:
        stays = layers is None or layer is None or layer in layers
        stays = stays and (unit is None or unit.number in Units(unit.axis).entries(kept))
        return stays and len(tree.entries(kept)) < tree.full()

    gains = [gain for layer, gain in table.gains if touched(layer, gain.tree)]
    fits = kind != "norm"
    consumers = [
        consumer
        for layer, consumer in table.consumers
        if fits and touched(layer, consumer.tree, consumer.unit)
    ]
    walks, calls = kind == "sequential", Calls()
    folds = Folds(table, sizes, layers if kind == "least_squares" else None)  # the walk does it by itself
    layers_run = None if walks else layers  # the dense model is its target
    mends = any(runtime.gather_objects(bool(gains or consumers)))
    if not (walks or mends or folds.gaps):
        return []
    walked = [c for layer, c in table.consumers if walks and c.adds and (layers is None or layer in layers)]
    inputs = [_inputs(consumer, kept) for consumer in (*consumers, *walked)]
    widest = max(map(max, runtime.gather_objects([0, *inputs, *folds.inputs()])))
    loop = _enough(loop, widest)
    rows = {(id(e.module), e.attribute): e.dims[0].entries(kept) for e in table.entries if e.dims}
    records: list[Record] = []
    columns_of: dict[str, torch.Tensor] = {}
    energy: dict[str, torch.Tensor] = {}
    if folds.gaps:
        records += folds.make(lambda seen: _run(table, None, loop, seen), room)
    # Weights of all ranks before experts, which are others on each: the sums of a pass are added up in step.
    waiting = sorted(consumers, key=lambda consumer: consumer.unit is not None)
    routers = [consumer.router for _, consumer in table.consumers if consumer.router is not None]
    number = 0
    while (mends or walks) if number == 0 else any(runtime.gather_objects(bool(waiting))):
        wanted = next(room.fitting(waiting, lambda consumer: bytes_of(consumer, kept)), [])
        waiting = waiting[len(wanted) :]
        counted = [consumer for consumer in waiting if consumer.router is not None] if not number else []
        behind = any(runtime.gather_objects(any(c.router is not None for c in (*wanted, *counted))))
        moments = Moments(wanted, [] if number else gains, kept, room, counted, routers if behind else ())
        with calls.recorded(table) if walks and not number else contextlib.nullcontext():
            _run(table, layers_run, loop, moments)
        if walks:
            walkable = bool(table.layers and table.layers.numbers)
            _refuse_silence(walkable and not any(runtime.gather_objects(bool(calls.first), "dp")))
        energy.update(moments.energy)
        for consumer in wanted:
            record, columns = _fitted(consumer, rows[id(consumer.module), consumer.name], kept, moments)
            records.append(record)
            if columns is not None:  # later passes must still see the full weight
                columns_of[consumer.label] = columns.cpu()
        few = {c.label for c in counted if too_little_text(_inputs(c, kept), moments.tokens[c.label], 1)}
        for consumer in waiting:  # no pass for an expert that gets too little
            if consumer.label in few:
                records.append(_record(consumer, kept, moments))
        waiting = [consumer for consumer in waiting if consumer.label not in few]
        number += 1

    def apply(layer: int | None) -> None:
        """Makes the changes to one layer, or to what stands in none."""
        for place, consumer in table.consumers:
            if place == layer and consumer.label in columns_of:
                weight, columns = consumer.weight(), columns_of[consumer.label]
                out, in_ = rows[id(consumer.module), consumer.name], consumer.tree.entries(kept)
                weight[out[:, None].to(weight.device), in_.to(weight.device)] = columns.to(weight.device)
        for place, gain in table.gains:
            if place == layer and gain.label in energy:
                _rescale(gain, gain.tree.entries(kept), energy[gain.label])

    with evaluating(table.model), torch.no_grad():
        if walks:
            records += Walk(table, sizes, layers, calls, apply)()
        else:
            for layer in table.layers.numbers if table.layers is not None else ():
                apply(layer)
        apply(None)
    once: dict[Any, Record] = {}  # replicas say the same
    for part in runtime.gather_objects(records):
        for record in part:
            once.setdefault((record["weight"], record.get("target")), record)
    return list(once.values())


def _enough(loop: Callable[[nn.Module], Any], inputs: int) -> Callable[[nn.Module], Any]:
    """A loop over no more text than a fit is better for, and many first tokens, where it can be changed.

    Args:
        inputs: of the widest weight.
    """
    if not isinstance(loop, CalibrationLoop):
        return loop
    return with_openings(loop.first(max(TEXT, 2 * TOKENS * inputs)))


def _inputs(consumer: Consumer, kept: Kept) -> int:
    """Input channels that a weight keeps."""
    return len(consumer.tree.entries(kept))


def _run(
    table: SliceTable,
    layers: Sequence[int] | None,
    loop: Callable[[nn.Module], Any],
    seen: Moments | Contributions,
) -> None:
    """One pass over the text, at full width, with the layers that stay."""
    with contextlib.ExitStack() as stack:
        if layers is not None:
            sizes = {**table.hparams(), DEPTH: len(layers)}
            stack.enter_context(select(table, sizes, layers))
            stack.enter_context(mcore.whole_config(table.model, sizes))
        stack.enter_context(evaluating(table.model))
        stack.enter_context(torch.no_grad())
        stack.enter_context(seen)
        loop(table.model)
    seen.finish()
    _refuse_silence(seen.silent)


def _refuse_silence(silent: bool) -> None:
    """A loop that has run out, as over an iterator that was used up for the scores, would repair nothing."""
    if any(runtime.gather_objects(silent)):
        raise UserError(
            "the forward loop did not run the model this time: a repair runs it again, on the same text; "
            "give one that can be called several times, or repair='none'"
        )


def _record(consumer: Consumer, kept: Kept, moments: Moments) -> Record:
    """What is known of a weight before it is fitted: also why it is not, if it sees too little text."""
    inputs, tokens = _inputs(consumer, kept), moments.tokens.get(consumer.label, 0)
    record: Record = {
        "weight": consumer.label, "channels": [consumer.tree.full(), inputs], "tokens": tokens
    }  # fmt: skip
    why = too_little_text(inputs, tokens, consumer.label in moments.judge)
    return {**record, "repaired": False, "why": why} if why else record


def _fitted(
    consumer: Consumer, out: torch.Tensor, kept: Kept, moments: Moments
) -> tuple[Record, torch.Tensor | None]:
    """The record of a weight, and its new columns where they are better than its own.

    Args:
        out: the rows of the weight that stay.
    """
    record = _record(consumer, kept, moments)
    if "why" in record:
        return record, None
    weight = consumer.weight().detach()
    fit, judge = (sums[consumer.label].to(weight.device) for sums in (moments.fit, moments.judge))
    in_ = consumer.tree.entries(kept).to(weight.device)
    weight = weight[out.to(weight.device)]
    if consumer.renorm is not None:  # the sums are those of `Moments._renormed`
        weight = torch.cat([weight, weight[:, in_]], dim=1)
        in_ = torch.arange(weight.shape[1] - len(in_), weight.shape[1], device=fit.device)
    sliced = output_error(weight, in_, weight[:, in_], judge)
    ridge, mended, columns = judged(
        lambda ridge: refit(weight, in_, carried_over(fit, in_, ridge)).to(weight.dtype),
        lambda columns: output_error(weight, in_, columns, judge),
    )
    record = {**verdict(record, sliced, mended), "ridge": ridge}
    return record, columns if record["repaired"] else None


def _rescale(gain: Gain, kept: torch.Tensor, energy: torch.Tensor) -> None:
    kept, weight = kept.to(energy.device), gain.weight()
    factor = (energy[kept].mean() / energy.mean().clamp(min=1e-30)).sqrt()
    weight[kept] = ((weight[kept].double() + gain.offset) * factor - gain.offset).to(weight.dtype)


def _say(records: Sequence[Record], kind: str) -> None:
    if kind == "norm":
        log.info("repair: gains of norms rescaled where hidden channels go")
    for target, (what, kept) in SAID.items():
        these = [record for record in records if record.get("target") == target]
        done = [record for record in these if record["repaired"]]
        if done:
            sliced, mended = (
                sum(r[f"{how}_error"] for r in done) / len(done) for how in ("sliced", "repaired")
            )
            log.info(
                "repair: %d of %d weights refitted; error of %s, on samples kept for judging: "
                "%.3f sliced, %.3f repaired", len(done), len(these), what, sliced, mended,
            )  # fmt: skip
        left = [record for record in these if not record["repaired"]]
        for why in sorted({record["why"] for record in left}):
            plain = [record["weight"] for record in left if record["why"] == why]
            more = f" and {len(plain) - 3} more" if len(plain) > 3 else ""
            log.warning("repair: %s%s: %s: %s", ", ".join(plain[:3]), more, kept, why)
