"""Layers of every kind cut out of the middle: patterns of both configs, logits, layer numbers."""

from __future__ import annotations

import pytest
import torch
from depth import DEPTHS, weaken
from masks import masked_dense
from matrix import TOLERANCE, load, load_hf, write_source
from models import cut, difference, run, run_hf, tokens

import mbridge_prune as mbp

IDS = tokens(seed=15)


@pytest.fixture(scope="module", params=DEPTHS)
def pruned(request, tmp_path_factory):
    """(what is expected, unpruned HF model, pruned Megatron model with its bridge, plan, exported folder)."""
    depth, path = DEPTHS[request.param], tmp_path_factory.mktemp("depth")
    write_source(depth.family, path / "in", weaken(depth.weak), **depth.all_changes)
    loaded = load(path / "in", **depth.overrides)
    plan = cut(loaded.unwrapped_model, {"num_layers": len(depth.kept)})
    mbp.export_hf(loaded.bridge, loaded.model, path / "out", layers_kept=plan.layers_kept,
                  source=path / "in", trust_remote_code=True)  # fmt: skip
    return depth, load_hf(path / "in")[0], loaded, plan, path / "out"


def test_the_weak_layers_go_and_the_patterns_follow(pruned):
    depth, _, loaded, plan, out = pruned
    assert plan.layers_kept == depth.kept
    config, text = loaded.unwrapped_model.config, load_hf(out)[0].config.get_text_config()
    assert {name: getattr(config, name) for name in depth.megatron} == depth.megatron
    assert {name: getattr(text, name) for name in depth.hf} == depth.hf
    assert config.num_layers == text.num_hidden_layers == len(depth.kept)


def test_logits(pruned):
    _, dense, loaded, plan, out = pruned
    got, exported = run(loaded.unwrapped_model, IDS), load_hf(out)[0]
    assert difference(got, run_hf(exported, IDS)) <= TOLERANCE
    assert difference(got, run_hf(masked_dense(dense, plan), IDS)) <= TOLERANCE
    assert difference(got, run_hf(dense, IDS)) > 1e-4


def test_kinds_of_layers_stay_what_they_were(pruned):
    """Each layer of the pruned Megatron model is one of the unpruned model's, numbered anew."""
    depth, _, loaded, plan, _ = pruned
    layers = loaded.unwrapped_model.decoder.layers
    assert [layer.layer_number for layer in layers] == list(range(1, len(depth.kept) + 1))
    for place, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_number"):
                own = type(module).__name__ == "Gemma3SelfAttention"  # its number says what it is
                assert module.layer_number == (plan.layers_kept[place] if own else place) + 1


def test_megatron_imports_the_export(pruned):
    depth, _, loaded, _, out = pruned
    if not depth.rebuilds:
        with pytest.raises(mbp.UserError, match="layer_types differ"):
            load(out)
        return
    again = load(out).unwrapped_model
    assert difference(run(again, IDS), run(loaded.unwrapped_model, IDS)) <= TOLERANCE
    names = list(loaded.unwrapped_model.state_dict())
    assert names == list(again.state_dict())
    assert all(
        torch.equal(p, q)
        for p, q in zip(loaded.unwrapped_model.parameters(), again.parameters(), strict=True)
    )
