"""save and restore, save_pretrained and from_pretrained, and what transformers loads without us."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from hf_models import FAMILIES, output, tiny

import mbridge_prune as mbp
from mbridge_prune.dynamic import shrink
from mbridge_prune.errors import UserError
from mbridge_prune.huggingface import table_of
from mbridge_prune.huggingface.pretrained import needs_us, record

UNEVEN = {"layers.0.num_attention_heads": 3, "layers.1.num_attention_heads": 1, "layers.1.ffn_hidden_size": 6}
FEWER_HEADS = {"layers.0.num_attention_heads": 3, "layers.1.num_attention_heads": 1}
SAME_FFN = {"layers.0.ffn_hidden_size": 6, "layers.1.ffn_hidden_size": 6}
OWN_WORDS = {"heads": FEWER_HEADS, "ffn": SAME_FFN, "both": {**FEWER_HEADS, **SAME_FFN}}
NO_PRUNED_HEADS = ("gptj", "gpt-neox")


def cut(family: str, sizes: dict[str, int]):
    model = tiny(family)
    shrink(table_of(model), sizes)
    record(model)
    return model


def near(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_from_pretrained_gives_back_the_class_the_sizes_and_the_outputs(family, tmp_path):
    model = cut(family, UNEVEN)
    model.save_pretrained(tmp_path)
    again = mbp.from_pretrained(tmp_path)
    assert type(again) is type(model)
    shapes = {name: tensor.shape for name, tensor in again.named_parameters()}
    assert {name: tensor.shape for name, tensor in model.named_parameters()}.items() <= shapes.items()
    near(output(again.eval()), output(model))
    again.save_pretrained(tmp_path / "twice")
    near(output(mbp.from_pretrained(tmp_path / "twice").eval()), output(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_transformers_refuses_uneven_sizes_and_never_loads_half(family, tmp_path):
    model = cut(family, UNEVEN)
    assert "an FFN size a layer" in needs_us(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        type(model).from_pretrained(tmp_path)


@pytest.mark.parametrize("what", OWN_WORDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_can_say_itself_it_loads_itself(family, what, tmp_path):
    model = cut(family, OWN_WORDS[what])
    model.save_pretrained(tmp_path)
    if what != "ffn" and family in NO_PRUNED_HEADS:
        assert "fewer heads" in needs_us(model)
        with pytest.raises(RuntimeError, match="size mismatch"):
            type(model).from_pretrained(tmp_path)
    else:
        assert needs_us(model) == ""
        near(output(type(model).from_pretrained(tmp_path).eval()), output(model))
    near(output(mbp.from_pretrained(tmp_path).eval()), output(model))


def test_the_encoder_of_a_classifier_and_options_of_transformers(tmp_path):
    model = cut("bert", UNEVEN)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    encoder = mbp.from_pretrained(tmp_path, transformers.BertModel, dtype=torch.bfloat16)
    assert type(encoder) is transformers.BertModel and encoder.dtype == torch.bfloat16
    expected = model.bert.encoder.layer[1].output.dense.weight.bfloat16()
    assert torch.equal(encoder.encoder.layer[1].output.dense.weight, expected)
    _, info = mbp.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


@pytest.mark.parametrize("one_config", [True, False])
def test_two_models_in_one_module_are_each_saved_with_their_own_sizes(one_config, tmp_path):
    first, second = tiny("bert-encoder"), tiny("bert-encoder", seed=2)
    if one_config:
        second = type(first)(first.config, add_pooling_layer=False).eval()
    both = torch.nn.ModuleDict({"a": first, "b": second})
    shrink(table_of(both), {**UNEVEN, "layers.2.num_attention_heads": 2, "layers.3.ffn_hidden_size": 4})
    record(both)
    assert "an FFN size a layer" in needs_us(both)
    for name, model in both.items():
        model.save_pretrained(tmp_path / name)
        near(output(mbp.from_pretrained(tmp_path / name, add_pooling_layer=False).eval()), output(model))


def test_heads_that_transformers_pruned_before_stay_pruned(tmp_path):
    model = tiny("bert")
    model.prune_heads({0: [1]})
    shrink(table_of(model), {"layers.0.num_attention_heads": 2})
    record(model)
    assert model.bert.encoder.layer[0].attention.pruned_heads == {2, 3}
    model.save_pretrained(tmp_path)
    near(output(transformers.BertForSequenceClassification.from_pretrained(tmp_path).eval()), output(model))


def test_other_models_load_as_ever_and_other_sizes_are_refused(tmp_path):
    model = tiny("bert")
    model.save_pretrained(tmp_path / "whole")
    near(output(mbp.from_pretrained(tmp_path / "whole").eval()), output(model))
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        mbp.from_pretrained(tmp_path / "nowhere")
    cut("bert", UNEVEN).save_pretrained(tmp_path / "cut")
    path = tmp_path / "cut" / "config.json"
    content = json.loads(path.read_text())
    content["mbridge_prune"]["layers.7.ffn_hidden_size"] = 3
    path.write_text(json.dumps(content))
    with pytest.raises(
        UserError, match=r"names other axes than BertForSequenceClassification has: layers\.7"
    ):
        mbp.from_pretrained(tmp_path / "cut")
    content["architectures"] = ["BertForSequenceClasification"]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="did you mean 'BertForSequenceClassification'"):
        mbp.from_pretrained(tmp_path / "cut")
