"""What a candidate costs: parameters, and operations and time of one forward of `dummy_input`.

Parameters and operations are read off the slice table; where a weight is used is seen in one run. No formula
here knows a layer type, and `torch.utils.flop_counter` has to agree.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from mbridge_prune import runtime
from mbridge_prune.dynamic import Counter, Fixed, Shape, Sizes, SliceTable, select, shapes
from mbridge_prune.dynamic.table import Entry
from mbridge_prune.errors import UserError
from mbridge_prune.evaluate.mode import evaluating

BUDGETS = ("flops", "params", "latency_ms")
LINEAR = (nn.Linear, Conv1D)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
PRODUCTS = (*LINEAR, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
WARM, REPEATS = 2, 9


@dataclass(frozen=True)
class Forward:
    """One forward of a model, as `dummy_input` says it."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, dummy_input: Any) -> Forward:
        """A tensor; a tuple of arguments, the last of which may be a dict of named ones; or such a dict.

        Raises:
            UserError: there is none.
        """
        if dummy_input is None:
            raise UserError("dummy_input is needed: a tensor, a tuple of arguments, or a dict of named ones")
        if isinstance(dummy_input, Mapping):
            return cls(kwargs=dict(dummy_input))
        if not isinstance(dummy_input, tuple):
            return cls((dummy_input,))
        if dummy_input and isinstance(dummy_input[-1], dict):
            return cls(dummy_input[:-1], dummy_input[-1])
        return cls(dummy_input)

    def __call__(self, model: nn.Module) -> Any:
        """Runs the model in evaluation mode, without gradients, where its weights are."""
        weight = next(model.parameters(), None)
        device = None if weight is None else weight.device
        move = lambda x: x.to(device) if isinstance(x, torch.Tensor) else x
        with evaluating(model), torch.no_grad():
            return model(*map(move, self.args), **{name: move(x) for name, x in self.kwargs.items()})

    def check(self, model: nn.Module) -> None:
        """Runs the model once.

        Raises:
            UserError: it does not take the input.
        """
        try:
            self(model)
        except Exception as error:  # the model's own code
            raise UserError(
                f"{type(model).__name__} does not run with dummy_input: {type(error).__name__}: "
                f"{' '.join(str(error).split())}"
            ) from error


class ForwardCosts:
    """Counts candidates of a model; arrays of sizes count many at once.

    Args:
        table: of the unpruned model.
        forward: the run that operations and time are of.
    """

    def __init__(self, table: SliceTable, forward: Forward):
        self.table, self.forward = table, forward
        self.weights = Counter(shapes(table))
        self._latency: dict[tuple[int, ...], float] = {}
        uses, calls = _uses(table, forward)
        work = [
            Shape((Fixed(2 * uses[id(entry.module)]), *entry.dims), None)
            for entry in table.entries
            if entry.attribute == "weight" and id(entry.module) in uses
        ]
        for _, cost in table.costs:
            if cost.kind == "flops" and cost.seen is not None:
                for tokens, context in calls[id(cost.seen)]:
                    times = cost.times * tokens * (context if cost.per_token else 1)
                    work.append(Shape((Fixed(times), cost.tree), None))
        self.products = Counter(work, layers=self.weights.layers)
        self.rest = counted_flops(table.model, forward) - int(self.products.params({}))
        """Operations that no weight of the table makes: they belong to parts that are left alone."""
        if self.rest < 0:
            raise RuntimeError(f"{-self.rest:,} more operations counted from the table than were run: a bug")

    def of(self, budget: str, sizes: Sizes) -> int | float | np.ndarray:
        """The cost that a budget bounds: "flops", "params" or "latency_ms"."""
        return getattr(self, budget)(sizes)

    def params(self, sizes: Sizes) -> int | np.ndarray:
        """Parameters; a shared one counts once."""
        return self.weights.params(sizes)

    def flops(self, sizes: Sizes) -> int | np.ndarray:
        """Floating-point operations of one forward, two a multiplication with its addition.

        Products of matrices and convolutions, as `torch.utils.flop_counter` counts them.
        """
        return self.products.params(sizes) + self.rest

    def latency_ms(self, sizes: Sizes) -> float:
        """Median time of one forward on this machine (rank 0's), measured in `select`; once a candidate."""
        key = tuple(int(axis.size_in(sizes)) for axis in self.table.axes.values())
        if key not in self._latency:
            with select(self.table, sizes) as model:
                measured = measured_ms(lambda: self.forward(model))
            self._latency[key] = runtime.gather_objects(measured)[0]  # all ranks decide alike
        return self._latency[key]


def counted_flops(model: nn.Module, forward: Forward) -> int:
    """Operations of one forward by the independent counter.

    It does not see into every fused attention kernel (not the CPU's), so attention runs in its plain form.
    """
    with _unfused(), FlopCounterMode(display=False) as counter:
        forward(model)
    return int(counter.get_total_flops())


@contextmanager
def _unfused() -> Iterator[None]:
    """Attention in its plain form, transformer layers of torch.nn module by module."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def measured_ms(run: Callable[[], Any]) -> float:
    """Median milliseconds of a call, after a warm-up."""
    seconds = []
    for repeat in range(WARM + REPEATS):
        _wait()
        begin = time.perf_counter()
        run()
        _wait()
        if repeat >= WARM:
            seconds.append(time.perf_counter() - begin)
    return 1000 * statistics.median(seconds)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _uses(table: SliceTable, forward: Forward) -> tuple[dict[int, int], Mapping[int, list[tuple[int, int]]]]:
    """Seen in one run: how often each weight entry multiplies, and (tokens, context) of each attention call.

    A linear layer uses each entry once a row of its input, a convolution once a position of its output, a
    transposed one once a position of its input. What no axis cuts, and what has a forward of its own, is
    left to the counter.
    """
    uses: dict[int, int] = defaultdict(int)
    calls: dict[int, list[tuple[int, int]]] = defaultdict(list)

    def use(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        if isinstance(module, LINEAR):
            uses[id(module)] += x.numel() // x.shape[-1]
        elif isinstance(module, TRANSPOSED):
            uses[id(module)] += x.numel() // module.in_channels
        else:
            uses[id(module)] += output.numel() // module.out_channels

    def call(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        calls[id(module)].append((x.numel() // x.shape[-1], x.shape[-2]))

    products = {id(e.module): e.module for e in table.entries if _multiplies(e)}
    seen = {id(c.seen): c.seen for _, c in table.costs if c.seen is not None}
    handles = [m.register_forward_hook(use, with_kwargs=True) for m in products.values()]
    handles += [m.register_forward_hook(call, with_kwargs=True) for m in seen.values()]
    try:
        with _unfused():
            forward(table.model)
    finally:
        for handle in handles:
            handle.remove()
    return uses, calls


def _multiplies(entry: Entry) -> bool:
    module: Any = entry.module
    plain = isinstance(module, PRODUCTS) and type(module).forward in [cls.forward for cls in PRODUCTS]
    return plain and any(any(layout.axes()) for layout in entry.dims)
