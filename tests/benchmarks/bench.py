"""Speed and memory as ratios, measured side by side in one run (`make bench`).

Both sides of a ratio run in turn, A B, B A, A B, ..., and the medians are divided: what else the
machine does hits both alike. Absolute seconds are no result and are not printed as one.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

import mbridge_prune as mbp
from mbridge_prune import demo_data, mcore, runtime
from mbridge_prune.calibration.schedule import forward_only
from mbridge_prune.dynamic import DEPTH, SliceTable, select, shrink
from mbridge_prune.importance import Collector
from mbridge_prune.mcore_minitron import count

CANDIDATES = 1_000_000
WAIT_S = 300


@dataclass
class Row:
    """One line of the table: a ratio (or seconds), and the bound it shall stay under."""

    what: str
    measured: float
    goal: float | None = None
    note: str = ""

    def cells(self) -> list[str]:
        if self.goal is None:
            return [self.what, f"{self.measured:.3f}", "-", "-", self.note]
        ok = "yes" if self.measured <= self.goal else "NO"
        return [self.what, f"{self.measured:.3f}", f"<= {self.goal:g}", ok, self.note]


def seconds(action: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def side_by_side(
    a: Callable[[], float], b: Callable[[], float], repeats: int, warm_up: bool = True
) -> tuple[float, float]:
    """Medians of two timed actions, run in turn and in alternating order."""
    if warm_up:
        a(), b()
    times: dict[int, list[float]] = {0: [], 1: []}
    for n in range(repeats):
        for side in (0, 1) if n % 2 == 0 else (1, 0):
            times[side].append((a, b)[side]())
    return median(times[0]), median(times[1])


def random_tokens(vocabulary: int, samples: int, length: int) -> torch.Tensor:
    return torch.randint(0, vocabulary, (samples, length), generator=torch.Generator().manual_seed(0))


def load(path: Path, pp: int = 1, length: int = 512) -> Any:
    overrides = {"pipeline_model_parallel_size": pp, "seq_length": length}
    return mbp.load_mbridge_model_from_hf(
        hf_model_name_or_path=path, provider_overrides=overrides, moe_grouped_gemm=False
    )


def table_of(model: Any) -> SliceTable:
    return SliceTable.of(model, mcore.root_scope(model))


def candidate(table: SliceTable) -> tuple[dict[str, int], list[int]]:
    """A subnet that cuts every hparam by a little, and the layers it keeps."""
    full = table.hparams()
    sizes = {}
    for axis in table.axes.values():
        step = max(1, axis.groups) if axis.hparam.startswith("num_") else min(64, axis.value)
        part = {"hidden_size": 8 / 9, "ffn_hidden_size": 3 / 4}.get(axis.hparam, 2 / 3)
        sizes[axis.hparam] = max(step, int(axis.value * part) // step * step)
    sizes[DEPTH] = max(1, full[DEPTH] - full[DEPTH] // 8)
    return sizes, list(range(sizes[DEPTH]))


def hooked_pass(model: Any, tokens: torch.Tensor, repeats: int) -> Row:
    table = table_of(model)

    def bare() -> float:
        return seconds(lambda: forward_only(model, tokens, 1))

    def hooked() -> float:
        with Collector(table):
            return seconds(lambda: forward_only(model, tokens, 1))

    a, b = side_by_side(hooked, bare, repeats)
    return Row("hooked calibration pass / bare forward through the last layer", a / b, 1.05,
               f"{tokens.numel() / a:.0f} tokens/s hooked")  # fmt: skip


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

    An empty selection saves and restores everything else that `shrink` changes.
    """
    full = list(range(table.hparams()[DEPTH]))
    with select(table, {}, full):
        for entry in table.entries:
            entry.tensor().data = entry.tensor().data.clone()
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
        return seconds(lambda: [t.clone() for t in kept])

    a, b = side_by_side(cut, copy, repeats)
    return Row(
        "shrink / clone of the kept bytes", a / b, 2.0, f"{sum(t.nbytes for t in kept) / 2**20:.0f} MiB kept"
    )


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


