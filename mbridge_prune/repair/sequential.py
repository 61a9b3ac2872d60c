"""Layer by layer with the error that has come so far: two streams of hidden states, dense and cut.

A weight that adds to the hidden state (linear_proj, fc2, a mixer's out_proj) is fitted on the inputs it
has in the cut model. Its target is the dense hidden state behind it, less what the cut model has before
it: so it makes good what earlier layers got wrong, and what layers did that stood behind it and go.

It is fitted as `repair.missing` says, from the weight that least squares has refitted already. Errors count
as shares of a token's own hidden state, and plain besides, both as much over the whole text: the plain ones
are those of attention sinks, a few tokens with hidden states a hundred times as large, on which all others
rely. What is left of what is missing is noise more and more, which a fit of every weight in turn learns by
heart: hence a ridge that is chosen on the judging samples.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from mbridge_prune import mcore, runtime
from mbridge_prune.dynamic import DEPTH, Consumer, SliceTable, Units, select
from mbridge_prune.importance.watch import first_tensor, watch
from mbridge_prune.repair.gaps import gaps_between, stage_of_layers
from mbridge_prune.repair.missing import Sums
from mbridge_prune.repair.routing import judging
from mbridge_prune.repair.solve import HIDDEN_STATE, Record

States = list[torch.Tensor]
"""Hidden states [s, b, hidden] in host memory, one tensor a microbatch."""


class _Enough(Exception):
    """Leaves a layer's forward once what is wanted of it has been seen."""


