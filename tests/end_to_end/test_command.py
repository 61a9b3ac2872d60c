"""launch/prune.py as its users run it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed.launching import ROOT, python, torchrun
from end_to_end.conftest import plan_of, snapshot, weights_of
from models import tokens
from transformers import AutoModelForCausalLM, AutoTokenizer

EVERYTHING = {"hidden_size": 48, "ffn_hidden_size": 64, "num_attention_heads": 4, "num_layers": 3}


@pytest.fixture(scope="module")
def rival_run(site, tmp_path_factory):
    """The flags that users of the rival's script type, on two pipeline stages."""
    root = tmp_path_factory.mktemp("rival")
    arguments = [
        "--hf_model_name_or_path", site / "model", "--pp_size", 2, "--num_layers_in_first_pipeline_stage", 1,
        "--num_layers_in_last_pipeline_stage", 3, "--calib_dataset_name", site / "text.txt",
        "--calib_num_samples", 8, "--calib_batch_size", 2, "--seq_length", 12,
        "--prune_export_config", json.dumps(EVERYTHING), "--hidden_size_divisor", 16,
        "--ffn_hidden_size_divisor", 32, "--num_layers_divisor", 1, "--mamba_head_dim_divisor", 8,
        "--num_moe_experts_divisor", 8, "--trust_remote_code", "--prune_intermediate_ckpt", root / "s.safetensors",
        "--output_hf_path", root / "small", "--output_megatron_path", root / "megatron", "--repair", "none",
    ]  # fmt: skip
    done = torchrun(2, "launch/prune.py", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return root, arguments, done


def test_everything_is_written_where_the_flags_say(rival_run):
    root, _, done = rival_run
    assert sorted(p.name for p in root.iterdir()) == ["megatron", "s.safetensors", "small", "small.run"]
    assert (root / "megatron" / "iter_0000000" / "run_config.yaml").is_file()
    assert sorted(p.name for p in (root / "small.run").iterdir()) == [
        "plan.json",
        "report.html",
        "run.log",
        "settings.json",
    ]
    for name in ("small", "s.safetensors", "megatron", "small.run/plan.json"):
        assert name in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_plain_transformers_loads_and_speaks(rival_run, site):
    small = rival_run[0] / "small"
    model = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32)
    config = model.config
    assert [config.hidden_size, config.intermediate_size, config.num_attention_heads] == [48, 64, 4]
    assert [config.num_hidden_layers, config.num_key_value_heads, config.head_dim] == [3, 2, 8]
    assert config.tie_word_embeddings
    tokenizer = AutoTokenizer.from_pretrained(small)
    inputs = tokenizer("w3 w4 w5", return_tensors="pt", add_special_tokens=False)
    assert inputs["input_ids"].tolist() == [[3, 4, 5]]
    out = model.generate(**inputs, do_sample=False, pad_token_id=2)
    assert out.shape[1] > 3
    assert model.generation_config.max_new_tokens == 5
    assert model.num_parameters() == plan_of(rival_run[0] / "small.run")["params_after"]
    card = (small / "README.md").read_text()
    assert "ffn_hidden_size" in card and "text.txt" in card


def test_the_next_command_works_as_printed(rival_run, site):
    line = next(x for x in rival_run[2].stdout.splitlines() if "launch/evaluate.py" in x)
    words = line.split()
    assert words[0] == "python"
    assert words[words.index("--data") + 1] == str(site / "text.txt")
    done = python(*words[1:], "--window", "12", "--windows", "4")
    assert done.returncode == 0, done.stderr
    assert "perplexity" in done.stdout.lower()


def test_a_finished_run_says_so_and_does_nothing(rival_run, run):
    root, arguments, _ = rival_run
    before = snapshot(root)
    said = run(*arguments)
    assert said.code == 0
    assert "already finished" in said.out
    assert snapshot(root) == before


