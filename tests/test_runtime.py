"""Device, dtype, ranks and groups of one process, and the variables of srun."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

from mbridge_prune import runtime
from mbridge_prune.errors import UserError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def slurm(monkeypatch):
    """`slurm(**variables)`: what torch.distributed is given under srun."""
    environ = {k: v for k, v in os.environ.items() if k not in VARIABLES and not k.startswith("SLURM")}
    monkeypatch.setattr(os, "environ", environ)

    def take(**variables):
        environ.update(variables)
        runtime.take_slurm_variables()
        return {name: environ.get(name) for name in VARIABLES}

    return take


def test_srun_variables(slurm):
    got = slurm(SLURM_PROCID="3", SLURM_STEP_NUM_TASKS="8", SLURM_LOCALID="1", SLURM_STEP_NODELIST="gpu[03-07,9],x",
                SLURM_JOB_ID="123456")  # fmt: skip
    assert got == {
        "RANK": "3",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "gpu03",
        "MASTER_PORT": "23456",
    }


def test_a_master_that_the_user_names_is_kept(slurm):
    got = slurm(SLURM_PROCID="0", SLURM_STEP_NUM_TASKS="2", MASTER_ADDR="head", MASTER_PORT="7")
    assert (got["MASTER_ADDR"], got["MASTER_PORT"]) == ("head", "7")


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_PROCID": "0"},
        {"SLURM_STEP_NUM_TASKS": "4"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"},
    ],
)
def test_one_task_stays_one_process(slurm, variables):
    assert slurm(**variables)["RANK"] is None


def test_torchrun_inside_an_allocation_wins(slurm):
    got = slurm(SLURM_PROCID="0", SLURM_STEP_NUM_TASKS="2", RANK="5", WORLD_SIZE="6")
    assert (got["RANK"], got["WORLD_SIZE"], got["MASTER_ADDR"]) == ("5", "6", None)


def test_one_process_has_groups_of_one():
    runtime.start_model_parallel()
    assert dist.get_world_size() == runtime.world_size() == 1
    assert runtime.rank() == 0
    for kind in ("pp", "dp", "tp"):
        assert (runtime.size(kind), runtime.place(kind)) == (1, 0)
        assert runtime.gather_objects("x", kind) == ["x"]
    assert runtime.gather_objects([1]) == [[1]]
    runtime.barrier()
    runtime.start_model_parallel()  # a second time is no error


def test_layouts_that_do_not_fit_the_world():
    for layout in ({"pp": 2}, {"tp": 2}, {"pp": 2, "tp": 2}):
        with pytest.raises(
            UserError, match="world size 1 is not a multiple of pipeline . x tensor . parallel size"
        ):
            runtime.start_model_parallel(**layout)


def test_device_dtype_and_backend_go_together():
    kind = runtime.device().type
    want = {"cpu": (torch.float32, "gloo"), "cuda": (torch.bfloat16, "nccl")}[kind]
    assert (runtime.default_dtype(), runtime.backend()) == want
    for word in (kind, runtime.backend(), "1 x"):
        assert word in runtime.describe()
