"""Starts commands as a user does: under torchrun, under srun's variables, or plainly."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 600
FOREIGN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in FOREIGN and not k.startswith("SLURM_")}
    return {**kept, "OMP_NUM_THREADS": "1", "COLUMNS": "100", **more}


def python(*arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=environment(**more), capture_output=True, text=True, timeout=TIMEOUT, cwd=ROOT,
    )  # fmt: skip


def torchrun(ranks: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    return python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks, *arguments)


def srun(ranks: int, *arguments: object) -> list[subprocess.CompletedProcess[str]]:
    """Plain processes that know of each other through SLURM's variables alone; one result a rank."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, *map(str, arguments)]
    started = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
            env=environment(SLURM_PROCID=str(rank), SLURM_STEP_NUM_TASKS=str(ranks), SLURM_LOCALID=str(rank),
                            MASTER_ADDR="localhost", MASTER_PORT=str(port)),
        )
        for rank in range(ranks)
    ]  # fmt: skip
    try:
        return [
            subprocess.CompletedProcess(command, p.wait(), *said)
            for p in started
            for said in [p.communicate(timeout=TIMEOUT)]
        ]
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
