"""The graph of a network by torch.fx. What cannot be traced becomes one opaque node, and is named."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from mbridge_prune.errors import UserError
from mbridge_prune.vision.layers import rule_of


class _Failed(Exception):
    """A module's forward cannot be traced."""

    def __init__(self, path: str, why: str):
        super().__init__(f"{path}: {why}")
        self.path, self.why = path, why


class Tracer(fx.Tracer):
    """Goes into every module but those with a rule, PyTorch's own, and those found to be opaque."""

    def __init__(self, opaque: Mapping[str, str]):
        super().__init__()
        self.opaque = opaque

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        # A buffer with a number a channel (FrozenBatchNorm's) is followed as parameters are; a counter is
        # a value.
        vector = isinstance(attr_val, torch.Tensor) and attr_val.is_floating_point() and attr_val.numel() > 1
        self.proxy_buffer_attributes = vector
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self.opaque or rule_of(m) is not None:
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except _Failed:
            raise
        except Exception as error:  # the network's own code
            raise _Failed(self.path_of_module(m), _why(error)) from error


def trace(model: nn.Module, inputs: inspect.BoundArguments) -> tuple[fx.GraphModule, dict[str, str]]:
    """The graph of a forward with these inputs, and path -> reason of what is left alone.

    Args:
        inputs: of `bind`.

    Raises:
        UserError: the outermost forward itself cannot be traced, with the operation and its place.
    """
    given = dict(inputs.arguments)
    fixed = {name: value for name, value in given.items() if not isinstance(value, torch.Tensor)}
    opaque: dict[str, str] = {}
    while True:
        tracer = Tracer(opaque)
        try:
            graph = tracer.trace(model, concrete_args=fixed or None)
            return fx.GraphModule(model, graph), opaque
        except _Failed as failed:
            if failed.path in opaque:
                raise UserError(f"{type(model).__name__} cannot be traced: {failed}") from failed
            opaque[failed.path] = failed.why
        except Exception as error:  # the network's own code
            raise UserError(
                f"{type(model).__name__}.forward cannot be traced: {_why(error)}; move the operation into a "
                "submodule of its own: that one is then left alone and the rest is pruned"
            ) from error


def bind(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> inspect.BoundArguments:
    """The arguments of one forward by name, defaults included.

    Raises:
        UserError: they do not fit the forward.
    """
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise UserError(f"dummy_input does not fit {type(model).__name__}.forward: {error}") from error
    bound.apply_defaults()
    return bound


def values_of(inputs: inspect.BoundArguments) -> list[Any]:
    """The values of a graph's placeholders: arguments by place, by keyword alone, and `*rest` at the end."""
    kinds = {name: inputs.signature.parameters[name].kind for name in inputs.arguments}
    rest = [v for name, v in inputs.arguments.items() if kinds[name] is inspect.Parameter.VAR_POSITIONAL]
    many = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    single = [value for name, value in inputs.arguments.items() if kinds[name] not in many]
    return [*single, *(value for values in rest for value in values)]


def _why(error: Exception) -> str:
    """What failed, and the line of the network that did it."""
    inside = ("torch/fx/", "torch/nn/modules/module.py", "mbridge_prune/vision/tracing.py")
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if not any(i in f.filename for i in inside)
    ]
    said = " ".join(str(error).split()) or type(error).__name__
    said = said.partition(". See ")[0].partition(" See the docs")[0]
    if not frames:
        return said
    last = frames[-1]
    return f"`{last.line}` ({last.filename}:{last.lineno}): {said}"
