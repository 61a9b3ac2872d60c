"""Depth by greedy removal: the layer goes without which the predictions change least, then the next.

One-shot scores look at a layer alone in the full model; here every layer is judged anew in the model that
the removals before it have left, at a sample of positions: by KL(full || candidate), or by the squared error
of the logits as a share of the full model's. Candidates begin at the layer that goes: the hidden states
before it are those of the present model and are run once a removal.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext

import torch
from torch import nn

from mbridge_prune import mcore, runtime
from mbridge_prune.calibration.loop import CalibrationLoop
from mbridge_prune.calibration.schedule import forward_only
from mbridge_prune.dynamic import DEPTH, SliceTable, select
from mbridge_prune.evaluate.divergence import Reference
from mbridge_prune.report.console import progress_bar
from mbridge_prune.search.waves import waves

log = logging.getLogger("mbridge_prune")

TEXT = 65_536
"""Tokens that are read at most."""
ENOUGH = 32_768
"""With fewer, removals follow the text they are chosen on."""
POSITIONS = 4096

States = dict[int, list[torch.Tensor]]
"""Global layer number -> what the layer reads, in host memory, one tensor [s, b, hidden] a microbatch."""


MEASURES = {
    "greedy": (Reference.kl, "KL is %.4f nats"),
    "greedy_logits": (Reference.logit_error, "error of the logits is %.4f of the full model's"),
}
"""Setting -> what a removal costs, position by position, and how the log says its mean."""


def greedy_depth(
    table: SliceTable, loop: CalibrationLoop, removals: int, measure: str = "greedy"
) -> torch.Tensor:
    """Scores of the layers, the same on every rank: those that go, in their order, have the lowest.

    A layer that goes has the measure of the model without it and those before it, made to rise; one that
    stays, what the model would have without it as the last.

    Args:
        table: of this rank's part of the full model.
        loop: over the text; hidden states of a stage's layers are kept in host memory for all of it.
        removals: how many layers are to be ranked for removal; fewer than there are.
        measure: a key of `MEASURES`.

    Returns:
        [layers] fp32: nats, or shares.
    """
    of, said = MEASURES[measure]
    text = loop.first(TEXT)
    tokens_ns, batch = text.tokens_ns, text.micro_batch_size
    if tokens_ns.numel() < ENOUGH:
        log.warning(
            "greedy depth: %s calibration tokens, fewer than the %s that make removals sure",
            f"{tokens_ns.numel():,}", f"{ENOUGH:,}",
        )  # fmt: skip
    replicas = runtime.size("dp") if runtime.size("ep") == 1 else 1
    reference = Reference.of(table.model, tokens_ns, POSITIONS, batch=batch)
    stay = list(range(table.hparams()[DEPTH]))
    scores = torch.zeros(len(stay), dtype=torch.float64)
    level = 0.0
    total = sum(len(stay) - n for n in range(removals))
    with progress_bar("greedy depth", total, "candidates") as step, torch.no_grad():
        for _ in range(removals):
            states = _states(table, stay, tokens_ns, batch, deal=replicas == 1)

            def without(layer: int, states: States = states) -> float:
                rest = [n for n in stay if n != layer]
                begin = _begun(table, stay.index(layer), states.get(layer))
                with _shortened(table, rest), begin:
                    return float(of(reference, table.model, deal=replicas == 1).double().mean())

            found: dict[int, float] = {}
            for wave in waves(stay, without, runtime.place("dp") % replicas, replicas):
                found.update(wave)
                step(len(wave))
            gone = min(stay, key=lambda n: (found[n], -n))
            level = max(found[gone], level * (1 + 1e-5) + 1e-9)
            for layer in stay:
                scores[layer] = max(found[layer], level * (1 + 1e-5) + 1e-9)
            scores[gone] = level
            stay.remove(gone)
            log.info(f"greedy depth: without layer %d the {said}", gone, found[gone])
    return scores.float()


@contextmanager
def _shortened(table: SliceTable, layers: Sequence[int]) -> Iterator[None]:
    """Inside, the model has these layers alone."""
    sizes = {**table.hparams(), DEPTH: len(layers)}
    with select(table, sizes, layers) as model, mcore.whole_config(model, sizes):
        yield


def _states(
    table: SliceTable, stay: Sequence[int], tokens_ns: torch.Tensor, batch: int, deal: bool
) -> States:
    """What every layer of the present model reads. Empty on pipeline stages, whose input comes by itself."""
    if runtime.size("pp") > 1 or table.layers is None:
        return {}
    states: States = {}
    with _shortened(table, stay), ExitStack() as stack:
        for number, layer in zip(table.layers.numbers, table.layers.owner.layers, strict=True):
            kept = states.setdefault(number, [])

            def see(module: nn.Module, args: tuple, kwargs: dict, kept: list[torch.Tensor] = kept) -> None:
                hidden_sbh = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
                kept.append(hidden_sbh.detach().to("cpu", copy=True))

            stack.callback(layer.register_forward_pre_hook(see, with_kwargs=True).remove)
        forward_only(table.model, tokens_ns, batch, deal=deal)
    return states


@contextmanager
def _begun(table: SliceTable, place: int, states: list[torch.Tensor] | None) -> Iterator[None]:
    """Inside, the stack begins at its layer `place`, with the states of one microbatch after another."""
    if states is None or table.layers is None:
        with nullcontext():
            yield
        return
    stack = table.layers.owner
    whole, began, given = stack.layers, stack.pre_process, stack.input_tensor
    waiting = iter(states)

    def put(module: nn.Module, args: tuple) -> None:
        stack.input_tensor = next(waiting).to(runtime.device(), copy=True)

    hook = stack.register_forward_pre_hook(put)
    stack.layers, stack.pre_process = nn.ModuleList(list(whole)[place:]), False
    stack.layers.training = whole.training
    try:
        yield
    finally:
        hook.remove()
        stack.layers, stack.pre_process, stack.input_tensor = whole, began, given
