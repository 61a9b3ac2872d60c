"""A Slurm cluster of this machine alone: sbatch, srun, scontrol and scancel that start real processes.

Every node is this machine under another node number, so that torchrun has one agent a node to bring together.
The commands know what our batch scripts use of them and refuse anything else.

    python cluster.py BIN    # writes the four commands into a folder
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

SRUN_KNOWN = (
    "--nodes", "--ntasks-per-node", "--kill-on-bad-exit", "--cpu-bind", "--chdir", "--container-image", "--container-mounts",
    "--container-workdir", "--no-container-mount-home",
)  # fmt: skip
COMMANDS = ("sbatch", "srun", "scontrol", "scancel")
JOB = str(30_000 + os.getpid() % 10_000)


def state() -> Path:
    """The folder that stands for the controller's memory."""
    return Path(os.environ["FAKE_SLURM"])


def write_commands(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in COMMANDS:
        command = folder / name
        command.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).resolve()} {name} "$@"\n')
        command.chmod(0o755)


def sbatch(arguments: list[str]) -> int:
    """Runs a batch script to its end, as often as it is put back into the queue; prints the job's number.

    Where FAKE_SLURM_WARN names a file, the script gets USR1 (as by --signal=B:USR1@...) when it appears.
    """
    options, script, more = {}, "", []
    for word in arguments:
        if script:
            more.append(word)
        elif word.startswith("--"):
            key, _, options[key] = word.partition("=")
        else:
            script = word
    header = re.findall(r"^#SBATCH (--[\w-]+)(?:=(.*))?$", Path(script).read_text(), re.M)
    options = {**dict(header), **options}
    nodes = int(options["--nodes"])
    log = options["--output"].replace("%x", options["--job-name"]).replace("%j", JOB)
    env = {
        **os.environ, "SLURM_JOB_ID": JOB, "SLURM_JOB_NAME": options["--job-name"], "SLURM_NNODES": str(nodes),
        "SLURM_JOB_NODELIST": f"node[1-{nodes}]", "SLURM_SUBMIT_DIR": os.getcwd(),
    }  # fmt: skip
    restarts, code = 0, 0
    while restarts < 5:
        (state() / "queued").unlink(missing_ok=True)
        again = {"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}
        with open(log, "a" if options.get("--open-mode") == "append" else "w") as out:
            job = subprocess.Popen(["bash", script, *more], env={**env, **again}, stdout=out, stderr=out)
            warned = False
            while job.poll() is None:
                time.sleep(0.05)
                warn = os.environ.get("FAKE_SLURM_WARN")
                if warn and not warned and not restarts and Path(warn).exists():
                    assert options["--signal"].startswith("B:USR1@")
                    warned = True
                    job.send_signal(signal.SIGUSR1)
            code = job.returncode
        if not (state() / "queued").exists():
            break
        assert "--requeue" in options
        restarts += 1
    print(f"Submitted batch job {JOB}")
    return code


def srun(arguments: list[str]) -> int:
    """One process a node; the first that fails ends the others, as --kill-on-bad-exit asks for."""
    options: dict[str, str] = {}
    while arguments[0].startswith("--"):
        key, _, options[key] = arguments.pop(0).partition("=")
        if key not in SRUN_KNOWN:
            print(f"srun: unrecognized option '{key}'", file=sys.stderr)
            return 1
    with open(state() / "srun", "a") as record:
        record.write(" ".join(f"{k}={v}" for k, v in options.items()) + "\n")
    tasks = [
        subprocess.Popen(
            arguments, cwd=options.get("--chdir"),
            env={**os.environ, "SLURM_NODEID": str(node), "SLURM_PROCID": str(node), "SLURM_STEP_NUM_TASKS": options["--nodes"]},
        )
        for node in range(int(options["--nodes"]))
    ]  # fmt: skip
    (state() / "tasks").write_text(" ".join(str(task.pid) for task in tasks))
    while any(task.poll() is None for task in tasks):
        if "--kill-on-bad-exit" in options and any(task.poll() for task in tasks):
            for task in tasks:
                task.terminate()
        time.sleep(0.05)
    return max(abs(task.wait()) for task in tasks)


def scontrol(arguments: list[str]) -> int:
    if arguments[:2] == ["show", "hostnames"]:
        low, high = re.fullmatch(r"node\[(\d+)-(\d+)\]", arguments[2]).groups()  # type: ignore[union-attr]
        print("\n".join(["localhost"] * (int(high) - int(low) + 1)))
        return 0
    if arguments == ["requeue", os.environ["SLURM_JOB_ID"]]:
        (state() / "queued").touch()
        return 0
    return 1


def scancel(arguments: list[str]) -> int:
    """--signal=TERM JOB: to the processes of the job's steps, not to the batch script."""
    if arguments != ["--signal=TERM", os.environ["SLURM_JOB_ID"]]:
        return 1
    for pid in (state() / "tasks").read_text().split():
        os.kill(int(pid), signal.SIGTERM)
    return 0


if __name__ == "__main__":
    sys.exit(
        {"sbatch": sbatch, "srun": srun, "scontrol": scontrol, "scancel": scancel}[sys.argv[1]](sys.argv[2:])
    )
