"""Short pieces of the calibration text beside its samples, for their many first tokens.

The first token of a sequence is the attention sink of most models: it gets a hidden state a hundred times as
large, on which all others rely, and fits must not spoil that. Long samples show few of them.
"""

from __future__ import annotations

import torch

from mbridge_prune import runtime
from mbridge_prune.calibration.loop import CalibrationLoop
from mbridge_prune.repair.routing import JUDGES, judges_of

OPENINGS = 1024
"""At most; else a power of two of microbatches of them."""
LENGTH = 8
"""Tokens of each."""
BATCH = 32
"""Openings of a microbatch."""


def with_openings(loop: CalibrationLoop) -> CalibrationLoop:
    """The loop, with pieces from all over its text besides, those for judging from samples for judging.

    Unchanged where all samples begin alike (with a BOS): there is no other first token to be seen.
    """
    text_ns, samples = loop.tokens_ns, len(loop.tokens_ns)
    length = min(LENGTH, text_ns.shape[1])
    microbatches = min(OPENINGS, text_ns.numel() // length) // BATCH
    microbatches = 1 << microbatches.bit_length() - 1 if microbatches else 0  # many layouts divide it
    if runtime.size("ep") > 1:  # as in `CalibrationLoop.first`
        microbatches -= microbatches % runtime.size("dp")
    count = microbatches * BATCH
    if samples < JUDGES or not count or (text_ns[:, 0] == text_ns[0, 0]).all():
        return loop
    before = -(-samples // loop.micro_batch_size)
    judges_k = judges_of(before * BATCH, count)
    places = torch.empty(count, 2, dtype=torch.long)  # sample, first token
    for judge in (False, True):
        mine = judges_k == judge
        pool, number = (judges_of(0, samples) == judge).nonzero().flatten(), int(mine.sum())
        places[mine, 0] = pool[torch.arange(number) % len(pool)]
        places[mine, 1] = torch.linspace(0, text_ns.shape[1] - length, max(number, 1)).long()[:number]
    openings_kl = text_ns[places[:, :1], places[:, 1:] + torch.arange(length)]
    return loop.also(openings_kl, BATCH)
