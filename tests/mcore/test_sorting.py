"""Any order of any axis leaves what every family computes, with grouped and with separate experts."""

from __future__ import annotations

import pytest
import torch
from matrix import FAMILIES, TOLERANCE, cuts, load, run_through
from models import difference, run, tokens

from mbridge_prune.dynamic import DEPTH, sort
from mbridge_prune.mcore_minitron import table_of

LAYOUTS = [
    (f, grouped) for f in FAMILIES for grouped in (True, False) if grouped or "all_separate" in cuts(f)
]


def random_orders(table, seed=3):
    """A random order of every axis: group-limited routing, query and SSM groups keep to themselves."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: axis.order_by(torch.rand(axis.size, generator=generator))
        for key, axis in table.axes.items()
        if key != DEPTH
    }


def ahead(model: torch.nn.Module) -> list[torch.Tensor]:
    """Logits of multi-token-prediction layers, where there are some."""
    seen: list[torch.Tensor] = []
    layers = model.mtp.layers if getattr(model, "mtp", None) is not None else ()
    hooks = [la.final_layernorm.register_forward_hook(lambda m, args, out: seen.append(out)) for la in layers]
    run_through(model)
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        return [model.output_layer(hidden_sbh)[0] for hidden_sbh in seen]


@pytest.mark.parametrize(
    ("family", "grouped"), LAYOUTS, ids=[f"{f}-{'grouped' if g else 'separate'}" for f, g in LAYOUTS]
)
def test_sorting_leaves_the_logits(family, grouped, hf_folder):
    model, ids = load(hf_folder(family), grouped).unwrapped_model, tokens(seed=4)
    before, ahead_before = run(model, ids), ahead(model)
    table = table_of(model)
    weights = {entry.name: entry.tensor().clone() for entry in table.entries}
    sort(table, random_orders(table))
    assert difference(run(model, ids), before) <= TOLERANCE
    assert len(ahead_before) == (family == "glm4_moe_mtp")
    for now, then in zip(ahead(model), ahead_before, strict=True):
        assert difference(now, then) <= TOLERANCE
    moved = {entry.name for entry in table.entries if not torch.equal(entry.tensor(), weights[entry.name])}
    followers = {e.name for e in table.entries if e.unit or any(True for d in e.dims for _ in d.axes())}
    counters = {n for n in followers if "tokens_per_expert" in n}  # all zero
    assert moved == followers - counters


@pytest.mark.parametrize("family", ["deepseek_v3", "nemotron_h_moe", "qwen3_next"])
def test_orders_one_after_another_are_one_order(family, hf_folder):
    """Sorting back gives every tensor back, bit for bit."""
    model = load(hf_folder(family)).unwrapped_model
    table = table_of(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if torch.is_tensor(tensor)}
    orders = random_orders(table)
    sort(table, orders)
    # Units of groups that moved themselves: what now stands in place g came from orders[g].
    back = {}
    for key, order in orders.items():
        axis = table.axes[key]
        groups = torch.arange(axis.groups) if axis.within is None else orders[axis.within.key].reshape(-1)
        if axis.within is not None and axis.within.groups > 1:
            width = axis.within.width
            groups = groups + torch.arange(axis.within.groups).repeat_interleave(width) * width
        back[key] = torch.argsort(order[groups], dim=1)
    sort(table, back)
    after = model.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
