"""A search on several ranks measures, scores and exports what it does on one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import running
from launching import ROOT, python
from safetensors.torch import load_file

SEARCH = [
    "--calib-num-samples", 6, "--seq-length", 12, "--hidden-size-divisor", 16, "--ffn-hidden-size-divisor", 32,
    "--num-layers-divisor", 1, "--prune-target-params", "80%", "--max-width-pruning", 0.5,
    "--max-depth-pruning", 0.5, "--search-num-samples", 2, "--top-k", 3, "--export-top-k", 2,
]  # fmt: skip
MODULE = "tests.distributed.scoring"


def launched(ranks: int, calls: Path, *arguments: object) -> Any:
    return python(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks, "launch/prune.py", *arguments,
        CALLS=str(calls), PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    )  # fmt: skip


def on_ranks(ranks: int, calls: Path, *arguments: object) -> None:
    done = launched(ranks, calls, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr


def measured(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "candidates.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def calls_of(folder: Path) -> dict[str, list[int]]:
    """Rank -> parameters of its part of each model that it scored."""
    return {file.name: [int(n) for n in file.read_text().split()] for file in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def base(site) -> list[object]:
    return ["--hf-path", site / "models" / "untied", "--calib-data", site / "tokens.npy", *SEARCH]


@pytest.fixture(scope="module")
def single(base, tmp_path_factory):
    """(run folder, calls folder) of a search on one rank, scored by the user's function."""
    root = tmp_path_factory.mktemp("single")
    (root / "calls").mkdir()
    on_ranks(1, root / "calls", *base, "--prune-score-func", f"{MODULE}:loss", "--output", root / "run")
    return root / "run", root / "calls"


def assert_same_exports(folder: Path, other: Path) -> None:
    for name in ("hf", "candidates/01", "candidates/02"):
        mine, its = (load_file(f / name / "model.safetensors") for f in (folder, other))
        assert mine.keys() == its.keys() and all(torch.equal(mine[n], t) for n, t in its.items()), name


@pytest.mark.slow
def test_two_stages_find_and_export_what_one_finds(base, single, tmp_path):
    (tmp_path / "calls").mkdir()
    on_ranks(2, tmp_path / "calls", *base, "--pp", 2, "--prune-score-func", f"{MODULE}:loss",
             "--output", tmp_path / "run")  # fmt: skip
    assert measured(tmp_path / "run") == measured(single[0])
    assert_same_exports(tmp_path / "run", single[0])
    both = calls_of(tmp_path / "calls")
    assert len(both) == 2 and [a + b for a, b in zip(*both.values(), strict=True)] == calls_of(single[1])["0"]


@pytest.mark.slow
def test_a_users_function_scores_a_candidate_a_replica(base, single, tmp_path):
    """Three candidates on two replicas: two calls and one, each of another candidate, and the same scores."""
    (tmp_path / "calls").mkdir()
    on_ranks(
        2, tmp_path / "calls", *base, "--prune-score-func", f"{MODULE}:loss", "--output", tmp_path / "run"
    )
    assert measured(tmp_path / "run") == measured(single[0])
    assert_same_exports(tmp_path / "run", single[0])
    one, calls = calls_of(single[1])["0"], calls_of(tmp_path / "calls")
    assert calls == {"0": one[::2], "1": one[1::2]}


def test_a_function_that_fails_on_one_stage_ends_the_run_on_all(base, tmp_path):
    done = launched(2, tmp_path, *base, "--pp", 2, "--prune-score-func", f"{MODULE}:fails_on_the_last_stage",
                    "--output", tmp_path / "run")  # fmt: skip
    assert done.returncode == 1
    assert "fails_on_the_last_stage failed: ZeroDivisionError: no questions" in done.stdout + done.stderr


@pytest.mark.slow
def test_a_function_that_needs_all_ranks_is_called_on_all(base, single, tmp_path):
    (tmp_path / "calls").mkdir()
    on_ranks(
        2, tmp_path / "calls", *base, "--prune-score-func", f"{MODULE}:together", "--output", tmp_path / "run"
    )
    one = calls_of(single[1])["0"]
    assert calls_of(tmp_path / "calls") == {"0": one, "1": one}
    scores, want = (
        [r["score"] for r in measured(f) if r["kind"] == "score"] for f in (tmp_path / "run", single[0])
    )
    assert scores == pytest.approx(want, rel=1e-6)


@pytest.mark.slow
def test_kl_on_two_stages(base, tmp_path, capsys):
    """The score that the search measures itself, on the last stage."""
    on_ranks(2, tmp_path, *base, "--pp", 2, "--output", tmp_path / "two")
    with running("prune", capsys) as run:
        assert run(*base, "--output", tmp_path / "one").code == 0
    assert measured(tmp_path / "two") == measured(tmp_path / "one")
    assert_same_exports(tmp_path / "two", tmp_path / "one")
