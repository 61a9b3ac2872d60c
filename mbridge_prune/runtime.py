"""The one place that decides device, dtype and backend, and that knows ranks and process groups."""

from __future__ import annotations

import contextlib
import datetime
import functools
import logging
import os
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from mbridge_prune.errors import UserError

log = logging.getLogger("mbridge_prune")
Result = TypeVar("Result")


def device() -> torch.device:
    """This process's device: its CUDA device, or the CPU where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def backend() -> str:
    """nccl on CUDA devices, gloo on the CPU."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def default_dtype() -> torch.dtype:
    """bf16 on CUDA devices; fp32 on the CPU, whose bf16 is slow."""
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def take_slurm_variables() -> None:
    """Under plain srun, gives torch.distributed what torchrun would have set.

    Only srun sets SLURM_STEP_NUM_TASKS to the ranks it starts; a batch script's own step has one task.
    """
    env = os.environ
    tasks = env.get("SLURM_STEP_NUM_TASKS")
    if "SLURM_PROCID" not in env or "RANK" in env or not tasks or int(tasks) < 2:
        return
    env["RANK"] = env["SLURM_PROCID"]
    env["WORLD_SIZE"] = tasks
    env["LOCAL_RANK"] = env.get("SLURM_LOCALID", "0")
    if "MASTER_ADDR" not in env:
        env["MASTER_ADDR"] = first_host(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", ""))
    if "MASTER_PORT" not in env:
        env["MASTER_PORT"] = str(20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000)


def first_host(nodes: str) -> str:
    """The first host of a SLURM node list: `gpu[03-07,9],x` -> `gpu03`."""
    match = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\]([^,]*))?", nodes)
    return (match[1] + (match[2] or "") + (match[3] or "")) if match else "localhost"


def start_distributed(timeout_minutes: float = 30) -> None:
    """Starts the default process group once, under torchrun, srun, or as a single process."""
    if dist.is_initialized():
        return
    take_slurm_variables()
    timeout = datetime.timedelta(minutes=timeout_minutes)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    if "RANK" in os.environ:
        dist.init_process_group(backend(), timeout=timeout)
        dist.barrier()  # a rank that has nothing to do must not leave while others still connect to it
    else:
        store = dist.HashStore()
        dist.init_process_group(backend(), store=store, rank=0, world_size=1, timeout=timeout)


def start_model_parallel(pp: int = 1, tp: int = 1, ep: int = 1, cp: int = 1, seed: int = 1234) -> None:
    """Starts Megatron's process groups; what is left of the world is data parallel.

    Expert-parallel ranks are taken out of the tensor- and data-parallel ones; experts themselves
    are never sharded (expert tensor parallel size 1).

    Raises:
        UserError: the world size is no multiple of the layout's.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    start_distributed()
    world = dist.get_world_size()
    if world % (pp * tp * cp):
        raise UserError(
            f"world size {world} is not a multiple of pipeline {pp} x tensor {tp} "
            + (f"x context {cp} " if cp > 1 else "")
            + f"parallel size; start a multiple of {pp * tp * cp} processes (torchrun --nproc-per-node)"
        )
    if world % (pp * ep):
        raise UserError(
            f"world size {world} is not a multiple of pipeline {pp} x expert {ep} parallel size; "
            f"start a multiple of {pp * max(tp, ep)} processes (torchrun --nproc-per-node)"
        )
    if parallel_state.model_parallel_is_initialized():
        have = {kind: size(kind) for kind in ("pp", "tp", "ep", "cp")}
        if have != {"pp": pp, "tp": tp, "ep": ep, "cp": cp}:
            raise UserError(f"Megatron already runs with other parallel sizes: {have}")
        return
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=1,
    )
    model_parallel_cuda_manual_seed(seed)


def rank() -> int:
    """Global rank; 0 without torch.distributed."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def group(kind: str) -> Any:
    """Megatron's process group "pp", "dp", "tp", "cp", "ep" or "edp" (ranks that hold the same experts).

    None where Megatron's groups do not exist.
    """
    from megatron.core import parallel_state as ps

    if not (dist.is_initialized() and ps.model_parallel_is_initialized()):
        return None
    getters = {
        "pp": ps.get_pipeline_model_parallel_group,
        "dp": ps.get_data_parallel_group,
        "tp": ps.get_tensor_model_parallel_group,
        "cp": ps.get_context_parallel_group,
        "ep": ps.get_expert_model_parallel_group,
        "edp": ps.get_expert_data_parallel_group,
    }
    return getters[kind]()


@functools.cache
def alone() -> Any:
    """A process group of this rank by itself."""
    return dist.new_group([dist.get_rank()], use_local_synchronization=True)


def size(kind: str) -> int:
    """Ranks in a Megatron group (1 without one)."""
    handle = group(kind)
    return 1 if handle is None or (kind in ("dp", "edp") and _apart) else handle.size()


def place(kind: str) -> int:
    """This rank's place in a Megatron group."""
    handle = group(kind)
    return 0 if handle is None or (kind in ("dp", "edp") and _apart) else handle.rank()


_apart = False


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Inside, this data-parallel replica is by itself: each has another model, and nothing is dealt out."""
    global _apart
    before, _apart = _apart, True
    try:
        yield
    finally:
        _apart = before


def gather_objects(thing: Any, kind: str | None = None) -> list[Any]:
    """`thing` of every rank of the group ("pp", "dp", None for all), in rank order."""
    if _apart and kind is None:
        kind = "pp"  # all ranks of this replica: it shards no tensors and no experts over others
    handle = group(kind) if kind else None
    n = size(kind) if kind else world_size()
    if n == 1:
        return [thing]
    things: list[Any] = [None] * n
    dist.all_gather_object(things, thing, group=handle)
    return things


def send_to_stage(tensor: torch.Tensor, stage: int) -> None:
    """Sends a tensor to another pipeline stage of this replica, which receives it at the same time."""
    peers = group("pp")
    on_device = tensor.to(device()).contiguous()
    dist.send(on_device, dst=dist.get_process_group_ranks(peers)[stage], group=peers)


def receive_from_stage(shape: Sequence[int], dtype: torch.dtype, stage: int) -> torch.Tensor:
    """What that stage sends, on this rank's device."""
    peers = group("pp")
    tensor = torch.empty(tuple(shape), dtype=dtype, device=device())
    dist.recv(tensor, src=dist.get_process_group_ranks(peers)[stage], group=peers)
    return tensor


def together(action: Callable[[], Result]) -> Result:
    """What `action` returns; what it refuses on one pipeline stage is refused on every one.

    For checks that read a stage's own layers: the other stages would wait for it in a collective.
    """
    refused: UserError | None = None
    try:
        result = action()
    except UserError as error:
        refused = error
    said = [reason for reason in gather_objects(None if refused is None else str(refused), "pp") if reason]
    if refused is not None:
        raise refused
    if said:
        raise UserError(said[0])
    return result


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def training() -> contextlib.AbstractContextManager[None]:
    """Inside, Megatron-Bridge's training loop runs on this machine, GPUs or none."""
    if torch.cuda.is_available():
        return contextlib.nullcontext()
    from mbridge_prune.reference.training import on_cpu

    return on_cpu()


def describe() -> str:
    """One line for the log: host, device, dtype, backend, ranks."""
    return (
        f"{socket.gethostname()}: {world_size()} x {device().type}, "
        f"{str(default_dtype()).removeprefix('torch.')}, {backend()}"
    )
