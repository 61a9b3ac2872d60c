"""Losses of Megatron models against transformers, position by position."""

from __future__ import annotations

import math

import pytest
import torch
from models import LENGTH, difference, load, load_hf, run_hf, tokens
from questions import tokenizer

from mbridge_prune.errors import UserError
from mbridge_prune.evaluate import loss as loss_module
from mbridge_prune.evaluate.loss import loss, token_losses, windows

FAMILIES = ["llama_tied", "gemma2", "qwen3_moe_mixed", "deepseek_v2", "glm4_moe_mtp", "qwen2_5_vl"]


def losses_of(hf, ids_ns):
    logits = run_hf(hf, ids_ns)[:, :-1].double()
    return -logits.log_softmax(-1).gather(-1, ids_ns[:, 1:, None])[..., 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_token_losses_are_those_of_transformers(family, hf_folder):
    folder, ids_ns = hf_folder(family), tokens(5)
    found = token_losses(load(folder).unwrapped_model, ids_ns, batch=2)
    assert found.shape == (5, LENGTH - 1) and found.dtype == torch.float32
    assert difference(losses_of(load_hf(folder), ids_ns), found.double()) < 1e-5


def test_chunks_and_batches_change_nothing(megatron, text_ns, monkeypatch):
    whole = token_losses(megatron(), text_ns)
    monkeypatch.setattr(loss_module, "CHUNK", 7)
    assert torch.equal(token_losses(megatron(), text_ns), whole)
    assert torch.allclose(token_losses(megatron(), text_ns, batch=3), whole, rtol=0, atol=1e-5)


def test_a_transformers_model_goes_the_same_way(plain, megatron, text_ns):
    one, two = token_losses(plain(), text_ns, batch=2), token_losses(megatron(), text_ns, batch=2)
    assert difference(one, two) < 1e-5
    result = loss(plain(), text_ns)
    assert result.loss == pytest.approx(float(losses_of(plain(), text_ns).mean()), rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    assert result.predictions == 5 * 19 and result.tokens_per_second > 0


def test_windows_are_full_and_may_begin_with_bos():
    text = "abcdefghij" * 3
    plain = windows(text, tokenizer(), 8)
    assert plain.shape == (3, 8)
    begun = windows(text, tokenizer(), 8, limit=2, add_bos=True)
    assert begun.shape == (2, 8) and begun[:, 0].tolist() == [0, 0]
    assert torch.equal(begun[:, 1:].flatten(), plain.flatten()[:14])
    with pytest.raises(UserError, match="30 tokens, fewer than one window of 31"):
        windows(text, tokenizer(), 31)
    none = tokenizer()
    none.bos_token = None
    with pytest.raises(UserError, match="no BOS token"):
        windows(text, none, 8, add_bos=True)
