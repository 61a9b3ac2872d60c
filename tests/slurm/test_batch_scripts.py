"""launch/slurm: the batch scripts on two nodes, which are two torchrun agents on this machine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import write_commands
from distill.conftest import save_tokenizer, write_dataset
from distributed.launching import ROOT, environment
from end_to_end.conftest import plan_of, weights_of
from models import write_hf

from mbridge_prune import config
from mbridge_prune.distill.settings import Settings as Distillation

SCRIPTS = sorted((ROOT / "launch" / "slurm").iterdir())
SIZES = {"ffn_hidden_size": 64, "num_layers": 3}
STOPS_AFTER_SCORES = """
import os, runpy, signal, sys
sys.path.insert(0, {root!r})
if "SLURM_RESTART_COUNT" not in os.environ:
    import mbridge_prune.mcore_minitron as minitron
    save = minitron.save_scores

    def save_and_wait(*arguments):
        save(*arguments)
        if os.environ["RANK"] == "0":
            open(os.environ["FAKE_SLURM_WARN"], "w").close()
        signal.pause()

    minitron.save_scores = save_and_wait
sys.argv[0] = {script!r}
runpy.run_path({script!r}, run_name="__main__")
"""
SAYS_WHAT_IT_IS_GIVEN = """
import json, os, sys
import torch.distributed as dist
dist.init_process_group("gloo")
ranks = [None] * dist.get_world_size()
dist.all_gather_object(ranks, (dist.get_rank(), os.environ["SLURM_NODEID"]))
if dist.get_rank() == 0:
    json.dump({"arguments": sys.argv[1:], "ranks": ranks}, open(os.environ["SAID"], "w"))
dist.destroy_process_group()
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """`slurm(script, *arguments, VARIABLE=...)` submits it from a folder of its own; returns (process, log)."""
    write_commands(tmp_path / "bin")
    (tmp_path / "slurm").mkdir()
    (tmp_path / "submit").mkdir()
    (tmp_path / "submit" / "launch").symlink_to(ROOT / "launch")

    def submit(script: str, *arguments: str, sbatch: tuple[str, ...] = (), **variables: object):
        path = f"{tmp_path}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
        given = {name: str(value) for name, value in variables.items()}
        env = environment(PATH=path, FAKE_SLURM=f"{tmp_path}/slurm", PYTHONPATH=str(ROOT), **given)
        done = subprocess.run(
            ["sbatch", "--nodes=2", *sbatch, f"launch/slurm/{script}.sbatch", *arguments],
            env=env, cwd=tmp_path / "submit", capture_output=True, text=True, timeout=900,
        )  # fmt: skip
        [log] = (tmp_path / "submit").glob("*.log")
        return done, log

    return submit


def repository(folder: Path, **scripts: str) -> Path:
    """A REPO whose launch/ has these programs."""
    (folder / "launch").mkdir(parents=True)
    for name, content in scripts.items():
        (folder / "launch" / f"{name}.py").write_text(content)
    return folder


