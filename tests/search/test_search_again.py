"""A search that is started again in its folder with other settings, as its users do."""

from __future__ import annotations

import json
import os

import pytest
from end_to_end.conftest import plan_of, snapshot

from mbridge_prune.bridge.exported import RECORD, put_in_place


def sizes_in(folder):
    return json.loads((folder / RECORD).read_text())["sizes"]


def test_another_budget_begins_a_new_search_and_exports_what_it_finds(run, searching, tmp_path):
    folder, best = tmp_path / "run", ["--export-top-k", 1]
    assert run(*searching, *best).code == 0
    first = plan_of(folder)
    said = run(*searching, *best, "--prune-target-params", "60%")
    assert said.code == 0, said.err
    assert "a new search begins (budgets was" in said.out + said.err
    assert (folder / "candidates.1.jsonl").is_file()
    second = plan_of(folder)
    assert second["params_after"] <= 0.6 * second["params_before"] < first["params_after"]
    assert sizes_in(folder / "hf") == sizes_in(folder / "candidates" / "01") == second["sizes_after"]
    assert not list(folder.glob(".*")), "nothing is left aside"
    before = snapshot(folder)
    assert "already finished" in run(*searching, *best, "--prune-target-params", "60%").out
    assert snapshot(folder) == before


@pytest.mark.parametrize("more", [["--top-k", 3], ["--export-top-k", 1], ["--score-lower-bound", -100]])
def test_more_of_the_same_search_goes_on(run, searching, tmp_path, more):
    assert run(*searching).code == 0
    said = run(*searching, *more)
    assert said.code == 0 and "search taken up again" in said.out, said
    assert not (tmp_path / "run" / "candidates.1.jsonl").exists()
    assert sizes_in(tmp_path / "run" / "hf") == plan_of(tmp_path / "run")["sizes_after"]


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["--calib-num-samples", 5], "calibration.num_samples was 6, is 5"),
        (["--search-num-samples", 5], "search.num_samples was "),
        (["--dtype", "bfloat16"], "model.dtype was 'auto', is 'bfloat16'"),
    ],
)
def test_other_data_or_another_model_begin_a_new_search_beside_the_former(
    run, searching, tmp_path, more, why
):
    assert run(*searching).code == 0
    before = snapshot(tmp_path / "run")
    refused = run(*searching, *more, "--prune-target-params", "1%")  # before anything is moved
    assert refused.code == 2 and snapshot(tmp_path / "run") == before
    said = run(*searching, *more)
    assert said.code == 0 and f"a new search begins ({why}" in said.out, said
    moved = {
        path.replace("/run.1", "/run", 1): content for path, content in snapshot(tmp_path / "run.1").items()
    }
    assert moved == before
    assert sizes_in(tmp_path / "run" / "hf") == plan_of(tmp_path / "run")["sizes_after"]
    assert "already finished" in run(*searching, *more).out


def test_a_search_that_reads_from_the_former_run_moves_nothing(run, searching, tmp_path):
    assert run(*searching).code == 0
    before = snapshot(tmp_path / "run")
    said = run(*searching, "--scores", tmp_path / "run" / "scores.safetensors", "--calib-num-samples", 5)
    assert said.code == 2 and "begun with other settings (calibration.num_samples was 6" in said.err
    assert snapshot(tmp_path / "run") == before


def test_a_folder_that_cannot_be_moved_is_named(run, searching, tmp_path, monkeypatch):
    assert run(*searching).code == 0
    before = snapshot(tmp_path / "run")

    def busy(self, target):
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(type(tmp_path), "rename", busy)
    said = run(*searching, "--calib-num-samples", 5)
    assert said.code == 2 and "cannot be moved: [Errno 16] Device or resource busy" in said.err
    assert snapshot(tmp_path / "run") == before


