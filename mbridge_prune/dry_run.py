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

import numpy as np
import torch
from rich.table import Table
from torch.overrides import TorchFunctionMode

from mbridge_prune import mcore, mcore_minitron, runtime
from mbridge_prune.bridge.expressible import check_expressible
from mbridge_prune.bridge.load import check_layout, open_bridge, warn_of_lost_heads
from mbridge_prune.bridge.quiet import quiet
from mbridge_prune.dynamic import Counter, Entry, Shape, SliceTable, shapes
from mbridge_prune.errors import UserError
from mbridge_prune.plan import Plan
from mbridge_prune.prune_config import DIVISORS, PruneConfig
from mbridge_prune.report.console import space_table
from mbridge_prune.search.budget import resolve
from mbridge_prune.search.candidates import inside_budget
from mbridge_prune.search.run import Search

SearchTarget = tuple[Mapping[str, Any], Mapping[str, Any]]


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
        stages: layers and weights a rank of every pipeline stage, before the cut.
        choices: hparam -> the sizes that its divisor (given, or the usual one) and its groups allow.
        bytes_per_param: of the model's dtype.
        space, in_budget: of a search: its choices, and how many candidates keep the budget.
    """

    plan: Plan
    stages: list[Stage]
    choices: dict[str, list[int]] = field(default_factory=dict)
    bytes_per_param: int = 2
    space: Table | None = None
    in_budget: str = ""


def forecast(
    hf_path: str | Path,
    export_config: Mapping[str, int],
    *,
    provider_overrides: Mapping[str, Any] | None = None,
    divisors: Mapping[str, int] | None = None,
    trust_remote_code: bool = False,
    search: SearchTarget | None = None,
    experts: str = "gated",
) -> Forecast:
    """Checks a target and counts it, reading config.json alone.

    Args:
        search: (budgets, keys of `prune(config=...)`) in place of an export_config.
        experts: their ranking, as in `prune(config=...)`.

    Raises:
        UserError: everything `prune` would refuse about the model, the layout and the sizes.
    """
    bridge, provider = _open(hf_path, provider_overrides, trust_remote_code)
    check_layout(provider, scoring=not export_config and not search)
    warn_of_lost_heads(bridge, provider)
    runtime.start_model_parallel()
    table, plan = _planned(bridge, provider, export_config, divisors, trust_remote_code)
    mcore_minitron.check_experts(table, experts)
    space, in_budget = _searched(table, search, divisors) if search else (None, "")
    groups = {axis.hparam: axis.groups for axis in table.axes.values() if not axis.per_group}
    choices = {}
    for name, full in table.hparams().items():
        given = (divisors or {}).get(f"{name}_divisor", 1)
        usual = given if given > 1 else DIVISORS.get(name, 1)
        step = math.lcm(usual, groups.get(name, 1))
        if step > 1 or name.startswith("num_"):
            sizes = sorted({*range(step, full + 1, step), full})
            choices[name] = [size for size in sizes if _is_allowed(table, name, size)]
    width = torch.empty(0, dtype=provider.params_dtype).element_size()
    return Forecast(plan, _stages(table, provider), choices, width, space, in_budget)


def check_target(
    hf_path: str | Path,
    export_config: Mapping[str, int],
    *,
    provider_overrides: Mapping[str, Any] | None = None,
    divisors: Mapping[str, int] | None = None,
    trust_remote_code: bool = False,
    score_only: bool = False,
    search: SearchTarget | None = None,
    experts: str = "gated",
) -> Any:
    """Refuses, from config.json alone, what `prune` would refuse; starts Megatron's process groups.

    Args:
        score_only: nothing is going to be cut: layouts that a model can only be scored under are fine.
        search, experts: as in `forecast`.

    Returns:
        The Megatron-Bridge provider of the model.

    Raises:
        UserError: about the model, the parallel layout, a layer, or a size.
    """
    bridge, provider = _open(hf_path, provider_overrides, trust_remote_code)
    check_layout(provider, score_only)
    runtime.start_model_parallel(
        provider.pipeline_model_parallel_size or 1,
        provider.tensor_model_parallel_size or 1,
        provider.expert_model_parallel_size or 1,
    )
    table, _ = _planned(bridge, provider, export_config, divisors, trust_remote_code)
    mcore_minitron.check_experts(table, experts)
    if search:
        Search(table, PruneConfig.of(search[1]), search[0], divisors, whole=True)
    return provider


def _searched(
    table: SliceTable, search: SearchTarget, divisors: Mapping[str, int] | None
) -> tuple[Table, str]:
    """The space, and how many candidates keep the budget; layers are not ranked yet: the last go."""
    run = Search(table, PruneConfig.of(search[1]), search[0], divisors, whole=True)
    order = list(range(table.hparams()["num_layers"]))
    space, costs = run.space(order), run.costs(order)
    limits = resolve(run.budgets, costs)
    found = inside_budget(space, costs, limits, lambda grid: np.zeros(len(grid["num_layers"])))
    said = f"{found.grid:,} real candidates, {found.inside:,} of them keep the budget"
    return space_table(space.choices, limits), said


def _open(hf_path: str | Path, overrides: Mapping[str, Any] | None, trust_remote_code: bool) -> Any:
    return open_bridge(hf_path, overrides, trust_remote_code=trust_remote_code, weights=False)


def _is_allowed(table: SliceTable, hparam: str, size: int) -> bool:
    try:
        table.check({hparam: size})
    except UserError:
        return False
    return True


def _planned(
    bridge: Any,
    provider: Any,
    export_config: Mapping[str, int],
    divisors: Mapping[str, int] | None,
    trust_remote_code: bool,
) -> tuple[SliceTable, Plan]:
    """The whole model's table and the plan of a target that has passed every check."""
    table = meta_table(provider)
    mcore_minitron.check_sizes(table, export_config, divisors)
    sizes = table.settle(export_config)
    shares = provider.expert_model_parallel_size or 1
    if sizes.get("num_moe_experts", shares) % shares:
        raise UserError(
            f"num_moe_experts={sizes['num_moe_experts']} does not divide over "
            f"expert_model_parallel_size={shares}"
        )
    counter = Counter(shapes(table))  # of all stages: the table is the whole model's on every rank
    plan = Plan(
        sizes_before=table.hparams(),
        sizes_after=sizes,
        params_before=int(counter.params({})),
        params_after=int(counter.params(sizes)),
        layers_kept=list(range(sizes["num_layers"])),
        active_before=int(counter.active_params({})),
        active_after=int(counter.active_params(sizes)),
    )
    if export_config:
        heads = Counter(_prediction_heads(table), layers=table.hparams()["num_layers"])
        check_expressible(bridge.hf_pretrained, provider, plan, int(heads.params(sizes)), trust_remote_code)
    return table, plan


