"""CIFAR-10, a ResNet-20 and a plain CNN for it, and how they are trained: what the FastNAS example prunes."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from mbridge_prune.demo_data import cifar10

MEAN = torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)
STD = torch.tensor([0.2470, 0.2435, 0.2616]).view(3, 1, 1)
Batch = tuple[torch.Tensor, torch.Tensor]


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, inside: int, out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut = nn.Identity()
        if stride != 1 or inside != out:
            self.shortcut = nn.Sequential(nn.Conv2d(inside, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x_nchw: torch.Tensor) -> torch.Tensor:
        y_nchw = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x_nchw)))))
        return F.relu(y_nchw + self.shortcut(x_nchw))


class ResNet20(nn.Module):
    """The ResNet-20 of arXiv 1512.03385, section 4.2, with 1x1 convolutions as shortcuts: 272,474 weights.

    Args:
        stride: of the first convolution; at 2 an image takes 10 million multiplications instead of 41.
    """

    def __init__(self, classes: int = 10, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        widths = [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]
        self.blocks = nn.Sequential(*(Block(a, b, 2 if a != b else 1) for a, b in itertools.pairwise(widths)))
        self.fc = nn.Linear(64, classes)

    def forward(self, x_nchw: torch.Tensor) -> torch.Tensor:
        x_nchw = self.blocks(F.relu(self.bn1(self.conv1(x_nchw))))
        return self.fc(x_nchw.mean(dim=(2, 3)))


def plain_cnn() -> nn.Sequential:
    """Six convolutions and two linear layers, no shortcut."""
    layers: list[nn.Module] = []
    for inside, out, pool in ((3, 32, 0), (32, 32, 2), (32, 64, 0), (64, 64, 2), (64, 96, 0), (96, 96, 2)):
        layers += [nn.Conv2d(inside, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU()]
        layers += [nn.MaxPool2d(pool)] if pool else []
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(96 * 16, 128), nn.ReLU(), nn.Linear(128, 10))


class Images:
    """A split in memory, dealt out in batches; training batches are shuffled, shifted and mirrored.

    Args:
        part: (first, last) image; None takes all.
        raw: 0 to 255, as they are; otherwise normalised.
    """

    def __init__(
        self,
        split: str,
        batch: int,
        train: bool = False,
        part: tuple[int, int] | None = None,
        raw: bool = False,
    ):
        tensors = load_file(str(cifar10() / f"{split}.safetensors"))
        chosen = slice(*part) if part else slice(None)
        self.images_nchw, self.labels_n = tensors["images"][chosen], tensors["labels"][chosen]
        self.batch, self.train, self.raw = batch, train, raw
        self.random = torch.Generator().manual_seed(0)

    def __len__(self) -> int:
        return math.ceil(len(self.labels_n) / self.batch)

    def __iter__(self) -> Iterator[Batch]:
        n = len(self.labels_n)
        order = torch.randperm(n, generator=self.random) if self.train else torch.arange(n)
        for places in order.split(self.batch):
            x_nchw = self.images_nchw[places].float()
            x_nchw = x_nchw if self.raw else (x_nchw / 255 - MEAN) / STD
            yield self._moved(x_nchw) if self.train else x_nchw, self.labels_n[places]

    def _moved(self, x_nchw: torch.Tensor) -> torch.Tensor:
        mirrored = torch.rand(len(x_nchw), generator=self.random) < 0.5
        x_nchw = torch.where(mirrored[:, None, None, None], x_nchw.flip(3), x_nchw)
        top, left = torch.randint(0, 9, (2,), generator=self.random).tolist()
        return F.pad(x_nchw, (4, 4, 4, 4))[:, :, top : top + 32, left : left + 32]


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    """Share of the images whose class comes first."""
    model.eval()
    right = sum(int((model(x).argmax(1) == labels).sum()) for x, labels in images)
    return right / len(images.labels_n)


def train(
    model: nn.Module,
    images: Images,
    epochs: float,
    peak: float,
    told: Callable[[str], None] = print,
) -> None:
    """SGD with momentum; the learning rate rises to `peak` in a fifth of the steps and falls to zero."""
    steps = max(1, round(epochs * len(images)))
    optimizer = torch.optim.SGD(model.parameters(), lr=peak, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=steps + 1, pct_start=0.2)
    model.train()
    begin, step = time.monotonic(), 0
    while step < steps:
        for x_nchw, labels_n in images:
            loss = F.cross_entropy(model(x_nchw), labels_n)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
            if step % 50 == 0 or step == steps:
                told(f"step {step}/{steps} loss {loss.item():.3f} {time.monotonic() - begin:.0f} s")
            if step == steps:
                break
    model.eval()