def counting(model: Any, repeats: int) -> Row:
    table = table_of(model)
    counter = count(table)
    draw = np.random.default_rng(0)
    sizes = {}
    for axis in table.axes.values():
        step = 1 if axis.per_group else axis.groups
        sizes.setdefault(axis.hparam, draw.integers(1, axis.value // step + 1, CANDIDATES) * step)
    times = [seconds(lambda: counter.params(sizes)) for _ in range(repeats)]
    return Row("one million candidates counted, seconds", median(times), 1.0)


def two_stages(model: Any, path: Path, vocabulary: int, scratch: Path, args: argparse.Namespace) -> Row:
    """One rank with all threads here; two pipeline ranks in a torchrun job that waits its turn."""
    tokens = random_tokens(vocabulary, args.microbatches, args.length)
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, args.threads // 2))}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    own = [__file__, "--model", str(path), "--stage-worker", str(scratch), "--length", str(args.length),
           "--microbatches", str(args.microbatches)]  # fmt: skip
    log = (scratch / "stages.log").open("w")
    job = subprocess.Popen([*torchrun, *own], env=environment, stdout=log, stderr=subprocess.STDOUT)
    turn = 0

    def staged() -> float:
        nonlocal turn
        turn += 1
        (scratch / f"go-{turn}").touch()
        done = scratch / f"done-{turn}"
        limit = time.monotonic() + WAIT_S
        while not done.exists():
            if job.poll() is not None or time.monotonic() > limit:
                raise RuntimeError(f"the two-stage job failed:\n{Path(log.name).read_text()[-3000:]}")
            time.sleep(0.02)
        return json.loads(done.read_text())

    def single() -> float:
        return seconds(lambda: forward_only(model, tokens, 1))

    try:
        a, b = side_by_side(staged, single, args.passes)
        (scratch / "stop").touch()
        job.wait(timeout=60)
    finally:
        if job.poll() is None:
            job.terminate()
            job.wait()
        log.close()
    ideal = (args.microbatches + 1) / args.microbatches
    return Row("PP=2 pass / single-rank pass on the same cores", a / b, None,
               f"{args.microbatches} microbatches: the pipeline's fill alone is {ideal:.2f}")  # fmt: skip


def stage_worker(path: Path, scratch: Path, args: argparse.Namespace) -> None:
    """A rank of the two-stage job: a pass whenever the next go-<n> appears."""
    loaded = load(path, pp=2, length=args.length)
    model = loaded.unwrapped_model
    tokens = random_tokens(loaded.provider.vocab_size, args.microbatches, args.length)
    turn = 0
    while True:
        turn += 1
        stop = False
        if runtime.rank() == 0:
            while not ((scratch / f"go-{turn}").exists() or (stop := (scratch / "stop").exists())):
                time.sleep(0.02)
        if runtime.gather_objects(stop)[0]:
            torch.distributed.destroy_process_group()
            return

        def one_pass() -> None:
            forward_only(model, tokens, 1)
            runtime.barrier()

        taken = seconds(one_pass)
        if runtime.rank() == 0:
            aside = scratch / f"aside-{turn}"
            aside.write_text(json.dumps(taken))
            aside.rename(scratch / f"done-{turn}")


def markdown(rows: list[Row]) -> str:
    cells = [["what", "measured", "goal", "ok", "note"], *(row.cells() for row in rows)]
    widths = [max(len(line[n]) for line in cells) for n in range(len(cells[0]))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", type=Path, help="a Hugging Face folder (default: SmolLM2-135M of the demo)"
    )
    parser.add_argument("--quick", action="store_true", help="fewer repeats: a look, not a result")
    parser.add_argument(
        "--threads", type=int, default=min(8, os.cpu_count() or 1), help="threads of one rank"
    )
    parser.add_argument("--length", type=int, default=512, help="tokens a sequence")
    parser.add_argument("--microbatches", type=int, default=8, help="of a pass over two stages")
    parser.add_argument("--stage-worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.repeats, args.passes = (3, 1) if args.quick else (11, 3)
    return args


def main() -> None:
    args = parse_args()
    path = args.model or demo_data.smollm2()
    if args.stage_worker is not None:
        stage_worker(path, args.stage_worker, args)
        return
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    begin = time.monotonic()
    loaded = load(path, length=args.length)
    model, vocabulary = loaded.unwrapped_model, loaded.provider.vocab_size
    tokens = random_tokens(vocabulary, 1, args.length)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        scratch = Path(folder)
        measures: list[Callable[[], Row]] = [
            lambda: hooked_pass(model, tokens, args.repeats),
            lambda: two_stages(model, path, vocabulary, scratch, args),
            lambda: candidate_forward(model, path, tokens.repeat(2, 1), scratch, args.repeats),
            lambda: shrinking(model, args.repeats),
            lambda: shrink_memory(model),
            lambda: import_and_export(path, scratch, 1 if args.quick else 3),
            lambda: counting(model, args.repeats),
        ]
        rows = []
        for measure in measures:
            rows.append(measure())
            print(
                f"[{time.monotonic() - begin:4.0f} s] {rows[-1].what}: {rows[-1].measured:.3f}",
                file=sys.stderr,
            )
    others = max(0.0, os.getloadavg()[0] - args.threads)
    print(f"\n{path.name}, {args.threads} threads, torch {torch.__version__}, medians of {args.repeats}")
    if others > 0.5:
        print(f"other work kept about {others:.1f} cores busy: run it again on an idle machine")
    print()
    print(markdown(rows))


if __name__ == "__main__":
    main()
