"""Lets Megatron run where CUDA, Transformer Engine, mamba_ssm or flash-linear-attention is missing.

Megatron-Bridge imports Transformer Engine unconditionally and Megatron asks for a CUDA
device. `enable` registers plain PyTorch stand-ins under the missing names, so that
Megatron's own classes and Bridge's own specs run unmodified. The package's start-up calls
it once, before Megatron is imported; nobody else imports this room.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys

_LOGGER = logging.getLogger("mbridge_prune")
_CUDA, _TE, _MAMBA, _FLA = "cuda", "transformer_engine", "mamba_ssm", "fla"
_stood_in: list[str] | None = None


def _importable(package: str, module: str) -> bool:
    """Whether `module` of `package` really imports; a broken half-import is swept away."""
    before = set(sys.modules)
    try:
        if importlib.util.find_spec(package) is None:
            return False
        importlib.import_module(module)
    except (ImportError, OSError, ValueError):
        for name in set(sys.modules) - before:
            if name == package or name.startswith(package + "."):
                del sys.modules[name]
        return False
    return True


def missing() -> list[str]:
    """Names of what has to be stood in here: of `cuda`, `transformer_engine`, `mamba_ssm`, `fla`.

    The packages hold CUDA kernels only, so without a CUDA device they count as missing
    even where they are installed.
    """
    import torch

    if not torch.cuda.is_available():
        return [_CUDA, _TE, _MAMBA, _FLA]
    names = []
    if not _importable("transformer_engine", "transformer_engine.pytorch"):
        names.append(_TE)
    if not _importable("mamba_ssm", "mamba_ssm.ops.triton.ssd_combined"):
        names.append(_MAMBA)
    if not _importable("fla", "fla.ops.gated_delta_rule"):
        names.append(_FLA)
    return names


def _announcement(names: list[str]) -> str:
    parts = []
    if _CUDA in names:
        parts.append("no CUDA device: Megatron's device calls run on the CPU")
    labels = {_TE: "Transformer Engine", _MAMBA: "mamba_ssm", _FLA: "flash-linear-attention"}
    kernels = [label for key, label in labels.items() if key in names]
    if kernels:
        parts.append(f"{', '.join(kernels)}: PyTorch reference kernels")
    return "; ".join(parts)


def enable() -> list[str]:
    """Stand in for whatever is missing; does nothing the second time.

    Returns:
        the stood-in names, a subset of `["cuda", "transformer_engine", "mamba_ssm", "fla"]`;
        empty on a machine with CUDA and all packages, where nothing is touched.

    Raises:
        RuntimeError: Megatron was imported first, so it has already looked for what is missing.
    """
    global _stood_in
    if _stood_in is not None:
        return list(_stood_in)
    names = missing()
    early = [name for name in ("megatron.core", "megatron.bridge") if name in sys.modules]
    if early and names == [_FLA]:
        names = []  # only gated delta nets need it, and Megatron says so when it builds one
    if names and early:
        raise RuntimeError(
            f"{early[0]} was imported before mbridge_prune, and {', '.join(names)} must be stood "
            "in on this machine: write `import mbridge_prune` above every megatron import"
        )
    if _CUDA in names:
        from mbridge_prune.reference import cuda

        cuda.install()
    if _TE in names:
        from mbridge_prune.reference import transformer_engine

        transformer_engine.register()
    if _MAMBA in names:
        from mbridge_prune.reference import mamba_ssm

        mamba_ssm.install()
    if _FLA in names:
        from mbridge_prune.reference import fla

        fla.install()
    _stood_in = names
    if names:
        _LOGGER.info(_announcement(names))
    return list(names)
