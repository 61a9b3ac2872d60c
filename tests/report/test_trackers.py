"""TensorBoard gets what it is told; a tracker that is asked for and missing is an error."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest

from mbridge_prune import runtime
from mbridge_prune.errors import UserError
from mbridge_prune.report.trackers import Trackers, send_run


def test_tensorboard_reads_back_what_was_sent(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Trackers(tensorboard_dir=tmp_path) as trackers:
        trackers.scalars({"search/kl": 0.5, "search/params": 6e9}, step=0)
        trackers.scalars({"search/kl": 0.25}, step=3)
        trackers.text("plan", "**sizes**")
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("search/kl")] == [(0, 0.5), (3, 0.25)]
    assert events.Scalars("search/params")[0].value == pytest.approx(6e9)
    assert events.Tensors("plan/text_summary")[0].tensor_proto.string_val == [b"**sizes**"]


@pytest.mark.parametrize("package, asked, fix", [
    ("wandb", {"wandb_project": "p"}, "pip install wandb"),
    ("torch.utils.tensorboard", {"tensorboard_dir": "folder"}, "pip install tensorboard"),
])  # fmt: skip
def test_a_missing_package_names_its_install(monkeypatch, package, asked, fix, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=fix):
        Trackers(**asked)


def test_wandb_is_told_the_same(monkeypatch):
    told = []
    run = SimpleNamespace(
        log=lambda values, step: told.append((values, step)),
        summary={},
        finish=lambda: told.append("finished"),
    )
    init = lambda project: told.append(project) or run
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, login=lambda prompt=None: True))
    trackers = Trackers(wandb_project="prune")
    assert told == [], "nothing begins before there is something to tell"
    trackers.scalars({"loss": 1.5}, step=2)
    trackers.text("plan", "sizes")
    trackers.close()
    trackers.close()
    assert told == ["prune", ({"loss": 1.5}, 2), "finished"]
    assert run.summary == {"plan": "sizes"}


def test_wandb_that_does_not_start_is_one_line(monkeypatch):
    def init(project):
        raise RuntimeError("no key")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, login=lambda prompt=None: True))
    with pytest.raises(UserError, match=r"did not start \(no key\)"):
        Trackers(wandb_project="prune").text("plan", "sizes")


def test_a_key_that_is_missing_is_told_before_anything_runs(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(login=lambda prompt=None: False))
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(UserError, match="wandb login"):
        Trackers(wandb_project="prune")
    monkeypatch.setenv("WANDB_MODE", "offline")
    Trackers(wandb_project="prune").close()


def test_a_run_that_sends_nothing_leaves_nothing(tmp_path):
    with Trackers(tensorboard_dir=tmp_path / "tb"):
        pass
    assert not (tmp_path / "tb").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to .*file/tb: .*file is no folder"):
        Trackers(tensorboard_dir=tmp_path / "file" / "tb")


def test_nothing_asked_is_nothing_done_and_other_ranks_are_silent(monkeypatch, tmp_path):
    Trackers().scalars({"loss": 1.0}, step=0)
    monkeypatch.setattr(runtime, "rank", lambda: 1)
    with Trackers(tensorboard_dir=tmp_path / "tb") as trackers:
        trackers.scalars({"loss": 1.0}, step=0)
    assert not (tmp_path / "tb").exists()


def test_a_search_is_sent_in_rising_steps(tmp_path):
    """W&B drops what comes at a step below the last."""
    told = []
    trackers = SimpleNamespace(scalars=lambda v, s: told.append((s, v)), text=lambda *a: told.append(a))
    records = [
        {"kind": "search", "full": {"hidden_size": 8}, "space": {"hidden_size": [4, 8]}, "budgets": {}, "grid": 2},
        {"kind": "halving", "sizes": {"hidden_size": 4}, "kl": 0.5, "se": 0.1, "samples": 2, "params": 40,
         "predicted": 0.4, "round": 0},
    ]  # fmt: skip
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    plan = {
        "sizes_before": {"hidden_size": 8}, "sizes_after": {"hidden_size": 4}, "params_before": 80,
        "params_after": 40, "active_before": 80, "active_after": 40, "layer_scores": [0.1, 0.2],
        "loss": {"before": {"loss": 1.0}, "after": {"loss": 1.5}, "kl": {"kl": 0.5}},
    }  # fmt: skip
    send_run(trackers, plan, tmp_path / "c.jsonl")
    assert told[0] == ("sizes", "| | before | after |\n| --- | --- | --- |\n| hidden_size | 8 | 4 |")
    assert [step for step, _ in told[1:]] == [0, 1]
    first = told[1][1]
    assert first["loss/before"] == 1.0 and first["loss/after"] == 1.5 and first["kl/kl"] == 0.5
    assert (
        first["candidate/kl"] == 0.5 and first["candidate/params"] == 40.0 and first["params_after"] == 40.0
    )
    assert told[2] == (1, {"layer_score": 0.2})
