"""Versions of what a run was made with, for plan.json and the page."""

from __future__ import annotations

import platform
from importlib import metadata

PACKAGES = (
    "mbridge-prune", "torch", "megatron-core", "megatron-bridge", "transformers", "transformer-engine",
    "mamba-ssm", "safetensors", "numpy",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Package -> version, Python first; what is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
