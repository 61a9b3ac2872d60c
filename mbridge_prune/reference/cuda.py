"""Sends Megatron's CUDA calls to the CPU where there is no CUDA device.

Factories, `.to` and `.cuda` are wrapped one by one: a global TorchFunctionMode would see
every operator of a forward, would hold for one thread only and would not reach autograd's.
`torch.cuda.is_available()` keeps answering False; `claims_cuda` changes that for a while.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import time
import types
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch


def _words(text: str) -> list[str]:
    return text.split()


FACTORIES = _words(
    "arange asarray as_tensor empty empty_like empty_permuted empty_strided eye from_file "
    "full full_like linspace logspace ones ones_like rand rand_like randint randint_like "
    "randn randn_like randperm scalar_tensor tensor tril_indices triu_indices zeros "
    "zeros_like bartlett_window blackman_window hamming_window hann_window kaiser_window "
    "sparse_coo_tensor sparse_csr_tensor complex_tensor"
)
METHODS = ["new_empty", "new_empty_strided", "new_full", "new_ones", "new_tensor", "new_zeros"]
_CPU = torch.device("cpu")


def to_cpu(device: Any) -> Any:
    """`device` with every spelling of a CUDA device (name, index, torch.device) made the CPU."""
    if isinstance(device, str):
        return _CPU if device.startswith("cuda") else device
    if isinstance(device, torch.device):
        return _CPU if device.type == "cuda" else device
    if isinstance(device, int) and not isinstance(device, bool):
        return _CPU
    return device


def _remapped(original: Callable[..., Any]) -> Callable[..., Any]:
    """A factory whose `device=` may say CUDA."""

    @functools.wraps(original)
    def factory(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = to_cpu(kwargs["device"])
        if "pin_memory" in kwargs:
            kwargs["pin_memory"] = False
        return original(*args, **kwargs)

    return factory


def _patch_factories() -> None:
    # `with torch.device("meta")` knows the factories by identity and caches them at first
    # use: let it meet the originals.
    from torch.jit._builtins import _find_builtin, _register_builtin
    from torch.utils._device import _device_constructors

    _device_constructors()
    for name in FACTORIES:
        original = getattr(torch, name, None)
        if original is None:
            continue
        wrapped = _remapped(original)
        builtin = _find_builtin(original)
        if builtin is not None:  # torch.jit.script also knows them by identity
            _register_builtin(wrapped, builtin)
        setattr(torch, name, wrapped)
    for name in METHODS:
        setattr(torch.Tensor, name, _remapped(getattr(torch.Tensor, name)))


def _patch_moves() -> None:
    original_to = torch.Tensor.to
    original_load = torch.load

    @functools.wraps(original_to)
    def tensor_to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and isinstance(args[0], (str, int, torch.device)):
            args = (to_cpu(args[0]), *args[1:])
        if "device" in kwargs:
            kwargs["device"] = to_cpu(kwargs["device"])
        return original_to(self, *args, **kwargs)

    def tensor_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self if self.device.type == "cpu" else original_to(self, _CPU)

    @functools.wraps(original_load)
    def load(f: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
        return original_load(f, to_cpu(map_location), *args, **kwargs)

    torch.Tensor.to = tensor_to
    torch.Tensor.cuda = tensor_cuda
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self
    torch.Tensor.record_stream = lambda self, stream: None
    torch.load = load


def _patch_collectives() -> None:
    """Two places where gloo on CPU tensors does less than NCCL on CUDA tensors."""
    import torch.distributed as dist

    original_scatter, original_all_to_all = dist.scatter, dist.all_to_all_single

    @functools.wraps(original_scatter)
    def scatter(tensor: torch.Tensor, scatter_list: Any = None, *args: Any, **kwargs: Any) -> Any:
        # gloo takes a strided share's memory as it lies and says nothing; a move to CUDA packs it.
        packed = [share.contiguous() for share in scatter_list] if scatter_list else scatter_list
        return original_scatter(tensor, packed, *args, **kwargs)

    @functools.wraps(original_all_to_all)
    def all_to_all_single(
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        # Megatron lists the sizes only where it brings them from the device to the host.
        sizes = (s.tolist() if torch.is_tensor(s) else s for s in (output_split_sizes, input_split_sizes))
        return original_all_to_all(output, input, *sizes, *args, **kwargs)

    dist.scatter, dist.all_to_all_single = scatter, all_to_all_single


class Stream:
    """A stream on which everything has already happened."""

    cuda_stream = 0
    device = _CPU

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event


class Event:
    """An event that is over as soon as it is recorded; keeps wall-clock times."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.time_s = 0.0

    def record(self, stream: Any = None) -> None:
        self.time_s = time.perf_counter()

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds from this event to `end`."""
        return (end.time_s - self.time_s) * 1e3


class _Generators:
    """`torch.cuda.default_generators` with one entry, found under any index: the CPU's."""

    def __getitem__(self, index: Any) -> torch.Generator:
        return torch.default_generator

    def __len__(self) -> int:
        return 1


