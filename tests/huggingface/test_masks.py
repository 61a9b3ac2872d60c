"""Gradients of masks against finite differences of weights; nothing of the model changes."""

from __future__ import annotations

import copy

import pytest
import torch
from hf_models import FAMILIES, LAYERS, loss, output, tiny, tokens

from mbridge_prune import runtime
from mbridge_prune.huggingface import Masks, squared_gradients, table_of

STEP = 1e-3


def slope(model, reader, columns, batch) -> float:
    """d loss / d s at s = 1, where s scales what the reader's `columns` multiply: a central difference."""
    weight = reader.weight
    across = weight if type(reader).__name__ != "Conv1D" else weight.t()
    kept = across[:, columns].clone()
    values = []
    with torch.no_grad():
        for s in (1 + STEP, 1 - STEP):
            across[:, columns] = kept * s
            values.append(float(loss(model(batch), batch)))
        across[:, columns] = kept
    return (values[0] - values[1]) / (2 * STEP)


@pytest.mark.parametrize(
    ("family", "heads", "ffn"),
    [
        ("bert", "bert.encoder.layer.{}.attention.output.dense", "bert.encoder.layer.{}.output.dense"),
        ("gptj", "transformer.h.{}.attn.out_proj", "transformer.h.{}.mlp.fc_out"),
        ("gpt2", "transformer.h.{}.attn.c_proj", "transformer.h.{}.mlp.c_proj"),
    ],
)
def test_scores_are_squared_slopes_of_every_unit_summed_over_batches(family, heads, ffn):
    model = tiny(family).double()
    batches = [tokens(2, 1), tokens(3, 2)]
    scores = squared_gradients(table_of(model), batches, loss).units
    for layer in range(LAYERS):
        for name, hparam, size in ((heads, "num_attention_heads", 6), (ffn, "ffn_hidden_size", 1)):
            reader = model.get_submodule(name.format(layer))
            found = scores[f"layers.{layer}.{hparam}"]
            units = range(len(found)) if size == 6 else (0, 7, len(found) - 1)
            for unit in units:
                columns = slice(unit * size, (unit + 1) * size)
                expected = sum(slope(model, reader, columns, batch) ** 2 for batch in batches)
                assert float(found[unit]) == pytest.approx(expected, rel=3e-3, abs=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_change_no_output_and_leave_nothing(family):
    model = tiny(family)
    model.train()
    model.get_submodule(next(n for n, m in model.named_modules() if isinstance(m, torch.nn.LayerNorm))).eval()
    modes = [m.training for m in model.modules()]
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    before = copy.deepcopy(model.state_dict())
    with Masks(table_of(model)):
        masked = output(model.eval())
    assert torch.equal(masked, output(model))
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode
    squared_gradients(table_of(model), [tokens()], loss)
    assert [m.training for m in model.modules()] == modes
    assert [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()] == hooks
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_frozen_model_is_scored_as_one_that_trains():
    model = tiny("bert")
    expected = squared_gradients(table_of(model), [tokens()], loss).units
    found = squared_gradients(table_of(model.requires_grad_(False)), [tokens()], loss).units
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_dropout_is_off():
    model = tiny("bert").train()
    first, second = (squared_gradients(table_of(model), [tokens()], loss).units for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_ranks_add_what_their_batches_say(monkeypatch):
    model = tiny("bert")
    table, batches = table_of(model), [tokens(2, seed) for seed in range(3)]
    whole = squared_gradients(table, batches, loss)
    parts: list = []
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "gather_objects", lambda thing, kind=None: parts.append(thing) or [thing])
        squared_gradients(table, batches[:1], loss)
        squared_gradients(table, batches[1:], loss)
        patch.setattr(runtime, "gather_objects", lambda thing, kind=None: parts[:2])
        found = squared_gradients(table, batches[:1], loss)
    assert found.meta["batches"] == whole.meta["batches"] == 3
    for key, scores in whole.units.items():
        torch.testing.assert_close(found.units[key], scores)
