"""launch/prune_vision.py as its users run it: a run folder, the same one on two ranks, and what is refused."""

from __future__ import annotations

import json
import re

import pytest
import torch
from commands import running
from distributed.launching import ROOT, python
from safetensors.torch import save_file

import mbridge_prune as mbp
from mbridge_prune.report.heterogeneous import write_report

CODE = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 12, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4))

def batches():
    random = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 3, 8, 8, generator=random), None) for _ in range(3)]

def score(model):
    images = batches()[0][0]
    return -float((model(images) - net().eval()(images)).square().mean().detach())

def number():
    return 3
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "mine", raising=False)
    return tmp_path


@pytest.fixture
def run(capsys):
    with running("prune_vision", capsys) as call:
        yield call


BASE = (
    "--model", "mine:net", "--data-loader", "mine:batches", "--prune-score-func", "mine:score",
    "--input-shape", "1,3,8,8", "--channel-divisor", "4", "--prune-target-flops", "50%", "--output", "out",
)  # fmt: skip


def test_the_page_says_where_a_unit_is_several_channels(run, here):
    assert run(*BASE).code == 0
    out = here / "out"
    assert "channels each" not in (out / "report.html").read_text()
    plan = json.loads((out / "plan.json").read_text())
    plan["search"]["channels_per_unit"]["0.out_channels"] = 2
    (out / "plan.json").write_text(json.dumps(plan))
    assert write_report(out).read_text().count(", of 2 channels each") == 1


def test_a_run_leaves_a_model_a_plan_a_map_and_a_page(run, here):
    assert run(*BASE).code == 0
    plan = json.loads((here / "out" / "plan.json").read_text())
    assert (
        plan["mode"] == "fastnas" and plan["costs"]["flops"]["after"] <= plan["costs"]["flops"]["before"] / 2
    )
    assert plan["settings"]["search"]["flops"] == "50%" and plan["versions"]["torch"]
    import mine

    model = mbp.restore(mine.net(), here / "out" / "pruned.safetensors").eval()
    assert sum(p.numel() for p in model.parameters()) == plan["params_after"]
    assert mine.score(model) == pytest.approx(plan["search"]["score_after"], abs=1e-6)
    page = (here / "out" / "report.html").read_text()
    share = f"{plan['costs']['flops']['after'] / plan['costs']['flops']['before']:.1%}"
    assert "FastNAS" in page and share.rstrip("%") in page and "0.<wbr>out_<wbr>channels" in page
    said = re.search(r"it alone loses no more than [^;<]+; what the budget then left was given back\.", page)
    assert said, "a sentence"
    assert len((here / "out" / "sensitivity.jsonl").read_text().splitlines()) == 1 + 1 + 3 + 2
    # The same command again has nothing to do; another budget in its folder measures nothing again.
    before = {p.name: p.stat().st_mtime_ns for p in (here / "out").iterdir()}
    assert "already finished" in run(*BASE).out
    assert before == {p.name: p.stat().st_mtime_ns for p in (here / "out").iterdir()}
    said = run(*BASE, "--prune-target-flops", "40%")
    assert said.code == 0 and "6 measurements read" in said.out


@pytest.mark.slow
def test_two_ranks_find_the_same(run, here):
    assert run(*BASE).code == 0
    ranks = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    command = ("launch/prune_vision.py", *BASE[:-1], here / "two")
    done = python(*ranks, *command, PYTHONPATH=f"{ROOT}:{here}")
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((here / name / "plan.json").read_text()) for name in ("out", "two"))
    assert (one["sizes_after"], one["kept"]) == (two["sizes_after"], two["kept"])
    assert one["search"] == two["search"]
    lines = lambda name: (here / name / "sensitivity.jsonl").read_text()
    assert lines("out") == lines("two")


def test_weights_are_read_and_a_dry_run_writes_nothing(run, here):
    import mine

    weights = mine.net().state_dict()
    weights["0.weight"] = torch.zeros_like(weights["0.weight"])
    save_file(weights, here / "w.safetensors")
    said = run(*BASE, "--weights", "w.safetensors", "--dry-run")
    assert said.code == 0 and "centroid" in said.out and not (here / "out").exists()
    assert run(*BASE, "--weights", "w.safetensors").code == 0
    model = mbp.restore(mine.net(), here / "out" / "pruned.safetensors")
    assert not model[0].weight.any()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--prune-target-flops", "1%"), "the choices reach from"),
        (("--prune-target-flop", "50%"), "did you mean '--prune-target-flops'"),
        (("--input-shape", "3,a"), "is no shape"),
        (("--input-shape", "1,4,8,8"), "does not run with dummy_input"),
        (("--model", "mine:nett"), "did you mean 'net'"),
        (("--model", "mine:number"), "mine:number returned int, expected an nn.Module"),
        (("--prune-score-func", "score"), "'score' is no function: give module:function"),
        (("--weights", "none.safetensors"), "--weights none.safetensors: "),
        (("prune.max_pruning=1.5",), "is no share"),
        (("model.factory=null",), "no network: give --model"),
        (("search.flops=null",), "nothing to prune"),
        (("search.score_func=null",), "no score"),
        (("data.loader=null",), "config needs a data_loader"),
    ],
)
def test_wrong_input_is_one_line(run, here, words, message):
    said = run(*BASE, *words)
    assert said.code == 2 and message in said.err and said.err.count("\n") == 1
    assert not (here / "out" / "pruned.safetensors").exists()
