"""The plan from the model's config alone: Megatron's own modules on the meta device, no weights read."""

from __future__ import annotations

import contextlib
import copy
import io
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch.overrides import TorchFunctionMode

from mbridge_prune import mcore, mcore_minitron, runtime
from mbridge_prune.bridge.load import check_layout, open_bridge, quiet
from mbridge_prune.dynamic import SliceTable


@dataclass
class Stage:
    """Weights of one pipeline stage, in parameters."""

    layers: int
    params: int


@dataclass
class Forecast:
    """What a prune would give.

    Args:
        plan: sizes and parameters before and after.
        stages: layers and weights of every pipeline stage before the cut.
        choices: hparam -> the sizes that its divisor (given, or the usual one) and its groups allow.
        bytes_per_param: of the model's dtype.
    """

    plan: mcore_minitron.Plan
    stages: list[Stage]
    choices: dict[str, list[int]] = field(default_factory=dict)
    bytes_per_param: int = 2


def forecast(
    hf_path: str | Path,
    export_config: Mapping[str, int],
    *,
    provider_overrides: Mapping[str, Any] | None = None,
    divisors: Mapping[str, int] | None = None,
    trust_remote_code: bool = False,
) -> Forecast:
    """Checks a target and counts it, reading config.json alone.

    Raises:
        UserError: everything `prune` would refuse about the model, the layout and the sizes.
    """
    overrides = dict(provider_overrides or {})
    _, provider = open_bridge(hf_path, overrides, trust_remote_code=trust_remote_code, weights=False)
    check_layout(provider)
    stages = provider.pipeline_model_parallel_size or 1
    split = _split(provider, stages)
    runtime.start_model_parallel()
    table = meta_table(provider)
    mcore_minitron.check_sizes(table, export_config, divisors)
    sizes = {**table.hparams(), **export_config}
    counter = mcore_minitron.count(table)
    plan = mcore_minitron.Plan(
        sizes_before=table.hparams(),
        sizes_after=sizes,
        params_before=int(counter.params({})),
        params_after=int(counter.params(sizes)),
        layers_kept=list(range(sizes["num_layers"])),
    )
    groups = {axis.hparam: axis.groups for axis in table.axes.values() if not axis.per_group}
    choices = {}
    for name, full in table.hparams().items():
        given = (divisors or {}).get(f"{name}_divisor", 1)
        usual = given if given > 1 else mcore_minitron.DIVISORS.get(name, 1)
        step = math.lcm(usual, groups.get(name, 1))
        if step > 1:
            choices[name] = sorted({*range(step, full + 1, step), full})
    width = torch.empty(0, dtype=provider.params_dtype).element_size()
    return Forecast(plan, _stages(table, split), choices, width)


def check_target(
    hf_path: str | Path,
    export_config: Mapping[str, int],
    *,
    provider_overrides: Mapping[str, Any] | None = None,
    divisors: Mapping[str, int] | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Refuses, from config.json alone, what `prune` would refuse; starts Megatron's process groups.

    Returns:
        The Megatron-Bridge provider of the model.

    Raises:
        UserError: about the model, the parallel layout, a layer, or a size.
    """
    _, provider = open_bridge(hf_path, provider_overrides, trust_remote_code=trust_remote_code, weights=False)
    check_layout(provider)
    runtime.start_model_parallel(provider.pipeline_model_parallel_size)
    mcore_minitron.check_sizes(meta_table(provider), export_config, divisors)
    return provider


def meta_table(provider: Any) -> SliceTable:
    """The slice table of the whole model, all stages in one, built on the meta device."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    whole = copy.copy(provider)
    whole.pipeline_model_parallel_size = 1
    whole.num_layers_in_first_pipeline_stage = whole.num_layers_in_last_pipeline_stage = None
    whole.init_model_with_meta_device = True
    whole.perform_initialization = False
    whole._pg_collection = ProcessGroupCollection.use_mpu_process_groups()
    with on_meta(), quiet(), contextlib.redirect_stdout(io.StringIO()):
        model = whole.provide(pre_process=True, post_process=True)
    return SliceTable.of(model, mcore.root_scope(model))


def show(forecast: Forecast) -> Table:
    """The layout of the model over ranks, with the memory of its weights."""
    table = Table(title="weights a rank (before the cut; activations of one microbatch come on top)")
    for column in ("stage", "layers", "parameters", "memory"):
        table.add_column(column, justify="right")
    for number, stage in enumerate(forecast.stages):
        memory = stage.params * forecast.bytes_per_param / 2**30
        table.add_row(str(number), str(stage.layers), f"{stage.params:,}", f"{memory:.2f} GiB")
    return table


def _split(provider: Any, stages: int) -> list[int]:
    first = provider.num_layers_in_first_pipeline_stage
    last = provider.num_layers_in_last_pipeline_stage
    middle = stages - (first is not None) - (last is not None)
    rest = provider.num_layers - (first or 0) - (last or 0)
    each = rest // middle if middle else 0
    return [*([first] if first is not None else []), *[each] * middle, *([last] if last is not None else [])]


def _stages(table: SliceTable, split: list[int]) -> list[Stage]:
    bounds = [sum(split[: i + 1]) for i in range(len(split))]
    params = [0] * len(split)
    for entry in table.entries:
        if not entry.counted:
            continue
        if entry.layer is not None:
            stage = next(i for i, end in enumerate(bounds) if entry.layer < end)
        else:
            stage = 0 if entry.name.startswith("embedding") else len(split) - 1
        params[stage] += entry.tensor().numel()
    if len(split) > 1 and getattr(table.model, "share_embeddings_and_output_weights", False):
        # The last stage keeps its own copy of a tied embedding.
        copy = next(e for e in table.entries if e.name == "embedding.word_embeddings.weight")
        params[-1] += copy.tensor().numel()
    return [Stage(layers, p) for layers, p in zip(split, params, strict=True)]


class _Meta(TorchFunctionMode):
    """Whatever device a factory is told, it makes a meta tensor."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """Modules built inside hold no memory."""
    with torch.device("meta"), _Meta():
        yield