def _prediction_heads(table: SliceTable) -> Iterator[Shape]:
    """Shapes of multi-token-prediction heads, which transformers' classes leave out."""
    heads = [e for e in table.entries if ".mtp." in f".{e.name}"]
    return iter(shapes(SliceTable(table.model, heads, [], [])))


def meta_table(provider: Any) -> SliceTable:
    """The slice table of the whole model, all stages in one, built on the meta device."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    whole = copy.copy(provider)
    whole.pipeline_model_parallel_size = 1
    whole.tensor_model_parallel_size = runtime.size("tp")
    whole.expert_model_parallel_size = runtime.size("ep")
    whole.num_layers_in_first_pipeline_stage = whole.num_layers_in_last_pipeline_stage = None
    whole.init_model_with_meta_device = True
    whole.perform_initialization = False
    whole._pg_collection = ProcessGroupCollection.use_mpu_process_groups()
    whole._pg_collection.pp = runtime.alone()
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


def _stages(table: SliceTable, provider: Any) -> list[Stage]:
    """Layers and weights of a rank of every stage; its experts and its shards of matrices alone."""
    split = _split(provider, provider.pipeline_model_parallel_size or 1)
    bounds = [sum(split[: i + 1]) for i in range(len(split))]
    params = [0] * len(split)
    for entry in table.entries:
        if not entry.counted:
            continue
        size = _on_a_rank(entry, provider)
        if entry.layer is not None:
            stage = next(i for i, end in enumerate(bounds) if entry.layer < end)
        else:
            stage = 0 if _is_first(table, entry) else len(split) - 1
        params[stage] += size
        if entry.name.endswith("embedding.word_embeddings.weight") and len(split) > 1:
            # The last stage keeps copies of its own: of a tied output layer, and for prediction heads.
            tower = mcore.language_model(table.model)
            copies = tower.share_embeddings_and_output_weights + bool(getattr(tower, "mtp_process", False))
            params[-1] += copies * size
    return [Stage(layers, p) for layers, p in zip(split, params, strict=True)]


def _is_first(table: SliceTable, entry: Entry) -> bool:
    """Embeddings and vision towers stand on the first stage; norms and heads on the last."""
    tower = mcore.language_model(table.model)
    name = entry.name.removeprefix("language_model.")
    return name.startswith("embedding.") or (tower is not table.model and name == entry.name)


def _on_a_rank(entry: Entry, provider: Any) -> int:
    size, tp = entry.tensor().numel(), provider.tensor_model_parallel_size or 1
    if entry.unit is not None:
        return size // (provider.expert_model_parallel_size or 1)
    return size // tp if entry.tensor().dim() > 1 and ".router." not in entry.name else size


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
