"""Running statistics of BatchNorm for the channels that are left, before a candidate is scored."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn

from mbridge_prune.errors import UserError
from mbridge_prune.heterogeneous.batches import batch_fingerprint, same_order

BatchNorm = nn.modules.batchnorm._BatchNorm


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """The norms that keep running statistics."""
    return [
        m
        for m in model.modules()
        if isinstance(m, BatchNorm) and m.track_running_stats and m.running_mean is not None
    ]


def first_of(batch: Any) -> Any:
    """The usual `collect_func`: the input of the model is the batch, or its first part."""
    return batch[0] if isinstance(batch, (tuple, list)) else batch


class Recalibration:
    """Takes new running statistics from training batches.

    Args:
        batches: read from their beginning each time, with the same random numbers.
        collect: batch -> the model's input: a tensor, a tuple of arguments, or a dict of named ones.
        at_most: batches.
    """

    def __init__(self, batches: Iterable[Any] | None, collect: Callable[[Any], Any], at_most: int):
        self.batches, self.collect, self.at_most = batches, collect, at_most

    def fingerprint(self) -> str | None:
        """Of the first input: what is measured with other data is another measurement."""
        with same_order():
            first = next(iter(self.batches), None) if self.batches is not None else None
            return None if first is None else batch_fingerprint(self.collect(first))

    def __call__(self, model: nn.Module) -> None:
        """Cumulative averages over the batches take the place of the running statistics, in new tensors.

        Raises:
            UserError: there are no batches, or they do not fit the model.
        """
        norms = batch_norms(model)
        if not norms:
            return
        assert self.batches is not None
        modes = [(module, module.training) for module in model.modules()]
        momenta = [norm.momentum for norm in norms]
        device = next(model.parameters()).device
        model.eval()
        try:
            for norm in norms:
                # New tensors: in `select` the old ones are views of the full model's.
                for name in ("running_mean", "running_var", "num_batches_tracked"):
                    buffer = getattr(norm, name)
                    buffer.data = (
                        torch.ones_like(buffer) if name == "running_var" else torch.zeros_like(buffer)
                    )
                norm.momentum = None  # type: ignore[assignment]
                norm.train()
                # Each rank may hold another candidate: SyncBatchNorm must not wait for the others.
                if isinstance(norm, nn.SyncBatchNorm):
                    norm.__dict__["forward"] = MethodType(BatchNorm.forward, norm)
            seen = 0
            with same_order(), torch.no_grad():
                for batch in itertools.islice(self.batches, self.at_most):
                    _run(model, self.collect(batch), device)
                    seen += 1
            if not seen:
                raise UserError("data_loader has no batches: BatchNorm needs some to recalibrate on")
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
                norm.__dict__.pop("forward", None)
            for module, mode in modes:
                module.training = mode

    @contextmanager
    def around(self, model: nn.Module) -> Iterator[nn.Module]:
        """New statistics inside; afterwards the old ones, exactly."""
        names = ("running_mean", "running_var", "num_batches_tracked")
        buffers = [getattr(norm, name) for norm in batch_norms(model) for name in names]
        before = [buffer.data for buffer in buffers]
        try:
            self(model)
            yield model
        finally:
            for buffer, data in zip(buffers, before, strict=True):
                buffer.data = data


def _run(model: nn.Module, inputs: Any, device: torch.device) -> None:
    move = lambda x: x.to(device) if isinstance(x, torch.Tensor) else x
    try:
        if isinstance(inputs, dict):
            model(**{name: move(x) for name, x in inputs.items()})
        else:
            model(*(move(x) for x in (inputs if isinstance(inputs, tuple) else (inputs,))))
    except Exception as error:  # the network's own code
        raise UserError(
            f"the model does not run on what collect_func makes of a batch: {type(error).__name__}: {error}"
        ) from error
