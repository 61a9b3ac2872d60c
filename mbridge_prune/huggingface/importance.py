"""The `gradnas` ranking: the squared gradient of the loss with respect to every unit's mask.

With a mask m = 1 on a unit, dL/dm is the sum, over all places of a batch, of what the unit writes times the
gradient there. Its square, summed over batches, is the empirical Fisher information of the mask: half of it
is the second-order estimate of what the loss gains when the unit goes (Theis et al. 2018, arXiv 1801.05787;
Molchanov et al. 2019, arXiv 1906.10771). Heads and FFN units of all layers are on one scale.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sized
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from mbridge_prune import runtime
from mbridge_prune.dynamic import SliceTable
from mbridge_prune.errors import UserError
from mbridge_prune.evaluate.mode import evaluating
from mbridge_prune.heterogeneous.batches import batch_fingerprint, same_order
from mbridge_prune.huggingface.masks import Masks
from mbridge_prune.importance import Scores
from mbridge_prune.report.console import progress_bar
from mbridge_prune.search.callables import name_of

Loss = Callable[[Any, Any], torch.Tensor]
NEEDED = "expected a tensor with one number that the gradient flows from"


def squared_gradients(
    table: SliceTable,
    data_loader: Iterable[Any],
    loss_func: Loss,
    collect_func: Callable[[Any], Any] | None = None,
    at_most: int | None = None,
) -> Scores:
    """Scores of every head and FFN unit: sum over batches of (dL/dmask)^2.

    The model runs in evaluation mode. Its outputs, weights, gradients and hooks stay as they were. Ranks that
    read different batches add theirs.

    Args:
        data_loader: batches; a batch counts once, whatever its size.
        loss_func: f(model output, batch) -> scalar loss.
        collect_func: f(batch) -> the model's input; by default see `model_input`.
        at_most: read so many batches of every rank; None reads all.

    Returns:
        Axis key -> [units] fp32, with the number of batches and a fingerprint of the first in `meta`.

    Raises:
        UserError: no batch, a batch that the model does not take, a loss that is none.
    """
    model = table.model
    weight = next(model.parameters())
    sums: dict[str, torch.Tensor] = {}
    batches = 0
    total = _length(data_loader, at_most)
    progress = progress_bar("gradients", total, "batches") if total else nullcontext(lambda n: None)
    data = None
    with Masks(table) as masks, evaluating(model), same_order(), progress as step:
        for batch in itertools.islice(_batches(data_loader), at_most):
            data = data or batch_fingerprint(batch)
            batch = to_device(batch, weight.device)
            found = _gradients(model, masks.masks, batch, loss_func, collect_func, batches)
            for key, gradient in found.items():
                square = gradient.detach().double().square().cpu()
                sums[key] = sums[key] + square if key in sums else square
            batches += 1
            step(1)
    parts = runtime.gather_objects((batches, sums, data))
    batches, data = sum(count for count, _, _ in parts), parts[0][2]
    if not batches:
        raise UserError("data_loader gave no batch: give an iterable of batches that is not used up")
    units = {key: sum(part[key] for _, part, _ in parts if key in part).float() for key in masks.masks}
    return Scores(units, {"ranking": "gradnas", "batches": batches, "data": data})


def data_fingerprint(data_loader: Iterable[Any]) -> str | None:
    """Of rank 0's first batch, as `squared_gradients` notes it; None if there is none."""
    with same_order():
        first = next(iter(_batches(data_loader)), None)
    return runtime.gather_objects(None if first is None else batch_fingerprint(first))[0]


def model_input(batch: Any) -> Any:
    """What the model is called with by default: a mapping whole, of a list or tuple the first."""
    if isinstance(batch, (list, tuple)):
        if not batch:
            raise UserError("data_loader gave an empty batch")
        return batch[0]
    return batch


def called_with(model: nn.Module, given: Any) -> Any:
    """Calls the model: a mapping names its arguments, a tuple lists them, anything else is the first."""
    if isinstance(given, Mapping):
        return model(**given)
    return model(*given) if isinstance(given, tuple) else model(given)


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on `device`; containers keep their kind."""
    if isinstance(batch, torch.Tensor) or hasattr(batch, "to"):
        return batch.to(device)  # a BatchEncoding, too
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def _batches(data_loader: Iterable[Any]) -> Iterable[Any]:
    try:
        batches = iter(data_loader)
    except TypeError as error:
        raise UserError(f"data_loader is {type(data_loader).__name__}, not an iterable of batches") from error
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except Exception as error:  # the user's own code
            raise UserError(f"data_loader failed: {_said(error)}") from error
        yield batch


def _length(data_loader: Iterable[Any], at_most: int | None) -> int | None:
    length = len(data_loader) if isinstance(data_loader, Sized) else None
    given = [n for n in (length, at_most) if n is not None]
    return min(given) if given else None


@torch.enable_grad()
def _gradients(
    model: nn.Module,
    masks: Mapping[str, torch.Tensor],
    batch: Any,
    loss_func: Loss,
    collect_func: Callable[[Any], Any] | None,
    number: int,
) -> dict[str, torch.Tensor]:
    try:
        given = model_input(batch) if collect_func is None else collect_func(batch)
    except UserError:
        raise
    except Exception as error:  # the user's own code
        assert collect_func is not None
        raise UserError(f"collect_func {name_of(collect_func)} failed: {_said(error)}") from error
    try:
        output = called_with(model, given)
    except Exception as error:  # what the model says of a wrong input
        raise UserError(
            f"{type(model).__name__} does not take batch {number} of data_loader ({_said(error)}); give "
            "collect_func: f(batch) -> a dict of named arguments, a tuple, or a tensor"
        ) from error
    name = name_of(loss_func)
    try:
        loss = loss_func(output, batch)
    except Exception as error:  # the user's own code
        raise UserError(f"loss_func {name} failed: {_said(error)}") from error
    if not isinstance(loss, torch.Tensor):
        raise UserError(f"loss_func {name} returned {type(loss).__name__}, {NEEDED}")
    if loss.numel() != 1:
        raise UserError(f"loss_func {name} returned a tensor of shape {tuple(loss.shape)}, {NEEDED}")
    if not loss.requires_grad:
        raise UserError(f"loss_func {name} returned a tensor without gradient (detached?), {NEEDED}")
    if not torch.isfinite(loss):
        raise UserError(f"loss_func {name} gave {loss.item()} on batch {number} of data_loader")
    keys = list(masks)
    gradients = torch.autograd.grad(loss.reshape(()), [masks[key] for key in keys], allow_unused=True)
    found = {key: gradient for key, gradient in zip(keys, gradients, strict=True) if gradient is not None}
    if len(found) < len(keys):
        lacking = [key for key in keys if key not in found]
        raise UserError(
            f"the loss of {name} does not depend on {', '.join(lacking[:3])}: every layer has to run on the "
            "batches"
        )
    bad = [key for key, gradient in found.items() if not torch.isfinite(gradient).all()]
    if bad:
        raise UserError(
            f"the gradient of batch {number} is not finite in {', '.join(bad[:3])}: check the model, or "
            "score it in float32"
        )
    return found


def _said(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"
