"""launch/prune_hf.py as its users run it: a run folder, a model that loads again, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from commands import running
from hf_models import output, tiny
from transformers import PreTrainedTokenizerFast

import mbridge_prune as mbp

WORDS = [
    "[PAD]",
    "[UNK]",
    "[MASK]",
    "<|endoftext|>",
    *["a", "fine", "bad", "film", "plot", "is", "the", "and", "of", "very", "dull", "bright"],
]
CODE = """
def batches(model, tokenizer):
    import torch
    return [{"input_ids": torch.arange(16).view(2, 8), "labels": torch.tensor([0, 1])}]

def loss(output, batch):
    return output.loss

def broken(model, tokenizer):
    raise OSError("disk gone")
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(CODE)
    texts = ["a fine film", "the plot is dull", "very bright and fine", "bad film of the dull and bad"] * 4
    lines = [json.dumps({"text": text, "label": n % 2}) for n, text in enumerate(texts)]
    (tmp_path / "reviews.jsonl").write_text("\n".join(lines))
    (tmp_path / "words.txt").write_text(" ".join(texts * 20))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "own", raising=False)
    return tmp_path


@pytest.fixture
def run(capsys):
    with running("prune_hf", capsys) as call:
        yield call


def write(family: str, folder) -> None:
    """A tiny model and a tokenizer of its words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tiny(family).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]", eos_token="<|endoftext|>",
    ).save_pretrained(folder)  # fmt: skip


BASE = ("--seq-length", "8", "--batch-size", "4", "--num-samples", "8", "--ffn-hidden-size-divisor", "2",
        "--prune-target-flops", "70%", "--output", "out")  # fmt: skip


@pytest.mark.parametrize(
    ("family", "data"), [("bert", "reviews.jsonl"), ("camembert", "words.txt"), ("gptj", "words.txt")]
)
def test_a_run_leaves_a_model_scores_a_plan_and_a_page(family, data, run, here):
    write(family, here / "model")
    said = run("--hf-path", "model", "--data", data, *BASE)
    assert said.code == 0, said.err
    plan = json.loads((here / "out" / "plan.json").read_text())
    assert plan["mode"] == "gradnas" and plan["calibration"]["batches"] == 2
    assert plan["costs"]["flops"]["after"] <= 0.7 * plan["costs"]["flops"]["before"]
    model = mbp.from_pretrained(here / "out" / "hf").eval()
    assert sum(p.numel() for p in model.parameters()) == plan["params_after"]
    again = mbp.restore(tiny(family, seed=3), here / "out" / "pruned.safetensors")
    torch.testing.assert_close(output(model), output(again), rtol=1e-6, atol=1e-5)
    page = (here / "out" / "report.html").read_text()
    assert "GradNAS" in page and "layers.0.<wbr>ffn_" in page.replace("layers.<wbr>0.", "layers.0.")
    # The same command has nothing to do; the scores serve another budget in another folder without data.
    assert "already finished" in run("--hf-path", "model", "--data", data, *BASE).out
    assert not list(here.glob("out/.*"))


def test_functions_of_ones_own_and_a_dry_run(run, here):
    write("bert", here / "model")
    mine = ("--data-loader", "own:batches", "--loss-func", "own:loss")
    said = run("--hf-path", "model", *mine, *BASE, "--dry-run")
    assert said.code == 0 and "nothing was written" in said.out and not (here / "out").exists()
    assert run("--hf-path", "model", *mine, *BASE).code == 0
    assert json.loads((here / "out" / "plan.json").read_text())["calibration"]["batches"] == 1


def test_a_dry_run_of_a_pruned_model_is_of_what_is_left(run, here):
    write("bert", here / "model")
    assert run("--hf-path", "model", "--data", "reviews.jsonl", *BASE).code == 0
    left = json.loads((here / "out" / "plan.json").read_text())["params_after"]
    said = run("--hf-path", "out/hf", *BASE[:-4], "--prune-target-flops", "90%", "--dry-run")
    assert said.code == 0 and f"{left:,} (100.0%)" in said.out


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ((), "no data: give --data FILE"),
        (("--data", "nowhere.jsonl"), "classifiers read a .jsonl file"),
        (("--data", "reviews.jsonl", "--text-key", "txt"), "line 1: no key 'txt' (did you mean 'text'?); keys: text, label"),
        (("--data", "reviews.jsonl", "--label-key", "text"), "'a fine film' is no label of the model"),
        (("--data", "reviews.jsonl", "--seq-length", "999"), "--seq-length 999 is more than the 32 positions"),
        (("--data", "reviews.jsonl", "--loss-func", "own:loss"), "go with --data-loader"),
        (("--data", "reviews.jsonl", "--data-loader", "own:batches"), "not both"),
        (("--data-loader", "own:broken"), "own:broken failed: OSError: disk gone"),
        (("--data-loader", "own.batches"), "is no function: give module:function"),
        (("--data", "reviews.jsonl", "--prune-target-flops", "1%"), "reach from"),
        (("--data", "reviews.jsonl", "--axes-to-skip", "layer.*"), "no axis 'layer.*'"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line_and_writes_nothing(more, said, run, here):
    write("bert", here / "model")
    found = run("--hf-path", "model", *BASE, *more)
    assert found.code == 2 and said in found.err and found.err.count("\n") == 1
    assert not (here / "out" / "hf").exists() and not (here / "out" / "plan.json").exists()


def test_models_without_a_task_or_a_block(run, here):
    write("bert-encoder", here / "model")
    found = run("--hf-path", "model", "--data", "reviews.jsonl", *BASE)
    assert found.code == 2 and "BertModel has no task that is known here" in found.err
    from transformers import LlamaConfig, LlamaForCausalLM

    small = {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "vocab_size": 40,
    }
    LlamaForCausalLM(LlamaConfig(**small)).save_pretrained(here / "llama")
    found = run("--hf-path", "llama", "--dry-run", *BASE)
    assert found.code == 2 and "knows no block of LlamaForCausalLM" in found.err
