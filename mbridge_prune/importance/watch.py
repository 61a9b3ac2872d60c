"""Shows a tensor of every call of a module, without changing what the module returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

See = Callable[[torch.Tensor, tuple], None]


@contextmanager
def watch(module: nn.Module, tensor: str, see: See) -> Iterator[None]:
    """Inside, every call of `module` shows one of its tensors to `see(tensor, positional arguments)`.

    Args:
        tensor: "input", "output", or "norm_output" (the normalised input of a fused norm+linear).
    """
    if tensor == "norm_output":
        before = module.return_layernorm_output
        module.return_layernorm_output = True
        hook = module.register_forward_hook(_take_norm_output(see))
    elif tensor == "output":
        hook = module.register_forward_hook(lambda m, args, out: see(first_tensor(out), args))
    elif tensor == "input":
        hook = module.register_forward_pre_hook(lambda m, args: see(args[0], args))
    else:
        raise ValueError(f"unknown tensor {tensor!r}")
    try:
        yield
    finally:
        hook.remove()
        if tensor == "norm_output":
            module.return_layernorm_output = before


def _take_norm_output(see: Callable[[torch.Tensor, tuple], None]) -> Callable:
    """A hook that takes the norm's output out of what a fused norm+linear returns.

    Megatron's wrapper returns ((out, norm), None), or (out, bias, norm) where TE returns the bias.
    """

    def hook(module: nn.Module, args: tuple, out: Any) -> Any:
        first = out[0]
        if isinstance(first, tuple):
            see(first[1], args)
            return first[0], *out[1:]
        see(out[2], args)
        return out[0], out[1]

    return hook


def first_tensor(out: Any) -> torch.Tensor:
    """The tensor of what a module returns, which may be a tuple that begins with it."""
    return out[0] if isinstance(out, tuple) else out
