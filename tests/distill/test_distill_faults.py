"""Killed in the middle of a checkpoint, told to stop, out of disk: the same command ends as if nothing had been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from distill.conftest import arguments, losses
from distributed.launching import ROOT, environment, python

pytestmark = pytest.mark.slow
FAILING = Path(__file__).with_name("failing.py")


@pytest.fixture(scope="module")
def whole(site, tmp_path_factory):
    """The losses and weights of a run that nothing happened to."""
    run = tmp_path_factory.mktemp("whole") / "run"
    done = python("launch/distill.py", *arguments(site, run))
    assert done.returncode == 0, done.stderr
    return run


def same(run: Path, whole: Path) -> None:
    assert losses(run) == losses(whole)
    assert (run / "hf" / "model.safetensors").read_bytes() == (
        whole / "hf" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("moment", ["shards", "tracker", "config"])
def test_kill_nine_in_the_middle_of_a_checkpoint(site, tmp_path, whole, moment):
    run = tmp_path / "run"
    killed = python(FAILING, moment, *arguments(site, run))
    assert killed.returncode == -signal.SIGKILL, killed
    assert (run / "checkpoints" / "iter_0000006").exists() and not (run / "hf").exists()
    again = python("launch/distill.py", *arguments(site, run))
    assert again.returncode == 0 and "checkpoint of step 3" in again.stdout, again
    same(run, whole)


def test_sigterm_to_the_process_group_writes_a_checkpoint(site, tmp_path):
    """As torchrun sends it: the processes that load the data get it, too."""
    run = tmp_path / "run"
    words = arguments(
        site, run, "--steps", 100000, "--save-interval", 100000, "--eval-iters", 0, "--num-workers", 2
    )
    started = subprocess.Popen(
        [sys.executable, "launch/distill.py", *words],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=environment(),
        start_new_session=True,
    )  # fmt: skip
    assert started.stdout is not None
    for line in started.stdout:
        if line.startswith("step 10/"):
            os.killpg(started.pid, signal.SIGTERM)
            break
    with started:
        said = started.stdout.read()
    assert started.returncode == 143, said
    assert "the same command goes on from it" in said
    (checkpoint,) = (run / "checkpoints").glob("iter_*")
    step = int(checkpoint.name.removeprefix("iter_"))
    again = python("launch/distill.py", *words[: words.index("--steps")], *arguments_after(words, step + 1))
    assert again.returncode == 2 and "other settings" in again.stderr  # steps decide the learning rate


def arguments_after(words: list[str], steps: int) -> list[str]:
    rest = words[words.index("--steps") :]
    return ["--steps", str(steps), *rest[2:], "--steps", str(steps)]


def test_a_full_disk_is_one_line_and_what_was_saved_stays(site, tmp_path, whole):
    disk = tmp_path / "disk"
    disk.mkdir()
    size = 1_900_000  # one checkpoint of 1.1 MB fits, a second does not
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        run = disk / "run"
        full = python("launch/distill.py", *arguments(site, run))
        assert full.returncode == 2, full
        last = full.stderr.splitlines()[-1]
        assert last.startswith("error: the run cannot go on: ") and "(0 MiB free" in last, full.stderr
        assert last.endswith("the same command goes on from the last checkpoint")
        assert [p.name for p in (run / "checkpoints").glob("iter_*")] == ["iter_0000003"]
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        again = python("launch/distill.py", *arguments(site, run))
        assert again.returncode == 0, again
        same(run, whole)
    finally:
        subprocess.run(["umount", disk], check=True)
