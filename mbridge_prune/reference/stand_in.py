"""Registers stand-in modules under foreign names, once for all stand-in packages."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from typing import Any


def register(name: str, **contents: Any) -> types.ModuleType:
    """Put a module `name` holding `contents` into `sys.modules`, and on its parent.

    The module carries a spec, so `importlib.util.find_spec(name)` answers, and no
    `__path__`, so a submodule nobody registered raises ModuleNotFoundError.
    """
    module = types.ModuleType(name, f"PyTorch stand-in for {name} (mbridge_prune.reference)")
    module.__spec__ = importlib.machinery.ModuleSpec(name, loader=None, origin=__name__)
    module.__dict__.update(contents)
    sys.modules[name] = module
    parent, _, leaf = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], leaf, module)
    return module


def refusing(name: str, why: str) -> type:
    """A class called `name` that may be imported and subclassed, and raises `why` when built."""

    def __init__(self: object, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(f"{name}: {why}")

    return type(name, (), {"__init__": __init__, "__doc__": f"Not stood in: {why}."})
