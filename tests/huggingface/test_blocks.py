"""Every family: sorting keeps the function, a cut equals zeroed units, counts equal independent counts."""

from __future__ import annotations

import copy

import pytest
import torch
from hf_models import FAMILIES, output, tiny, tokens
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mbridge_prune.dynamic import Counter, select, shapes, shrink, sort
from mbridge_prune.errors import UserError
from mbridge_prune.heterogeneous import Forward
from mbridge_prune.heterogeneous.costs import ForwardCosts
from mbridge_prune.huggingface import table_of

CUT = {
    "layers.0.num_attention_heads": 3, "layers.0.ffn_hidden_size": 13,
    "layers.1.num_attention_heads": 1, "layers.1.ffn_hidden_size": 6,
}  # fmt: skip


def orders(table, seed: int = 3) -> dict[str, torch.Tensor]:
    """A random order of every axis."""
    draw = torch.Generator().manual_seed(seed)
    return {key: axis.order_by(torch.rand(axis.size, generator=draw)) for key, axis in table.axes.items()}


def silence(model, order: dict[str, torch.Tensor]) -> None:
    """Zeroes, in a dense model, the weights that read the units which a cut removes."""
    for probe in table_of(model).probes:
        (reading,) = probe.readings
        gone = order[reading.axis.key][0, CUT[reading.axis.key] :]
        columns = (gone[:, None] * reading.channels + torch.arange(reading.channels)).flatten()
        weight = probe.module.weight if type(probe.module).__name__ != "Conv1D" else probe.module.weight.t()
        with torch.no_grad():
            weight[:, columns] = 0


@pytest.mark.parametrize("family", FAMILIES)
def test_sorted_is_the_same_and_sliced_equals_masked(family):
    model = tiny(family)
    masked, before = copy.deepcopy(model), output(model)
    table = table_of(model)
    order = orders(table)
    sort(table, order)
    torch.testing.assert_close(output(model), before, rtol=1e-5, atol=1e-5)
    silence(masked, order)
    expected = output(masked)
    assert not torch.allclose(expected, before, atol=1e-3), "the cut must matter"
    with select(table, CUT) as candidate:
        torch.testing.assert_close(output(candidate), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output(model), before, rtol=1e-5, atol=1e-5)
    shrink(table, CUT)
    torch.testing.assert_close(output(model), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_equal_independent_counts(family):
    model = tiny(family)
    table = table_of(model)
    forward = Forward.of(tokens())
    counts = {"params": Counter(shapes(table)).params(CUT), "flops": ForwardCosts(table, forward).flops(CUT)}
    assert counts["params"] < sum(p.numel() for p in model.parameters())
    shrink(table, CUT)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens())
    real = {"params": sum(p.numel() for p in model.parameters()), "flops": counter.get_total_flops()}
    assert counts == real


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_model_trains(family):
    model = tiny(family).train()
    shrink(table_of(model), CUT)
    model(tokens())[0].square().mean().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for _, p in _used(model))


def _used(model):
    """Parameters of the blocks."""
    table = table_of(model)
    return [(e.name, e.tensor()) for e in table.entries if any(list(d.axes()) for d in e.dims)]


def test_generation_goes_on_with_layers_of_different_sizes():
    model = tiny("gptj")
    shrink(table_of(model), CUT)
    prompt = tokens(1)
    made = model.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0)
    ids = prompt
    for _ in range(made.shape[1] - prompt.shape[1]):  # without a cache
        ids = torch.cat([ids, output(model, ids)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(made, ids)


def test_a_model_inside_another_module_is_pruned_and_its_surroundings_stay():
    class Classifier(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.head = tiny("bert-encoder"), torch.nn.Linear(24, 3)

        def forward(self, ids):
            return (self.head(self.encoder(ids)[0].mean(1)),)

    model = Classifier()
    table = table_of(model)
    assert set(table.axes) == set(CUT)
    shrink(table, CUT)
    assert model.encoder.encoder.layer[1].intermediate.dense.out_features == 6
    assert output(model).shape == (2, 3)


def test_what_cannot_be_pruned_is_named_with_what_works():
    from transformers import BertConfig, BertLMHeadModel, LlamaConfig, LlamaForCausalLM

    small = {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "vocab_size": 9,
    }
    llama = LlamaForCausalLM(LlamaConfig(**small))
    with pytest.raises(
        UserError,
        match=r"no block of LlamaForCausalLM \(layers: LlamaDecoderLayer\); .*GPT-J.*mcore_minitron",
    ):
        table_of(llama)
    decoder = BertLMHeadModel(BertConfig(**small, is_decoder=True, add_cross_attention=True))
    with pytest.raises(
        UserError, match=r"bert\.encoder\.layer\.0\.crossattention.*add_cross_attention=False"
    ):
        table_of(decoder)


def test_an_unknown_tensor_in_a_block_stops_the_run():
    model = tiny("bert")
    model.bert.encoder.layer[0].attention.scale = torch.nn.Parameter(torch.ones(4))
    with pytest.raises(UserError, match=r"bert\.encoder\.layer\.0\.attention\.scale"):
        table_of(model)
