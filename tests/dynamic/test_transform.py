"""Sort, select and shrink on a toy model; what they keep and what they refuse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from toy import FFN, GROUPS, HIDDEN, LAYERS, VOCAB, WIDTH, Toy, ToyLayer, table_of

from mbridge_prune.dynamic import DEPTH, Counter, select, shapes, shrink, sort
from mbridge_prune.errors import UserError

IDS = torch.arange(VOCAB)
ATTRIBUTES = {"allreduce": True, "tensor_model_parallel": False, "partition_dim": -1, "shared": "word"}
subnets = st.fixed_dictionaries(
    {
        "hidden_size": st.integers(1, HIDDEN),
        "ffn": st.integers(1, FFN),
        "groups": st.integers(1, GROUPS),
        "width": st.integers(1, WIDTH),
        "layers": st.sets(st.integers(0, LAYERS - 1), min_size=1).map(sorted),
    }
)


def split(subnet):
    sizes = dict(subnet)
    layers = sizes.pop("layers")
    return {**sizes, DEPTH: len(layers)}, layers


def random_orders(table, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        k: a.order_by(torch.rand(a.size, generator=generator)) for k, a in table.axes.items() if k != DEPTH
    }


def state(model):
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {n: (id(t), t.data_ptr(), tuple(t.shape), t.detach().clone()) for n, t in tensors}


def plain(model):
    return [
        (vars(model.config).copy(), model.head.in_features),
        [(id(m), m.layer_number, m.groups, m.heads, m.ffn) for m in model.layers],
    ]


def same(a, b):
    return a.keys() == b.keys() and all(a[n][:3] == b[n][:3] and torch.equal(a[n][3], b[n][3]) for n in a)


@pytest.mark.parametrize("tied", [True, False])
@given(seed=st.integers(0, 99))
@settings(max_examples=10)
def test_sort_keeps_the_function(tied, seed):
    model = Toy(tied)
    table, before, weights = table_of(model), model(IDS), state(model)
    sort(table, random_orders(table, seed))
    after = state(model)
    assert torch.allclose(model(IDS), before, rtol=1e-10, atol=1e-10)
    assert all(after[n][:3] == weights[n][:3] for n in weights), "sort is in place"


def test_sort_puts_the_important_units_first():
    model = Toy()
    table, up = table_of(model), model.layers[2].gate_up.detach().clone()
    scores = torch.arange(FFN).float()
    sort(table, {"layers.2.ffn": table.axes["layers.2.ffn"].order_by(scores)})
    assert torch.equal(model.layers[2].gate_up, torch.cat([up[:FFN].flip(0), up[FFN:].flip(0)]))


@pytest.mark.parametrize("tied", [True, False])
@given(subnet=subnets)
@settings(max_examples=40)
def test_select_equals_shrink_and_restores(tied, subnet):
    sizes, layers = split(subnet)
    model, other = Toy(tied), Toy(tied)
    table, other_table = table_of(model), table_of(other)
    weights, attributes, full = state(model), plain(model), model(IDS)
    planned = Counter(shapes(table), layers + [n for n in range(LAYERS) if n not in layers]).params(sizes)
    with select(table, sizes, layers) as candidate:
        assert candidate is model
        selected = model(IDS)
        shown = {n: p.detach().clone() for n, p in model.named_parameters()}
        numbers = [m.layer_number for m in model.layers]
        assert {n: id(p) for n, p in model.named_parameters()}.items() <= {
            n: weights[old][0] for n, old in renamed(shown, layers).items()
        }.items()
    assert same(state(model), weights) and plain(model) == attributes
    assert torch.equal(model(IDS), full)

    identities = {n: id(p) for n, p in other.named_parameters()}
    shrink(other_table, sizes, layers)
    assert torch.equal(other(IDS), selected)
    cut = dict(other.named_parameters())
    assert cut.keys() == shown.keys() and all(torch.equal(cut[n], shown[n]) for n in cut)
    assert all(id(cut[n]) == identities[old] for n, old in renamed(cut, layers).items())
    assert all(getattr(p, k) == v for p in cut.values() for k, v in ATTRIBUTES.items())
    assert all(p.is_contiguous() and p.untyped_storage().nbytes() == p.nbytes for p in cut.values())
    assert numbers == [m.layer_number for m in other.layers] == list(range(1, len(layers) + 1))
    assert sum(p.numel() for p in other.parameters()) == planned
    assert other.config.hidden_size == sizes["hidden_size"] == other.head.in_features
    assert other.config.num_layers == len(layers)
    assert {(m.ffn, m.groups, m.heads) for m in other.layers} == {
        (sizes["ffn"], sizes["groups"], sizes["groups"] * sizes["width"])
    }


def renamed(names, layers):
    """Name after the cut -> name before it."""
    out = {}
    for name in names:
        if name.startswith("layers."):
            _, place, rest = name.split(".", 2)
            out[name] = f"layers.{layers[int(place)]}.{rest}"
        else:
            out[name] = name
    return out


def test_shrink_keeps_the_leading_units():
    model, dense = Toy(tied=False), Toy(tied=False)
    shrink(table_of(model), {"hidden_size": 4, "ffn": 3, "groups": 2, "width": 2})
    new, old = model.layers[1], dense.layers[1]
    assert torch.equal(new.gate_up, old.gate_up[[0, 1, 2, FFN, FFN + 1, FFN + 2], :4])
    assert torch.equal(new.scale, old.scale[:3])
    block = WIDTH * 2 + 2
    rows = [g * block + i for g in range(2) for i in (0, 1, 2, 3, block - 2, block - 1)]
    assert torch.equal(new.fused, old.fused[rows, :4])
    assert torch.equal(new.temperature, old.temperature)


def test_select_restores_when_the_body_raises():
    model = Toy()
    table, before, attributes = table_of(model), state(model), plain(model)
    with pytest.raises(KeyError), select(table, {"hidden_size": 3, "ffn": 2, DEPTH: 2}, [1, 3]):
        assert model.config.hidden_size == 3 and len(model.layers) == 2
        raise KeyError("an evaluation that dies")
    assert same(state(model), before) and plain(model) == attributes


def test_selects_follow_one_another():
    """A candidate leaves nothing behind for the next one, and shrink after select is shrink alone."""
    model, fresh = Toy(), Toy()
    table, fresh_table = table_of(model), table_of(fresh)
    for layers in ([0, 1], [3], [1, 2, 3]):
        with select(table, {"ffn": 2, DEPTH: len(layers)}, layers):
            model(IDS)
    shrink(table, {"hidden_size": 4, DEPTH: 3}, [0, 2, 3])
    shrink(fresh_table, {"hidden_size": 4, DEPTH: 3}, [0, 2, 3])
    assert torch.equal(model(IDS), fresh(IDS))


def test_gradients_flow_after_shrink():
    model = Toy()
    shrink(table_of(model), {"hidden_size": 4, "ffn": 3})
    model(IDS).sum().backward()
    assert all(p.grad.shape == p.shape for p in model.parameters())


def test_an_unknown_parameter_is_named():
    model = Toy()
    model.layers[1].extra = nn.Parameter(torch.zeros(2))
    with pytest.raises(UserError, match=r"layers\.1\.extra"):
        table_of(model)


def test_an_unknown_buffer_is_named():
    model = Toy()
    model.layers[3].register_buffer("mask", torch.zeros(2))
    with pytest.raises(UserError, match=r"layers\.3\.mask"):
        table_of(model)


def test_an_unknown_module_is_named():
    class Adapter(nn.Linear):
        pass

    model = Toy()
    model.layers[2].adapter = nn.Sequential(Adapter(2, 2))
    with pytest.raises(UserError, match=r"unsupported layer layers\.2\.adapter\.0: Adapter has weight, bias"):
        table_of(model)


def test_a_subclass_does_not_slip_in():
    class Changed(ToyLayer):
        pass

    model = Toy()
    model.layers[0].__class__ = Changed
    with pytest.raises(UserError, match=r"unsupported layer layers\.0: Changed"):
        table_of(model)


def test_a_size_that_disagrees_with_the_weights_is_named():
    model = Toy()
    model.layers[0].ffn = FFN + 1
    with pytest.raises(UserError, match=r"layers\.0\.gate_up: dimension 0 is 16 long, its layout 18"):
        table_of(model)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [({"fnn": 2}, "unknown hparam 'fnn'.*did you mean 'ffn'"), ({"ffn": 9}, r"outside 1\.\.8"),
     ({"width": 0}, r"outside 1\.\.4"), ({"ffn": 2.5}, "not an integer")],
)  # fmt: skip
def test_sizes_are_checked(sizes, message):
    with pytest.raises(UserError, match=message):
        table_of(Toy()).check(sizes)
