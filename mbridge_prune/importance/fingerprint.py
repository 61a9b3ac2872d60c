"""A model's fingerprint, the same under any parallel layout: what a scores file is checked against."""

from __future__ import annotations

import hashlib

import torch

from mbridge_prune import runtime
from mbridge_prune.dynamic import Entry, SliceTable

ROWS = 64
ODD = 0x9E3779B97F4A7C15 - (1 << 64)
"""An odd 64-bit number (of the golden ratio) whose multiples look random."""


def model_fingerprint(table: SliceTable) -> str:
    """Short SHA-256 over every counted tensor's global name, shape and the bits of up to 64 rows.

    A tensor's digest is an exact sum, mod 2^64, of bits times numbers made of their global places:
    shares of a tensor-parallel weight add up to the digest of the whole one.
    """
    sums: dict[tuple[str, tuple[int, ...]], int] = {}
    mine = [_digest(entry) for entry in table.entries if entry.counted]
    for part in runtime.gather_objects([d for d in mine if d is not None]):
        for name, shape, share, total in part:
            known = sums.setdefault((name, shape, share), total)  # type: ignore[arg-type]
            assert known == total, f"{name} differs between ranks"
    whole: dict[tuple[str, tuple[int, ...]], int] = {}
    for (name, shape, _), total in sums.items():  # type: ignore[misc]
        whole[name, shape] = (whole.get((name, shape), 0) + total) % (1 << 64)
    return hashlib.sha256(repr(sorted(whole.items())).encode()).hexdigest()[:16]


def _digest(entry: Entry) -> tuple[str, tuple[int, ...], int, int] | None:
    """(global name, global shape, share, sum) of this rank's part of a tensor."""
    tensor, rank, ranks = entry.tensor().detach(), runtime.place("tp"), runtime.size("tp")
    places, shape, sharded = [], [], False
    for dim, layout in enumerate(entry.dims):
        n = tensor.shape[dim]
        share = layout.full() != n
        places.append(layout.share(rank, ranks) if share else torch.arange(n))
        shape.append(layout.full())
        sharded = sharded or share
    if tensor.dim() == 0:
        tensor, places = tensor.reshape(1), [torch.arange(1)]
    chosen = _rows(places[0], shape[0] if shape else 1)
    bits = _bits(tensor.flatten(1) if tensor.dim() > 1 else tensor[:, None], chosen)
    columns = torch.zeros(1, dtype=torch.int64)
    for place in places[1:]:
        columns = (columns[:, None] * 1_000_003 + place + 1).flatten()
    weights = _mix(places[0][chosen] + 1)[:, None] * _mix(columns + 7)[None]
    total = int((bits * weights.to(bits.device)).sum()) % (1 << 64)
    return entry_name(entry), tuple(shape), rank if sharded else 0, total


def _rows(places: torch.Tensor, length: int) -> torch.Tensor:
    """Indices of the local rows whose global number is a multiple of the step: about 64 in all."""
    return (places % max(1, length // ROWS) == 0).nonzero().flatten()


def _bits(matrix: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """[rows, columns] int64: the bit patterns of the values."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    part = matrix[rows.to(matrix.device)].contiguous()
    return part.view(kinds[part.element_size()]).to(torch.int64)


def _mix(numbers: torch.Tensor) -> torch.Tensor:
    """Odd, well spread 64-bit numbers (arithmetic mod 2^64)."""
    mixed = numbers * ODD
    mixed = (mixed ^ (mixed >> 29)) * ODD
    return mixed | 1


def entry_name(entry: Entry) -> str:
    """A name that is the same on every layout: global layer and expert numbers."""
    name = entry.name
    if entry.layer is not None:
        head, _, tail = name.partition("layers.")
        name = f"{head}layers.{entry.layer}.{tail.split('.', 1)[1]}"
    if entry.unit is not None:
        name = f"{name.partition('.experts.')[0]}.experts.{entry.unit.number}.{entry.unit.role}"
    return name
