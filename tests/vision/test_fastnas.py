"""The mode as a whole, on a network small enough to score a hundred times."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn import functional as F
from zoo import Net, Residual, conv

import mbridge_prune as mbp
from mbridge_prune import runtime
from mbridge_prune.errors import UserError
from mbridge_prune.heterogeneous import Forward
from mbridge_prune.vision import fastnas
from mbridge_prune.vision.recalibration import Recalibration, first_of
from mbridge_prune.vision.table import table_of

RANDOM = torch.Generator().manual_seed(0)
IMAGES = torch.randn(64, 3, 8, 8, generator=RANDOM)
LABELS = (IMAGES[:, :, :4].mean((1, 2, 3)) > IMAGES[:, :, 4:].mean((1, 2, 3))).long()
LOADER = [(IMAGES[n : n + 16], LABELS[n : n + 16]) for n in (0, 16, 32, 48)]
DUMMY = torch.zeros(1, 3, 8, 8)


def network():
    torch.manual_seed(2)
    return nn.Sequential(
        conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), Residual(8, 8), Residual(8, 16, 2), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(16, 2),
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained():
    """A network that has learned which half of an image is brighter."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(25):
        for images, labels in LOADER:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return model.eval()


def score(model):
    return -float(F.cross_entropy(model(IMAGES), LABELS).detach())


def prune(model, constraints=None, **config):
    config = {"score_func": score, "data_loader": LOADER, **config}
    space = mbp.fastnas.get_fastnas_config(channel_divisor=2)
    return mbp.prune(model, [("fastnas", space)], constraints or {"flops": "50%"}, DUMMY, config)


def test_a_network_is_pruned_within_its_budget(trained, tmp_path):
    model = copy.deepcopy(trained)
    pruned, plan = prune(model)
    assert pruned is model and plan.mode == "fastnas"
    assert plan.costs["flops"]["after"] <= 0.5 * plan.costs["flops"]["before"]
    assert plan.search["score_before"] == pytest.approx(score_of(trained), abs=1e-6)
    assert plan.search["score_after"] == pytest.approx(score(model), abs=1e-6)
    assert len(set(plan.sizes_after.values())) > 1
    json.dumps(plan.to_dict())
    again = mbp.restore(network(), mbp.save(model, tmp_path / "pruned.safetensors"))
    assert torch.equal(again.eval()(IMAGES), model(IMAGES))


def score_of(model):
    """Recalibrated by PyTorch's own cumulative average."""
    model = copy.deepcopy(model)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
    with torch.no_grad():
        for images, _ in LOADER:
            model(images)
        return score(model.eval())


@pytest.mark.parametrize(
    "constraints", [{"params": "40%"}, {"flops": "60%", "params": 1800}, {"flops": "20%"}]
)
def test_every_budget_is_kept(trained, constraints):
    model, plan = prune(copy.deepcopy(trained), constraints)
    for name, value in constraints.items():
        full = plan.costs[name]["before"]
        limit = float(value.rstrip("%")) / 100 * full if isinstance(value, str) else value
        assert plan.costs[name]["after"] <= limit
    assert plan.params_after == sum(p.numel() for p in model.parameters())


def test_a_budget_of_measured_time_is_kept(trained):
    _, plan = prune(copy.deepcopy(trained), {"latency_ms": 10_000.0, "flops": "50%"})
    assert 0 < plan.search["costs"]["latency_ms"] < 10_000


def test_the_better_part_of_the_units_is_kept(trained):
    _, plan = prune(copy.deepcopy(trained))
    reads = trained[3].conv2.weight.detach().square().sum((0, 2, 3)).sqrt()
    kept = plan.kept["3.conv1.out_channels"][0]
    assert kept == torch.argsort(reads, descending=True, stable=True)[: len(kept)].tolist()