def test_shellcheck():
    paths = [str(p.relative_to(ROOT)) for p in SCRIPTS]
    done = subprocess.run(
        [Path(sys.executable).with_name("shellcheck"), "-x", *paths], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.slow  # torchrun on two nodes, twice
@pytest.mark.timeout(1000)
def test_a_warned_prune_is_queued_again_and_goes_on(slurm, site, tmp_path):
    script = str(ROOT / "launch" / "prune.py")
    program = STOPS_AFTER_SCORES.format(root=str(ROOT / "tests"), script=script)
    done, log = slurm(
        "prune", "--seq-length", "12", "calibration.num_samples=8",
        MODEL=site / "model", DATA=site / "tokens.npy", SIZES=json.dumps(SIZES), OUTPUT=tmp_path / "run", PP=2, NPROC=1,
        REPO=repository(tmp_path / "repo", prune=program), FAKE_SLURM_WARN=tmp_path / "scored",
    )  # fmt: skip
    text = log.read_text()
    assert done.returncode == 0, text
    assert log.name.startswith("mbridge-prune-") and log.stem.rpartition("-")[2] in done.stdout
    assert ", start 1: 2 x 1 ranks" in text and ", start 2: 2 x 1 ranks" in text
    assert "== told to stop" in text and "== queued again" in text
    first, second = text.split("== queued again")
    assert "wrote" not in first
    assert "taking up the run" in second and "no scoring pass needed" in second
    assert plan_of(tmp_path / "run")["sizes_after"]["num_layers"] == 3
    assert sorted(weights_of(tmp_path / "run" / "hf"))[0] == "model.embed_tokens.weight"


@pytest.mark.slow  # torchrun on two nodes, twice
@pytest.mark.timeout(1000)
def test_a_warned_distillation_saves_is_queued_again_and_goes_on(slurm, tmp_path):
    write_hf("llama_tied", tmp_path / "teacher", seed=3)
    write_hf("llama_tied", tmp_path / "student", seed=4, intermediate_size=64)
    for name in ("teacher", "student"):
        save_tokenizer(tmp_path / name)
    for seed, name in enumerate(("train", "valid")):
        write_dataset(tmp_path / name, 60, seed)
    steps, run = 200, tmp_path / "run"
    words = ["--seq-length", "16", "--gbs", "4", "--mbs", "2", "--steps", str(steps), "--warmup-steps", "1", "--eval-iters",
             "1", "--eval-interval", "1000", "--save-interval", "1000", "--log-interval", "1"]  # fmt: skip
    done, log = slurm(
        "distill", *words, TEACHER=tmp_path / "teacher", STUDENT=tmp_path / "student", DATA=tmp_path / "train",
        VALID=tmp_path / "valid", OUTPUT=run, NPROC=1, REPO=ROOT, GRACE=60, FAKE_SLURM_WARN=run / "losses.jsonl",
    )  # fmt: skip
    text = log.read_text()
    assert done.returncode == 0, text
    first, second = text.split("== queued again")
    assert "Sending process" not in first.partition("told to stop;")[0]  # torchrun's, before it kills
    assert "a checkpoint was written, the same command goes on from it" in first
    step = int(re.search(r"going on from the checkpoint of step (\d+)", second)[1])  # type: ignore[index]
    assert 0 < step < steps
    trained = [json.loads(line) for line in (run / "losses.jsonl").read_text().splitlines()]
    assert [line["step"] for line in trained if "train" in line] == list(range(1, steps + 1))
    assert (run / "hf" / "model.safetensors").is_file()


def test_a_command_that_fails_by_itself_is_not_queued_again(slurm, tmp_path):
    wrong = "import sys; sys.exit('error: as for a wrong request')"
    done, log = slurm("prune", MODEL="m", NPROC=1, REPO=repository(tmp_path / "repo", prune=wrong))
    text = log.read_text()
    assert done.returncode != 0
    assert "error: as for a wrong request" in text and "queued again" not in text
    assert text.count(", start ") == 1


@pytest.mark.slow
def test_what_distill_is_given(slurm, tmp_path):
    said = tmp_path / "said.json"
    done, log = slurm(
        "distill", "train.lr=2e-4", TEACHER="/the parent", STUDENT="/pruned/hf", STUDENT_MEGATRON="/pruned/megatron",
        DATA="0.7,/d/a,0.3,/d/b", VALID="/d/v", TOKENS="80e9", TP=4, PP=2, OUTPUT="runs/x", NPROC=2, SAID=said,
        REPO=repository(tmp_path / "repo", distill=SAYS_WHAT_IT_IS_GIVEN),
    )  # fmt: skip
    assert done.returncode == 0, log.read_text()
    content = json.loads(said.read_text())
    assert content["arguments"] == [
        "--output", f"{tmp_path}/submit/runs/x", "--stop-file", f"{tmp_path}/submit/runs/x/stop", "--tp", "4", "--pp", "2", "--teacher-hf-path", "/the parent",
        "--student-hf-path", "/pruned/hf", "--student-megatron-path", "/pruned/megatron", "--data", "0.7,/d/a,0.3,/d/b",
        "--valid-data", "/d/v", "--tokens", "80e9", "train.lr=2e-4",
    ]  # fmt: skip
    ranks = content["ranks"]
    assert [rank for rank, _ in ranks] == [0, 1, 2, 3]
    assert len({node for _, node in ranks[:2]}) == len({node for _, node in ranks[2:]}) == 1
    assert {node for _, node in ranks} == {"0", "1"}


@pytest.mark.slow
def test_inside_a_container(slurm, tmp_path):
    """pyxis' flags; the program is the image's, so here it is not found and the job ends."""
    done, log = slurm(
        "prune",
        MODEL="m",
        IMAGE="registry#mbridge-prune",
        MOUNTS="/data:/data,/runs",
        NPROC=1,
        sbatch=("--nodes=1",),
    )
    assert done.returncode != 0
    assert "launch/prune.py --output" in log.read_text()
    [line] = (tmp_path / "slurm" / "srun").read_text().splitlines()
    # Else Slurm may give the one task of a node one core, and all ranks and loaders with it.
    assert "--cpu-bind=none" in line
    for word in ("--container-image=registry#mbridge-prune", "--container-mounts=/data:/data,/runs",
                 "--container-workdir=/opt/mbridge_prune", "--no-container-mount-home"):  # fmt: skip
        assert word in line
    assert "--chdir" not in line


@pytest.mark.parametrize("script", ["prune", "distill"])
def test_what_the_scripts_pass_the_programs_know(script):
    parser = config.parser() if script == "prune" else config.parser(Distillation)
    words = (ROOT / "launch" / "slurm" / f"{script}.sbatch").read_text()
    passed = set(re.findall(r'(--[\w-]+) "\$', words))
    assert {"--output", "--pp"} <= passed
    assert passed <= {flag for action in parser._actions for flag in action.option_strings}
