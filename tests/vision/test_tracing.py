"""What cannot be traced, or has no rule, is left alone and named; what cannot be done at all is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from zoo import IMAGE, Net, Output, Zigzag, built, conv

from mbridge_prune.dynamic import shrink, sort
from mbridge_prune.errors import UserError
from mbridge_prune.heterogeneous import Forward
from mbridge_prune.vision.flow import Flow
from mbridge_prune.vision.layers import DynamicLinear
from mbridge_prune.vision.table import table_of

X = torch.randn(IMAGE, generator=torch.Generator().manual_seed(0))


def found(model, x=X):
    return table_of(model.eval(), Forward.of(x))


def test_an_untraceable_part_is_named_with_its_operation_and_keeps_its_tensors():
    model, x = built("opaque_between")
    traced = table_of(model, Forward.of(x))
    (why,) = traced.alone.values()
    assert list(traced.alone) == ["2"] and "cannot be traced" in why
    assert "`if x.sum() > 0:`" in why and "zoo.py:" in why
    before = copy.deepcopy(model[2].state_dict())
    sort(traced.table, {key: torch.randperm(axis.size)[None] for key, axis in traced.table.axes.items()})
    shrink(traced.table, dict.fromkeys(traced.table.axes, 2))
    assert all(torch.equal(before[name], tensor) for name, tensor in model[2].state_dict().items())
    assert model[1].out_channels == 6 and model(x).shape == (2, 4, 8, 8)


def test_an_untraceable_forward_of_the_model_itself_is_refused_with_the_operation():
    with pytest.raises(UserError, match=r"Zigzag.forward cannot be traced: `if x.sum\(\) > 0:` .*zoo.py:\d+"):
        found(Zigzag(3))


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (nn.MultiheadAttention(8, 2, batch_first=True), "MultiheadAttention"),
        (nn.LSTM(8, 8, batch_first=True), "LSTM"),
        (nn.Bilinear(8, 8, 8), "Bilinear"),
    ],
)
def test_layers_without_a_rule_are_named_and_the_rest_is_pruned(module, name):
    def forward(self, x):
        hidden = self.stem(x).relu()
        y = self.part(hidden, hidden) if name == "Bilinear" else self.attend(hidden)
        return self.head(self.mlp(y) if name == "Bilinear" else self.mlp(y[0]))

    def attend(self, x):
        return self.part(x, x, x) if name == "MultiheadAttention" else self.part(x)

    model = Net(forward, stem=nn.Linear(6, 8), part=module, mlp=nn.Linear(8, 12), head=nn.Linear(12, 3))
    model.attend = attend.__get__(model)
    traced = found(model, torch.randn(2, 5, 6))
    assert list(traced.table.axes) == ["mlp.out_features"]
    assert traced.alone == {"part": f"no rule for {name}"}


@pytest.mark.parametrize(
    ("operation", "said"),
    [
        (lambda x: x[:, :8], "it picks channels by number"),
        (lambda x: torch.cat(x.split(4, dim=1), 1), "it splits channels at a number"),
        (lambda x: x.view(2, 8, 64).view(2, 8, 8, 8), "it has the length 8 as a number"),
        (lambda x: x.softmax(1), "it mixes channels"),
        (lambda x: x / x.norm(dim=1, keepdim=True), "it mixes channels"),
        (lambda x: torch.einsum("nchw,nchw->nchw", x, x), "no rule for it"),
        (
            lambda x: x + torch.ones(8, 1, 1),
            "it meets a tensor of a fixed length, or one too large to follow",
        ),
        (lambda x: x / x.std(False), "it mixes channels"),
        (lambda x: x.roll(1, 1), "it splits channels at a number"),
    ],
)
def test_an_operation_that_fixes_the_channels_keeps_them_and_is_named(operation, said):
    model = Net(lambda s, x: s.c(operation(s.b(s.a(x)))), a=conv(3, 6), b=conv(6, 8), c=conv(8, 4))
    traced = found(model)
    assert list(traced.table.axes) == ["a.out_channels"]
    assert said in traced.alone.values()


@pytest.mark.parametrize(
    "norm", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm]
)
def test_a_weight_that_is_made_in_the_forward_is_left_alone(norm):
    traced = found(nn.Sequential(conv(3, 8), norm(conv(8, 8)), conv(8, 6), conv(6, 4)))
    assert list(traced.table.axes) == ["2.out_channels"]
    assert traced.alone == {"1": "no rule for ParametrizedConv2d"}


def test_the_output_inside_an_object_is_kept():
    model = Net(lambda s, x: Output(logits=s.b(s.a(x).mean((2, 3)))), a=conv(3, 8), b=nn.Linear(8, 10))
    traced = found(model)
    assert list(traced.table.axes) == ["a.out_channels"]
    assert any("Output" in why for why in traced.alone.values())


def test_what_only_fails_when_it_runs_is_found_by_running():
    class Picky(nn.Module):
        def forward(self, x):
            return x.to(torch.float64).to(x.dtype).unsafe_chunk(2, 1)[0].repeat(1, 2, 1, 1) + 0 * x

    class Sized(nn.Conv2d):
        """Its own forward, so it is traced into; the weight is used as it is."""

        def forward(self, x):
            return nn.functional.conv2d(x, self.weight, self.bias)

    model = nn.Sequential(conv(3, 8), Picky(), conv(8, 8), Sized(8, 8, 1), conv(8, 8), conv(8, 4))
    traced = found(model)
    assert "4.out_channels" in traced.table.axes and "2.out_channels" not in traced.table.axes
    assert any("conv2d" in place for place in traced.alone)


class Auxiliary(nn.Module):
    """A second head, for training alone."""

    def __init__(self):
        super().__init__()
        self.a, self.aux, self.b = conv(3, 8), nn.Sequential(conv(8, 4)), conv(8, 4)

    def forward(self, x):
        x = self.a(x)
        return (self.b(x), self.aux(x)) if self.training else self.b(x)


def test_a_part_that_only_training_runs_is_named():
    assert found(Auxiliary()).alone == {"aux.0": "this forward never runs it: only what it reads is cut"}
    assert found(nn.Sequential(conv(3, 8), nn.MultiheadAttention(8, 2), conv(8, 4))[::2]).alone == {}


class ByKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = conv(3, 8), conv(8, 4)

    def forward(self, *, x, y=None, scale=2):
        return self.b(self.a(x) * scale + (0 if y is None else self.a(y)))


class Listed(ByKeyword):
    def forward(self, *images):
        return self.b(self.a(images[0]) + self.a(images[1]))


@pytest.mark.parametrize(
    ("model", "dummy"), [(ByKeyword(), {"x": X}), (ByKeyword(), {"y": X, "x": X}), (Listed(), (X, X))]
)
def test_arguments_reach_the_graph_however_they_are_given(model, dummy):
    assert list(found(model, dummy).table.axes) == ["a.out_channels"]


def test_a_use_that_a_rule_does_not_know_is_kept_and_named(monkeypatch):
    def broken(self, n, value, moves):
        raise KeyError("an argument")

    monkeypatch.setattr(Flow, "_elementwise", broken)
    traced = found(nn.Sequential(conv(3, 6), conv(6, 8), nn.ReLU(), conv(8, 4)))
    assert list(traced.table.axes) == ["0.out_channels"]
    assert traced.alone == {"2": "its rule does not fit: 'an argument'"}


def test_a_layer_whose_rule_fails_half_way_keeps_its_tensors(monkeypatch):
    plain = DynamicLinear.flow

    def broken(self, ids, shape):
        plain(self, ids, shape)
        raise ValueError("no such use")

    monkeypatch.setattr(DynamicLinear, "flow", broken)
    traced = found(
        nn.Sequential(conv(3, 6), conv(6, 8), nn.Flatten(), nn.Linear(512, 10), nn.ReLU(), nn.Linear(10, 4))
    )
    assert list(traced.table.axes) == ["0.out_channels"]
    assert traced.alone["3"] == "its rule does not fit: no such use"


@pytest.mark.parametrize(
    ("model", "dummy", "message"),
    [
        (
            nn.Sequential(nn.Linear(3, 4)),
            torch.ones(1, 3),
            "nothing in Sequential can be pruned: it has no hidden channels",
        ),
        (nn.Sequential(conv(3, 4), conv(4, 2)), torch.ones(1, 5, 8, 8), "does not run with dummy_input"),
        (nn.Sequential(conv(3, 4), conv(4, 2)), (X, X), "dummy_input does not fit Sequential.forward"),
    ],
)
def test_what_cannot_be_done_is_refused(model, dummy, message):
    with pytest.raises(UserError, match=message):
        found(model, dummy)


def test_the_network_is_left_as_it_was():
    model, x = built("residual")
    model.train()
    before, said = copy.deepcopy(model.state_dict()), str(model)
    table_of(model, Forward.of(x))
    assert model.training and model[1].bn1.training and str(model) == said
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
