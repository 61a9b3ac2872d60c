"""Real weights through the command: the cut model still predicts text."""

from __future__ import annotations

import json
import math

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


def stored(folder):
    """Numbers in a checkpoint; a tied output layer is not in it."""
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("smollm2", {"ffn_hidden_size": 1344}),
        ("glassllm", {"ffn_hidden_size": 298}),
        # 14 heads of 64 over 864 channels: only a head_dim in config.json makes this load.
        ("qwen2_5_coder", {"ffn_hidden_size": 4480, "hidden_size": 864}),
    ],
)
def test_two_stages_prune_a_real_model(name, sizes, tmp_path):
    model, text, held_out = getattr(demo_data, name)(), demo_data.enwik8(), demo_data.wikitext2("test")
    layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    first = layers - layers // 2
    done = torchrun(
        2, "launch/prune.py", "--hf-path", model, "--pp", 2, "--num-layers-in-first-pipeline-stage", first,
        "--calib-data", text, "--calib-num-samples", 16, "--seq-length", 256, "-o", tmp_path / "run",
        "--prune-export-config", json.dumps(sizes),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    plan, small = json.loads((tmp_path / "run" / "plan.json").read_text()), tmp_path / "run" / "hf"
    assert (plan["params_before"], plan["params_after"]) == (stored(model), stored(small))
    assert {key: plan["sizes_after"][key] for key in sizes} == sizes
    assert plan["layers_kept"] == list(range(layers))
    before, after = perplexity(model, held_out), perplexity(small, held_out)
    # A mild cut, no training: worse, and still far from guessing.
    assert before * 0.98 < after < before * 5


def test_the_demo(tmp_path):
    done = python("launch/demo.py", "--output", tmp_path / "demo", "calibration.num_samples=8")
    assert done.returncode == 0, done.stdout + done.stderr
    for word in ("perplexity", "before", "after", "tokens a second", str(tmp_path / "demo")):
        assert word in done.stdout.replace("\n", "") or word in done.stdout
    config = json.loads((tmp_path / "demo" / "hf" / "config.json").read_text())
    assert config["intermediate_size"] == 1152
