"""launch/prune.py with a budget, as its users run it."""

from __future__ import annotations

import json

import pytest
import torch
from distributed.launching import torchrun
from end_to_end.conftest import plan_of, snapshot
from transformers import AutoModelForCausalLM

STEPS = ["--hidden-size-divisor", 16, "--ffn-hidden-size-divisor", 32, "--num-layers-divisor", 1]


@pytest.fixture(scope="module")
def auto(site, tmp_path_factory):
    """A search on two data-parallel replicas, with the two best candidates exported."""
    root = tmp_path_factory.mktemp("auto")
    arguments = [
        "--hf-path", site / "model", "--calib-data", site / "text.txt", "--calib-num-samples", 6,
        "--seq-length", 12, *STEPS, "--prune-target-params", "80%", "--max-width-pruning", 0.5,
        "--max-depth-pruning", 0.5, "--search-num-samples", 6, "--top-k", 3, "--export-top-k", 2,
        "--output", root / "run",
    ]  # fmt: skip
    done = torchrun(2, "launch/prune.py", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return root / "run", arguments, done


def test_the_best_candidate_is_cut_and_exported(auto):
    run, _, done = auto
    plan = plan_of(run)
    assert plan["params_after"] <= 0.8 * plan["params_before"]
    assert AutoModelForCausalLM.from_pretrained(run / "hf").num_parameters() == plan["params_after"]
    measured = [json.loads(line) for line in (run / "candidates.jsonl").read_text().splitlines()]
    scores = [r for r in measured if r["kind"] == "score"]
    assert len(scores) == 3
    assert plan["sizes_after"] in [r["sizes"] for r in scores]
    assert "Traceback" not in done.stdout + done.stderr


def test_the_runners_up_stand_beside_it(auto):
    run = auto[0]
    folders = sorted((run / "candidates").iterdir())
    assert [folder.name for folder in folders] == ["01", "02"]
    winner, first, second = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (run / "hf", *folders)
    )
    tokens = torch.arange(3, 15)[None]
    torch.testing.assert_close(first(tokens).logits, winner(tokens).logits, atol=2e-6, rtol=0)
    assert second.num_parameters() <= 0.8 * plan_of(run)["params_before"]
    assert second.config.to_dict() != first.config.to_dict()


@pytest.mark.slow
def test_replicas_without_a_candidate_do_not_wait(site, tmp_path):
    """A single cut is one replica's: the other takes part in the full model's predictions all the same."""
    done = torchrun(
        2, "launch/prune.py", "--hf-path", site / "model", "--calib-data", site / "text.txt",
        "--calib-num-samples", 6, "--seq-length", 12, *STEPS, "--prune-target-params", "95%",
        "--search-space", '{"ffn_hidden_size": {"min": 64, "max": 96}}', "--search-num-samples", 6, "--top-k", 1,
        "--hparams-to-skip", "hidden_size,num_attention_heads,num_layers", "--output", tmp_path / "run",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert plan_of(tmp_path / "run")["sizes_after"]["ffn_hidden_size"] == 64


def test_two_stages_count_a_budget_as_one_does(run, site, tmp_path):
    arguments = [
        "--hf-path", site / "model", "--calib-data", site / "text.txt", "--calib-num-samples", 4,
        "--seq-length", 12, *STEPS, "--search-num-samples", 4, "-o", tmp_path / "out",
        "--prune-target-params", 80, "--prune-target-memory-mb", 1e-6, "--prune-target-flops", 8,
    ]  # fmt: skip
    line = run(*arguments).err.strip().splitlines()[-1]
    assert "the smallest candidate has" in line
    assert line in torchrun(2, "launch/prune.py", *arguments, "--pp", 2).stderr


def test_the_page_shows_the_search(auto):
    page = (auto[0] / "report.html").read_text()
    assert "The search" in page and "<svg" in page


def test_a_finished_search_says_so_and_does_nothing(auto, run):
    before = snapshot(auto[0])
    said = run(*auto[1])
    assert said.code == 0 and "already finished" in said.out
    assert snapshot(auto[0]) == before


def test_a_dry_run_counts_the_space(auto, run, site):
    said = run("--hf-path", site / "model", *STEPS, "--prune-target-params", "80%", "--dry-run")
    assert said.code == 0, said.err
    assert "choices" in said.out and "hidden_size" in said.out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--prune-target-params", "5%"], "smallest"),
        (["--prune-target-params", "80"], "smallest"),
        (["--prune-target-params", "lots"], "lots"),
        (["--prune-target-params", "80%", "--prune-score-func", "mmlu_x"], "mmlu"),
        (["--prune-target-params", "80%", "--hparams-to-skip", '["ffn_size"]'], "ffn_hidden_size"),
        (["--prune-target-params", "80%", "--prune-export-config", '{"hidden_size": 48}'], "one of"),
        (["--prune-target-active-params", "0%"], "0%"),
    ],
)
def test_bad_bounds_are_one_line_and_write_nothing(run, site, tmp_path, arguments, message):
    said = run(
        "--hf-path", site / "model", "--calib-data", site / "text.txt", "--calib-num-samples", 4,
        "--seq-length", 12, *STEPS, "--search-num-samples", 4, "-o", tmp_path / "out", *arguments,
    )  # fmt: skip
    assert said.code == 2
    line = said.err.strip().splitlines()[-1]
    assert message in line
    assert not (tmp_path / "out").exists()
