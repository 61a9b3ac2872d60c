"""What all modules share: parameters on the right device, the tensor-parallel group, empty FP8 state."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn


def _device(device: Any) -> Any:
    """Megatron passes the CUDA device's index; without CUDA that is the CPU."""
    if isinstance(device, int) or str(device).startswith("cuda"):
        return device if torch.cuda.is_available() else "cpu"
    return device


def parameter(*shape: int, device: Any, dtype: Any) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, device=_device(device), dtype=dtype))


def default_init(weight: torch.Tensor) -> None:
    nn.init.normal_(weight, std=0.023)


def initialise(
    weight: nn.Parameter,
    init_method: Callable | None,
    get_tracker: Callable[[], Any] | None,
    state_name: str | None,
) -> None:
    """Fills `weight` in the random state that Megatron keeps for it.

    Ranks with shares of one weight must not draw the same numbers, ranks with copies of it must.

    Args:
        init_method: fills in place; None is Transformer Engine's default.
        get_tracker: returns Megatron's tracker; None draws from the default generator.
        state_name: of the state in the tracker; None is the tracker's default, its own on each
            tensor-parallel rank.
    """
    if weight.is_meta:
        return
    state: Any = contextlib.nullcontext()
    if get_tracker is not None:
        state = get_tracker().fork(state_name) if state_name else get_tracker().fork()
    with state:
        (init_method or default_init)(weight)


def refuse_sequence_parallel(sequence_parallel: bool | None) -> None:
    if sequence_parallel:
        raise NotImplementedError(
            "the PyTorch reference modules have no sequence parallelism; set sequence_parallel=False "
            "(the results are the same), or install Transformer Engine"
        )


class QuantisationFree(nn.Module):
    """A module whose `_extra_state`, where Transformer Engine keeps FP8 scales, is there and empty.

    Megatron asks for the key in every checkpoint, so one written here is one that Transformer Engine
    reads, and the other way round.
    """

    fp8 = fp8_calibration = False
    fp8_meta: ClassVar[dict[str, Any]] = {"fp8_checkpoint": False}

    def __init__(self) -> None:
        super().__init__()
        self._register_load_state_dict_pre_hook(_default_extra_state)

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        """Megatron calls it before it loads grouped experts; there is nothing to prepare."""

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """Weights are never FP8 here, so the scales of a checkpoint have no use."""


def _default_extra_state(state: dict[str, Any], prefix: str, *ignored: Any) -> None:
    # Megatron-Bridge drops the keys before a strict load: their absence is no missing weight.
    state.setdefault(f"{prefix}_extra_state", None)


class TensorParallel(QuantisationFree):
    """A module with a tensor-parallel group, given at once or by `set_tensor_parallel_group`."""

    def __init__(self, tp_group: Any = None, tp_size: int = 1, sequence_parallel: bool = False) -> None:
        super().__init__()
        refuse_sequence_parallel(sequence_parallel)
        self.sequence_parallel = False
        self.tp_size = tp_size if tp_group is None else tp_group.size()
        self.set_tensor_parallel_group(tp_group)

    def set_tensor_parallel_group(self, tp_group: Any) -> None:
        self.tp_group = tp_group

    def _share(self, size: int, name: str) -> int:
        """This rank's part of `size`."""
        if size % self.tp_size:
            raise ValueError(f"{name}={size} does not divide over {self.tp_size} tensor-parallel ranks")
        return size // self.tp_size
