"""Greedy depth against every removal tried anew in transformers, and with and without its shortcut."""

from __future__ import annotations

import pytest
import torch
from matrix import load
from models import cut, load_hf, loop_over, tokens
from torch import nn

import mbridge_prune as mbp
from mbridge_prune.importance import greedy

TEXT = tokens(6, seed=41)
LOOP = mbp.CalibrationLoop(TEXT, 2)


def scored(path, checkpoint, layers, **config):
    """(plan, depth scores) of a cut to so many layers."""
    settings = {"forward_loop": LOOP, "checkpoint": checkpoint, "depth": "greedy", **config}
    plan = cut(load(path, grouped=False).unwrapped_model, {"num_layers": layers}, **settings)
    return plan, torch.tensor(plan.layer_scores)


def by_hand(path, removals: int, depth: str) -> tuple[list[int], list[float]]:
    """Layers in the order they go, and the measure then, over all positions; transformers alone."""
    hf = load_hf(path)
    layers = list(hf.model.layers)
    with torch.no_grad():
        full = hf(TEXT, use_cache=False).logits.double()
        p = full.log_softmax(-1)

        def measure(numbers: list[int]) -> float:
            hf.model.layers = nn.ModuleList(layers[n] for n in numbers)
            hf.config.num_hidden_layers = len(numbers)
            logits = hf(TEXT, use_cache=False).logits.double()
            if depth == "greedy_logits":
                spread = full - full.mean(-1, keepdim=True)
                apart = logits - logits.mean(-1, keepdim=True) - spread
                return float((apart.norm(dim=-1) / spread.norm(dim=-1)).square().mean())
            q = logits.log_softmax(-1)
            return float((p.exp() * (p - q)).sum(-1).mean())

        stay, gone, found = list(range(len(layers))), [], []
        for _ in range(removals):
            trials = {n: measure([m for m in stay if m != n]) for n in stay}
            gone.append(min(trials, key=trials.__getitem__))
            found.append(trials[gone[-1]])
            stay.remove(gone[-1])
    return gone, found


@pytest.mark.parametrize("depth", ["greedy", "greedy_logits"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_layers_go_as_every_removal_tried_by_hand_says(hf_folder, tmp_path, family, depth):
    plan, scores = scored(hf_folder(family), tmp_path / "scores.safetensors", 2, depth=depth)
    gone, found = by_hand(hf_folder(family), 2, depth)
    assert sorted(set(range(4)) - set(plan.layers_kept)) == sorted(gone)
    assert scores.argsort()[:2].tolist() == gone
    torch.testing.assert_close(scores[gone], torch.tensor(found), rtol=2e-3, atol=1e-6)
    assert scores[plan.layers_kept].min() > scores[gone].max()


@pytest.mark.parametrize("family", ["llama", "gemma2", "deepseek_v3", "qwen3_next", "nemotron_h_moe"])
def test_beginning_at_the_layer_that_goes_changes_nothing(hf_folder, tmp_path, monkeypatch, family):
    _, quick = scored(hf_folder(family), tmp_path / "quick.safetensors", 2)
    monkeypatch.setattr(greedy, "_states", lambda *args, **more: {})
    _, whole = scored(hf_folder(family), tmp_path / "whole.safetensors", 2)
    assert torch.equal(quick, whole)


def test_few_tokens_are_warned_of(hf_folder, tmp_path, caplog):
    scored(hf_folder("llama"), tmp_path / "scores.safetensors", 3)
    assert "fewer than the 32,768" in caplog.text


def test_a_scores_file_serves_the_cuts_it_was_made_for(hf_folder, tmp_path):
    path, file = hf_folder("llama"), tmp_path / "scores.safetensors"
    plan, _ = scored(path, file, 2)
    again, _ = scored(path, file, 3, forward_loop=None)
    assert set(plan.layers_kept) < set(again.layers_kept)
    with pytest.raises(mbp.UserError, match="ranks 2 layers for removal, and 3 may go"):
        scored(path, file, 1)
    for depth in ("cosine", "greedy_logits"):
        with pytest.raises(mbp.UserError, match=f"ranks layers by greedy, and depth='{depth}' was asked for"):
            scored(path, file, 3, depth=depth)
    width = {"forward_loop": None, "checkpoint": file}
    assert cut(load(path, grouped=False).unwrapped_model, {"ffn_hidden_size": 64}, **width).params_after > 0


def test_a_loop_that_hides_its_tokens_is_refused(hf_folder, tmp_path):
    with pytest.raises(mbp.UserError, match="depth='greedy' needs the tokens"):
        scored(hf_folder("llama"), tmp_path / "scores.safetensors", 3, forward_loop=loop_over(TEXT))
