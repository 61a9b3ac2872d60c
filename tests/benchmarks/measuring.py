"""What every measure needs: interleaved timing, rows of the table, a loaded model, a candidate."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

import mbridge_prune as mbp
from mbridge_prune import mcore
from mbridge_prune.dynamic import DEPTH, SliceTable

from megatron.core.transformer.enums import AttnBackend  # isort: skip


@dataclass
class Row:
    """One line of the table: a ratio (or seconds), and the bound it shall stay under."""

    what: str
    measured: float
    goal: float | None = None
    note: str = ""
    model: str = ""

    def cells(self) -> list[str]:
        if self.goal is None:
            return [self.model, self.what, f"{self.measured:.3f}", "-", "-", self.note]
        ok = "yes" if self.measured <= self.goal else "NO"
        return [self.model, self.what, f"{self.measured:.3f}", f"<= {self.goal:g}", ok, self.note]


clock = time.perf_counter
"""`time.process_time` where the machine has other work to do (`--cpu-time`)."""


def seconds(action: Callable[[], Any]) -> float:
    begin = clock()
    action()
    return clock() - begin


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


def load(path: Path, pp: int = 1, length: int = 512, grouped: bool = False, remote_code: bool = False) -> Any:
    overrides = {
        "pipeline_model_parallel_size": pp,
        "seq_length": length,
        "attention_backend": AttnBackend.auto,  # the same for all models of a process
    }
    return mbp.load_mbridge_model_from_hf(
        hf_model_name_or_path=path, provider_overrides=overrides, moe_grouped_gemm=grouped,
        trust_remote_code=remote_code,
    )  # fmt: skip


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


def markdown(rows: list[Row]) -> str:
    cells = [["model", "what", "measured", "goal", "ok", "note"], *(row.cells() for row in rows)]
    widths = [max(len(line[n]) for line in cells) for n in range(len(cells[0]))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)
