"""Real weights through the command: the cut model still predicts text."""

from __future__ import annotations

import json

import pytest
from distributed.launching import python, torchrun

from mbridge_prune import demo_data

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def perplexity(folder, text):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mbridge_prune.evaluate.loss import loss, windows

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return loss(model, windows(text.read_text(encoding="utf-8"), tokenizer, 256, 8)).perplexity


@pytest.mark.parametrize("name", ["smollm2", "glassllm"])
def test_two_stages_prune_a_real_model(name, tmp_path):
    model, text, held_out = getattr(demo_data, name)(), demo_data.enwik8(), demo_data.wikitext2("test")
    config = json.loads((model / "config.json").read_text())
    ffn = config["intermediate_size"] * 7 // 8
    layers = config["num_hidden_layers"]
    first = layers - layers // 2
    done = torchrun(
        2, "launch/prune.py", "--hf-path", model, "--pp", 2, "--num-layers-in-first-pipeline-stage", first,
        "--calib-data", text, "--calib-num-samples", 16, "--seq-length", 256, "-o", tmp_path / "run",
        "--prune-export-config", json.dumps({"ffn_hidden_size": ffn}),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    cut = layers * 3 * config["hidden_size"] * (config["intermediate_size"] - ffn)
    assert plan["params_before"] - plan["params_after"] == cut
    assert plan["layers_kept"] == list(range(layers))
    before, after = perplexity(model, held_out), perplexity(tmp_path / "run" / "hf", held_out)
    # An eighth of the FFN, no training: worse, and still far from guessing.
    assert before * 0.98 < after < before * 5


def test_the_demo(tmp_path):
    done = python("launch/demo.py", "--output", tmp_path / "demo", "calibration.num_samples=8")
    assert done.returncode == 0, done.stdout + done.stderr
    for word in ("perplexity", "before", "after", "tokens a second", str(tmp_path / "demo")):
        assert word in done.stdout.replace("\n", "") or word in done.stdout
    config = json.loads((tmp_path / "demo" / "hf" / "config.json").read_text())
    assert config["intermediate_size"] == 1152
