"""The candidates in numbers: how many every stage saw, the best of them, what there was to choose from."""

from __future__ import annotations

from mbridge_prune.report.markup import Html, code, numbers, table, tag
from mbridge_prune.report.numbers import DASH, GAP, counted, exact, short, significant, with_error
from mbridge_prune.report.plot import figure
from mbridge_prune.report.search_record import Candidate, Search

TOP = 20
COSTS = {"active_params": "active", "memory_mb": "MiB", "flops": "operations"}
"""Columns of the table of candidates, where they tell something."""
UNITS = {
    "params": "parameters",
    "active_params": "parameters active on a token",
    "memory_mb": "MiB of memory",
    "flops": "operations a token",
}


def funnel(search: Search) -> Html:
    """How many candidates every stage saw."""
    steps: list[tuple[int, str]] = []
    if isinstance(search.head.get("grid"), int):
        steps.append((search.head["grid"], "in the space"))
    if search.in_budget is not None:
        bounds = " and ".join(_bound(name, limit) for name, limit in search.budgets.items())
        steps.append((search.in_budget, f"inside {bounds}" if bounds else "inside the budget"))
    for seen, samples in search.rounds.values():
        steps.append((seen, f"measured on {counted(samples, 'sample')}" if samples else "measured"))
    if search.scored:
        steps.append((len(search.scored), f"scored by {search.score_name}"))
    if search.winner:
        steps.append((1, "winner"))
    items = (tag("li", tag("b", exact(n)), tag("span", words)) for n, words in steps)
    return tag("ol", *items, class_="funnel")


def _bound(name: str, limit: float) -> str:
    if name == "memory_mb":
        return f"{exact(limit)} MiB of memory"
    return f"{short(limit)} {UNITS.get(name, name)}"


def words(search: Search, c: Candidate) -> str:
    cut = ", ".join(f"{h} {n:,}" for h, n in search.cut(c).items())
    parts = [cut or "the full model"]
    if c.params is not None:
        parts.append(f"{short(c.params)} parameters")
    if c.predicted is not None:
        parts.append(f"predicted {significant(c.predicted)}")
    if c.kl is not None:
        parts.append(f"measured {with_error(c.kl, c.se)}")
    parts += [f"{name} {with_error(value, None)}" for name, value in c.scores.items()]
    return "; ".join(parts)


def top(search: Search) -> Html | None:
    """The best candidates, best first."""
    best = search.scored or sorted((c for c in search.measured if c.kl is not None), key=lambda c: c.kl or 0)
    best = best[:TOP]
    if not best:
        return None
    varying = [h for h in best[0].sizes if len({c.sizes.get(h) for c in best}) > 1]
    same = {h: n for h, n in best[0].sizes.items() if h not in varying}
    facts = [f for f in COSTS if any(_tells(search, c, f) for c in best)]
    names = list(dict.fromkeys(name for c in best for name in c.scores))
    head = ["", *map(code, names), "parameters", *(COSTS[f] for f in facts), *map(code, varying),
            "KL predicted", "KL, halving"]  # fmt: skip
    rows = []
    for place, c in enumerate(best, 1):
        rows.append([
            tag("b", f"{place}{GAP}winner", class_="win") if c is search.winner else str(place),
            *(DASH if n not in c.scores else with_error(c.scores[n], None) for n in names),
            DASH if c.params is None else short(c.params), *(_fact(f, c.facts.get(f)) for f in facts),
            *(exact(c.sizes[h]) for h in varying),
            DASH if c.predicted is None else f"{c.predicted:.3f}",
            DASH if c.kl is None else with_error(c.kl, c.se),
        ])  # fmt: skip
    kept = ", ".join(f"{h} {n:,}" for h, n in same.items())
    said = f"Best first. All of them have {kept}." if kept else "Best first."
    return figure("The best candidates", said, table(head, rows, caption="The best candidates, best first"))


def _tells(search: Search, c: Candidate, fact: str) -> bool:
    """False for active parameters that are all parameters, and for operations that nobody bounded."""
    if fact == "active_params":
        return fact in c.facts and c.facts[fact] != c.params
    return fact in c.facts and (fact != "flops" or fact in search.budgets)


def _fact(name: str, value: float | None) -> str:
    if value is None:
        return DASH
    return exact(value) if name == "memory_mb" else short(value)


def space(search: Search) -> Html | None:
    """The choices of every hparam, folded away."""
    choices = search.head.get("space") or {}
    if not choices:
        return None
    rows = [[code(h), len(sizes), ", ".join(exact(n) for n in sizes)] for h, sizes in choices.items()]
    head, what = ["", "choices", "sizes"], "The search space"
    return numbers(what, table(head, rows, left=1, caption=what, class_="wrap"))
