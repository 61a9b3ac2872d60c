"""GradNAS against random and magnitude selection at the same budget, on a trained BERT and a trained GPT-J.

    python tests/benchmarks/gradnas.py bert --model runs/minilm-sst2 --tune 1500
    python tests/benchmarks/gradnas.py gptj --model runs/small-gptj

Every selection goes through the same search (its scores in the place of the gradients'), and, for the ranking
alone, through uniform sizes: the same share of every axis. One JSON line a candidate, then a table.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from mbridge_prune import gradnas
from mbridge_prune.dynamic import SliceTable, shrink, sort
from mbridge_prune.heterogeneous import Forward, ForwardCosts, choices_of
from mbridge_prune.heterogeneous.bisection import search
from mbridge_prune.huggingface import squared_gradients, table_of
from mbridge_prune.huggingface.block import out_dim
from mbridge_prune.huggingface.prices import losses, prices

sys.path.insert(0, str(Path(__file__).parents[2] / "docs" / "examples"))
Units = dict[str, torch.Tensor]
GRADNAS = "gradients, searched sizes (GradNAS)"


def magnitudes(table: SliceTable) -> Units:
    """Squared L2 norm of the weights that read each unit."""
    found = {}
    for probe in table.probes:
        (reading,) = probe.readings
        weight = probe.module.weight.detach()
        by_input = weight.square().sum(out_dim(probe.module))
        found[reading.axis.key] = by_input.view(reading.axis.size, reading.channels).sum(1)
    return found


def draws(table: SliceTable, seed: int) -> Units:
    """Independent random scores."""
    draw = torch.Generator().manual_seed(seed)
    return {key: torch.rand(axis.size, generator=draw) for key, axis in table.axes.items()}


def searched(table: SliceTable, units: Units, costs: ForwardCosts, limit: float) -> dict[str, int]:
    """The sizes that the mode's own search gives these scores."""
    space = gradnas.get_gradnas_config()
    steps = {key: space[f"{key.rpartition('.')[2]}_divisor"] for key in table.axes}
    choices = choices_of(table, steps, largest_cut=space["max_pruning"], at_most=10**6)
    lost = losses(table, units, choices)
    return search(choices, prices(lost, costs.of, ["flops"]), costs.of, {"flops": limit}, worth=lost).sizes


def largest_drop(table: SliceTable, units: Units, costs: ForwardCosts, limit: float) -> dict[str, int]:
    """The other rule: no axis loses more of its scores than the tolerated drop, whatever it saves."""
    choices = choices_of(
        table, {k: 64 if "ffn" in k else 1 for k in table.axes}, largest_cut=0.95, at_most=10**6
    )
    return search(choices, losses(table, units, choices), costs.of, {"flops": limit}).sizes


def uniform(table: SliceTable, costs: ForwardCosts, limit: float) -> dict[str, int]:
    """The same share of every axis, heads in whole numbers, FFN units filling up to the limit."""
    heads = {key: axis for key, axis in table.axes.items() if "heads" in key}
    share = next(s / 100 for s in range(100, 0, -1) if _cost(table, costs, s / 100) <= limit)
    sizes = {key: max(1, round(axis.size * share)) for key, axis in table.axes.items()}
    ffn = [key for key in sizes if key not in heads]
    while costs.flops({**sizes, **{k: sizes[k] + 8 for k in ffn}}) <= limit:
        sizes.update({k: sizes[k] + 8 for k in ffn})
    while costs.flops(sizes) > limit:
        sizes.update({k: sizes[k] - 8 for k in ffn})
    return sizes


def _cost(table: SliceTable, costs: ForwardCosts, share: float) -> int:
    return int(costs.flops({key: max(1, round(axis.size * share)) for key, axis in table.axes.items()}))


def candidates(
    table: SliceTable, scored: list[Units], drawn: int, costs: ForwardCosts, limit: float
) -> Iterator[tuple[str, Units, dict[str, int]]]:
    """(what, scores, sizes), what matters most first."""
    same, heavy, first = uniform(table, costs, limit), magnitudes(table), scored[0]
    by_chance = [draws(table, seed) for seed in range(drawn)]
    yield GRADNAS, first, searched(table, first, costs, limit)
    yield "magnitude, searched sizes", heavy, searched(table, heavy, costs, limit)
    for units in by_chance:
        yield "random, searched sizes", units, searched(table, units, costs, limit)
    yield "gradients, uniform sizes", first, same
    yield "magnitude, uniform sizes", heavy, same
    for units in scored[1:]:
        yield GRADNAS, units, searched(table, units, costs, limit)
    for units in by_chance:
        yield "random, uniform sizes", units, same
    yield "gradients, largest drop of an axis", first, largest_drop(table, first, costs, limit)


