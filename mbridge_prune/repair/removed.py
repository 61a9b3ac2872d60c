"""What removed layers did, taken over by the weight before them.

Before a gap (`repair.gaps`) stands a layer whose last weight (fc2; linear_proj or out_proj, where a layer has
nothing behind it) adds to the hidden state right in front of the gap. With x what of its input stays and z
what the layers of the gap add to the hidden state, both in the dense model:

W' = W_S + E[z x^T] (E[x x^T] + ridge diag E[x x^T])^-1

as in `repair.missing`. It is done to the full model, before any other weight is refitted: those see the
model with the layers that stay as it is then.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mbridge_prune import runtime
from mbridge_prune.dynamic import DEPTH, Consumer, SliceTable, Units
from mbridge_prune.importance.watch import first_tensor, watch
from mbridge_prune.repair.gaps import Gap, gaps_between, stage_of_layers
from mbridge_prune.repair.missing import Sums
from mbridge_prune.repair.room import Room
from mbridge_prune.repair.routing import judging
from mbridge_prune.repair.solve import REMOVED_LAYERS, Record


@dataclass(frozen=True)
class Fold:
    """A weight of this stage that takes over what the layers of a gap did.

    Args:
        in_: the columns of the weight that stay.
    """

    gap: Gap
    consumer: Consumer
    in_: torch.Tensor


class Folds:
    """All folds of a cut. Every method is called on all ranks.

    Args:
        table: of the sorted model.
        layers: global layers that stay; None for all.

    Attributes:
        gaps: of the whole model.
        here: the folds of this stage.
        impossible: records of the gaps before which this stage has nothing to fold them into.
    """

    def __init__(self, table: SliceTable, sizes: Mapping[str, int], layers: Sequence[int] | None):
        self.table, self.kept = table, table.first(sizes)
        self.gaps = gaps_between(layers, table.hparams()[DEPTH])
        self.stage_of = stage_of_layers(table) if self.gaps else {}
        self.here: list[Fold] = []
        self.impossible: list[Record] = []
        for gap in self.gaps:
            if self.stage_of[gap.first if gap.before is None else gap.before] == runtime.place("pp"):
                found = self._fold(gap)
                if isinstance(found, Fold):
                    self.here.append(found)
                else:
                    self.impossible.append(
                        {"weight": str(gap), "target": REMOVED_LAYERS, "repaired": False, "why": found}
                    )

    def _fold(self, gap: Gap) -> Fold | str:
        """The fold, or why there is none."""
        consumers = [consumer for layer, consumer in self.table.consumers if layer == gap.before]
        if gap.before is None:
            return "no layer that stays is in front of them"
        if not consumers or not consumers[-1].adds:
            return f"what layer {gap.before} adds last to the hidden state is not one weight's output"
        in_ = consumers[-1].tree.entries(self.kept)
        if consumers[-1].renorm is not None and len(in_) < consumers[-1].tree.full():
            return f"{consumers[-1].label} stands behind a norm over channels that go too"
        return Fold(gap, consumers[-1], in_)

    def inputs(self) -> list[int]:
        """Of the weights of this stage."""
        return [len(fold.in_) for fold in self.here]

    def make(self, run: Callable[[Contributions], None], room: Room) -> list[Record]:
        """Changes the weights of this stage; a record of each.

        Args:
            run: one pass of the dense model over the text, inside this context, and its `finish`.
            room: for the sums.
        """
        rows = Units(self.table.axes["hidden_size"]).entries(self.kept)
        records = list(self.impossible)
        changes: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        hidden = self.table.axes["hidden_size"].size
        passes = list(room.fitting(self.here, lambda fold: Sums.bytes_of(len(fold.in_), hidden)))
        everywhere = runtime.gather_objects([[fold.gap for fold in folds] for folds in passes], "pp")
        for number, gaps in enumerate(itertools.zip_longest(*everywhere, fillvalue=())):
            folds = passes[number] if number < len(passes) else []
            seen = Contributions(self.table, folds, list(itertools.chain(*gaps)), self.stage_of, room)
            run(seen)
            for fold, sums in zip(folds, seen.sums, strict=True):
                weight = fold.consumer.weight().detach()
                in_ = fold.in_.to(weight.device)
                record, new = sums.fitted(
                    fold.consumer, weight[:, in_], REMOVED_LAYERS, besides=True, rows=rows
                )
                records.append(record)
                if new is not None:  # later passes must still see the dense model
                    changes.append((weight, in_, new.cpu()))
        for weight, in_, new in changes:
            weight[:, in_] = new.to(weight.device)
        return records


class Contributions:
    """Context manager: inside it, every forward of the dense model adds to the sums of x and z.

    Where a gap ends on a later stage, what belongs together meets in `finish`: until then one stage keeps x
    and the hidden state before the gap, the other the hidden state behind it, in host memory.

    Args:
        folds: of this stage.
        gaps: of the folds of all stages.
        stage_of: global layer number -> stage.
        room: for the sums.

    Attributes:
        sums: of every fold.
    """

    def __init__(
        self,
        table: SliceTable,
        folds: Sequence[Fold],
        gaps: Sequence[Gap],
        stage_of: Mapping[int, int],
        room: Room,
    ):
        assert table.layers is not None
        here, hidden = runtime.place("pp"), table.axes["hidden_size"].size
        self.folds, self.stage_of = folds, stage_of
        self.sums = [Sums(len(fold.in_), hidden, room) for fold in folds]
        self.ending = [
            gap for gap in gaps if stage_of[gap.last] == here and gap.before is not None
            and stage_of[gap.before] != here
        ]  # fmt: skip
        self.modules = dict(zip(table.layers.numbers, table.layers.owner.layers, strict=True))
        self._calls = [0] * len(folds)
        self._before: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in folds]
        self._behind: list[list[torch.Tensor]] = [[] for _ in self.ending]
        self._hooks = ExitStack()

    def __enter__(self) -> Contributions:
        for place, fold in enumerate(self.folds):
            self._watch(place, fold)
        for gap, states in zip(self.ending, self._behind, strict=True):
            self._after(gap.last, self._keeper(states))
        return self

    def __exit__(self, *exc: object) -> None:
        self._hooks.close()

    def _watch(self, place: int, fold: Fold) -> None:
        gap, here = fold.gap, self.stage_of[fold.gap.last] == runtime.place("pp")
        inputs: list[torch.Tensor] = []
        waiting = self._before[place]
        assert gap.before is not None

        def see_input(x_sbc: torch.Tensor, args: tuple) -> None:
            inputs.append(x_sbc[..., fold.in_.to(x_sbc.device)])

        def see_before(state_sbh: torch.Tensor) -> None:
            pair = inputs.pop(), state_sbh
            waiting.append(pair if here else (pair[0].cpu(), pair[1].to("cpu", copy=True)))

        def see_behind(state_sbh: torch.Tensor) -> None:
            self._add(place, *waiting.pop(), state_sbh)

        self._hooks.enter_context(watch(fold.consumer.seen, fold.consumer.tensor, see_input))
        self._after(gap.before, see_before)
        if here:
            self._after(gap.last, see_behind)

    @staticmethod
    def _keeper(states: list[torch.Tensor]) -> Callable[[torch.Tensor], None]:
        return lambda state_sbh: states.append(state_sbh.to("cpu", copy=True))

    def _after(self, number: int, see: Callable[[torch.Tensor], Any]) -> None:
        def hook(layer: nn.Module, args: tuple, out: Any) -> None:
            see(first_tensor(out).detach())

        self._hooks.callback(self.modules[number].register_forward_hook(hook).remove)

    def _add(
        self, place: int, x_sbk: torch.Tensor, before_sbh: torch.Tensor, behind_sbh: torch.Tensor
    ) -> None:
        judges = judging(self._calls[place], x_sbk.shape[1])
        self._calls[place] += 1
        self.sums[place].add(x_sbk, behind_sbh.float() - before_sbh.float(), behind_sbh, judges)

    @property
    def silent(self) -> bool:
        """There was something to see, and nothing came."""
        return bool(self.sums) and not any(any(sums.tokens.values()) for sums in self.sums)

    def finish(self) -> None:
        """Brings together what other stages have seen, and the sums of data-parallel ranks."""
        for gap, states in zip(self.ending, self._behind, strict=True):
            assert gap.before is not None
            for state in states:
                runtime.send_to_stage(state.float(), self.stage_of[gap.before])
        device = runtime.device()
        for place, fold in enumerate(self.folds):
            for x_sbk, before_sbh in self._before[place]:
                stage = self.stage_of[fold.gap.last]
                behind_sbh = runtime.receive_from_stage(before_sbh.shape, torch.float32, stage)
                self._add(place, x_sbk.to(device), before_sbh.to(device), behind_sbh)
        for sums in self.sums:
            sums.reduce()
