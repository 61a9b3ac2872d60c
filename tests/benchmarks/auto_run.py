"""Where the time of a search goes: a whole auto prune of a few minutes, split into its steps."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import measuring
import torch
from measuring import Row, load, random_tokens

import mbridge_prune as mbp
from mbridge_prune.search.store import Record, Store

DIVISORS = {"hidden_size_divisor": 64, "ffn_hidden_size_divisor": 128, "num_layers_divisor": 2}
BUDGET = {"params": "75%"}
TOP_K = 3
STEPS = {  # kind of the record that a step ends with: the step
    "search": "ranking and sorting",
    "axis": "single cuts",
    "cloud": "counting the grid",
    "pair": "surrogate check",
    "surrogate": "surrogate check",
    "halving": "halving",
    "score": "score",
    "winner": "loss before and after",
}
MEASURED = ("axis", "pair", "halving", "score")


class Split:
    """Seconds of every step; a record that the search stores ends one."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.candidates: Counter[str] = Counter()
        self.last = measuring.clock()

    def lap(self, step: str) -> None:
        now = measuring.clock()
        self.seconds[step] += now - self.last
        self.last = now

    def stored(self, record: Record) -> None:
        step = STEPS[record["kind"]]
        self.lap(step)
        self.candidates[step] += record["kind"] in MEASURED


class Loop(mbp.CalibrationLoop):
    """The calibration loop, which says when it begins and ends."""

    split: Split

    def __call__(self, model: torch.nn.Module) -> None:
        self.split.lap("preparing")
        super().__call__(model)
        self.split.lap("scoring")


def auto_run(path: Path, scratch: Path, args: argparse.Namespace) -> Iterator[Row]:
    """Import to export, on random tokens: what they say changes no time."""
    samples, held_out = (2, 1) if args.quick else (8, 4)
    split, add = Split(), Store.add

    def timed_add(store: Store, record: Record) -> Record:
        record = add(store, record)
        split.stored(record)
        return record

    bridge, provider, model, unwrapped, _ = load(path, length=args.length)
    split.lap("import")
    tokens = random_tokens(provider.vocab_size, samples + held_out, args.length)
    loop = Loop(tokens[:samples], 1, held_out_ns=tokens[samples:])
    loop.split = split
    config = {
        "forward_loop": loop,
        "checkpoint": scratch / "auto" / "scores.safetensors",
        "top_k": TOP_K,
    }
    with mock.patch.object(Store, "add", timed_add):
        _, plan = mbp.prune(unwrapped, [("mcore_minitron", DIVISORS)], BUDGET, config=config)
    split.lap("cut")
    mbp.export_hf(bridge, model, scratch / "auto" / "hf", layers_kept=plan.layers_kept, sizes=plan.sizes_after,
                  source=path)  # fmt: skip
    split.lap("export")
    notes = {step: f", {n} candidates measured" for step, n in split.candidates.items() if n}
    notes |= {
        "scoring": f", {samples} x {args.length} tokens",
        "counting the grid": f", {plan.search['grid']:,} candidates",
    }
    whole = split.seconds.total()
    for step, taken in split.seconds.items():
        note = f"{taken:.1f} s of {whole:.0f}{notes.get(step, '')}"
        yield Row(f"{step} / the whole auto run", taken / whole, None, note)
