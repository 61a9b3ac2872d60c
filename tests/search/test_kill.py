"""A search that is killed at arbitrary moments ends like one that was not, and measures nothing twice."""

from __future__ import annotations

import hashlib
import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from distributed.launching import ROOT, environment
from models import tokens, write_hf

from mbridge_prune.bridge.exported import RECORD

EXPORTS = ["--export-top-k", "2"]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[str]:
    site = tmp_path_factory.mktemp("kill")
    write_hf("llama", site / "model", seed=4)
    np.save(site / "tokens.npy", tokens(16).numpy())
    return [
        "--hf-path", f"{site}/model", "--calib-data", f"{site}/tokens.npy", "--seq-length", "12",
        "--calib-num-samples", "8", "--search-num-samples", "8", "--prune-target-params", "70%", "--top-k", "4",
        "--max-width-pruning", "0.5", "--max-depth-pruning", "0.5", "--hidden-size-divisor", "16",
        "--ffn-hidden-size-divisor", "32", "--num-layers-divisor", "1",
    ]  # fmt: skip


def start(
    arguments: list[str], folder: Path, *command: str, script: str = "launch/prune.py"
) -> subprocess.Popen[str]:
    command = (sys.executable, script, *command, *arguments, "--output", str(folder))
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=environment()
    )


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory) -> Path:
    """The folder of a run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run = start([*arguments, *EXPORTS], folder)
    said, _ = run.communicate(timeout=200)
    assert run.returncode == 0, said
    return folder


@pytest.mark.slow
def test_kill_nine_at_random_moments(arguments, whole, tmp_path):
    want = lines_of(whole / "candidates.jsonl")
    folder, chance = tmp_path / "killed", random.Random(5)
    for _ in range(2):
        log = folder / "candidates.jsonl"
        until = len(lines_of(log)) + chance.randint(1, len(want) // 3)
        run = start([*arguments, *EXPORTS], folder)
        while run.poll() is None and len(lines_of(log)) < until:
            pass
        run.send_signal(signal.SIGKILL)
        run.communicate(timeout=30)
        assert run.returncode == -signal.SIGKILL, "it was to be killed before it was done"
    last = start([*arguments, *EXPORTS], folder)
    said, _ = last.communicate(timeout=200)
    assert last.returncode == 0 and "search taken up again" in said, said
    got = [json.loads(line) for line in lines_of(folder / "candidates.jsonl")]
    keys = [json.dumps([r["kind"], r.get("sizes"), r.get("samples")], sort_keys=True) for r in got]
    assert len(keys) == len(set(keys)), "nothing is measured twice"
    assert_equal_runs(folder, whole)


MOMENTS = [
    "os.mkdir .01.partial",  # a runner-up
    "os.rename .02.partial",
    "os.mkdir .hf.partial",  # the winner
    "open config.json",
    "os.rename .hf.partial",
    "open .plan.json.partial",
    "os.rename .plan.json.partial",
    "open .report.html.partial",
]
"""Of an export, the plan and the page, in the order in which a run comes to them."""


@pytest.mark.slow
def test_kill_nine_while_the_results_are_written(arguments, whole, tmp_path):
    """Killed at one moment after another in the same folder; what stands under a final name is whole."""
    folder = tmp_path / "killed"
    for moment in MOMENTS:
        run = start([*arguments, *EXPORTS], folder, moment, script="tests/search/killing.py")
        said, _ = run.communicate(timeout=200)
        assert run.returncode == -signal.SIGKILL, (moment, said)
        for export in [folder / "hf", *(folder / "candidates").glob("[0-9]*")]:
            if export.exists():
                original = whole / export.relative_to(folder)
                assert export_of(export) == export_of(original), (moment, export.name)
        if (folder / "plan.json").exists():
            assert json.loads((folder / "plan.json").read_text())["params_after"]
    assert not (folder / "report.html").exists(), "the last of the moments is that of the page"
    last = start([*arguments, *EXPORTS], folder)
    said, _ = last.communicate(timeout=200)
    assert last.returncode == 0, said
    assert_equal_runs(folder, whole)
    assert (folder / "report.html").exists() and not [p for p in folder.rglob(".*") if p.is_file()]


def export_of(folder: Path) -> dict[str, str]:
    """A hash of every file of an exported model."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in folder.iterdir() if path.name != RECORD}  # fmt: skip


def assert_equal_runs(folder: Path, whole: Path) -> None:
    """The same measurements, plan and exports; only times differ."""
    found, want = (
        [
            {k: v for k, v in json.loads(line).items() if k != "seconds"}
            for line in lines_of(f / "candidates.jsonl")
        ]
        for f in (folder, whole)
    )
    assert found == want
    plans = [json.loads((f / "plan.json").read_text()) for f in (folder, whole)]
    for plan in plans:
        del plan["seconds"], plan["settings"]
    assert plans[0] == plans[1]
    for name in ("hf", "candidates/01", "candidates/02"):
        assert export_of(folder / name) == export_of(whole / name)
