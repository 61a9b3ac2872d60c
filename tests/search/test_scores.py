"""launch/prune.py with every kind of score function."""

from __future__ import annotations

import json

import pytest


def scores_of(folder):
    lines = (folder / "candidates.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == "score"]


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module of the user's, in the working directory."""
    (tmp_path / "my_scores.py").write_text(
        "def narrow(model):\n    return -model.config.hidden_size\n\ndef nothing(model): ...\n\n"
        "def broken(model):\n    return model.no_such_layer\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "my_scores", raising=False)


def test_mmlu(run, searching, spoken, tmp_path):
    said = run(*searching, "--prune-score-func", "mmlu_50pct_bs2", "--mmlu-data", spoken / "mmlu")
    assert said.code == 0, said.err
    scores = scores_of(tmp_path / "run")
    assert len(scores) == 2 and all(r["name"] == "mmlu_50pct_bs2" and 0 <= r["score"] <= 1 for r in scores)
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["search"]["score"] == "mmlu_50pct_bs2"


def test_a_function_of_the_users(run, searching, tmp_path, mine):
    said = run(*searching, "--prune-score-func", "my_scores:narrow")
    assert said.code == 0, said.err
    assert [r["score"] for r in scores_of(tmp_path / "run")] == [
        -r["sizes"]["hidden_size"] for r in scores_of(tmp_path / "run")
    ]


def test_a_function_that_returns_nothing(run, searching, tmp_path, mine):
    said = run(*searching, "--prune-score-func", "my_scores:nothing")
    assert said.code == 2 and "my_scores:nothing returned NoneType, expected a number" in said.err


def test_a_function_that_fails(run, searching, tmp_path, mine):
    said = run(*searching, "--prune-score-func", "my_scores:broken")
    assert said.code == 2 and "score function my_scores:broken failed: AttributeError" in said.err
