"""Two ranks learn what one learns: data, pipeline and tensor parallel, uneven stages, experts, another resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from distill.conftest import arguments, copied, losses, save_tokenizer
from distributed.launching import torchrun
from models import write_hf
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

MIXED = ["--lm-weight", 0.3, "--temperature", 2, "--top-k", 5]
LAYOUTS = {
    "dp": ["--mbs", 1],
    "pp": ["--pp", 2, *MIXED],  # 4 layers of the teacher, 3 of the student
    "tp": ["--tp", 2, *MIXED],
    "resumed": ["--tp", 2, "--mbs", 1],  # from a checkpoint of one rank
}
SAME_AS = {"pp": "one_mixed", "tp": "one_mixed"}


def two_ranks(site: Path, file: Path, runs: list[list[str]]) -> None:
    file.write_text(json.dumps(runs))
    done = torchrun(2, Path(__file__).with_name("ranks.py"), file)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def runs(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from commands import launched

    root, main = tmp_path_factory.mktemp("layouts"), launched("distill").main
    assert main(arguments(site, root / "one")) == 0
    assert main(arguments(site, root / "one_mixed", *MIXED)) == 0
    half = copied(root / "one", root / "resumed")
    forget_the_end(half)
    two_ranks(site, root / "runs.json", [arguments(site, root / n, *more) for n, more in LAYOUTS.items()])
    return root


def forget_the_end(run: Path) -> None:
    """As if the run had been killed after its first checkpoint."""
    import shutil

    shutil.rmtree(run / "hf")
    (run / "distill.json").unlink()
    shutil.rmtree(run / "checkpoints" / "iter_0000006")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_losses_and_gradients_as_one_rank(runs, layout):
    ours, alone = losses(runs / layout), losses(runs / SAME_AS.get(layout, "one"))
    assert [line["step"] for line in ours] == [line["step"] for line in alone]
    for a, b in zip(ours, alone, strict=True):
        kind = "train" if "train" in b else "valid"
        assert a[kind] == pytest.approx(b[kind], rel=1e-5)
        if kind == "train":
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_exported_weights_as_one_rank(runs, layout):
    ours = load_file(runs / layout / "hf" / "model.safetensors")
    alone = load_file(runs / SAME_AS.get(layout, "one") / "hf" / "model.safetensors")
    assert ours.keys() == alone.keys()
    # Adam divides by the size of a gradient: where one is all but zero, its rounding is a whole step of lr.
    for name in alone:
        off = (ours[name] - alone[name]).abs()
        assert off.median() < 1e-6 and off.max() < 6e-3, name


@pytest.mark.slow
def test_experts_on_two_ranks(site, tmp_path):
    root = tmp_path
    for name, changes in (("teacher", {}), ("student", {"moe_intermediate_size": 16})):
        write_hf("qwen3_moe", root / name, seed=5, **changes)
        save_tokenizer(root / name)
    models = ["--teacher", root / "teacher", "--student", root / "student"]
    from commands import launched

    assert launched("distill").main(arguments(site, root / "one", *models)) == 0
    two_ranks(site, root / "runs.json", [arguments(site, root / "ep", *models, "--ep", 2, "--mbs", 1)])
    for a, b in zip(losses(root / "ep"), losses(root / "one"), strict=True):
        kind = "train" if "train" in b else "valid"
        assert a[kind] == pytest.approx(b[kind], rel=1e-4)