@dataclass
class Calls:
    """How the layers are called, microbatch after microbatch, and the first one's hidden states."""

    arguments: dict[int, list[tuple[tuple, dict[str, Any]]]] = field(default_factory=dict)
    first: States = field(default_factory=list)

    @contextmanager
    def recorded(self, table: SliceTable) -> Iterator[None]:
        """Inside, a pass of the whole model is recorded."""
        layers = table.layers
        assert layers is not None
        with ExitStack() as stack:
            for number, layer in zip(layers.numbers, layers.owner.layers, strict=True):
                see = self._recorder(number, number == layers.numbers[0])
                stack.callback(layer.register_forward_pre_hook(see, with_kwargs=True).remove)
            yield

    def _recorder(self, number: int, first: bool) -> Callable:
        def hook(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            if first:
                self.first.append(_stored(hidden))
            rest = args if "hidden_states" in kwargs else args[1:]
            self.arguments.setdefault(number, []).append((rest, others))

        return hook


class Walk:
    """Fits the weights of the layers that stay, from the first to the last, in place.

    Args:
        table: of the sorted model, whose leading units stay.
        layers: global layers that stay; None for all.
        calls: of the whole, dense model on the calibration text.
        apply: makes the other changes to a layer (its number), before it is fitted.
    """

    def __init__(
        self,
        table: SliceTable,
        sizes: Mapping[str, int],
        layers: Sequence[int] | None,
        calls: Calls,
        apply: Callable[[int], None],
    ):
        assert table.layers is not None
        self.table, self.sizes, self.calls, self.apply = table, sizes, calls, apply
        self.kept = table.first(sizes)
        self.hidden = Units(table.axes["hidden_size"]).entries(self.kept)
        self.numbers = table.layers.numbers
        self.modules = dict(zip(self.numbers, table.layers.owner.layers, strict=True))
        self.stay = [n for n in self.numbers if layers is None or n in layers]
        self.gaps = gaps_between(layers, table.hparams()[DEPTH])
        self.stage_of = stage_of_layers(table)
        self.stages = sorted(set(self.stage_of.values()))
        self.dtypes = runtime.gather_objects(calls.first[0].dtype if calls.first else None, "pp")

    def __call__(self) -> list[Record]:
        """One record a weight; every layer has its changes afterwards. Stages walk one after another."""
        records: list[Record] = []
        if not self.numbers:
            return records
        dense, cut = self._in_front(), self._begin()
        for number in self.stay:
            consumers = [consumer for layer, consumer in self.table.consumers if layer == number]
            targets, after = self._targets(number, consumers, dense)
            dense = self._behind(number, after)
            if consumers and consumers[-1].adds:  # nothing else of the layer comes after it
                targets[consumers[-1].label] = dense
            self.apply(number)
            for place, consumer in enumerate(consumers):
                if consumer.adds:
                    before = [c for c in consumers[:place] if c.adds]
                    sums = self._sums(number, consumer, before, targets[consumer.label], cut)
                    records.append(self._fit(consumer, sums))
            with self._shaped(number):
                cut = self._through([number], cut)
        self._end(cut)
        return records

    def _in_front(self) -> States:
        """The dense hidden states in front of this stage's first layer that stays.

        Those behind a gap that began on an earlier stage are what the layer before it is fitted to, there.
        """
        here = runtime.place("pp")
        for gap in self.gaps:
            if gap.first <= self.numbers[0] and self.stage_of[gap.last] == here:
                dense = self._through(range(self.numbers[0], gap.last + 1), self.calls.first)
                if gap.before is not None:
                    self._send(dense, self.stage_of[gap.before])
                return dense
        return self.calls.first

    def _behind(self, number: int, after: States) -> States:
        """The dense hidden states behind the gap after a layer, which may end on a later stage."""
        here = runtime.place("pp")
        for gap in self.gaps:
            if gap.before == number and self.stage_of[gap.last] != here:
                return self._receive(self.table.axes["hidden_size"].size, self.stage_of[gap.last])
            if gap.before == number:
                return self._through(range(gap.first, gap.last + 1), after)
        return after

    def _begin(self) -> States:
        """The hidden states of the cut model in front of this stage."""
        place = self.stages.index(runtime.place("pp"))
        if place == 0:
            return [state[..., self.hidden] for state in self.calls.first]
        return self._receive(len(self.hidden), self.stages[place - 1])

    def _end(self, cut: States) -> None:
        place = self.stages.index(runtime.place("pp"))
        if place + 1 < len(self.stages):
            self._send(cut, self.stages[place + 1])

    def _send(self, states: States, stage: int) -> None:
        for state in states:
            runtime.send_to_stage(state.to(self.dtypes[stage]), stage)

    def _receive(self, channels: int, stage: int) -> States:
        here = self.dtypes[runtime.place("pp")]
        shapes = [(*state.shape[:-1], channels) for state in self.calls.first]
        return [_stored(runtime.receive_from_stage(shape, here, stage)) for shape in shapes]

    def _through(self, numbers: Sequence[int], states: States) -> States:
        for number in numbers:
            states = [_stored(self._call(number, i, state)) for i, state in enumerate(states)]
        return states

    def _call(self, number: int, microbatch: int, state: torch.Tensor) -> torch.Tensor:
        args, kwargs = self.calls.arguments[number][microbatch]
        hidden = state.to(runtime.device())
        layer = self.modules[number]
        out = layer(hidden, *args, **kwargs) if args else layer(hidden_states=hidden, **kwargs)
        return first_tensor(out)

    @contextmanager
    def _shaped(self, number: int) -> Iterator[None]:
        """Inside, a layer has the shapes that it is cut to."""
        with (
            select(self.table.part(number), self.sizes),
            mcore.whole_config(self.table.model, self.sizes),
        ):
            yield

    def _targets(
        self, number: int, consumers: Sequence[Consumer], dense: States
    ) -> tuple[dict[str, States], States]:
        """The dense hidden states behind every weight that adds to them, and those behind the layer."""
        adding = [consumer for consumer in consumers if consumer.adds]
        targets: dict[str, States] = {consumer.label: [] for consumer in adding}
        after: States = []
        for microbatch, state in enumerate(dense):
            with _written(adding) as written:
                after.append(_stored(self._call(number, microbatch, state)))
            for consumer, added in zip(adding, written, strict=True):
                state = state + added.cpu()
                targets[consumer.label].append(state)
        return targets, after

    def _sums(
        self, number: int, consumer: Consumer, before: Sequence[Consumer], target: States, cut: States
    ) -> Sums:
        """What a weight reads in the cut model, and what is missing behind it."""
        sums = Sums(len(consumer.tree.entries(self.kept)), len(self.hidden))
        bias = consumer.module._parameters.get("bias")
        energy = _energy(target)
        with self._shaped(number):
            for microbatch, state in enumerate(cut):
                judges = judging(microbatch, state.shape[1])
                with _written(before) as written:
                    x_sbk = self._read(number, consumer, microbatch, state)
                dense_sbh = target[microbatch].to(x_sbk.device)
                missing_sbd = dense_sbh[..., self.hidden.to(x_sbk.device)] - state.to(x_sbk.device)
                for added in written if bias is None else [*written, bias]:
                    missing_sbd = missing_sbd - added
                sums.add(x_sbk, missing_sbd, dense_sbh, judges, energy)
        sums.reduce()
        return sums

    def _read(self, number: int, consumer: Consumer, microbatch: int, state: torch.Tensor) -> torch.Tensor:
        """[s, b, inputs]: what a weight reads; the layer runs no further."""
        found: list[torch.Tensor] = []

        def see(x_sbk: torch.Tensor, args: tuple) -> None:
            found.append(x_sbk)
            raise _Enough

        with watch(consumer.seen, consumer.tensor, see), contextlib.suppress(_Enough):
            self._call(number, microbatch, state)
        return found[0]

    def _fit(self, consumer: Consumer, sums: Sums) -> Record:
        weight = consumer.weight()
        rows, columns = self.hidden[:, None], consumer.tree.entries(self.kept)
        rows, columns = rows.to(weight.device), columns.to(weight.device)
        record, new = sums.fitted(consumer, weight[rows, columns], HIDDEN_STATE)
        if new is not None:
            weight[rows, columns] = new
        return record


@contextmanager
def _written(consumers: Sequence[Consumer]) -> Iterator[list[torch.Tensor]]:
    """Inside, a list grows by what each of these weights adds to the hidden state, with its bias."""
    found: list[torch.Tensor] = []

    def hook(module: nn.Module, args: tuple, out: Any) -> None:
        out, bias = out if isinstance(out, tuple) else (out, None)
        found.append(out.clone() if bias is None else out + bias)  # Megatron adds to it in place

    with ExitStack() as stack:
        for consumer in consumers:
            stack.callback(consumer.module.register_forward_hook(hook).remove)
        yield found


def _stored(state: torch.Tensor) -> torch.Tensor:
    return state.detach().to("cpu", copy=True)


def _energy(states: States) -> float:
    """The mean square of all tokens' hidden states, of all data-parallel ranks."""
    squares = [float(state.double().square().mean(-1).sum()) for state in states]
    tokens = [state.shape[0] * state.shape[1] for state in states]
    everywhere = runtime.gather_objects((sum(squares), sum(tokens)), "dp")
    return sum(square for square, _ in everywhere) / max(1, sum(count for _, count in everywhere))
