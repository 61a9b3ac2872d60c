"""launch/evaluate.py: one line, one table, one file, the same numbers through both backends; refusals."""

from __future__ import annotations

import math
import re

import pytest
import questions
from evaluate.conftest import CHILD, PARENT, read_json
from models import write_hf

from mbridge_prune.bridge import load as bridge_load
from mbridge_prune.errors import UserError
from mbridge_prune.evaluate.models import Megatron


@pytest.fixture
def base(site):
    return ["--hf-path", site / CHILD, "--data", site / "text.txt", "--window", "64", "--windows", "6"]


@pytest.fixture
def all_three(base, site):
    return [
        *base, "--metrics", "loss,kl,mmlu", "--reference-hf-path", site / PARENT, "--mmlu-data", site / "mmlu57",
        "--mmlu-percentage", "50", "--few-shot", "1", "--batch-size", "4",
    ]  # fmt: skip


def test_one_line_by_default(run, base):
    perplexities, losses = [], set()
    for backend in ("megatron", "transformers", "auto"):
        said = run(*base, "--backend", backend)
        assert said.code == 0, said
        (line,) = said.out.splitlines()
        assert "loss: 6 sequences in" in said.err, "progress goes elsewhere"
        form = r"perplexity (\d+\.\d\d) \(loss (\d+\.\d{4}) nats, 378 predictions, \d+ tokens/s\)"
        match = re.fullmatch(form, line)
        assert match, line
        perplexities.append(float(match[1]))
        losses.add(match[2])
    assert len(losses) == 1
    assert perplexities == pytest.approx([perplexities[0]] * 3, rel=1e-6)


def test_the_same_numbers_through_both_backends(run, all_three, tmp_path):
    found = {}
    for backend in ("megatron", "transformers"):
        file = tmp_path / f"{backend}.json"
        said = run(*all_three, "--backend", backend, "--output", file)
        assert said.code == 0, said
        for word in ("loss (nats)", "perplexity", "kl (nats)", "mmlu", "378 predictions", "questions"):
            assert word in said.out, said.out
        found[backend] = read_json(file)
        assert [p.name for p in tmp_path.glob(".*")] == []
    ours, theirs = (found[b]["metrics"] for b in ("megatron", "transformers"))
    for name in ("loss", "kl", "mmlu"):
        assert ours[name]["value"] == pytest.approx(theirs[name]["value"], rel=1e-5)
        assert ours[name]["se"] == pytest.approx(theirs[name]["se"], rel=1e-3)
        assert ours[name]["fingerprint"] == theirs[name]["fingerprint"]
        assert ours[name]["n"] == theirs[name]["n"]
    assert ours["mmlu"]["by_subject"] == theirs["mmlu"]["by_subject"]
    assert ours["loss"]["perplexity"] == pytest.approx(math.exp(ours["loss"]["value"]))
    assert found["megatron"]["layout"] == {"pp": 1, "ep": 1, "tp": 1, "dp": 1}
    assert found["transformers"]["backend"] == "transformers"


def test_what_bridge_does_not_know_goes_through_transformers(run, base, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=320, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    questions.tokenizer().save_pretrained(tmp_path / "gpt2")
    said = run(*base, "--hf-path", tmp_path / "gpt2")
    assert said.code == 0, said
    assert "does not know the architecture" in said.out and "perplexity" in said.out


def test_other_texts_and_scores(run, base, site, tmp_path, monkeypatch):
    import json

    import numpy as np
    from models import tokens

    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "ab cd " * 200}) + "\n")
    np.save(tmp_path / "ids.npy", tokens(8, length=64).numpy())
    for name in ("text.jsonl", "ids.npy"):
        said = run(*base, "--data", tmp_path / name)
        assert said.code == 0 and "378 predictions" in said.out, said
    (tmp_path / "own_score.py").write_text("def f(model): return 3.5")
    monkeypatch.chdir(tmp_path)
    said = run("--hf-path", site / CHILD, "--metrics", "own_score:f")
    assert said.code == 0 and re.search(r"own_score:f +│ +3\.5000", said.out), said


