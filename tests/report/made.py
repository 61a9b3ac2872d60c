"""Run folders made without a model: the files that a manual and an auto run leave."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

import mbridge_prune as mbp
from mbridge_prune.importance.scores_file import FORMAT

FULL = {
    "hidden_size": 64,
    "num_query_groups": 2,
    "num_attention_heads": 8,
    "ffn_hidden_size": 96,
    "num_layers": 6,
}
MOE = {**FULL, "num_moe_experts": 8, "moe_ffn_hidden_size": 24}
CUT = {"hidden_size": 48, "ffn_hidden_size": 64, "num_attention_heads": 6, "num_layers": 5}
LOSS = {
    "before": {"loss": 2.8412, "se": 0.0121, "n": 4080},
    "after": {"loss": 3.2087, "se": 0.0133, "n": 4080},
    "kl": {"kl": 0.3921, "se": 0.0074, "n": 2048},
}
LOG = """\
2026-03-04 10:00:02,871 INFO mbridge_prune on node7: 2 x cuda, bfloat16, nccl
2026-03-04 10:00:32,912 INFO calibration: 32 samples in 27.6 s (1.16/s)
2026-03-04 10:00:33,000 WARNING experts that calibration sent no token: layers.1: 3
2026-03-04 10:00:34,033 INFO slicing: 182 tensors in 0.5 s (342.11/s)
"""


def order(scores: np.ndarray, groups: int, keep: int) -> list[list[int]]:
    """[groups][keep] places kept in each group, most important first."""
    return np.argsort(-scores.reshape(groups, -1), axis=1, kind="stable")[:, :keep].tolist()


def axes(full: Mapping[str, int], after: Mapping[str, int]) -> list[tuple[str, int, int, int]]:
    """(hparam, units, groups, kept of each group) of one layer."""
    groups, experts = full["num_query_groups"], full.get("num_moe_experts", 0)
    found = [
        ("num_query_groups", groups, 1, after["num_query_groups"]),
        ("num_attention_heads", full["num_attention_heads"], groups,
         after["num_attention_heads"] // after["num_query_groups"]),
        ("ffn_hidden_size", full["ffn_hidden_size"], 1, after["ffn_hidden_size"]),
    ]  # fmt: skip
    if experts:
        channels = experts * full["moe_ffn_hidden_size"]
        found.append(("num_moe_experts", experts, 1, after["num_moe_experts"]))
        found.append(("moe_ffn_hidden_size", channels, experts, after["moe_ffn_hidden_size"]))
    return found


def write_run(
    folder: Path,
    full: Mapping[str, int] = FULL,
    cut: Mapping[str, int] = CUT,
    seed: int = 0,
    scores: bool = True,
    settings: Mapping[str, Any] | None = None,
    **plan: Any,
) -> Path:
    """A finished run of a made-up model whose layers are alike; `plan` lays keys over plan.json's."""
    folder.mkdir(parents=True, exist_ok=True)
    after, random = {**full, **cut}, np.random.default_rng(seed)
    units = {"hidden_size": random.lognormal(3, 0.4, full["hidden_size"])}
    kept = {"hidden_size": order(units["hidden_size"], 1, after["hidden_size"])}
    for n in range(full["num_layers"]):
        for hparam, size, groups, keep in axes(full, after):
            key = f"layers.{n}.{hparam}"
            units[key] = random.lognormal(np.log(0.3 * 1.06**n), 0.6, size)
            kept[key] = order(units[key], groups, keep)
    depth = units["num_layers"] = 0.03 + 0.08 * random.random(full["num_layers"])
    depth[0] = 0.9
    meta = {"ranking": "minitron", "tokens": 16384, "model": "m0", "data": f"d{seed}"}
    settings = settings or {
        "model": {"hf_path": "/models/made-up", "dtype": "auto"},
        "calibration": {"data": "/texts/text.txt", "num_samples": 32, "seed": 1 + seed},
        "prune": {"export_config": dict(cut), "scores": None},
        "output": {"path": str(folder)},
    }
    experts = "num_moe_experts" in full
    content = mbp.Plan(
        sizes_before=dict(full),
        sizes_after=after,
        params_before=134515008,
        params_after=91646464,
        active_before=61000000 if experts else 134515008,
        active_after=48000000 if experts else 91646464,
        layers_kept=sorted(np.argsort(-depth, kind="stable")[: after["num_layers"]].tolist()),
        kept=kept if scores else {},
        fingerprint="m0" if scores else None,
        layer_scores=depth.tolist() if scores else [],
        calibration=meta if scores else {},
    ).to_dict()
    more = {"seconds": {"import": 2.37, "prune": 28.81, "export": 3.14}, "settings": settings}
    (folder / "plan.json").write_text(
        json.dumps({**content, **more, "versions": {"torch": "2.13.0"}, **plan})
    )
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "run.log").write_text(LOG)
    if scores:
        save_file({k: v.astype(np.float32) for k, v in units.items()}, folder / "scores.safetensors",
                  {"format": FORMAT, "meta": json.dumps(meta)})  # fmt: skip
    return folder


