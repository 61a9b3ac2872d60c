"""The start-up switch, and what torch still does right once it is on."""

import subprocess
import sys

import mbridge_prune  # noqa: F401  isort: skip
import pytest
import torch

from mbridge_prune import reference
from mbridge_prune.reference import cuda

no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is remapped with CUDA")


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False
    )


def test_enable_twice_changes_nothing():
    to = torch.Tensor.to
    assert reference.enable() == reference.enable()
    assert torch.Tensor.to is to


@no_cuda
def test_announces_once():
    out = run(
        "import logging; logging.basicConfig(level=20)\n"
        "import mbridge_prune; mbridge_prune.reference.enable()"
    ).stderr
    assert out.count("INFO:mbridge_prune:no CUDA device") == 1


@no_cuda
def test_refuses_after_megatron():
    out = run("import megatron.core\nimport mbridge_prune").stderr
    assert "import mbridge_prune` above every megatron import" in out


@no_cuda
def test_cuda_means_cpu_and_availability_stays_false():
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.ones(1).to("cuda:0").cuda().device.type == "cpu"
    assert torch.nn.Linear(2, 2, device=torch.cuda.current_device()).weight.device.type == "cpu"
    assert not torch.cuda.is_available()
    with cuda.claims_cuda():
        assert torch.cuda.is_available()
    assert not torch.cuda.is_available()


@no_cuda
def test_meta_contexts_and_scripting_still_know_the_factories():
    with torch.device("meta"):
        assert torch.empty(2).is_meta
        assert torch.nn.Linear(2, 2).weight.is_meta

    @torch.jit.script
    def scripted(n: int):
        return torch.zeros(n) + torch.tensor(1.0)

    assert scripted(3).tolist() == [1.0, 1.0, 1.0]


@no_cuda
def test_cuda_seed_and_state_are_the_cpus():
    torch.cuda.manual_seed(3)
    state = torch.cuda.get_rng_state()
    first = torch.rand(4)
    torch.cuda.set_rng_state(state)
    assert torch.equal(first, torch.rand(4))
