"""A candidate's shapes for a while: the model that `shrink` makes, then the full model again, exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from depth import DEPTHS, Depth, weaken
from matrix import PATTERNS, cuts, load, write_source
from models import difference, run, tokens
from torch import nn

from mbridge_prune.dynamic import DEPTH, select, shrink, sort
from mbridge_prune.mcore_minitron import table_of

IDS = tokens(seed=15)
MORE = {  # kinds of layers that the models of the depth patterns do not have
    "qwen3_moe": Depth("qwen3_moe", 4, (1,), {}, {}),
    "olmoe": Depth("olmoe", 4, (1,), {}, {}),
    "glm4_moe_mtp": Depth("glm4_moe_mtp", 4, (0, 2), {}, {}),
    "qwen3_vl_moe": Depth("qwen3_vl_moe", 4, (2,), {}, {}),
    "moonlight": Depth("moonlight", 4, (2,), {}, {}),
}
MODELS = {**DEPTHS, **MORE}
SEPARATE = ("first_k_dense_replace", "layer_types", "linear_attention_freq", "hybrid_override_pattern", *MORE)
LAYOUTS = [
    *((name, True) for name in MODELS),
    *((name, False) for name in SEPARATE if name != "qwen3_vl_moe"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    written = {}

    def get(name):
        if name not in written:
            depth, written[name] = MODELS[name], tmp_path_factory.mktemp("select")
            changes = {} if depth.family in PATTERNS and not depth.changes else depth.all_changes
            write_source(depth.family, written[name], weaken(depth.weak), **changes)
        return written[name]

    return get


@pytest.fixture(params=LAYOUTS, ids=lambda p: f"{p[0]}-{'grouped' if p[1] else 'separate'}")
def sorted_model(request, folder):
    """(model sorted in a random order, its table, sizes of every hparam, layers to keep)."""
    name, grouped = request.param
    depth = MODELS[name]
    model = load(folder(name), grouped, **depth.overrides).unwrapped_model
    table, generator = table_of(model), torch.Generator().manual_seed(5)
    sort(table, {key: axis.order_by(torch.rand(axis.size, generator=generator))
                 for key, axis in table.axes.items() if key != DEPTH})  # fmt: skip
    sizes = {k: v for k, v in cuts(depth.family)["all"].items() if k in table.hparams()}
    return model, table, {**sizes, DEPTH: len(depth.kept)}, depth.kept


def test_selected_computes_what_shrunk_computes(sorted_model):
    model, table, sizes, layers = sorted_model
    full = run(model, IDS)
    with select(table, sizes, layers):
        selected, shapes = run(model, IDS), shapes_of(model)
        assert {hparam: getattr(model.config, hparam) for hparam in sizes} == sizes
    assert difference(selected, full) > 1e-2
    shrink(table, sizes, layers)
    assert torch.equal(run(model, IDS), selected)
    assert shapes_of(model) == shapes


def test_the_full_model_comes_back_exactly(sorted_model):
    model, table, sizes, layers = sorted_model
    full, before = run(model, IDS), snapshot(model)
    with select(table, sizes, layers):
        run(model, IDS)
        differs = changes(before, snapshot(model))
    assert {"module layers", "config num_layers"} <= differs
    assert changes(before, snapshot(model)) == set()
    assert torch.equal(run(model, IDS), full)


def test_an_error_inside_gives_it_back_too(sorted_model):
    model, table, sizes, layers = sorted_model
    run(model, IDS)
    before = snapshot(model)
    with pytest.raises(KeyError), select(table, sizes, layers):
        raise KeyError
    assert changes(before, snapshot(model)) == set()


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {n: tuple(t.shape) for n, t in [*model.named_parameters(), *model.named_buffers()]}


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Every tensor, module, plain attribute and config field, and which objects they are."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        found[f"module {path.rpartition('.')[2]} {path}"] = module
        for name, value in vars(module).items():
            if name not in ("_modules", "_parameters", "_buffers"):
                found[f"attribute {name} {path}"] = copy_of(value)
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                attributes = sorted(vars(tensor).items(), key=lambda item: item[0])
                found[f"tensor {name} {path}"] = (
                    id(tensor), tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), attributes,
                )  # fmt: skip
        found[f"order {path}"] = [*module._parameters, *module._modules]
    for config in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values():
        for name, value in vars(config).items():
            found[f"config {name} {id(config)}"] = copy_of(value)
    return found


def copy_of(value: Any) -> Any:
    return list(value) if isinstance(value, list) else dict(value) if isinstance(value, dict) else value


def changes(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    """Kind and name of whatever is not the same object, or equal."""
    same: Callable[[Any, Any], bool] = lambda a, b: a is b or (not torch.is_tensor(a) and a == b)
    gone = before.keys() ^ after.keys()
    moved = {key for key in before.keys() & after.keys() if not same(before[key], after[key])}
    return {" ".join(key.split(" ")[:2]) for key in gone | moved}
