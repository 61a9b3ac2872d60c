"""A search that is killed at arbitrary moments ends like one that was not, and measures nothing twice."""

from __future__ import annotations

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


def start(arguments: list[str], folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "launch/prune.py", *arguments, "--output", str(folder)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=environment()
    )


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.slow
def test_kill_nine_at_random_moments(arguments, tmp_path):
    whole = start(arguments, tmp_path / "whole")
    said, _ = whole.communicate(timeout=200)
    assert whole.returncode == 0, said
    want = lines_of(tmp_path / "whole" / "candidates.jsonl")
    folder, chance = tmp_path / "killed", random.Random(5)
    for _ in range(2):
        log = folder / "candidates.jsonl"
        until = len(lines_of(log)) + chance.randint(1, len(want) // 3)
        run = start(arguments, folder)
        while run.poll() is None and len(lines_of(log)) < until:
            pass
        run.send_signal(signal.SIGKILL)
        run.communicate(timeout=30)
        assert run.returncode == -signal.SIGKILL, "it was to be killed before it was done"
    last = start(arguments, folder)
    said, _ = last.communicate(timeout=200)
    assert last.returncode == 0 and "search taken up again" in said, said
    got = [json.loads(line) for line in lines_of(folder / "candidates.jsonl")]
    keys = [json.dumps([r["kind"], r.get("sizes"), r.get("samples")], sort_keys=True) for r in got]
    assert len(keys) == len(set(keys)), "nothing is measured twice"
    plain = [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in want]
    assert [{k: v for k, v in r.items() if k != "seconds"} for r in got] == plain
    plans = [json.loads((f / "plan.json").read_text()) for f in (tmp_path / "whole", folder)]
    assert plans[0]["sizes_after"] == plans[1]["sizes_after"] and plans[0]["kept"] == plans[1]["kept"]
