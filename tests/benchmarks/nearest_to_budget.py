"""The rule "score the candidates nearest to the budget", against a search that has run.

    python tests/benchmarks/nearest_to_budget.py RUN_FOLDER TEXT.txt [--count 10] [--windows 20]

Reads the settings, scores and bounds of a finished search by size. The winner and the candidates whose
parameter counts are the nearest to the bound are measured by the same code: their KL to the full model on the text
that the search kept aside, and their loss on a text that nothing here has seen. None of them is repaired.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from measuring import load

import mbridge_prune as mbp
from mbridge_prune.dynamic import sort
from mbridge_prune.evaluate.estimate import estimate, paired
from mbridge_prune.evaluate.loss import token_losses, windows
from mbridge_prune.mcore_minitron import score_model, table_of
from mbridge_prune.prune_config import DIVISORS, PruneConfig
from mbridge_prune.repair import Repair, Room
from mbridge_prune.search.costs import Costs
from mbridge_prune.search.judge import Judge
from mbridge_prune.search.run import Search
from mbridge_prune.search.space import Space, as_sizes
from mbridge_prune.search.store import Store


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--windows", type=int, default=20)
    options = parser.parse_args()
    settings = json.loads((options.run / "settings.json").read_text())
    plan = json.loads((options.run / "plan.json").read_text())
    bound = plan["search"]["budgets"]["params"]
    loaded, loop, run, scores = opened(options.run, settings)
    table, order = run.table, scores.layer_order()
    costs = run.costs(order)
    judge = Judge(table, scores, costs, loop.held_out_ns, Store(None, {}), run.mend)
    kl = judge.function("kl")
    length = settings["calibration"]["seq_length"]
    text_ns = windows(options.text.read_text(), loaded.tokenizer, length, options.windows)

    full = token_losses(table.model, text_ns)
    print(f"full model: loss {estimate(full).mean:.4f} over {full.numel():,} predictions")
    print(
        "| parameters | cut | KL | loss | the loss less the winner's |\n| ---: | --- | ---: | ---: | ---: |"
    )
    winner = None
    for sizes in [plan["sizes_after"], *nearest_to(bound, run.space(order), costs, options.count)]:
        apart, params = -judge.score(sizes, "kl", kl)["score"], int(costs.params(sizes))
        with judge.as_exported(sizes) as model:
            losses = token_losses(model, text_ns)
        cut = ", ".join(f"{h} {n}" for h, n in sizes.items() if n != plan["sizes_before"][h])
        found = estimate(losses)
        if winner is None:
            winner, behind = losses, "(the winner)"
        else:
            change = paired(losses, winner)
            behind = f"{change.mean:+.4f} ± {change.se:.4f}"
        print(f"| {params:,} | {cut} | {apart:.3f} | {found.mean:.4f} ± {found.se:.4f} | {behind} |",
              flush=True)  # fmt: skip


def opened(folder: Path, settings: dict[str, Any]) -> tuple[Any, Any, Search, Any]:
    """The sorted model of a run, its text, and its search before it begins."""
    calibration, searched, pruned = settings["calibration"], settings["search"], settings["prune"]
    path = settings["model"]["hf_path"]
    loaded = load(path, length=calibration["seq_length"])
    loop = mbp.get_hf_mbridge_calibration_loop(
        model=loaded.model, provider=loaded.provider, tokenizer=loaded.tokenizer, hf_model_name_or_path=path,
        dataset_name=calibration["data"], num_samples=calibration["num_samples"], seed=calibration["seed"],
        held_out=searched["num_samples"],
    )  # fmt: skip
    scores = score_model(
        loaded.unwrapped_model,
        {
            "checkpoint": folder / "scores.safetensors",
            "forward_loop": loop,
            "importance": pruned["importance"],
        },
    )
    table = table_of(loaded.unwrapped_model)
    sort(table, scores.orders(table))
    divisors = {f"{name}_divisor": step for name, step in DIVISORS.items()}
    divisors |= {k: v for k, v in pruned.items() if k.endswith("_divisor") and v}
    keys = ("max_width_pruning", "max_depth_pruning", "hparams_to_skip")
    config = PruneConfig(
        forward_loop=loop, repair=pruned["repair"], search_space=searched["space"] or None,
        **{key: searched[key] for key in keys},
    )  # fmt: skip
    mend = Repair(config.repair_made(), loop, Room(pruned["repair_memory_gb"]))
    return loaded, loop, Search(table, config, {"params": searched["params"]}, divisors, mend), scores


def nearest_to(bound: float, space: Space, costs: Costs, count: int) -> list[dict[str, int]]:
    """Sizes of the candidates with the most parameters inside the bound."""
    found = []
    for chunk in space.grid():
        params = costs.params(chunk)
        inside = [place for place in range(len(params)) if params[place] <= bound]
        found += [(int(params[place]), as_sizes(chunk, place)) for place in inside]
    found.sort(key=lambda one: -one[0])
    return [sizes for _, sizes in found[:count]]


if __name__ == "__main__":
    main()
