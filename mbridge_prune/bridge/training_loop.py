"""Megatron-Bridge's training code, imported and run without what it does not need here."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path

# Of nvidia-modelopt: hooks for the state of quantised models, and for Bridge's own distillation.
HOOKS = {
    "modelopt.torch.opt.plugins": (
        "restore_modelopt_state",
        "restore_sharded_modelopt_state",
        "save_modelopt_state",
        "save_sharded_modelopt_state",
    ),
    "modelopt.torch.distill.plugins.megatron": ("get_tensor_shapes_adjust_fn_for_distillation",),
}
CHECKPOINTING = (
    "megatron.bridge.training.checkpointing",
    "megatron.bridge.training.post_training.checkpointing",
    "megatron.bridge.training.model_load_save",
)
TRAINING = (*CHECKPOINTING, "megatron.bridge.training.train", "megatron.bridge.training.pretrain")


def import_bridge(modules: tuple[str, ...] = CHECKPOINTING) -> None:
    """Imports Bridge's checkpoint or training code, which names hooks of a package it does not need here.

    Their modules import functions of nvidia-modelopt at their top, for models that ours are not. Where that
    package is missing, empty hooks stand in for the length of the import and are gone after it.
    """
    if importlib.util.find_spec("modelopt") is not None:
        return
    stood_in = {part for name in HOOKS for part in _parents(name)}
    for name in stood_in:
        sys.modules[name] = types.ModuleType(name)
    for name, functions in HOOKS.items():
        for function in functions:
            setattr(sys.modules[name], function, lambda *args, **kwargs: None)
    try:
        for module in modules:
            importlib.import_module(module)
    finally:
        for name in stood_in:
            del sys.modules[name]


def _parents(name: str) -> list[str]:
    words = name.split(".")
    return [".".join(words[: i + 1]) for i in range(len(words))]


@contextlib.contextmanager
def helpers_compiled() -> Iterator[None]:
    """Inside, Megatron does not run `make` for its dataset helpers where they came compiled.

    Megatron-core's wheel ships the compiled helpers and no Makefile, and `make` without one ends the process.
    """
    from megatron.bridge.training import initialize
    from megatron.core.datasets import utils

    folder = Path(utils.__file__).parent
    original = initialize.compile_helpers
    if not (folder / "Makefile").exists() and importlib.util.find_spec("megatron.core.datasets.helpers_cpp"):
        initialize.compile_helpers = lambda: None
    try:
        yield
    finally:
        initialize.compile_helpers = original