def _properties(device: Any = None) -> types.SimpleNamespace:
    page, pages = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_PHYS_PAGES")
    return types.SimpleNamespace(
        name="cpu",
        major=8,
        minor=0,
        total_memory=page * pages,
        multi_processor_count=os.cpu_count() or 1,
        warp_size=32,
        is_integrated=1,
        shared_memory_per_block_optin=0,
        gcnArchName="",
    )


@contextlib.contextmanager
def _nothing(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield


def _ignore(*args: Any, **kwargs: Any) -> None:
    return None


def _zero(*args: Any, **kwargs: Any) -> int:
    return 0


def _cuda_calls() -> dict[str, Any]:
    total = _properties().total_memory
    stream = Stream()
    calls: dict[str, Any] = {
        "current_device": lambda: _CPU,
        "device_count": lambda: 1,
        "Stream": Stream,
        "Event": Event,
        "stream": _nothing,
        "device": _nothing,
        "StreamContext": _nothing,
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "is_current_stream_capturing": lambda: False,
        "default_generators": _Generators(),
        "get_rng_state": lambda device=None: torch.default_generator.get_state(),
        "set_rng_state": lambda state, device=None: torch.default_generator.set_state(state),
        "get_rng_state_all": lambda: [torch.default_generator.get_state()],
        "set_rng_state_all": lambda states: torch.default_generator.set_state(states[0]),
        "manual_seed": lambda seed: _ignore(torch.default_generator.manual_seed(int(seed))),
        "manual_seed_all": lambda seed: _ignore(torch.default_generator.manual_seed(int(seed))),
        "initial_seed": lambda: torch.default_generator.initial_seed(),
        "memory_stats": lambda device=None: defaultdict(int),
        "mem_get_info": lambda device=None: (total, total),
        "get_device_properties": _properties,
        "get_device_capability": lambda device=None: (8, 0),
        "get_device_name": lambda device=None: "cpu",
        # CUDA builds queue such calls until the device wakes up; ours is awake.
        "_lazy_call": lambda call, **kwargs: call(),
        "_lazy_init": _ignore,
    }
    for name in _words(
        "set_device set_stream synchronize empty_cache ipc_collect check_error init "
        "reset_peak_memory_stats reset_max_memory_allocated"
    ):
        calls[name] = _ignore
    for name in _words(
        "memory_allocated max_memory_allocated memory_reserved max_memory_reserved "
        "utilization temperature power_draw clock_rate"
    ):
        calls[name] = _zero
    return calls


def _quiet_rng_fork(record: logging.LogRecord) -> bool:
    # Megatron warns that drawing "CUDA" numbers changed the CPU's state: here they are one.
    return "CPU RNG state changed within GPU RNG context" not in record.getMessage()


def install() -> None:
    """Patch torch for this process. Called by `reference.enable` only."""
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # Dynamo files torch's functions by identity when first imported, as Megatron's
    # decorators do: let it meet the originals too.
    importlib.import_module("torch._dynamo")
    _patch_factories()
    _patch_moves()
    if torch.distributed.is_available():
        _patch_collectives()
    for name, call in _cuda_calls().items():
        setattr(torch.cuda, name, call)
        for part in (torch.cuda.random, torch.cuda.memory, torch.cuda.streams):
            if hasattr(part, name):
                setattr(part, name, call)
    for name in ("range_push", "range_pop", "mark"):
        setattr(torch.cuda.nvtx, name, _ignore)
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(_quiet_rng_fork)


@contextlib.contextmanager
def claims_cuda() -> Iterator[None]:
    """Inside, `torch.cuda.is_available()` answers True: Megatron-Bridge's training loop asks."""
    original = torch.cuda.is_available
    torch.cuda.is_available = lambda: True
    try:
        yield
    finally:
        torch.cuda.is_available = original