@pytest.fixture
def no_weights(monkeypatch):
    """Fails where weights are read."""

    def fail(*arguments, **named):
        raise AssertionError("weights were read")

    import mbridge_prune.evaluate.models as models

    monkeypatch.setattr(models, "load_mbridge_model_from_hf", fail)
    monkeypatch.setattr(models, "auto_class", fail)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--hf-path", "/nowhere/model"], "no such model folder: /nowhere/model"),
        (["--data", "/nowhere.txt"], "no such text file: /nowhere.txt"),
        (
            ["--metrics", "los"],
            "no metric 'los' (did you mean 'loss'?); there are: loss, kl, mmlu, module:function",
        ),
        (["--metrics", "loss,mmlu_10pct"], "no score function 'mmlu_10pct' (did you mean 'mmlu_10pct_bs1'?)"),
        (["--metrics", "kl"], "give --reference-hf-path PARENT"),
        (
            ["--metrics", "kl", "--reference-hf-path", "/nowhere/parent"],
            "no such model folder: /nowhere/parent",
        ),
        (["--metrics", "mmlu", "--mmlu-data", "/nowhere"], "no such folder of MMLU data: /nowhere"),
        (["--metrics", "mmlu", "--mmlu-percentage", "0"], "--mmlu-percentage 0: expected above 0"),
        (["--metrics", "no_such_module:f"], "no_such_module:f: no module"),
        (["--window", "1"], "--window must be at least 2"),
        (["--window", "2", "--add-bos"], "--window must be at least 3"),
        (["--windows", "0"], "--windows must be at least 1"),
        (["--few-shot", "-1"], "--few-shot must be at least 0"),
        (["--window", "5000"], "fewer than one window of 5000"),
        (["--backend", "transformers", "--tp", "2"], "leave --pp, --ep and --tp out"),
        (["--tp", "3"], "tensor_model_parallel_size=3 does not divide num_attention_heads=8"),
        (["--pp", "2"], "world size 1 is not a multiple of pipeline 2"),
        (["--pp", "4"], "has 3 layers: too few for --pp 4"),
        (["--ep", "2"], "the model has no experts; use --ep 1"),
        (["--windwo", "3"], "unrecognized arguments: --windwo 3"),
    ],
)
def test_bad_input_is_one_line(run, base, no_weights, more, message):
    said = run(*base, *more)
    assert said.code == 2, said
    (line,) = said.err.splitlines()
    assert line.startswith("error: ") and message in line, line


def test_a_vocabulary_that_ranks_cannot_share_is_refused(tmp_path):
    write_hf("llama", tmp_path / "odd", vocab_size=321)
    with pytest.raises(UserError, match="the 321 tokens of .*odd do not divide over --tp 2"):
        Megatron(tp=2).check([str(tmp_path / "odd")])


def test_more_bad_input(run, base, site, no_weights, tmp_path, monkeypatch):
    def refused(*more):
        said = run(*base, *more)
        assert said.code == 2 and len(said.err.splitlines()) == 1, said
        return said.err

    without = [*base[:2], "--metrics", "loss,kl", "--reference-hf-path", site / PARENT]
    said = run(*without)
    assert said.code == 2 and "loss and kl need text: give --data FILE" in said.err
    (tmp_path / "there.json").write_text("{}")
    assert "there.json exists" in refused("--output", tmp_path / "there.json")
    write_hf("llama", tmp_path / "other", vocab_size=128)
    line = refused("--metrics", "kl", "--reference-hf-path", tmp_path / "other")
    assert "one vocabulary" in line and "other has 128 tokens" in line and "child has 320 tokens" in line
    monkeypatch.setattr(bridge_load, "load_tokenizer", lambda *arguments: None)
    assert "has no tokenizer" in refused()
    assert "has no tokenizer" in refused("--metrics", "mmlu", "--mmlu-data", site / "mmlu")
