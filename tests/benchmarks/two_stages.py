"""Two pipeline ranks against one, on the same cores: a torchrun job that waits its turn."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from measuring import Row, load, random_tokens, seconds, side_by_side

from mbridge_prune import runtime
from mbridge_prune.calibration.schedule import forward_only

WAIT_S = 300


def two_stages(model: Any, path: Path, vocabulary: int, scratch: Path, args: argparse.Namespace) -> Row:
    """One rank with all threads here; two pipeline ranks in a torchrun job that waits its turn."""
    tokens = random_tokens(vocabulary, args.microbatches, args.length)
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, args.threads // 2))}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    own = [str(Path(__file__).with_name("bench.py")), "--model", str(path), "--stage-worker", str(scratch), "--length", str(args.length),
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