class World:
    """A model in which each dimension cut alone costs a smooth KL, and cuts together a little more.

    Args:
        dear: hparam -> KL of cutting it by two fifths.
        steps: hparam -> step of its choices.
        params: of the full model.
    """

    def __init__(self, full: Mapping[str, int], dear: Mapping[str, float], steps: Mapping[str, int], params: float,
                 seed: int = 0):  # fmt: skip
        self.full, self.dear, self.params = dict(full), dear, params
        self.space = {h: [full[h]] for h in full}
        for h, step in steps.items():
            self.space[h] = list(range(full[h] - step * int(0.4 * full[h] / step), full[h] + 1, step))
        self.random = np.random.default_rng(seed)

    def predicted(self, sizes: Mapping[str, int]) -> float:
        return sum(kl * ((1 - sizes[h] / self.full[h]) / 0.4) ** 1.7 for h, kl in self.dear.items())

    def true(self, sizes: Mapping[str, int]) -> float:
        together = 0.05 * sum(sizes[h] < size for h, size in self.full.items())
        return self.predicted(sizes) * (1 + together) * self.random.lognormal(0, 0.06)

    def count(self, sizes: Mapping[str, int]) -> int:
        share = {h: sizes[h] / size for h, size in self.full.items()}
        inner = 0.7 * share["ffn_hidden_size"] + 0.3 * share["num_attention_heads"]
        return int(self.params * share["hidden_size"] * (0.2 + 0.8 * share["num_layers"] * inner))

    def drawn(self, n: int) -> list[dict[str, int]]:
        """Different random candidates."""
        seen = [{h: int(self.random.choice(sizes)) for h, sizes in self.space.items()} for _ in range(n)]
        return list({tuple(c.items()): c for c in seen}.values())


def write_search(
    folder: Path,
    world: World,
    budget: float,
    score: str = "mmlu_10pct_bs1",
    top_k: int = 10,
    drawn: int = 6000,
) -> dict[str, int]:
    """candidates.jsonl of a finished search as `mbridge_prune.search` writes it; returns the winner's sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    full, random = world.full, world.random
    grid = int(np.prod([len(sizes) for sizes in world.space.values()]))
    inside = sorted((c for c in world.drawn(drawn) if world.count(c) <= budget), key=world.predicted)
    lines: list[dict[str, Any]] = [
        {"kind": "identity", "identity": {"model": "m0"}},
        {"kind": "search", "full": full, "space": world.space, "budgets": {"params": budget}, "grid": grid},
    ]

    def measure(kind: str, sizes: dict[str, int], kl: float, samples: int, **more: Any) -> None:
        kl *= random.lognormal(0, 0.3 / samples**0.5)
        lines.append({"kind": kind, "sizes": sizes, "samples": samples, "kl": kl, "se": 0.15 * kl / samples**0.5,
                      "params": world.count(sizes), **more})  # fmt: skip

    for hparam, sizes in world.space.items():
        for size in sizes[:-1][:: max(1, len(sizes) // 4)]:
            measure("axis", {**full, hparam: size}, world.true({**full, hparam: size}), 128)
    sample = [inside[i] for i in random.permutation(len(inside))[:1500]]
    lines.append({"kind": "cloud", "in_budget": len(inside), "params": [world.count(c) for c in sample],
                  "predicted": [world.predicted(c) for c in sample]})  # fmt: skip
    for place in np.linspace(0, len(inside) - 1, 8).round().astype(int):
        measure(
            "pair", inside[place], world.true(inside[place]), 64, predicted=world.predicted(inside[place])
        )
    curves = {h: [[s, world.predicted({**full, h: s})] for s in sizes] for h, sizes in world.space.items()}
    lines.append({"kind": "surrogate", "curves": curves, "spearman": 0.93, "pairs": 8})
    field = [(world.true(c), c) for c in inside[: 4 * top_k]]
    for number, samples in enumerate((16, 64)):
        for kl, sizes in field:
            measure("halving", sizes, kl, samples, predicted=world.predicted(sizes), round=number)
        field = sorted(field, key=lambda pair: pair[0])[: 2 * top_k if number == 0 else top_k]
    best: dict[str, Any] = {}
    for kl, sizes in field:
        value = -kl if score == "kl" else float(np.clip(0.62 - 0.35 * kl + random.normal(0, 0.012), 0, 1))
        record = {"kind": "score", "name": score, "sizes": sizes, "score": value, "params": world.count(sizes),
                  "active_params": float(world.count(sizes)), "memory_mb": world.count(sizes) * 2 / 2**20 + 500,
                  "flops": 2.0 * world.count(sizes), "seconds": 31.5}  # fmt: skip
        lines.append(record)
        best = max(best or record, record, key=lambda r: r["score"])
    lines.append({**best, "kind": "winner", "loss": LOSS})
    (folder / "candidates.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return best["sizes"]


def write_auto(folder: Path, score: str = "mmlu_10pct_bs1", **plan: Any) -> Path:
    """A finished auto run: a search of the small model, cut to its winner."""
    dear = {"hidden_size": 0.9, "num_attention_heads": 0.35, "ffn_hidden_size": 0.5, "num_layers": 1.1}
    steps = {"hidden_size": 4, "num_attention_heads": 2, "ffn_hidden_size": 8, "num_layers": 1}
    world = World(FULL, dear, steps, params=134_515_008)
    winner = write_search(folder, world, budget=100_000_000, score=score, top_k=4, drawn=400)
    return write_run(folder, cut=winner, loss=LOSS, **plan)
