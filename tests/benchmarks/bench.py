"""Speed and memory as ratios, measured side by side in one run (`make bench`).

Both sides of a ratio run in turn, A B, B A, A B, ..., and the medians are divided: what else the
machine does hits both alike. Absolute seconds are no result and are not printed as one:
of a search, the share of every step is.

    measuring.py    timing in turn, the table
    one_rank.py     what is measured on one rank
    auto_run.py     a whole search, split into its steps
    two_stages.py   two pipeline ranks against one
    random_models.py  a mixture of experts and a hybrid of a size at which ratios mean something
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the tests' own builders of tiny models

import measuring
from auto_run import auto_run
from measuring import Row, load, markdown, random_tokens
from one_rank import (
    candidate_forward,
    counting,
    hooked_pass,
    import_and_export,
    shrink_memory,
    shrinking,
    sorting_and_shrinking,
)
from random_models import write_hybrid, write_mixture
from two_stages import stage_worker, two_stages

from mbridge_prune import demo_data

SEQUENCES = 4


def dense(args: argparse.Namespace, scratch: Path) -> Iterator[Row]:
    """A real dense model."""
    path = args.model or demo_data.smollm2()
    loaded = load(path, length=args.length)
    model, vocabulary = loaded.unwrapped_model, loaded.provider.vocab_size
    tokens = random_tokens(vocabulary, 1, args.length)
    yield hooked_pass(model, tokens, args.repeats)
    if not args.cpu_time:
        yield two_stages(model, path, vocabulary, scratch, args)
    yield candidate_forward(model, path, tokens.repeat(2, 1), scratch, args.repeats)
    yield shrinking(model, args.repeats)
    yield shrink_memory(model)
    if not args.cpu_time:
        yield import_and_export(path, scratch, 1 if args.quick else 3)


def auto(args: argparse.Namespace, scratch: Path) -> Iterator[Row]:
    """A search on the dense model, import to export."""
    yield from auto_run(args.model or demo_data.smollm2(), scratch, args)


def moe_grouped(args: argparse.Namespace, scratch: Path) -> Iterator[Row]:
    """Experts in one grouped GEMM."""
    yield from _mixture(args, scratch, grouped=True)


def moe_separate(args: argparse.Namespace, scratch: Path) -> Iterator[Row]:
    """Experts one by one."""
    yield from _mixture(args, scratch, grouped=False)


def _mixture(args: argparse.Namespace, scratch: Path, grouped: bool) -> Iterator[Row]:
    loaded = load(write_mixture(scratch / "mixture", args.length), length=args.length, grouped=grouped)
    model = loaded.unwrapped_model
    tokens = random_tokens(loaded.provider.vocab_size, SEQUENCES, args.length)
    yield hooked_pass(model, tokens, args.repeats)
    yield hooked_pass(model, tokens, args.repeats, SEQUENCES)
    yield shrinking(model, args.repeats)
    yield sorting_and_shrinking(model, args.repeats)


def hybrid(args: argparse.Namespace, scratch: Path) -> Iterator[Row]:
    """Mamba-2, attention and MLP layers."""
    loaded = load(write_hybrid(scratch / "hybrid", args.length), length=args.length, remote_code=True)
    tokens = random_tokens(loaded.provider.vocab_size, SEQUENCES, args.length)
    yield hooked_pass(loaded.unwrapped_model, tokens, args.repeats)
    yield hooked_pass(loaded.unwrapped_model, tokens, args.repeats, SEQUENCES)


def count(args: argparse.Namespace, scratch: Path) -> Iterator[Row]:
    """A million candidates of the dense model, of a mixture and of a hybrid, in every budget."""
    for path, remote in (
        (args.model or demo_data.smollm2(), False),
        (write_mixture(scratch / "mixture", args.length), False),
        (write_hybrid(scratch / "hybrid", args.length), True),
    ):
        loaded = load(path, length=args.length, remote_code=remote)
        for row in counting(loaded.unwrapped_model, args.repeats):
            row.what = f"{path.name}: {row.what}"
            yield row


PARTS: dict[str, Callable[[argparse.Namespace, Path], Iterator[Row]]] = {
    "dense": dense,
    "count": count,
    "auto": auto,
    "moe-grouped": moe_grouped,
    "moe-separate": moe_separate,
    "hybrid": hybrid,
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"all, or some of: {', '.join(PARTS)}")
    parser.add_argument("--model", type=Path, help="folder of the dense model (default: the demo's)")
    parser.add_argument("--quick", action="store_true", help="fewer repeats: a look, not a result")
    parser.add_argument("--repeats", type=int, help="of each side (default: 11; quick: 3)")
    parser.add_argument(
        "--threads", type=int, default=min(8, os.cpu_count() or 1), help="threads of one rank"
    )
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="CPU time of one thread instead of wall-clock time: for a machine that has other work to do; "
        "leaves out what waits for a disk or another process",
    )
    parser.add_argument("--length", type=int, default=512, help="tokens a sequence")
    parser.add_argument("--microbatches", type=int, default=8, help="of a pass over two stages")
    parser.add_argument("--stage-worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    unknown = set(args.parts) - set(PARTS)
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are: {', '.join(PARTS)}")
    args.parts = args.parts or list(PARTS)
    args.repeats, args.passes = args.repeats or (3 if args.quick else 11), 1 if args.quick else 3
    return args


def main() -> None:
    args = parse_args()
    if args.stage_worker is not None:
        stage_worker(args.model, args.stage_worker, args)
        return
    if args.cpu_time:
        args.threads, measuring.clock = 1, time.process_time
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    begin, rows, load_before = time.monotonic(), [], os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        for part in args.parts:
            for row in PARTS[part](args, Path(folder)):
                row.model = part
                rows.append(row)
                spent = time.monotonic() - begin
                print(f"[{spent:4.0f} s] {part}: {row.what}: {row.measured:.3f}", file=sys.stderr)
    others = max(load_before, os.getloadavg()[0] - args.threads)
    unit = "CPU time" if args.cpu_time else "wall-clock time"
    print(f"\n{args.threads} threads, torch {torch.__version__}, {unit}, medians of {args.repeats}")
    if others > 0.5 and not args.cpu_time:
        print(f"other work kept about {others:.1f} cores busy: run it again on an idle machine")
    print()
    print(markdown(rows))


if __name__ == "__main__":
    main()
