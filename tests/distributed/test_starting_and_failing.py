"""Ranks that SLURM started prune together; a rank that dies takes the others down, with the reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from launching import srun, torchrun

HERE = Path(__file__).parent


def test_slurm_variables_alone_make_two_ranks(site, job, result):
    one = job("slurm", "untied", "untied", result("single", "untied").plan["sizes_after"], {}, 2)
    (site / "slurm.json").write_text(json.dumps([one]))
    for done in srun(2, HERE / "jobs.py", site / "slurm.json"):
        assert done.returncode == 0, done.stderr
    mine = type(result("single", "untied"))(site / "slurm" / "untied")
    assert all(torch.equal(mine.weights[n], w) for n, w in result("single", "untied").weights.items())


def test_the_command_on_two_stages(site, tmp_path):
    """What is refused without the weights must not be refused wrongly where every rank checks it."""
    done = torchrun(
        2, "launch/prune.py", "--hf-path", site / "models" / "tied", "--pp", 2, "--calib-data", site / "tokens.npy",
        "--calib-num-samples", 8, "--seq-length", 12, "--prune-export-config", '{"ffn_hidden_size": 64}',
        "--output", tmp_path / "run",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert (
        plan["sizes_after"]["ffn_hidden_size"] == 64 and (tmp_path / "run" / "hf" / "config.json").is_file()
    )


@pytest.mark.parametrize(
    ("how", "reason"),
    [("raise", "rank 1 failed: RuntimeError: the accelerator fell off"), ("exit", "exitcode")],
)
def test_a_rank_that_dies_in_calibration_stops_the_run_under_torchrun(site, how, reason):
    done = torchrun(2, HERE / "dying.py", site / "models" / "untied", how)
    assert done.returncode != 0
    assert "finished all the same" not in done.stdout
    assert reason in done.stderr
    assert how == "raise" or "9" in done.stderr


def test_what_one_rank_alone_refuses_is_said(site):
    """Rank 0 speaks for all ranks, except about what it has not seen."""
    waiting, refusing = srun(2, HERE / "dying.py", site / "models" / "untied", "refuse")
    assert refusing.returncode == 2
    assert "error: rank 1: the text of this rank is missing" in refusing.stderr
    assert waiting.returncode != 0


def test_a_rank_that_vanishes_stops_its_neighbour_without_a_launcher(site):
    alive, dead = srun(2, HERE / "dying.py", site / "models" / "untied", "exit")
    assert dead.returncode == 9
    assert alive.returncode == 1
    assert alive.stderr.startswith("rank 0 failed: ") or "\nrank 0 failed: " in alive.stderr


SLOW_TO_CONNECT = """
import os, sys, time
from pathlib import Path
import torch.distributed as dist
from mbridge_prune import runtime

connect, connected = dist.init_process_group, Path(sys.argv[1])

def slowly(*args, **kwargs):
    connect(*args, **kwargs)
    if os.environ["RANK"] == "0":
        time.sleep(1)
        connected.touch()

dist.init_process_group = slowly
runtime.start_distributed()
assert connected.exists()
dist.destroy_process_group()
"""


def test_a_rank_may_leave_at_once_only_when_all_are_connected(tmp_path):
    script = tmp_path / "start.py"
    script.write_text(SLOW_TO_CONNECT)
    done = torchrun(2, script, tmp_path / "connected")
    assert done.returncode == 0, done.stderr
