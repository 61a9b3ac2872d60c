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
"""At most; and with their tokens at most `SHARE` of the text's."""
SHARE = 0.25
LENGTH = 8
"""Tokens of each."""
BATCH = 32
"""Openings of a microbatch."""
GOLDEN = 0.5 * (5**0.5 - 1)
"""Its multiples, less their whole parts, are spread evenly however many are taken."""


def with_openings(loop: CalibrationLoop) -> CalibrationLoop:
    """The loop, with pieces from all over its text besides, those for judging from samples for judging.

    Their microbatches are a power of two, which many layouts divide; data-parallel ranks that share experts
    must run as many each, and round up to that. Unchanged where all samples begin alike (with a BOS: there
    is no other first token to be seen), and where there is too little text.
    """
    text_ns, samples = loop.tokens_ns, len(loop.tokens_ns)
    length = min(LENGTH, text_ns.shape[1])
    microbatches = min(OPENINGS, int(SHARE * text_ns.numel()) // length) // BATCH
    if samples < JUDGES or not microbatches or (text_ns[:, 0] == text_ns[0, 0]).all():
        return loop
    microbatches = 1 << microbatches.bit_length() - 1
    if runtime.size("ep") > 1:
        microbatches += -microbatches % runtime.size("dp")
    count, before = microbatches * BATCH, -(-samples // loop.micro_batch_size)
    judges_k = judges_of(before * BATCH, count)
    places = torch.empty(count, 2, dtype=torch.long)  # sample, first token
    for judge in (False, True):
        mine = judges_k == judge
        pool, number = (judges_of(0, samples) == judge).nonzero().flatten(), int(mine.sum())
        ranks = torch.arange(number)
        places[mine, 0] = pool[ranks * len(pool) // number if number < len(pool) else ranks % len(pool)]
        room = text_ns.shape[1] - length  # the beginning is run already
        places[mine, 1] = min(room, 1) + (ranks.double() * GOLDEN % 1 * room).long()
    openings_kl = text_ns[places[:, :1], places[:, 1:] + torch.arange(length)]
    return loop.also(openings_kl, BATCH)
