"""Watches the model during calibration and accumulates what the scores are made of.

Per probe the rows of its statistic; per layer the sum over tokens of 1 - cosine(hidden state before,
after). All are sums on the device in fp64 (a few thousand numbers a layer: fp64 costs nothing and
makes the order of summation, and so the number of ranks, invisible), updated in place, without a
host sync until the end.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from mbridge_prune.dynamic import Probe, SliceTable
from mbridge_prune.importance.statistics import STATISTICS, Seen
from mbridge_prune.importance.watch import first_tensor, watch

Hook = Any


class Collector:
    """Context manager: inside it, every forward of the model adds to the sums.

    Args:
        table: whose probes and layers are watched.
        pad_token_id: input positions with this token are left out of every statistic.
        skip: keys of axes that are ranked otherwise; a probe that reads no other axis is left out.
        gate_free: the norms of experts' outputs are those without the router probability.

    Attributes:
        sums: (probe name, its first unit) -> [rows, columns] fp64, as its statistic makes them.
        layers: global layer number -> [2] fp64, (sum of 1 - cosine, tokens).
    """

    def __init__(
        self,
        table: SliceTable,
        pad_token_id: int | None = None,
        skip: Collection[str] = (),
        gate_free: bool = False,
    ):
        self.table, self.skip, self.gate_free = table, skip, gate_free
        self.pad_token_id = pad_token_id
        self.sums: dict[tuple[str, int], torch.Tensor] = {}
        self.layers: dict[int, torch.Tensor] = {}
        self._hooks: list[Hook] = []
        self._valid: torch.Tensor | None = None
        self._routed: dict[int, torch.Tensor] = {}
        self._watches = ExitStack()

    def __enter__(self) -> Collector:
        if self.pad_token_id is not None:
            hook = self.table.model.register_forward_pre_hook(self._see_tokens, with_kwargs=True)
            self._hooks.append(hook)
            for router in {id(p.router): p.router for p in self.table.probes if p.router}.values():
                self._hooks.append(router.register_forward_hook(self._see_routing))
        for probe in self.table.probes:
            if any(reading.axis.key not in self.skip for reading in probe.readings):
                self._watch(probe)
        if self.table.layers is not None:
            for number, layer in zip(self.table.layers.numbers, self.table.layers.owner.layers, strict=True):
                self._hooks.append(layer.register_forward_hook(self._see_layer(number), with_kwargs=True))
        return self

    def __exit__(self, *exc: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._watches.close()
        self._hooks, self._valid, self._routed = [], None, {}

    def _watch(self, probe: Probe) -> None:
        def see(x: torch.Tensor, args: tuple) -> None:
            self._add(probe, x, args)

        self._watches.enter_context(watch(probe.module, probe.tensor, see))

    @torch.no_grad()
    def _add(self, probe: Probe, x: torch.Tensor, args: tuple) -> None:
        if probe.part is not None:
            x = x.narrow(-1, *probe.part)
        splits, valid, gates = None, self._valid, None
        if probe.router is not None:
            # Grouped experts are told the tokens of each; an expert alone is not.
            splits = args[1] if len(args) > 1 else None
            valid = None if valid is None else self._valid_routed(probe, splits, x.shape[:-1].numel())
            if self.gate_free and probe.statistic == "routed_norm":
                gates = args[2]
        rows = STATISTICS[probe.statistic].rows(Seen(x, splits, valid, gates))
        total = self.sums.get((probe.name, probe.first))
        if total is None:
            self.sums[probe.name, probe.first] = rows
        else:
            total += rows

    def _valid_routed(self, probe: Probe, splits: Any, rows: int) -> torch.Tensor:
        """[rows] of an expert, or of all experts one after another: False for padded positions."""
        valid_te = self._routed[id(probe.router)]
        if splits is None:
            valid_te = valid_te[:, probe.first : probe.first + 1]
        flat = valid_te.t().reshape(-1)
        # The number of rows is known: a mask would wait for the device to count them.
        return flat[torch.nonzero_static(flat, size=rows)[:, 0]] == 1

    def _see_routing(self, router: nn.Module, args: tuple, out: Any) -> None:
        """Per token and expert: 0 not sent, 1 sent, -1 sent and padded."""
        if self._valid is not None:
            routing_te = out[1].to(torch.int8)
            sign_t = torch.where(self._valid.reshape(-1), 1, -1).to(torch.int8)
            self._routed[id(router)] = routing_te * sign_t[:, None]

    def _see_layer(self, number: int) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
            before_sbh = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            distance_sb = _cosine_distance(before_sbh, first_tensor(out))
            if self._valid is not None:
                distance_sb = distance_sb * self._valid
                tokens = self._valid.sum().double()
            else:
                count, device = distance_sb.numel(), distance_sb.device
                tokens = torch.full((), count, dtype=torch.float64, device=device)
            added = torch.stack([distance_sb.sum(dtype=torch.float64), tokens])
            total = self.layers.get(number)
            if total is None:
                self.layers[number] = added
            else:
                total += added

        return hook

    def _see_tokens(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        ids_bs = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        self._valid = (ids_bs != self.pad_token_id).t().contiguous()


@torch.no_grad()
def _cosine_distance(a_sbh: torch.Tensor, b_sbh: torch.Tensor) -> torch.Tensor:
    """1 - cosine over the last dimension, in fp32: [s, b]."""
    a, b = a_sbh.float(), b_sbh.float()
    dot = torch.linalg.vecdot(a, b)
    norms = torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(b, dim=-1)
    return 1 - dot / norms.clamp(min=1e-20)
