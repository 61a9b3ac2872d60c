"""The Dockerfile without Docker: its lint, and its steps on a bare Python and on one that has everything."""

from __future__ import annotations

import re
import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest
from distributed.launching import ROOT, environment

DOCKERFILE = (ROOT / "Dockerfile").read_text()


def test_hadolint():
    command = [Path(sys.executable).with_name("hadolint"), "Dockerfile"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_what_is_copied_is_in_the_build_context():
    allowed = {
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line[:1] == "!"
    }
    assert copied() == allowed


def copied() -> set[str]:
    """The COPY lines' sources."""
    lines = re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.M)
    return {name for line in lines for name in line.split()}


@pytest.fixture
def image(tmp_path):
    """What the COPY lines put into the image, and a bare Python beside it."""
    for name in copied():
        source, target = ROOT / name, tmp_path / "opt" / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(source, target)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    return tmp_path


def python(image: Path, *arguments: object) -> str:
    env = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [image / "venv" / "bin" / "python", *map(str, arguments)],
        cwd=image / "opt", env=env, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def packages(image: Path) -> set[str]:
    return set(python(image, "-m", "pip", "list", "--format=freeze").lower().split())


@pytest.mark.setup
@pytest.mark.timeout(1800)
def test_the_install_step_on_a_bare_python(image):
    said = python(image, "docker/install.py")
    assert "installed beside it: datasets==" in said
    assert "not here, and needed: torch, transformers, megatron" in said
    names = {line.partition("==")[0] for line in packages(image)}
    assert {"mbridge-prune", "datasets", "gguf", "pyarrow", "rich", "safetensors", "pyyaml"} <= names
    assert not names & {"torch", "transformers", "megatron-core", "megatron-bridge"}
    before = packages(image)
    assert "installed beside it: nothing" in python(image, "docker/install.py")
    assert packages(image) == before


@pytest.mark.setup
@pytest.mark.timeout(1800)
def test_the_install_step_where_everything_is_there(image):
    """As in the container: nothing is installed or replaced, and the image's command works from its own tree."""
    own = Path(python(image, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    lines = (f"import site; site.addsitedir({folder!r})\n" for folder in site.getsitepackages())
    (own / "container.pth").write_text("".join(lines))
    before = packages(image)
    assert "installed beside it: nothing" in python(image, "docker/install.py")
    assert {line for line in packages(image) ^ before if "mbridge" not in line} == set()
    command = re.search(r'^CMD \["python", (.*)\]$', DOCKERFILE, re.M)
    assert command is not None
    assert "--prune-export-config" in python(image, *command[1].replace('"', "").split(", "))
    where = python(image, "-c", "import mbridge_prune; print(mbridge_prune.__file__)")
    assert Path(where.strip()) == image / "opt" / "mbridge_prune" / "__init__.py"
