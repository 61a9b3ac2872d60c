"""The cache never shows a half-built folder, wiki markup goes, and the real models are right."""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mbridge_prune import demo_data
from mbridge_prune.demo_data import __main__ as cli
from mbridge_prune.demo_data import fetch, texts
from mbridge_prune.demo_data.models.minimind2 import named_weights
from mbridge_prune.errors import UserError


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MBRIDGE_PRUNE_CACHE", str(tmp_path / "cache"))
    return demo_data.cache_dir()


def archive(code: str, content: bytes = b"data") -> fetch.Archive:
    command = (sys.executable, "-c", code)
    return fetch.Archive("a.bin", command, hashlib.sha256(content).hexdigest())


WRITE = "open('a.bin', 'w').write('data')"


def test_archive_is_fetched_once_and_checked(cache):
    path = fetch.fetch(archive(WRITE))
    assert path.read_bytes() == b"data"
    assert fetch.fetch(archive("raise SystemExit(1)")) == path
    path.write_bytes(b"rotten")
    with pytest.raises(UserError, match="has SHA-256 .* expected .*; delete it"):
        fetch.fetch(archive(WRITE))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (archive("raise OSError('registry unreachable')"), "failed: OSError: registry unreachable"),
        (archive("pass"), "failed: no message"),
        (archive(WRITE, b"other"), "has SHA-256"),
        (fetch.Archive("a.bin", ("no-such-client", "get"), ""), "cannot run `no-such-client get`"),
    ],
)
def test_failed_download_is_one_line_and_leaves_nothing(cache, bad, message):
    with pytest.raises(UserError, match=message) as caught:
        fetch.fetch(bad)
    assert "\n" not in str(caught.value)
    assert [p.name for p in (cache / "downloads").iterdir()] == [".a.bin.lock"]


def test_concurrent_callers_build_once(cache):
    builds = []

    def build(folder):
        builds.append(folder)
        (folder / "x").write_text("done")

    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: fetch.build_once("thing", build), range(4)))
    assert set(paths) == {cache / "thing"}
    assert len(builds) == 1
    assert (cache / "thing" / "x").read_text() == "done"


def test_failed_build_leaves_nothing(cache):
    def build(folder):
        (folder / "half").write_text("x")
        raise RuntimeError("disk")

    with pytest.raises(RuntimeError):
        fetch.build_once("thing", build)
    assert [p.name for p in cache.iterdir()] == [".thing.lock"]


def test_wiki_markup_goes_and_words_stay():
    markup = """{{Infobox|a={{nested}} b}}
'''Anarchism''' is a [[term|word]] of [[abuse]]<ref name="x">a {{cite}}</ref>&nbsp;here.
[[Image:A.jpg|thumb|a [[nested|link]] caption]]
==Origins==
* first [http://a.b the site]
{| class="x"
| cell
|}
IQ < 80 and <b>bold</b> <!-- gone -->text.

== External links ==
* [http://x.y z]
[[Category:Politics]] [[de:Anarchismus]]
"""
    assert texts.clean(markup) == (
        "Anarchism is a word of abuse here.\n\nOrigins\n\nfirst the site\n\nIQ < 80 and bold text."
    )


def test_pages_skip_redirects_namespaces_and_stubs():
    long = "Some words. " * 80
    page = "<page><title>{}</title><text xml:space='preserve'>{}</text></page>"
    dump = "".join(
        page.format(title, text)
        for title, text in [
            ("A &amp; B", long),
            ("C", "#REDIRECT [[D]] " + long),
            ("Talk:E", long),
            ("F", "stub"),
        ]
    )
    assert list(texts._pages(dump)) == [("A & B", long.strip())]


def test_split_is_stable_and_proportional():
    splits = [texts.split_of(f"title {i}") for i in range(2000)]
    assert 50 < splits.count("validation") < 150
    assert 50 < splits.count("test") < 150
    assert texts.split_of("Anarchism") == "train"


def test_wrong_names(cache, capsys):
    with pytest.raises(UserError, match=r"did you mean 'train'\?"):
        demo_data.enwik8_articles("trian")
    with pytest.raises(UserError, match="there are: validation, test"):
        demo_data.wikitext2("train")
    assert cli.main(["smolm2"]) == 2
    assert "did you mean 'smollm2'?" in capsys.readouterr().err