def cut(model: Any, units: Units, sizes: dict[str, int]) -> Any:
    """A pruned copy."""
    copied = copy.deepcopy(model)
    table = table_of(copied)
    sort(table, {key: axis.order_by(units[key]) for key, axis in table.axes.items()})
    shrink(table, sizes)
    return copied


def compare(
    model: Any,
    forward: Forward,
    scored: list[Units],
    options: argparse.Namespace,
    measure: Callable[[Any], dict[str, float]],
    tune: Callable[[Any], None] | None = None,
) -> None:
    """Prints a line a candidate, then mean and spread of every kind; the first of each with searched sizes is tuned."""
    table = table_of(model)
    costs = ForwardCosts(table, forward)
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    say({"what": "full", **measure(model)})
    limit = options.flops * int(costs.flops({}))
    for what, units, sizes in candidates(table, scored, options.draws, costs, limit):
        pruned = cut(model, units, sizes)
        result = {"flops": int(costs.flops(sizes)) / int(costs.flops({})), **measure(pruned)}
        if tune is not None and "searched" in what and not found[what]:
            tune(pruned)
            result |= {f"{name} tuned": value for name, value in measure(pruned).items()}
        found[what].append(result)
        say({"what": what, **result, "sizes": list(sizes.values())})
    for what, results in found.items():
        words = []
        for name in dict.fromkeys(name for result in results for name in result):
            values = [result[name] for result in results if name in result]
            spread = f" ± {statistics.stdev(values):.4f} ({len(values)})" if len(values) > 1 else ""
            words.append(f"{name} {statistics.mean(values):.4f}{spread}")
        print(f"{what}: {', '.join(words)}", flush=True)


def say(line: dict[str, Any]) -> None:
    print(json.dumps({**line, "at": round(time.process_time())}), flush=True)


def bert(options: argparse.Namespace) -> None:
    from film_reviews import LENGTH, batches, classifier, evaluate, train

    from mbridge_prune.demo_data import sst2_examples

    model, tokenizer = classifier(options.model)
    reviews = sst2_examples("train")
    n = options.samples
    scored = [
        squared_gradients(
            table_of(model), list(batches(tokenizer, reviews[s * n : (s + 1) * n], 8)), own
        ).units
        for s in range(options.seeds)
    ]
    compare(
        model, Forward.of({"input_ids": torch.full((1, LENGTH), 1)}), scored, options,
        lambda m: dict(zip(("accuracy", "loss"), evaluate(m, tokenizer), strict=True)),
        (lambda m: train(m, tokenizer, reviews[: options.tune], rate=5e-5)) if options.tune else None,
    )  # fmt: skip


def gptj(options: argparse.Namespace) -> None:
    from small_gptj import LENGTH, language_model, perplexity, text

    model, tokenizer = language_model(options.model)
    held_out = text(tokenizer, "validation", 128)
    n = options.samples
    calibration = text(tokenizer, "train", n * options.seeds)
    scored = []
    for seed in range(options.seeds):
        parts = calibration[seed :: options.seeds].split(4)
        data = [{"input_ids": ids, "labels": ids} for ids in parts]
        scored.append(squared_gradients(table_of(model), data, own).units)
    compare(
        model, Forward.of(torch.zeros(1, LENGTH, dtype=torch.long)), scored, options,
        lambda m: {"perplexity": perplexity(m, held_out)},
    )  # fmt: skip


def own(output: Any, batch: Any) -> torch.Tensor:
    """The loss that the model computes itself."""
    return output.loss


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("bert", "gptj"))
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--flops", type=float, default=0.5)
    parser.add_argument("--samples", type=int, default=256, help="examples or sequences of each seed")
    parser.add_argument("--seeds", type=int, default=3, help="disjoint sets of examples that are scored")
    parser.add_argument("--draws", type=int, default=5, help="random selections")
    parser.add_argument("--tune", type=int, default=0, help="reviews of the short fine-tuning")
    {"bert": bert, "gptj": gptj}[parser.parse_args().what](parser.parse_args())
