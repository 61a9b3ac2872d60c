"""What every command shares: logging on rank 0, and errors as one line with the right exit code."""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

from mbridge_prune import runtime
from mbridge_prune.errors import UserError

log = logging.getLogger("mbridge_prune")
WRONG_INPUT, FAILED = 2, 1
ALONE = 3.0  # seconds


def run(command: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """Runs a command; a UserError is one line on rank 0 and exit code 2, anything else a traceback.

    Under torchrun a rank that fails ends the others; this returns at once and waits for nobody.
    """
    runtime.take_slurm_variables()  # before anybody asks for the rank
    start_logging()
    try:
        return command(arguments)
    except UserError as error:
        who = ""
        if runtime.rank():
            # Rank 0 says what all ranks found, and its end ends this one; else it was this rank alone.
            time.sleep(ALONE)
            who = f"rank {runtime.rank()}: "
        print(f"error: {who}{error}", file=sys.stderr, flush=True)
        return WRONG_INPUT
    except KeyboardInterrupt:
        return 130
    except (Exception, CheckpointException) as error:
        print(f"rank {runtime.rank()} failed: {type(error).__name__}: {error}", file=sys.stderr)
        traceback.print_exc()
        sys.stderr.flush()
        return FAILED


def leave(code: int) -> None:
    """Ends the process with `code`, without waiting in a collective for ranks that may be gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    if code and runtime.world_size() > 1:
        for child in multiprocessing.active_children():
            child.terminate()  # Megatron's checkpoint helpers would outlive us and hold the log open
        os._exit(code)
    if runtime.world_size() > 1:
        import torch.distributed as dist

        dist.destroy_process_group()
    sys.exit(code)


def start_logging() -> None:
    """Rank 0 logs to the terminal; the other ranks only what went wrong."""
    for old in list(log.handlers):
        log.removeHandler(old)
        old.close()
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO if runtime.rank() == 0 else logging.ERROR)
    log.propagate = False
    for module in (r"megatron\..*", r"torch\..*", r"transformers\..*"):
        warnings.filterwarnings("ignore", module=module)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    logging.getLogger("nvidia_resiliency_ext").setLevel(logging.ERROR)


def log_to_file(path: Path) -> None:
    """Rank 0 also writes the log, with times, to a file."""
    if runtime.rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(handler)