def test_the_map_is_taken_up_again_with_the_same_result(trained, tmp_path):
    calls = []

    def counted(model):
        calls.append(1)
        return score(model)

    path = tmp_path / "map.jsonl"
    _, first = prune(copy.deepcopy(trained), score_func=counted, checkpoint=path)
    measured = len(calls)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-3]))
    calls.clear()
    _, second = prune(copy.deepcopy(trained), score_func=counted, checkpoint=path)
    assert len(calls) == 3 + 1 < measured  # the three that were lost, and the pruned model
    assert second.sizes_after == first.sizes_after and second.kept == first.kept


def test_recalibration_touches_nothing_but_the_norms_inside_it(trained):
    model = copy.deepcopy(trained)
    model[0].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    again = Recalibration(LOADER, first_of, 2)
    with again.around(model):
        assert not torch.equal(model[1].running_mean, before["1.running_mean"])
        inputs = F.conv2d(torch.cat([x for x, _ in LOADER[:2]]), model[0].weight, model[0].bias, padding=1)
        assert torch.allclose(model[1].running_mean, inputs.mean((0, 2, 3)), atol=1e-6)
        assert model[1].momentum == 0.1 and not model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


class ActiveNorm(nn.BatchNorm2d):
    """timm's: a norm with its activation, in a forward of its own."""

    def forward(self, x):
        return super().forward(x).relu() - 3


def test_a_norm_with_a_forward_of_its_own_keeps_it_while_it_is_recalibrated():
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 8), ActiveNorm(8), conv(8, 4), nn.BatchNorm2d(4)).eval()
    expected = copy.deepcopy(model)
    for norm in (expected[1], expected[3]):
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        for images, _ in LOADER[:2]:
            expected(images)
    Recalibration(LOADER, first_of, 2)(model)
    torch.testing.assert_close(model[3].running_mean, expected[3].running_mean)
    torch.testing.assert_close(model[3].running_var, expected[3].running_var)


def test_synchronised_norms_do_not_wait_for_other_ranks():
    runtime.start_distributed()
    model = nn.Sequential(conv(3, 8), nn.SyncBatchNorm(8)).eval()
    before = set(vars(model[1]))
    Recalibration(LOADER, first_of, 1)(model)  # on a CPU, a synchronised forward would be refused
    expected = model[0](LOADER[0][0]).mean((0, 2, 3))
    assert torch.allclose(model[1].running_mean, expected, atol=1e-6) and set(vars(model[1])) == before


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"score_func": None}, "config needs a score_func"),
        ({"score_func": "accuracy"}, "score_func is str, not callable"),
        ({"data_loader": None}, "config needs a data_loader"),
        ({"data_loader": iter(LOADER)}, "can be read only once"),
        ({"data_loader": []}, "data_loader has no batches"),
        ({"collect_func": lambda batch: batch[1]}, "does not run on what collect_func makes"),
        ({"max_iter_data_loader": 0}, "must be an integer of at least 1"),
        ({"score_fun": score}, r"unknown config key 'score_fun' \(did you mean 'score_func'\?\)"),
        ({"verbose": "yes"}, "is not True or False"),
        ({"score_func": lambda model: 1 / 0}, "failed: ZeroDivisionError"),
    ],
)
def test_wrong_settings_are_refused(trained, config, message):
    model = copy.deepcopy(trained)
    with pytest.raises(UserError, match=message):
        prune(model, **config)
    assert torch.allclose(model(IMAGES), trained(IMAGES), atol=1e-5)


def test_sizes_are_multiples_of_the_divisor_in_channels():
    # Three groups of sixteen: a unit stands for three channels, and only eight of them for a multiple of 8.
    grouped = nn.Sequential(conv(3, 48), conv(48, 48, groups=3), conv(48, 4))
    traced = table_of(grouped.eval(), Forward.of(DUMMY))
    assert traced.step(8, 2) == {"0.out_channels": 8, "1.out_channels": 8}
    assert traced.step(6, 2) == {"0.out_channels": 2, "1.out_channels": 2}

    def two_axes(self, x):
        return self.d(self.c(x) + torch.cat([self.a(x), self.b(x)], 1))

    a, b, c = (nn.Linear(6, n) for n in (16, 8, 24))
    joined = Net(two_axes, c=c, a=a, b=b, d=nn.Linear(24, 3))
    steps = table_of(joined.eval(), Forward.of(torch.randn(2, 6))).step(8, 2)
    assert traced.channels_per_unit() == {"0.out_channels": 3, "1.out_channels": 3}
    assert steps == {"c.out_features": 2, "c.out_features.2": 2}


