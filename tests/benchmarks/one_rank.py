"""Measures of one rank: passes over the model, cutting, import and export, counting."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from measuring import Row, candidate, load, seconds, side_by_side, table_of

import mbridge_prune as mbp
from mbridge_prune.calibration.schedule import forward_only
from mbridge_prune.dynamic import DEPTH, SliceTable, select, shrink, sort
from mbridge_prune.importance import Collector
from mbridge_prune.search.budget import BUDGETS
from mbridge_prune.search.costs import Costs, Serving
from mbridge_prune.search.space import Grid, Space

CANDIDATES = 1_000_000


def hooked_pass(model: Any, tokens: torch.Tensor, repeats: int, batch: int = 1) -> Row:
    table = table_of(model)

    def bare() -> float:
        return seconds(lambda: forward_only(model, tokens, batch))

    def hooked() -> float:
        with Collector(table):
            return seconds(lambda: forward_only(model, tokens, batch))

    a, b = side_by_side(hooked, bare, repeats)
    return Row("hooked calibration pass / bare forward through the last layer", a / b, 1.05,
               f"microbatches of {batch} x {tokens.shape[1]}, {tokens.numel() / a:.0f} tokens/s hooked")  # fmt: skip


def candidate_forward(model: Any, path: Path, tokens: torch.Tensor, scratch: Path, repeats: int) -> Row:
    """A second copy of the model is cut for good and exported: the model on disk."""
    sizes, layers = candidate(table_of(model))
    other = load(path)
    shrink(table_of(other.unwrapped_model), sizes, layers)
    mbp.export_hf(other.bridge, other.model, scratch / "candidate", layers_kept=layers, source=path)
    del other
    loaded = load(scratch / "candidate").unwrapped_model
    table = table_of(model)

    def selected() -> float:
        with select(table, sizes, layers) as chosen:
            shapes = [p.shape for p in chosen.parameters()]
            if shapes != [p.shape for p in loaded.parameters()]:
                raise RuntimeError("the candidate and the model from disk differ in shape")
            return seconds(lambda: forward_only(chosen, tokens, 1))

    def from_disk() -> float:
        return seconds(lambda: forward_only(loaded, tokens, 1))

    a, b = side_by_side(selected, from_disk, repeats)
    return Row("candidate forward inside select / the same model loaded from disk", a / b, 1.05)


@contextmanager
def restored(table: SliceTable) -> Iterator[None]:
    """Gives the model fresh copies of its weights, which `shrink` may free, and the originals back.

    An empty selection saves and restores everything else that `shrink` changes. What comes next works in
    memory that is new to the process: freed memory that is still there makes a copy six times as fast, and
    whether any is there is chance.
    """
    full = list(range(table.hparams()[DEPTH]))
    with select(table, {}, full):
        for entry in table.entries:
            entry.tensor().data = entry.tensor().data.clone()
        with suppress(OSError, AttributeError):  # glibc
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        yield


def shrinking(model: Any, repeats: int) -> Row:
    table = table_of(model)
    sizes, layers = candidate(table)
    kept: list[torch.Tensor] = []
    with restored(table):
        shrink(table, sizes, layers)
        kept = [p.data for p in model.parameters()]

    def cut() -> float:
        with restored(table):
            return seconds(lambda: shrink(table, sizes, layers))

    def copy() -> float:
        with restored(table):
            return seconds(lambda: [t.clone() for t in kept])

    a, b = side_by_side(cut, copy, repeats)
    return Row(
        "shrink / clone of the kept bytes", a / b, 2.0, f"{sum(t.nbytes for t in kept) / 2**20:.0f} MiB kept"
    )


def sorting_and_shrinking(model: Any, repeats: int) -> Row:
    """Every axis in a random order of its own, as scores would have it, then the cut."""
    table = table_of(model)
    sizes, layers = candidate(table)
    draw = torch.Generator().manual_seed(0)
    axes = [axis for axis in table.axes.values() if axis.hparam != DEPTH]
    orders = {axis.key: axis.order_by(torch.rand(axis.size, generator=draw)) for axis in axes}
    with restored(table):
        shrink(table, sizes, layers)
        kept = [p.data for p in model.parameters()]

    def cut() -> float:
        with restored(table):
            return seconds(lambda: (sort(table, orders), shrink(table, sizes, layers)))

    def copy() -> float:
        with restored(table):
            return seconds(lambda: [t.clone() for t in kept])

    a, b = side_by_side(cut, copy, repeats)
    whole = sum(entry.tensor().nbytes for entry in table.entries if entry.counted)
    return Row("sort + shrink / clone of the kept bytes", a / b, None,
               f"{whole / 2**20:.0f} MiB sorted, {sum(t.nbytes for t in kept) / 2**20:.0f} MiB kept")  # fmt: skip


def shrink_memory(model: Any) -> Row:
    """Every allocation and release of torch's CPU allocator, in order: exact to the byte."""
    from torch.profiler import ProfilerActivity, profile, record_function

    table = table_of(model)
    sizes, layers = candidate(table)
    largest = max(p.nbytes for p in model.parameters())
    # The fresh weights are made inside the profile, or it would not see them released.
    recorder = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with recorder as record, restored(table), record_function("shrink"):
        shrink(table, sizes, layers)
    events = sorted(record.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    begin = next(e.start_ns() for e in events if e.name() == "shrink")
    above = np.cumsum([e.nbytes() for e in events if e.name() == "[memory]" and e.start_ns() >= begin])
    if above.min() >= 0:
        raise RuntimeError("the profiler saw no memory released by shrink: the measure is not valid")
    return Row("peak memory of shrink above the model / its largest tensor", above.max() / largest, 1.0,
               f"largest {largest / 2**20:.0f} MiB")  # fmt: skip


def import_and_export(path: Path, scratch: Path, repeats: int) -> Row:
    weights = sorted(path.glob("*.safetensors"))
    out = scratch / "whole"

    def both() -> float:
        shutil.rmtree(out, ignore_errors=True)

        def work() -> None:
            bridge, _, model, unwrapped, tokenizer = load(path)
            layers = list(range(unwrapped.config.num_layers))
            mbp.export_hf(bridge, model, out, layers_kept=layers, tokenizer=tokenizer, source=path)

        return seconds(work)

    def copy() -> float:
        return seconds(lambda: [shutil.copyfile(f, scratch / f.name) for f in weights])

    a, b = side_by_side(both, copy, repeats, warm_up=False)
    return Row("import + export / copying the safetensors", a / b, None, f"{a:.1f} s / {b:.2f} s")


def counting(model: Any, repeats: int) -> Iterator[Row]:
    """The first million candidates of the space with every size allowed, as a search counts them."""
    table = table_of(model)
    order = list(range(table.hparams()[DEPTH]))
    costs = Costs(table, order, Serving(), next(model.parameters()).element_size())
    space = Space.of(table, order, {})

    def laid_out() -> list[Grid]:
        chunks, missing = [], CANDIDATES
        for chunk in space.grid():
            chunks.append({hparam: sizes[:missing] for hparam, sizes in chunk.items()})
            missing -= len(chunks[-1][DEPTH])
            if not missing:
                return chunks
        raise RuntimeError(f"the whole space of this model has fewer than {CANDIDATES:,} candidates")

    grid = laid_out()
    lay_out = median(seconds(laid_out) for _ in range(repeats))
    whole = lay_out
    for budget in BUDGETS:
        count = median(
            seconds(lambda b=budget: [costs.of(b, chunk) for chunk in grid]) for _ in range(repeats)
        )
        whole += count
        yield Row(f"{budget} of one million candidates, seconds", count, 1.0,
                  f"{CANDIDATES / count / 1e6:.1f} million candidates/s")  # fmt: skip
    yield Row("one million candidates laid out and counted in every budget, seconds", whole, 1.0,
              f"laid out: {lay_out:.2f} s")  # fmt: skip
