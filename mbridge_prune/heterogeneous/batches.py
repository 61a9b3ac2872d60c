"""The user's batches: read with the same random numbers each time, and told apart by the first of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from mbridge_prune.search.callables import plain_of

SEED = 1234


@contextmanager
def same_order() -> Iterator[None]:
    """A loader that shuffles by PyTorch's random numbers gives the same batches inside, every time."""
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        yield


def batch_fingerprint(batch: Any) -> str:
    """Short SHA-256 of every tensor and plain value of a batch; other objects go by their type."""
    digest = hashlib.sha256()
    _feed(digest, batch)
    return digest.hexdigest()[:16]


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        digest.update(repr((value.dtype, tuple(value.shape))).encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        for key in value:
            digest.update(repr(key).encode())
            _feed(digest, value[key])
    elif isinstance(value, (list, tuple)):
        digest.update(repr(len(value)).encode())
        for part in value:
            _feed(digest, part)
    else:
        digest.update(repr(plain_of(value)).encode())
