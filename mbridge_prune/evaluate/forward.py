"""Logits of a model, microbatch by microbatch, and one result tensor for every rank.

A Megatron model runs through the forward-only pipeline; a transformers model, the independent check,
through its own forward, whole on every rank that asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from mbridge_prune import mcore, runtime
from mbridge_prune.calibration.schedule import forward_only

Progress = Callable[[int], None]
Places = tuple[torch.Tensor, torch.Tensor]
"""Rows (samples) and columns (positions) of one microbatch, [k] int64 each."""
NOWHERE: Places = (torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long))


def each_logits(
    model: nn.Module,
    tokens_ns: torch.Tensor,
    batch: int,
    consume: Callable[[int, torch.Tensor], None],
    *,
    places: Callable[[int, int], Places] | None = None,
    deal: bool = True,
    progress: Progress | None = None,
) -> None:
    """Calls `consume(first sample, logits)` for every microbatch of this rank, on the last stage.

    Args:
        model: an unwrapped Megatron model of this rank, or a whole transformers model.
        tokens_ns: [samples, sequence] int64, the same on every rank.
        batch: samples a microbatch. The result of a microbatch depends on nothing else.
        consume: gets logits [b, s, vocab]; [k, vocab] where `places` is given.
        places: (first sample, one past the last) -> the places to compute logits at: the output
            layer then runs on these alone.
        deal: deal microbatches out to the data-parallel ranks; False runs all on each.
        progress: called with the number of samples done.
    """
    if is_transformers(model):
        _transformers(model, tokens_ns, batch, consume, places, progress)
        return
    samples, replicas = len(tokens_ns), runtime.size("dp") if deal else 1
    if replicas > 1 and runtime.size("ep") > 1:
        # Expert-parallel ranks meet in every layer: each must run as many microbatches, as large.
        missing = -samples % (batch * replicas)
        tokens_ns = torch.cat([tokens_ns, tokens_ns[:1].expand(missing, -1)])
    firsts = range(0, len(tokens_ns), batch)[runtime.place("dp") if deal else 0 :: replicas]
    waiting = iter(firsts)

    def take(logits: torch.Tensor, tokens_bs: torch.Tensor) -> None:
        first = next(waiting)
        if picks is not None:
            logits = logits[0, : len(picks[first][0])]
        if first < samples and len(logits):
            consume(first, logits[: samples - first] if picks is None else logits)

    picks = None
    if places is not None:
        picks = {at: places(at, min(at + batch, samples)) if at < samples else NOWHERE for at in firsts}
    with _whole_vocabulary(model), _output_layer_at(model, None if picks is None else list(picks.values())):
        forward_only(model, tokens_ns, batch, with_logits=True, consume=take, progress=progress, deal=deal)


def combine(model: nn.Module, results: torch.Tensor, deal: bool = True) -> torch.Tensor:
    """The results of every rank's microbatches on every rank, bit for bit.

    Args:
        results: the same shape everywhere; filled on the last stage where this rank computed, 0 elsewhere.
        deal: as in `each_logits`; False leaves each data-parallel replica with its own results.
    """
    if is_transformers(model):
        return results
    if deal and runtime.size("dp") > 1 and runtime.place("pp") == runtime.size("pp") - 1:
        dist.all_reduce(results, group=runtime.group("dp"))
    if runtime.size("pp") > 1:
        stages = runtime.group("pp")
        dist.broadcast(results, src=dist.get_process_group_ranks(stages)[-1], group=stages)
    return results


def is_transformers(model: nn.Module) -> bool:
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel)


@contextmanager
def _whole_vocabulary(model: nn.Module) -> Iterator[None]:
    """Inside, every tensor-parallel rank has the logits of all tokens."""
    layer = getattr(mcore.language_model(model), "output_layer", None)
    if layer is None or runtime.size("tp") == 1:
        yield
        return
    before, layer.gather_output = layer.gather_output, True
    try:
        yield
    finally:
        layer.gather_output = before


@contextmanager
def _output_layer_at(model: nn.Module, picks: Sequence[Places] | None) -> Iterator[None]:
    """The output layer sees the picked places of each microbatch, in order: logits [1, k, vocab]."""
    tower = mcore.language_model(model)
    if picks is None or not getattr(tower, "post_process", True):
        yield
        return
    waiting = iter(picks)

    def choose(layer: nn.Module, arguments: tuple) -> tuple:
        hidden_sbh, *others = arguments
        rows, columns = next(waiting)
        rows, columns = (rows, columns) if len(rows) else NOWHERE  # no kernel is asked for an empty product
        rows, columns = rows.to(hidden_sbh.device), columns.to(hidden_sbh.device)
        return hidden_sbh[columns, rows].unsqueeze(1), *others

    hook = tower.output_layer.register_forward_pre_hook(choose)
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def _transformers(
    model: nn.Module,
    tokens_ns: torch.Tensor,
    batch: int,
    consume: Callable[[int, torch.Tensor], None],
    places: Callable[[int, int], Places] | None,
    progress: Progress | None,
) -> None:
    model.eval()
    device = next(model.parameters()).device
    for first in range(0, len(tokens_ns), batch):
        tokens_bs = tokens_ns[first : first + batch].to(device)
        logits = model(tokens_bs, use_cache=False).logits
        if places is not None:
            rows, columns = (index.to(device) for index in places(first, first + len(tokens_bs)))
            logits = logits[rows, columns]
        if logits.shape[0]:
            consume(first, logits)
        if progress is not None:
            progress(len(tokens_bs))
