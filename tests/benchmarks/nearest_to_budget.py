"""The rule "score the candidates nearest to the budget", against a search that has run.

    python tests/benchmarks/nearest_to_budget.py RUN_FOLDER [--count 10]

Reads the settings, scores and bounds of a finished search by size and measures, with the same text and the
same code, the KL of the candidates whose parameter counts are the nearest to the bound.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

import mbridge_prune as mbp
from mbridge_prune.dynamic import sort
from mbridge_prune.mcore_minitron import table_of
from mbridge_prune.prune_config import DIVISORS
from mbridge_prune.search.costs import Costs, Serving
from mbridge_prune.search.judge import Judge
from mbridge_prune.search.space import Space
from mbridge_prune.search.store import Store


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--count", type=int, default=10)
    options = parser.parse_args()
    settings = json.loads((options.run / "settings.json").read_text())
    calibration, searched = settings["calibration"], settings["search"]
    path = settings["model"]["hf_path"]
    bound = json.loads((options.run / "plan.json").read_text())["search"]["budgets"]["params"]
    loaded = mbp.load_mbridge_model_from_hf(
        hf_model_name_or_path=path, provider_overrides={"seq_length": calibration["seq_length"]}
    )
    loop = mbp.get_hf_mbridge_calibration_loop(
        model=loaded.model, provider=loaded.provider, tokenizer=loaded.tokenizer, hf_model_name_or_path=path,
        dataset_name=calibration["data"], num_samples=calibration["num_samples"], seed=calibration["seed"],
        held_out=searched["num_samples"],
    )  # fmt: skip
    divisors = {f"{name}_divisor": step for name, step in DIVISORS.items()}
    divisors |= {k: v for k, v in settings["prune"].items() if k.endswith("_divisor") and v}
    model = loaded.unwrapped_model
    scores = mbp.mcore_minitron.score_model(
        model, {"checkpoint": options.run / "scores.safetensors", "forward_loop": loop}
    )
    table = table_of(model)
    costs = Costs(
        table, scores.layer_order(), Serving(batch_size=1, seq_length=1, kv_dtype=torch.bfloat16), 4
    )
    nearest = nearest_to(bound, Space.of(table, scores.layer_order(), divisors), costs, options.count)
    sort(table, scores.orders(table))
    judge = Judge(table, scores, costs, loop.held_out_ns, Store(None, {}))
    for record in judge.divergences("halving", nearest, judge.samples, lambda _: None):
        cut = {h: s for h, s in record["sizes"].items() if h != "num_query_groups"}
        print(f"{record['params']:>12,}  KL {record['kl']:.3f} +- {record['se']:.3f}  {cut}", flush=True)


def nearest_to(bound: float, space: Space, costs: Costs, count: int) -> list[dict[str, int]]:
    """Sizes of the candidates with the most parameters inside the bound."""
    found = []
    for chunk in space.grid():
        for place in range(len(chunk["num_layers"])):
            sizes = {hparam: int(values[place]) for hparam, values in chunk.items()}
            if costs.params(sizes) <= bound:
                found.append((int(costs.params(sizes)), sizes))
    found.sort(key=lambda one: -one[0])
    return [sizes for _, sizes in found[:count]]


if __name__ == "__main__":
    main()
