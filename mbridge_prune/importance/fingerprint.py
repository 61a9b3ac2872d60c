"""A model's fingerprint, the same under any pipeline layout: what a scores file is checked against."""

from __future__ import annotations

import hashlib

import torch

from mbridge_prune import runtime
from mbridge_prune.dynamic import Entry, SliceTable

SAMPLES = 257


def model_fingerprint(table: SliceTable) -> str:
    """Short SHA-256 over every counted tensor's global name, shape and 257 of its values."""
    local = [(_global_name(entry), _digest(entry.tensor())) for entry in table.entries if entry.counted]
    everything = sorted({pair for part in runtime.gather_objects(local, "pp") for pair in part})
    return hashlib.sha256(repr(everything).encode()).hexdigest()[:16]


def _digest(tensor: torch.Tensor) -> str:
    flat = tensor.detach().reshape(-1)
    step = max(1, flat.numel() // SAMPLES)
    values = flat[::step].float().cpu().contiguous().numpy().tobytes()
    return hashlib.sha256(repr(tuple(tensor.shape)).encode() + values).hexdigest()


def _global_name(entry: Entry) -> str:
    """`decoder.layers.<local>.x` -> `decoder.layers.<global>.x`."""
    if entry.layer is None:
        return entry.name
    head, _, tail = entry.name.partition("layers.")
    return f"{head}layers.{entry.layer}.{tail.split('.', 1)[1]}"
