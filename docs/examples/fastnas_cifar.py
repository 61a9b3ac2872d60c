"""FastNAS on CIFAR-10: train a ResNet-20 (or a plain CNN), halve its operations, compare, fine-tune, save.

    python docs/examples/fastnas_cifar.py --network resnet20 --output runs/cifar

Beside FastNAS it cuts the same network to the same operations in two plain ways: every axis by the same
share, and the units with the smallest weights wherever they are. All three keep the units with the largest
consumer weights, recalibrate BatchNorm on the same images, and are trained further for as many steps.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))

import cifar

import mbridge_prune as mbp
from mbridge_prune.cli import start_logging
from mbridge_prune.demo_data import cifar_cnn, cifar_cnn_network
from mbridge_prune.dynamic import shrink, sort
from mbridge_prune.heterogeneous import Forward, ForwardCosts
from mbridge_prune.vision.ranking import importance
from mbridge_prune.vision.recalibration import Recalibration, first_of
from mbridge_prune.vision.table import table_of

DUMMY = torch.zeros(1, 3, 32, 32)
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet20": lambda: cifar.ResNet20(stride=2),
    "plain": cifar.plain_cnn,
    "keras": cifar_cnn_network,
}
TRAINED = (0, 45_000)


class Data:
    """The images of one run, as its network takes them."""

    def __init__(self, network: str, validation: int, calibration: int):
        self.raw = network == "keras"
        self.validation = cifar.Images("train", 500, part=(45_000, 45_000 + validation), raw=self.raw)
        self.calibration = cifar.Images("train", 128, part=(0, calibration), raw=self.raw)
        self.test = cifar.Images("test", 500, raw=self.raw)

    def train(self) -> cifar.Images:
        """The same batches in the same order each time it is called."""
        return cifar.Images("train", 128, train=True, part=TRAINED, raw=self.raw)

    def confidence(self, model: nn.Module) -> float:
        """Negative cross entropy on validation images: less noisy than accuracy."""
        with torch.no_grad():
            losses = (F.cross_entropy(model(x), n, reduction="sum") for x, n in self.validation)
            return -float(sum(losses)) / len(self.validation.labels_n)


def trained(name: str, epochs: float, path: Path, data: Data) -> nn.Module:
    """The trained network; read from the file if it is there. That of Keras was trained by others."""
    torch.manual_seed(0)
    model = NETWORKS[name]()
    path = cifar_cnn() / "model.safetensors" if name == "keras" else path
    if path.exists():
        model.load_state_dict(load_file(path))
        return model.eval()
    cifar.train(model, data.train(), epochs, peak=0.4 if name == "resnet20" else 0.1)
    save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, path)
    return model


def uniform(model: nn.Module, flops: float, calibration: cifar.Images) -> None:
    """Every axis keeps the same share of its units, the largest that keeps the bound."""
    cut_to(model, flops, calibration, lambda axis, scores, level: max(1, int(axis.size * (1 - level))))


def magnitude(model: nn.Module, flops: float, calibration: cifar.Images) -> None:
    """Units go whose weights are small against the mean of their axis, wherever they are."""

    def size(axis, scores, level):
        return max(1, int((scores / scores.mean() > 2 * level).sum()))

    cut_to(model, flops, calibration, size)


def cut_to(model: nn.Module, flops: float, calibration: cifar.Images, size: Callable) -> None:
    """Cuts by `size` at the smallest level in 0..1 that keeps the bound."""
    traced = table_of(model, Forward.of(DUMMY))
    table, costs, scores = traced.table, ForwardCosts(traced.table, Forward.of(DUMMY)), importance(traced)
    for step in range(1001):
        sizes = {key: size(axis, scores[key], step / 1000) for key, axis in table.axes.items()}
        if costs.flops(sizes) <= flops:
            break
    sort(table, {key: axis.order_by(scores[key]) for key, axis in table.axes.items()})
    shrink(table, sizes)
    Recalibration(calibration, first_of, 50)(model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, default="resnet20")
    parser.add_argument("--flops", default="50%")
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--fine-tune-epochs", type=float, default=0.5)
    parser.add_argument("--peak", type=float, default=0.02, help="learning rate of the fine-tuning")
    parser.add_argument("--divisor", type=int, default=4)
    parser.add_argument("--sizes-per-axis", type=int, default=8)
    parser.add_argument("--validation", type=int, default=2000, help="images that are scored on")
    parser.add_argument(
        "--calibration", type=int, default=1024, help="images that BatchNorm is recalibrated on"
    )
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    start_logging()
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    data = Data(options.network, options.validation, options.calibration)
    test = data.test
    full = trained(options.network, options.epochs, options.output / f"{options.network}.safetensors", data)
    results: dict[str, dict[str, float]] = {"full": {"test": cifar.accuracy(full, test)}}
    print("full", results["full"], flush=True)

    pruned = copy.deepcopy(full)
    space = mbp.fastnas.get_fastnas_config(
        channel_divisor=options.divisor,
        feature_divisor=options.divisor,
        sizes_per_axis=options.sizes_per_axis,
    )
    _, plan = mbp.prune(
        pruned,
        mode=[("fastnas", space)],
        constraints={"flops": options.flops},
        dummy_input=DUMMY,
        config={
            "score_func": data.confidence,
            "data_loader": data.calibration,
            "checkpoint": options.output / f"{options.network}.sensitivity.jsonl",
        },
    )
    cuts = {"fastnas": pruned, "uniform": copy.deepcopy(full), "magnitude": copy.deepcopy(full)}
    bound = plan.search["budgets"]["flops"]
    uniform(cuts["uniform"], bound, data.calibration)
    magnitude(cuts["magnitude"], bound, data.calibration)
    for name, model in cuts.items():
        costs = ForwardCosts(table_of(model, Forward.of(DUMMY)).table, Forward.of(DUMMY))
        flops, params = float(costs.flops({})), float(costs.params({}))
        results[name] = {"flops": flops, "params": params, "test": cifar.accuracy(model, test)}
        print(name, results[name], flush=True)
    for name, model in cuts.items() if options.fine_tune_epochs else ():
        cifar.train(model, data.train(), options.fine_tune_epochs, options.peak)
        results[name]["fine_tuned"] = cifar.accuracy(model, test)
        print(name, results[name], flush=True)

    saved = mbp.save(pruned, options.output / f"{options.network}-fastnas.safetensors")
    again = mbp.restore(NETWORKS[options.network](), saved)
    assert cifar.accuracy(again, test) == cifar.accuracy(pruned, test)
    (options.output / f"{options.network}.json").write_text(
        json.dumps({"results": results, "plan": plan.to_dict()}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