def test_a_scores_file_of_two_stages_needs_no_text(rival_run, run, site, tmp_path, monkeypatch):
    forbid_forward(monkeypatch)
    said = run(
        "--hf-path", site / "model", "--scores", rival_run[0] / "s.safetensors", "-o", tmp_path / "again",
        "--seq-length", 12, *(f"prune.export_config.{k}={v}" for k, v in EVERYTHING.items()),
    )  # fmt: skip
    assert said.code == 0, said.err
    assert "no scoring pass needed" in said.out
    one, two = weights_of(tmp_path / "again" / "hf"), weights_of(rival_run[0] / "small")
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


def test_dry_run_tells_the_real_result_and_writes_nothing(rival_run, run, site):
    root, arguments, _ = rival_run
    before = snapshot(root, site)
    said = run(*arguments, "--output", root / "nowhere", "--dry-run")
    assert said.code == 0, said.err
    assert snapshot(root, site) == before
    plan = plan_of(root / "small.run")
    assert f"{plan['params_before']:,}" in said.out
    assert f"{plan['params_after']:,}" in said.out
    assert "nothing was written" in said.out


def test_dry_run_of_a_full_size_model_from_its_config_alone(run, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_8B))
    said = run("--recipe", "qwen3-8b-to-6b-width", "--hf-path", tmp_path, "--dry-run")
    assert said.code == 0, said.err
    assert "8,190,735,360" in said.out
    # A published formula: embeddings, then per layer QKV, O, q/k norms, gated MLP, two norms; final norm.
    h, f = 3584, 9216
    layer = h * (32 + 8 + 8) * 128 + 32 * 128 * h + 2 * 128 + 3 * h * f + 2 * h
    assert f"{2 * 151936 * h + 36 * layer + h:,}" in said.out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json"]


def test_recipe_then_file_then_command_line(run, base, tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "prune:\n  export_config: {ffn_hidden_size: 80, num_attention_heads: 4}\n"
        "calibration: {num_samples: 4, batch_size: 1}\nparallel: {pp: 1}\n"
    )
    words = [w for w in base if w not in ("--prune-export-config", '{"ffn_hidden_size": 64}')]
    words[words.index("--calib-num-samples") + 1] = "6"
    said = run(
        "--recipe", "smollm2-135m", "--config", tmp_path / "mine.yaml", *words,
        "prune.export_config.ffn_hidden_size=32",
    )  # fmt: skip
    assert said.code == 0, said.err
    settings = plan_of(tmp_path / "run")["settings"]
    assert settings["prune"]["export_config"] == {"ffn_hidden_size": 32, "num_attention_heads": 4}
    assert settings["calibration"]["num_samples"] == 6  # command line over file over recipe
    assert settings["calibration"]["batch_size"] == 2
    assert settings["calibration"]["seed"] == 1234
    assert settings["parallel"]["pp"] == 1  # file over recipe
    config = json.loads((tmp_path / "run" / "hf" / "config.json").read_text())
    assert (config["intermediate_size"], config["num_attention_heads"]) == (32, 4)


