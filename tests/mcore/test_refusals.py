"""What cannot be cut is refused before anything is changed, with a message that names it."""

from __future__ import annotations

import pytest
import torch
from models import cut, load, run, tokens

import mbridge_prune as mbp


@pytest.fixture(scope="module")
def model(hf_folder):
    return load(hf_folder("llama")).unwrapped_model


def fail(model):
    raise AssertionError("nothing may be run for a request that cannot be met")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"ffn_hiden_size": 32}, "unknown hparam 'ffn_hiden_size'.*did you mean 'ffn_hidden_size'"),
        ({"num_layers": 5}, r"num_layers=5 is outside 1\.\.4"),
        ({"num_layers": 0}, r"num_layers=0 is outside 1\.\.4"),
        ({"hidden_size": 65}, r"hidden_size=65 is outside 1\.\.64"),
        ({"num_attention_heads": 3}, "num_attention_heads=3 is not a multiple of its 2 groups.*2, 4"),
        ({"hidden_size": 32.5}, "hidden_size=32.5 is not an integer"),
        ({"hidden_size": True}, "hidden_size=True is not an integer"),
        ({}, "at least one hparam"),
    ],
)
def test_sizes_that_do_not_fit(model, sizes, message):
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(mbp.UserError, match=message):
        cut(model, sizes, forward_loop=fail)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_divisors(model):
    space = mbp.mcore_minitron.get_mcore_minitron_config(hidden_size_divisor=16)
    mode = [("mcore_minitron", space)]
    with pytest.raises(
        mbp.UserError, match="hidden_size=40 is not a multiple of hidden_size_divisor=16.*32, 48"
    ):
        mbp.prune(model, mode, {"export_config": {"hidden_size": 40}}, config={"forward_loop": fail})
    with pytest.raises(mbp.UserError, match="did you mean 'hidden_size_divisor'"):
        mbp.mcore_minitron.get_mcore_minitron_config(hidden_sizes_divisor=16)
    with pytest.raises(mbp.UserError, match="not a positive integer"):
        mbp.mcore_minitron.get_mcore_minitron_config(hidden_size_divisor=0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"forward_lop": fail}, "did you mean 'forward_loop'"),
        ({"forward_loop": fail, "importance": "minitrn"}, "did you mean 'minitron'"),
        ({"forward_loop": fail, "repair": "nothing"}, "repair='nothing' is no(t a)? choice"),
        ({"forward_loop": 3}, "forward_loop is int, not callable"),
        ({}, "needs a forward_loop"),
    ],
)
def test_config_keys(model, config, message):
    with pytest.raises(mbp.UserError, match=message):
        mbp.prune(model, "mcore_minitron", {"export_config": {"hidden_size": 32}}, config=config)


def test_modes_and_constraints(model):
    target = {"export_config": {"hidden_size": 32}}
    with pytest.raises(mbp.UserError, match="did you mean 'mcore_minitron'"):
        mbp.prune(model, "mcore_minitrn", target)
    with pytest.raises(mbp.UserError, match="2 modes"):
        mbp.prune(model, ["mcore_minitron", "mcore_minitron"], target)
    with pytest.raises(mbp.UserError, match="did you mean 'export_config'"):
        mbp.prune(model, "mcore_minitron", {"export_confg": {"hidden_size": 32}})


class Novel(torch.nn.Linear):
    """A layer nobody has wrapped."""


def test_an_unsupported_layer_is_named(hf_folder):
    model = load(hf_folder("llama")).unwrapped_model
    model.decoder.layers[1].mlp = Novel(64, 64)
    with pytest.raises(
        mbp.UserError, match=r"unsupported layer decoder\.layers\.1\.mlp: Novel has weight, bias"
    ):
        cut(model, {"hidden_size": 32}, forward_loop=fail)


def test_a_tensor_nobody_knows_is_named(hf_folder):
    model = load(hf_folder("llama")).unwrapped_model
    model.decoder.layers[2].mlp.linear_fc1.register_parameter("secret", torch.nn.Parameter(torch.zeros(3)))
    with pytest.raises(mbp.UserError, match=r"decoder\.layers\.2\.mlp\.linear_fc1\.secret"):
        cut(model, {"hidden_size": 32}, forward_loop=fail)


def test_wrapped_models_are_refused(hf_folder):
    loaded = load(hf_folder("llama"))
    with pytest.raises(mbp.UserError, match="unwrapped"):
        cut(loaded.model, {"hidden_size": 32}, forward_loop=fail)
    next(loaded.unwrapped_model.parameters()).main_grad = torch.zeros(1)
    with pytest.raises(mbp.UserError, match="DDP"):
        cut(loaded.unwrapped_model, {"hidden_size": 32}, forward_loop=fail)


def test_parallel_layouts_that_cannot_be_cut(hf_folder):
    model = load(hf_folder("llama")).unwrapped_model
    model.config.tensor_model_parallel_size = 2
    with pytest.raises(mbp.UserError, match="tensor_model_parallel_size=2"):
        cut(model, {"hidden_size": 32}, forward_loop=fail)


def test_the_full_size_is_no_cut(hf_folder):
    model, ids = load(hf_folder("llama")).unwrapped_model, tokens()
    before = run(model, ids)
    plan = cut(model, {"hidden_size": 64, "num_layers": 4})
    assert plan.params_after == plan.params_before and plan.layers_kept == [0, 1, 2, 3]
    assert torch.allclose(run(model, ids), before, rtol=1e-5, atol=1e-5)
