"""One prune with a heterogeneous result: what it may cost, what was found, the cut and its checks."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch._dynamo import OptimizedModule

from mbridge_prune.dynamic import SliceTable, shrink
from mbridge_prune.dynamic.layout import Kept
from mbridge_prune.errors import UserError
from mbridge_prune.heterogeneous import bisection
from mbridge_prune.heterogeneous.bisection import Drops, Found
from mbridge_prune.heterogeneous.choices import Choices
from mbridge_prune.heterogeneous.costs import BUDGETS, Forward, ForwardCosts, counted_flops
from mbridge_prune.heterogeneous.profile import profile, profile_table
from mbridge_prune.heterogeneous.saved import Architecture, Cut
from mbridge_prune.importance.fingerprint import model_fingerprint
from mbridge_prune.plan import Plan
from mbridge_prune.report.console import console, progress_bar
from mbridge_prune.search.budget import budgets_of, resolve, said
from mbridge_prune.search.callables import PLAIN, name_of
from mbridge_prune.search.reach import refuse_needless

log = logging.getLogger("mbridge_prune")


class Heterogeneous:
    """Prints the profile table, and refuses a budget that cannot be kept, before anything is measured.

    Args:
        mode: its name.
        table: every axis is an hparam of its own.
        constraints: "flops", "params" or "latency_ms", each a number or a share ("50%").
        forward: the run that operations and time are of.
        choices: axis key -> its sizes.

    Raises:
        UserError: no budget, an unknown one, one that no candidate keeps, or that the model keeps as it is; a
            model that does not run with `dummy_input`.
    """

    def __init__(
        self,
        mode: str,
        table: SliceTable,
        constraints: Mapping[str, Any],
        forward: Forward,
        choices: Choices,
    ):
        self.mode, self.table, self.choices = mode, table, choices
        budgets = budgets_of(constraints, BUDGETS)
        if "export_config" in constraints:
            raise UserError(f"mode {mode} searches within a budget: give {', '.join(BUDGETS)}")
        if not budgets:
            raise UserError(f"constraints of mode {mode} need a budget: {', '.join(BUDGETS)}")
        shared = [key for key, axis in table.axes.items() if axis.hparam != key]
        if shared or table.stacks or table.layers is not None:
            raise ValueError(f"a heterogeneous table has an hparam an axis and no stack: {shared}")
        if not table.axes:
            raise UserError(f"nothing in {type(table.model).__name__} can be pruned")
        forward.check(table.model)
        self.forward, self.costs = forward, ForwardCosts(table, forward)
        self.limits = resolve(budgets, self.costs)
        self.fingerprint = model_fingerprint(table)
        self.profile = profile(choices, self.costs, self.limits)
        console().print(profile_table(choices, self.profile, self.limits))
        refuse_needless(self.limits, self.costs)
        bisection.check_reachable(choices, self.costs.of, self.limits)

    def identity(self) -> dict[str, Any]:
        """What a measurement is of, for a `Store`; the mode adds what its score depends on."""
        return {
            "mode": self.mode,
            "model": self.fingerprint,
            "choices": {k: list(v) for k, v in self.choices.items()},
        }

    def search(self, drops: Drops, level: str = "allowed drop", worth: Drops | None = None) -> Found:
        """The sizes that keep the budget; see `bisection.search`.

        Args:
            level: what the log calls the tolerated level.
            worth: see `bisection.search`.
        """
        found = bisection.search(
            self.choices, drops, self.costs.of, self.limits, "latency_ms" not in self.limits, worth
        )
        allowed = "only the smallest sizes keep the budget" if found.allowed_drop is None else (
            f"{level} {found.allowed_drop:.6g}"
        )  # fmt: skip
        log.info("%s: %s", allowed, ", ".join(f"{name} {said(cost)}" for name, cost in found.costs.items()))
        return found

    def cut(self, found: Found, orders: Kept, config: Mapping[str, Any], **plan: Any) -> Plan:
        """Cuts the sorted model in place, checks the counts, and notes what `save` needs.

        Args:
            orders: axis key -> [groups, width], the order that the model was sorted to.
            config: of the mode; plain values are saved, of functions their name.
            plan: further fields of the plan.
        """
        table, model, sizes = self.table, self.table.model, found.sizes
        architecture = Architecture.of(model, table)
        before = {
            name: float(self.costs.of(name, {})) for name in self.profile["max"] if name != "latency_ms"
        }
        after = {name: float(self.costs.of(name, sizes)) for name in before}
        kept = {
            key: orders.get(key, axis.identity())[:, : int(axis.width_in(sizes))].tolist()
            for key, axis in table.axes.items()
        }
        full = table.hparams()
        follows = [follow for _, follow in table.follows]
        values = [getattr(follow.owner, follow.name) for follow in follows]
        with progress_bar("slicing", len(table.entries), "tensors") as step:
            shrink(table, sizes, progress=step)
        self._check(after)
        architecture.follow(model, follows, values)
        said_config = {name: _said(value) for name, value in config.items()}
        architecture.cuts.append(Cut(self.mode, full, dict(sizes), kept, said_config))
        architecture.attach(model)
        log.info("pruned %s: %s", type(model).__name__, ", ".join(
            f"{name} {said(before[name])} to {said(after[name])} ({after[name] / before[name]:.1%})"
            for name in before
        ))  # fmt: skip
        return Plan(
            mode=self.mode,
            sizes_before=full,
            sizes_after=dict(sizes),
            params_before=int(before["params"]),
            params_after=int(after["params"]),
            layers_kept=[],
            kept=kept,
            fingerprint=self.fingerprint,
            costs={name: {"before": before[name], "after": after[name]} for name in before},
            search={
                "budgets": self.limits, "profile": self.profile, "allowed_drop": found.allowed_drop,
                "tolerated": found.tolerated, "costs": found.costs,
            },
            **plan,
        )  # fmt: skip

    def _check(self, planned: Mapping[str, float]) -> None:
        model = self.table.model
        real = {
            "params": sum(p.numel() for p in model.parameters()),
            "flops": counted_flops(model, self.forward),
        }
        for name, value in real.items():
            if value != planned[name]:
                raise RuntimeError(f"planned {planned[name]:,.0f} {name}, the model has {value:,}: a bug")


def refuse_wrapped(model: nn.Module, mode: str) -> None:
    """Refuses a model in a wrapper that keeps its parameters in buffers or shards, or runs a compiled graph.

    Raises:
        UserError: with what to give instead.
    """
    if type(model).__name__ in ("DistributedDataParallel", "FullyShardedDataParallel", "DataParallel"):
        raise UserError(
            f"mode {mode} takes the model itself, not {type(model).__name__}: prune first, then wrap it"
        )
    if isinstance(model, OptimizedModule):
        raise UserError(f"mode {mode} takes the model itself, not a compiled one: prune first, then compile")


def _said(value: Any) -> Any:
    """A setting as JSON: plain values as they are, of anything else a name."""
    if isinstance(value, PLAIN) and not isinstance(value, (bytes, complex)):
        return value
    if isinstance(value, Mapping):
        return {str(k): _said(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_said(v) for v in value]
    return name_of(value) if callable(value) else type(value).__qualname__