def test_a_killed_run_is_taken_up_without_a_forward_pass(run, base, tmp_path, monkeypatch):
    base = [*base, "--repair", "none"]
    kill_after_scores = (
        "import os, runpy, signal, sys\n"
        "import mbridge_prune.mcore_minitron as m\n"
        "save = m.save_scores\n"
        "m.save_scores = lambda *a: (save(*a), os.kill(os.getpid(), signal.SIGKILL))\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    (tmp_path / "killed.py").write_text(kill_after_scores)
    done = python(tmp_path / "killed.py", ROOT / "launch" / "prune.py", *base, PYTHONPATH=str(ROOT))
    assert done.returncode == -9, done.stderr
    assert (tmp_path / "run" / "scores.safetensors").is_file()
    assert not (tmp_path / "run" / "hf").exists()
    forbid_forward(monkeypatch)
    said = run(*base)
    assert said.code == 0, said.err
    assert "taking up the run" in said.out and "no scoring pass needed" in said.out
    assert (tmp_path / "run" / "hf" / "model.safetensors").is_file()


def test_a_run_that_failed_after_the_export_is_taken_up_there(run, base, tmp_path, monkeypatch):
    from megatron.bridge import AutoBridge

    def full(self, model, path, **more):
        Path(path).mkdir(parents=True)
        (Path(path) / "half").write_text("half")
        raise OSError(28, "No space left on device")

    words = [*base, "--output-megatron-path", tmp_path / "megatron", "--repair", "none"]
    with monkeypatch.context() as disk:
        disk.setattr(AutoBridge, "save_megatron_model", full)
        said = run(*words)
    assert said.code == 2 and said.err.startswith("error: cannot write the Megatron checkpoint")
    assert not (tmp_path / "megatron").exists()
    exported = snapshot(tmp_path / "run" / "hf")
    forbid_forward(monkeypatch)
    assert run(*words).code == 0
    assert snapshot(tmp_path / "run" / "hf") == exported
    assert (tmp_path / "megatron" / "iter_0000000").is_dir()
    assert "already finished" in run(*words).out


def test_a_text_run_and_chat_free_folder_names(run, base, site, tmp_path, monkeypatch):
    """Paths that YAML would take for numbers stay paths."""
    monkeypatch.chdir(tmp_path)
    words = ["2026_01" if w.endswith("/run") else w for w in base]
    words[words.index("--calib-data") + 1] = f"{site}/text.txt"
    assert run(*words).code == 0
    assert (tmp_path / "2026_01" / "hf" / "config.json").is_file()


@pytest.mark.parametrize("sizes", [{"hidden_size": 40}, {"num_layers": 2}, {"num_attention_heads": 2}])
def test_dry_run_counts_what_is_written(run, base, tmp_path, sizes):
    words = [*base[:-1], json.dumps(sizes)]
    dry = run(*words, "--dry-run")
    assert not (tmp_path / "run").exists()
    assert run(*words).code == 0
    real = sum(w.numel() for w in weights_of(tmp_path / "run" / "hf").values())
    assert f"{real:,}" in dry.out


def forbid_forward(monkeypatch):
    def no(*arguments, **more):
        raise AssertionError("a forward pass was about to run")

    monkeypatch.setattr("mbridge_prune.calibration.loop.forward_batches", no)


QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288,
    "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "vocab_size": 151936, "tie_word_embeddings": False, "max_position_embeddings": 40960, "rope_theta": 1000000,
    "rms_norm_eps": 1e-6, "hidden_act": "silu", "attention_bias": False, "torch_dtype": "bfloat16",
}  # fmt: skip


def test_help_lists_the_groups_and_both_spellings():
    done = python("launch/prune.py", "--help")
    assert done.returncode == 0, done.stderr
    for word in ("model:", "parallel:", "calibration:", "prune:", "output:", "--pp_size", "--dry-run"):
        assert word in done.stdout


def test_weighted_and_repaired(run, base, site, tmp_path):
    np.save(tmp_path / "much.npy", tokens(160, seed=19).numpy())
    said = run(*base, "--calib-data", str(tmp_path / "much.npy"), "--calib-num-samples", "160",
               "--importance", "weighted", "--repair", "least_squares")  # fmt: skip
    assert said.code == 0
    assert "repair: 4 of 4 weights refitted" in said.err + said.out
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert (plan["importance"], plan["repair"]) == ("weighted", "least_squares")
    assert all(record["repaired_error"] < record["sliced_error"] for record in plan["repaired"])
    assert "weighted" in (tmp_path / "run" / "report.html").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "hf")
    assert model.config.intermediate_size == 64


def test_the_next_command_of_scoring_prunes(run, base, tmp_path):
    said = run(*base[:-2], "--score-only", "--importance", "weighted")
    assert said.code == 0, said.err
    (line,) = [line.strip() for line in said.out.splitlines() if "launch/prune.py" in line]
    words = shlex.split(line)
    assert words[:2] == ["python", "launch/prune.py"]
    again = run(*words[2:])
    assert again.code == 0 and "no scoring pass needed" in again.out, again
    assert plan_of(tmp_path / "run-pruned")["sizes_after"]["ffn_hidden_size"] == 72