@pytest.mark.slow
def test_smollm2_tokenizer_round_trips_and_perplexity():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = demo_data.smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = demo_data.wikitext2("test").read_text(encoding="utf-8")[:100_000]
    for sample in (text, "\n\n".join(demo_data.enwik8_articles("validation"))[:100_000]):
        assert tokenizer.decode(tokenizer(sample, verbose=False).input_ids) == sample
    special = [tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert special == [0, 1, 2]
    assert not (folder / "tokenizer.model").exists()

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.rms_norm_eps == 1e-5
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = torch.tensor(tokenizer(text, verbose=False).input_ids)[: 40 * 512].view(40, 512)
    with torch.no_grad():
        losses = [model(row[None], labels=row[None]).loss.item() for row in ids]
    assert math.exp(sum(losses) / len(losses)) == pytest.approx(28.8, abs=0.2)


@pytest.mark.slow
def test_qwen2_5_coder_tokenizer_round_trips_and_the_head_is_tied():
    from safetensors import safe_open
    from transformers import AutoTokenizer

    folder = demo_data.qwen2_5_coder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = demo_data.wikitext2("test").read_text(encoding="utf-8")[:100_000]
    code = inspect.getsource(argparse)[:100_000]
    for sample in (text, code, "\n\n".join(demo_data.enwik8_articles("validation"))[:100_000]):
        assert tokenizer.decode(tokenizer(sample, verbose=False).input_ids) == sample
    # Qwen2.5's own numbers; a call stays to be read where special tokens are skipped.
    assert tokenizer("<|endoftext|><|im_end|><tool_call>").input_ids == [151643, 151645, 151657]
    assert tokenizer.decode([151657, 151645], skip_special_tokens=True) == "<tool_call>"
    assert (len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id) == (151665, 151645, 151643)
    assert not (folder / "tokenizer.model").exists()

    config = json.loads((folder / "config.json").read_text())
    assert config["tie_word_embeddings"] and config["rms_norm_eps"] == 1e-6
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()
        assert file.get_slice("model.embed_tokens.weight").get_shape() == [151936, 896]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "prompt", "continuation"),
    [
        (demo_data.glassllm, "Alice said", "Alice said the White Rabbit"),
        (demo_data.stories15m, "Once upon a time, there", "a little girl named Lily. She loved"),
    ],
)
def test_small_models_write_english(source, prompt, continuation):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = source()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    assert continuation in tokenizer.decode(output[0], skip_special_tokens=True)


@pytest.mark.slow
def test_enwik8_articles_are_split_and_clean():
    seen = set()
    for split in texts.SPLITS:
        with open(demo_data.enwik8() / f"{split}.jsonl", encoding="utf-8") as lines:
            titles = {json.loads(line)["title"] for line in lines}
        assert len(titles) > 50
        assert not titles & seen
        seen |= titles
    joined = "".join(demo_data.enwik8_articles("train"))
    assert 10_000_000 < len(joined) < 15_000_000
    assert sum(joined.count(mark) for mark in ("{{", "[[", "<ref", "&nbsp;", "'''")) < 30


@pytest.mark.slow
def test_sentiment_is_balanced_and_no_validation_sentence_is_trained_on():
    train, validation = (demo_data.sst2_examples(split) for split in ("train", "validation"))
    assert len(validation) == 872 and sum(example["label"] for example in validation) == 444
    assert len(train) > 8000 and 0.45 < sum(example["label"] for example in train) / len(train) < 0.55
    assert 80 < sum(example["label"] for example in train[:200]) < 120, "in no order"
    held_out = {"".join(filter(str.isalnum, example["text"].lower())) for example in validation}
    assert not held_out & {"".join(filter(str.isalnum, example["text"].lower())) for example in train}


@pytest.mark.slow
def test_minilm_tells_paraphrases_from_other_sentences():
    from transformers import AutoModel, AutoTokenizer

    folder = demo_data.minilm()
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    texts = ["A man is eating food.", "A man eats a meal.", "The stock market fell sharply."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
    assert float(vectors[0] @ vectors[1]) > 0.7 > 0.2 > float(vectors[0] @ vectors[2])


def test_weights_of_a_quantised_graph_get_their_names():
    """MiniMind2's ONNX names a projection by the node that multiplies by it, and keeps it as [in, out]."""
    generator = np.random.default_rng(0)
    whole = generator.normal(size=(6, 4)).astype(np.float32)
    scale = np.abs(whole).max() / 100
    quantised = np.round(whole / scale).astype(np.int8) + np.int8(3)
    name = "onnx::MatMul_7"
    arrays = {
        f"{name}_quantized": quantised, f"{name}_scale": scale, f"{name}_zero_point": np.int8(3),
        "model.embed_tokens.weight_quantized": quantised, "model.embed_tokens.weight_scale": scale,
        "model.embed_tokens.weight_zero_point": np.int8(3), "model.norm.weight": whole[0],
        "model.layers.1.input_layernorm.weight": whole[1],
    }  # fmt: skip
    node = SimpleNamespace(
        name="/model/layers.1/mlp/down_proj/MatMul_quant", input=["x", f"{name}_quantized"]
    )
    other = SimpleNamespace(name="/lm_head/MatMul_quant", input=["x", "nothing"])
    weights = named_weights([node, other], arrays)
    assert sorted(weights) == ["embed_tokens", "layers.1.input_layernorm", "layers.1.mlp.down_proj", "norm"]
    assert np.abs(weights["layers.1.mlp.down_proj"].T - whole).max() <= scale / 2 * 1.001
    assert np.abs(weights["embed_tokens"] - whole).max() <= scale / 2 * 1.001
