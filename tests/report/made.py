"""Run folders made without a model: the files that a manual and an auto run leave."""

from __future__ import annotations

import json
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

FULL = {"hidden_size": 64, "num_query_groups": 2, "num_attention_heads": 8, "ffn_hidden_size": 96, "num_layers": 6}
MOE = {**FULL, "num_moe_experts": 8, "moe_ffn_hidden_size": 24}
CUT = {"hidden_size": 48, "ffn_hidden_size": 64, "num_attention_heads": 6, "num_layers": 5}
LOSS = {
    "before": {"loss": 2.8412, "se": 0.0121, "n": 64},
    "after": {"loss": 3.2087, "se": 0.0133, "n": 64},
    "kl": {"kl": 0.3921, "se": 0.0074, "n": 64},
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


def write_run(
    folder: Path,
    full: dict[str, int] | None = None,
    cut: dict[str, int] | None = None,
    seed: int = 0,
    scores: bool = True,
    **plan: Any,
) -> Path:
    """A finished manual run of a made-up model; every layer is alike. `plan` adds keys to plan.json."""
    folder.mkdir(parents=True, exist_ok=True)
    full, random = dict(full or FULL), np.random.default_rng(seed)
    after = {**full, **(CUT if cut is None else cut)}
    layers, experts = full["num_layers"], full.get("num_moe_experts", 0)
    units = {"hidden_size": random.lognormal(3, 0.4, full["hidden_size"])}
    kept = {"hidden_size": order(units["hidden_size"], 1, after["hidden_size"])}
    depth = 0.03 + 0.08 * random.random(layers)
    depth[0] = 0.9
    for n in range(layers):
        level = 0.3 * 1.06**n

        def axis(hparam: str, size: int, groups: int, keep: int, n: int = n, level: float = level) -> None:
            key = f"layers.{n}.{hparam}"
            units[key] = random.lognormal(np.log(level), 0.6, size)
            kept[key] = order(units[key], groups, keep)

        groups = full["num_query_groups"]
        axis("num_query_groups", groups, 1, after["num_query_groups"])
        axis("num_attention_heads", full["num_attention_heads"], groups,
             after["num_attention_heads"] // after["num_query_groups"])  # fmt: skip
        axis("ffn_hidden_size", full["ffn_hidden_size"], 1, after["ffn_hidden_size"])
        if experts:
            axis("num_moe_experts", experts, 1, after["num_moe_experts"])
            axis("moe_ffn_hidden_size", experts * full["moe_ffn_hidden_size"], experts, after["moe_ffn_hidden_size"])
    units["num_layers"] = depth
    layers_kept = sorted(np.argsort(-depth, kind="stable")[: after["num_layers"]].tolist())
    meta = {"ranking": "minitron", "tokens": 16384, "model": "m0", "data": "d0"}
    settings = {
        "model": {"hf_path": "/models/made-up", "dtype": "auto"},
        "calibration": {"data": "/texts/text.txt", "num_samples": 32, "seed": 1 + seed},
        "prune": {"export_config": {h: s for h, s in after.items() if s != full[h]}, "scores": None},
        "output": {"path": str(folder)},
    }
    content = {
        "sizes_before": full, "sizes_after": after, "params_before": 134515008, "params_after": 91646464,
        "active_before": 61000000 if experts else 134515008, "active_after": 48000000 if experts else 91646464,
        "layers_kept": layers_kept, "kept": kept if scores else {}, "importance": "minitron", "repair": "none",
        "fingerprint": "m0" if scores else None, "layer_scores": depth.tolist() if scores else [],
        "calibration": meta if scores else {}, "seconds": {"import": 2.37, "prune": 28.81, "export": 3.14},
        "settings": settings, "versions": {"python": "3.11.9", "torch": "2.13.0"}, **plan,
    }  # fmt: skip
    (folder / "plan.json").write_text(json.dumps(content))
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "run.log").write_text(LOG)
    if scores:
        save_file({k: v.astype(np.float32) for k, v in units.items()}, folder / "scores.safetensors",
                  {"format": "mbridge_prune scores 2", "meta": json.dumps(meta)})  # fmt: skip
    return folder


def write_search(
    folder: Path,
    full: dict[str, int],
    weights: dict[str, float],
    steps: dict[str, int],
    params: float,
    budget: float,
    score: str = "mmlu_10pct_bs1",
    seed: int = 0,
) -> Path:
    """candidates.jsonl of a search whose truth is a sum of smooth costs, and a little more.

    Args:
        weights: hparam -> KL of cutting it by two fifths.
        steps: hparam -> step of its choices.
        params: of the full model.
    """
    random = np.random.default_rng(seed)
    space = {h: list(range(full[h] - step * int(0.4 * full[h] / step), full[h] + 1, step)) for h, step in steps.items()}

    def cost(sizes: dict[str, int]) -> float:
        return sum(w * ((1 - sizes.get(h, full[h]) / full[h]) / 0.4) ** 1.7 for h, w in weights.items())

    def measure(sizes: dict[str, int]) -> float:
        return cost(sizes) * (1 + 0.05 * sum(sizes.get(h, full[h]) < full[h] for h in full)) * random.lognormal(0, 0.06)

    def count(sizes: dict[str, int]) -> int:
        ratio = 1.0
        for h in ("hidden_size", "num_layers"):
            ratio *= sizes.get(h, full[h]) / full[h]
        inner = 0.7 * sizes.get("ffn_hidden_size", full["ffn_hidden_size"]) / full["ffn_hidden_size"]
        inner += 0.3 * sizes.get("num_attention_heads", full["num_attention_heads"]) / full["num_attention_heads"]
        return int(params * (0.2 * sizes.get("hidden_size", full["hidden_size"]) / full["hidden_size"] + 0.8 * ratio * inner))

    def some() -> dict[str, int]:
        return {h: int(random.choice(sizes)) for h, sizes in space.items()}

    lines: list[dict[str, Any]] = []
    grid = int(np.prod([len(s) for s in space.values()]))
    drawn = [{**full, **some()} for _ in range(6000)]
    inside = sorted((c for c in drawn if count(c) <= budget), key=cost)
    inside = [c for c, before in zip(inside, [{}, *inside], strict=False) if c != before]
    lines.append({"kind": "search", "full": full, "space": space, "budgets": {"params": budget}, "grid": grid,
                  "in_budget": int(grid * len(inside) / 6000), "settings": {}, "fingerprint": "f0"})  # fmt: skip
    for h, sizes in space.items():
        for size in sizes[:-1][:: max(1, len(sizes) // 4)]:
            kl = measure({h: size})
            lines.append({"kind": "axis", "sizes": {h: size}, "kl": kl, "se": 0.03 * kl, "samples": 16,
                          "params": count({h: size})})  # fmt: skip
    for a, b in combinations(space, 2):
        sizes = {a: space[a][len(space[a]) // 2], b: space[b][len(space[b]) // 3]}
        kl = measure(sizes)
        lines.append({"kind": "pair", "sizes": sizes, "predicted": cost(sizes), "kl": kl, "se": 0.03 * kl,
                      "samples": 16, "params": count(sizes)})  # fmt: skip
    curves = {h: [[s, cost({h: s})] for s in sizes] for h, sizes in space.items()}
    lines.append({"kind": "surrogate", "curves": curves, "spearman": 0.93, "pairs": len(list(combinations(space, 2)))})
    sample = [inside[i] for i in random.permutation(len(inside))[:1500]]
    lines.append({"kind": "cloud", "params": [count(c) for c in sample], "predicted": [cost(c) for c in sample]})
    truth = {}
    field = inside[:64]
    for r, (samples, survivors) in enumerate(pairwise([4, 16, 64, 10])) if False else enumerate([(4, 32), (16, 16), (64, 10)]):
        for c in field:
            key = tuple(c.items())
            truth.setdefault(key, measure(c))
            kl = truth[key] * random.lognormal(0, 0.3 / samples**0.5)
            lines.append({"kind": "halving", "round": r, "sizes": c, "predicted": cost(c), "kl": kl,
                          "se": 0.15 * kl / samples**0.5, "samples": samples, "params": count(c)})  # fmt: skip
        field = sorted(field, key=lambda c: truth[tuple(c.items())])[:survivors]
    best = None
    for c in field:
        kl = truth[tuple(c.items())]
        value = kl if score == "kl" else float(np.clip(0.62 - 0.35 * kl + random.normal(0, 0.012), 0, 1))
        lines.append({"kind": "score", "sizes": c, "name": score, "score": value, "params": count(c),
                      "active_params": count(c), "memory_mb": count(c) * 2 / 2**20 + 500, "seconds": 31.5})  # fmt: skip
        if best is None or (value < best[1]) == (score == "kl"):
            best = (c, value)
    assert best is not None
    lines.append({"kind": "winner", "sizes": best[0], "score": best[1], "params": count(best[0])})
    (folder / "candidates.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
