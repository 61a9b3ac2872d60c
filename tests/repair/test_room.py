"""Sums in host memory: the same fits, and nothing but what is being fitted on the device."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from models import cut, load, loop_over, tokens

from mbridge_prune import runtime
from mbridge_prune.repair import Room
from mbridge_prune.repair.missing import Sums

SIZES = {"ffn_hidden_size": 64, "hidden_size": 48, "num_layers": 3}


def test_items_that_fit_go_together_and_a_large_one_alone():
    room = Room(gb=10 / 2**30)
    assert list(room.fitting([4, 5, 2, 30, 1, 9], lambda item: item)) == [[4, 5], [2], [30], [1, 9]]


def test_the_setting_moves_every_sum_and_changes_no_weight(hf_folder, monkeypatch):
    states, homes = [], []
    kept = Room.kept
    monkeypatch.setattr(
        Room, "kept", lambda self, product: homes[-1].append(self.offload) or kept(self, product)
    )
    for offload in (False, True):
        homes.append([])
        model = load(hf_folder("llama")).unwrapped_model
        loop = loop_over(*tokens(200, seed=5).split(4))
        cut(model, SIZES, forward_loop=loop, repair="least_squares", repair_offload=offload)
        states.append({n: t for n, t in model.state_dict().items() if isinstance(t, torch.Tensor)})
    assert set(homes[0]) == {False} and set(homes[1]) == {True} and len(homes[0]) == len(homes[1])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_where_sums_are(monkeypatch):
    monkeypatch.setattr(runtime, "device", lambda: torch.device("meta"))
    assert Room(offload=True).device.type == "cpu" and Room().device.type == "meta"
    product = torch.eye(3, device="meta")
    assert Room().kept(product).device.type == "meta"
    assert Sums(3, 2, Room()).cross[True].device.type == "meta"
    assert Sums(3, 2, Room(offload=True)).moment[False].device.type == "cpu"


@pytest.mark.gpu
@pytest.mark.parametrize("offload", [False, True])
def test_fits_of_a_device(offload):
    generator = torch.Generator().manual_seed(0)
    x, z, state = (torch.randn(400, 5, n, generator=generator) for n in (12, 6, 6))
    weight = torch.randn(6, 12, generator=generator)
    consumer = SimpleNamespace(label="fc2", tree=SimpleNamespace(full=lambda: 12))
    results = []
    for where, room in (("cpu", Room(offload=True)), (runtime.device(), Room(offload=offload))):
        sums = Sums(12, 6, room)
        sums.add(*(t.to(where) for t in (x, z, state)), [False, False, True, False, False])
        assert sums.moment[False].device.type == ("cpu" if room.offload else torch.device(where).type)
        record, new = sums.fitted(consumer, weight.to(where), "test")
        assert new is not None and new.device.type == torch.device(where).type
        results.append((new.cpu(), record["repaired_error"]))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-5)
    assert abs(results[0][1] - results[1][1]) < 1e-5
