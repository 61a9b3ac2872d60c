"""A forward-only pipeline: many microbatches in flight, every stage busy, no logits unless wanted.

Each stage receives the next microbatch while it computes the present one, and sends without waiting
for the neighbour. Every rank runs the same microbatches in the same order, so the result of a
microbatch does not depend on the number of stages.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mbridge_prune import mcore, runtime

IN_FLIGHT = 4


def forward_only(
    model: nn.Module,
    tokens_ns: torch.Tensor,
    micro_batch_size: int,
    **options: Any,
) -> None:
    """`forward_batches` over samples [samples, sequence] int64, so many a microbatch."""
    forward_batches(model, tokens_ns.split(micro_batch_size), **options)


def forward_batches(
    model: nn.Module,
    batches: Sequence[torch.Tensor],
    *,
    with_logits: bool = False,
    consume: Callable[[torch.Tensor, torch.Tensor], Any] | None = None,
    progress: Callable[[int], None] | None = None,
    deal: bool = True,
) -> None:
    """Runs this rank's stage of the model over all samples of its data-parallel share.

    Args:
        model: the unwrapped Megatron model of this rank.
        batches: microbatches [samples, sequence] int64, which may differ in shape, the same on every rank;
            they are dealt out to the data-parallel ranks in turn.
        with_logits: also run the output layer on the last stage (needed by losses).
        consume: called on the last stage with (logits [b, s, vocab], tokens [b, s]).
        progress: called with the number of samples done after each microbatch.
        deal: False runs all microbatches on every data-parallel rank, for replicas of different models.
    """
    device = runtime.device()
    replica, replicas = (runtime.place("dp"), runtime.size("dp")) if deal else (0, 1)
    batches = batches[replica::replicas]
    stages, stage = runtime.size("pp"), runtime.place("pp")
    pipe = _Pipe(model, stages, stage, device)
    head = stages - 1 == stage and not with_logits
    with torch.no_grad(), _without_output_layer(model) if head else _without_prediction_heads(model):
        for number, batch in enumerate(batches):
            tokens_bs = batch.to(device)
            if stage > 0:
                following = batches[number + 1] if number + 1 < len(batches) else None
                model.set_input_tensor(pipe.receive(batch, following))
            positions_bs = torch.arange(tokens_bs.shape[1], device=device).expand_as(tokens_bs)
            out = model(input_ids=tokens_bs, position_ids=positions_bs, attention_mask=None)
            out = out[0] if isinstance(out, tuple) else out  # some also return their loss mask
            if stage < stages - 1:
                pipe.send(out)
            elif consume is not None:
                consume(out, tokens_bs)
            if progress is not None:
                progress(len(batch) * replicas)
        pipe.finish()


class _Pipe:
    """Asynchronous hand-over of [sequence, batch, hidden] activations between stages."""

    def __init__(self, model: nn.Module, stages: int, stage: int, device: Any):
        config = model.config
        self.dtype = getattr(config, "pipeline_dtype", None) or config.params_dtype
        self.hidden, self.device = config.hidden_size, device
        self.sent: deque = deque()
        self.waiting: tuple | None = None
        group = runtime.group("pp")
        ranks = dist.get_process_group_ranks(group) if stages > 1 else [0]
        self.group = group
        self.before = ranks[stage - 1] if stage > 0 else None
        self.after = ranks[stage + 1] if stage < stages - 1 else None

    def receive(self, batch: torch.Tensor, following: torch.Tensor | None) -> torch.Tensor:
        """This microbatch's input; posts the receive of the following one before returning."""
        if self.waiting is None:
            self.waiting = self._post(batch)
        buffer, work = self.waiting
        work.wait()
        self.waiting = None if following is None else self._post(following)
        return buffer

    def _post(self, batch: torch.Tensor) -> tuple:
        shape = (batch.shape[1], batch.shape[0], self.hidden)
        buffer = torch.empty(shape, dtype=self.dtype, device=self.device)
        return buffer, dist.irecv(buffer, src=self.before, group=self.group)

    def send(self, out: torch.Tensor) -> None:
        out = out.to(self.dtype).contiguous()
        self.sent.append((out, dist.isend(out, dst=self.after, group=self.group)))
        while len(self.sent) > IN_FLIGHT:
            self.sent.popleft()[1].wait()

    def finish(self) -> None:
        while self.sent:
            self.sent.popleft()[1].wait()


@contextmanager
def _without_output_layer(model: nn.Module) -> Iterator[None]:
    """The model returns its last hidden state; no logits are computed."""
    tower = mcore.language_model(model)
    before = tower.post_process
    tower.post_process = False
    try:
        yield
    finally:
        tower.post_process = before


@contextmanager
def _without_prediction_heads(model: nn.Module) -> Iterator[None]:
    """Logits of the next token alone: Megatron's multi-token heads want labels for more."""
    tower = mcore.language_model(model)
    before = getattr(tower, "mtp_process", False), getattr(tower.config, "mtp_num_layers", None)
    if before[0]:
        tower.mtp_process, tower.config.mtp_num_layers = False, None
    try:
        yield
    finally:
        if before[0]:
            tower.mtp_process, tower.config.mtp_num_layers = before