def test_what_is_not_an_export_is_never_replaced(run, searching, tmp_path):
    assert run(*searching).code == 0
    (tmp_path / "run" / "hf" / RECORD).unlink()
    before = snapshot(tmp_path / "run" / "hf")
    said = run(*searching, "--prune-target-params", "60%")
    assert said.code == 2 and "hf is not empty" in said.err
    assert snapshot(tmp_path / "run" / "hf") == before


def test_a_model_that_was_changed_since_is_never_replaced(run, searching, tmp_path):
    """A user has trained on in the folder: its record alone does not make it ours."""
    assert run(*searching).code == 0
    weights = tmp_path / "run" / "hf" / "model.safetensors"
    os.utime(weights, (0, 0))
    said = run(*searching, "--prune-target-params", "60%")
    assert said.code == 2 and "hf is not empty and holds files of later than its export" in said.err
    assert weights.stat().st_mtime == 0


def test_exports_that_are_none_of_the_search_any_more_go(run, searching, tmp_path):
    """Those beyond a smaller number, and of a search that was replaced; not what holds anything else."""
    folder = tmp_path / "run" / "candidates"
    assert run(*searching, "--top-k", 4, "--export-top-k", 4).code == 0
    (folder / "04" / "notes.txt").write_text("the user's")
    (folder / "mine").mkdir()
    said = run(*searching, "--top-k", 4, "--export-top-k", 2)
    assert said.code == 0, said.err
    assert sorted(p.name for p in folder.iterdir()) == ["01", "02", "04", "mine"]
    assert "removed" in said.out and "03: an export" in said.out and "04 is of an earlier search" in said.out
    (folder / "04" / "notes.txt").unlink()
    (folder / "mine").rmdir()
    assert run(*searching, "--prune-target-params", "60%").code == 0
    assert not folder.exists()


def test_a_search_that_finds_nothing_good_enough_has_a_page_and_no_more(run, searching, tmp_path):
    trackers = ["--tensorboard-dir", tmp_path / "tb"]
    said = run(*searching, *trackers, "--score-lower-bound", 0)
    assert said.code == 2 and "below score_lower_bound=0.0; nothing was cut" in said.err
    folder = tmp_path / "run"
    page = (folder / "report.html").read_text()
    assert "nothing was cut" in page and "score_lower_bound=0" in page and "The best candidates" in page
    assert not (folder / "hf").exists() and not (folder / "plan.json").exists()
    assert not (tmp_path / "tb").exists(), "no empty run is left"
    assert run(*searching, *trackers).code == 0
    assert (tmp_path / "tb").exists() and "nothing was cut" not in (folder / "report.html").read_text()
    plan, weights = (folder / "plan.json").read_bytes(), snapshot(folder / "hf")
    assert run(*searching, *trackers, "--score-lower-bound", 0).code == 2
    assert "nothing was cut" in (folder / "report.html").read_text(), "the plan is of the search before"
    assert (folder / "plan.json").read_bytes() == plan and snapshot(folder / "hf") == weights


def test_a_rename_that_fails_brings_the_former_back(tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "model").write_text("former")
    with pytest.raises(FileNotFoundError):
        put_in_place(tmp_path / "missing", tmp_path / "hf")
    assert (tmp_path / "hf" / "model").read_text() == "former"


def test_more_exports_than_scores_are_refused_at_once(run, searching, tmp_path):
    said = run(*searching, "--export-top-k", 3)
    assert said.code == 2 and "export_top_k=3 is more than top_k=2" in said.err
    assert not (tmp_path / "run").exists()


def test_defaults_of_a_search_in_a_file_are_no_search(run, searching, tmp_path):
    (tmp_path / "usual.yaml").write_text("search: {top_k: 10, score_func: kl, candidate_filter: null}\n")
    place = searching.index("--prune-target-params")
    words = [w for i, w in enumerate(searching) if i < place or w in ("--output", f"{tmp_path}/run")]
    said = run(
        "--config", tmp_path / "usual.yaml", *words, "--prune-export-config", '{"ffn_hidden_size": 64}'
    )
    assert said.code == 0, said.err