class Shuffled(nn.Module):
    """Its pixel shuffle needs fours of channels: half of them run, most other sizes do not."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = conv(3, 48), conv(48, 48, groups=3), conv(48, 4)

    def forward(self, x):
        return self.c(F.pixel_unshuffle(F.pixel_shuffle(self.b(self.a(x)), 2).relu(), 2))


def test_a_size_that_the_network_does_not_run_with_is_left_out():
    space = mbp.fastnas.get_fastnas_config(channel_divisor=6, sizes_per_axis=20)
    model = Shuffled()
    traced, run = fastnas.profile(model, {"flops": "60%"}, space, DUMMY)
    # Two units of three channels are six: not every multiple of six is one of four.
    assert run.choices == {"a.out_channels": list(range(2, 17, 2)), "b.out_channels": [4, 8, 12, 16]}
    assert "does not run at 2, 6, 10, 14 units: RuntimeError: pixel_shuffle" in traced.alone["b.out_channels"]
    config = {"score_func": lambda model: -float(model(IMAGES).square().mean()), "verbose": False}
    _, plan = mbp.prune(model, [("fastnas", space)], {"flops": "60%"}, DUMMY, config)
    assert plan.costs["flops"]["after"] <= 0.6 * plan.costs["flops"]["before"]


def test_a_map_of_other_data_is_set_aside(trained, tmp_path):
    path = tmp_path / "map.jsonl"
    _, first = prune(copy.deepcopy(trained), checkpoint=path)
    other = [(100 * images + 50, labels) for images, labels in LOADER]
    _, second = prune(copy.deepcopy(trained), checkpoint=path, data_loader=other)
    assert (tmp_path / "map.1.jsonl").exists() and first.search["drops"] != second.search["drops"]
    # The same images in an order drawn anew are the same data.
    dataset = torch.utils.data.TensorDataset(IMAGES, LABELS)
    for _ in range(2):
        loader = torch.utils.data.DataLoader(dataset, 16, shuffle=True)
        prune(copy.deepcopy(trained), checkpoint=tmp_path / "shuffled.jsonl", data_loader=loader)
    assert not (tmp_path / "shuffled.1.jsonl").exists()


def test_wrong_search_spaces_and_wrapped_models_are_refused(trained):
    config = {"score_func": score, "data_loader": LOADER}
    for space, message in (
        ({"channel_divisors": 4}, "did you mean 'channel_divisor'"),
        ({"max_pruning": 1}, "is no share"),
        ({"axes_to_skip": "0.*"}, "give a list"),
        ({"axes_to_skip": ["9.*"]}, "no axis '9"),
    ):
        with pytest.raises(UserError, match=message):
            mbp.prune(trained, [("fastnas", space)], {"flops": "50%"}, DUMMY, config)
    with pytest.raises(UserError, match="dummy_input is needed"):
        mbp.prune(trained, "fastnas", {"flops": "50%"}, None, config)
    compiled = copy.copy(trained)  # torch.compile itself is switched off beside Megatron
    vars(compiled)["_modules"] = {"_orig_mod": trained}
    compiled.__class__ = OptimizedModule
    with pytest.raises(UserError, match="prune first, then compile"):
        mbp.prune(compiled, "fastnas", {"flops": "50%"}, DUMMY, config)
    with pytest.raises(UserError, match="not DataParallel"):
        mbp.prune(nn.DataParallel(trained), "fastnas", {"flops": "50%"}, DUMMY, config)
