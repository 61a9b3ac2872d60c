"""The top of the page: what was cut, in one sentence, and what it cost, in a few numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mbridge_prune.dynamic import DEPTH
from mbridge_prune.report.data import Run
from mbridge_prune.report.markup import Html, code, join, table, tag
from mbridge_prune.report.numbers import GAP, TIMES, change, exact, share, short, with_error


def headline(run: Run) -> Html:
    kept = share(run.plan["params_after"], run.plan["params_before"])
    title = f"{run.model}, cut to {kept} of its parameters" if run.cut else f"{run.model}: nothing was cut"
    over = ["pruning report", run.log.when.partition(" ")[0], run.log.where]
    warned = tag("div", tag("p", tag("strong", "The run warned:")), *(tag("p", w) for w in run.log.warnings),
                 class_="warn")  # fmt: skip
    return tag(
        "header",
        tag("p", " · ".join(word for word in over if word), class_="over"),
        tag("h1", title),
        tag("p", _sentence(run) if run.cut else _why_not(run), class_="lead"),
        _facts(run),
        warned if run.log.warnings else None,
    )


def _sentence(run: Run) -> Html:
    cut = [h for h in run.before if run.after[h] != run.before[h]]
    words = [
        f"{run.after[h]} of {run.before[h]} layers" if h == DEPTH
        else join([code(h), f" {exact(run.before[h])}{GAP}→{GAP}{exact(run.after[h])}"])
        for h in sorted(cut, key=lambda h: h != DEPTH)
    ]  # fmt: skip
    what = join([join(words, ", "), ". "]) if words else "Every size was kept. "
    how = f"Ranked by {run.plan.get('importance', 'minitron')}, repair: {run.plan.get('repair', 'none')}. "
    return join([what, how, "Not trained since: distil it from its parent before use."])


def _why_not(run: Run) -> str:
    """What became of a search that cut nothing."""
    search, bound = run.search, run.settings.get("search", {}).get("score_lower_bound")
    assert search is not None
    if not search.scored:
        return "The search is not finished: no candidate has its score yet."
    best, name = search.scored[0].scores[search.score_name], search.score_name
    found = f"The best {name} found is {with_error(best, None)}"
    if bound is None:
        return f"{found}; the search is not finished."
    if search.lower_is_better:
        return f"{found}, and at most {with_error(-bound, None)} was asked for (score_lower_bound={bound:g})."
    return f"{found}, below score_lower_bound={bound:g}."


def _facts(run: Run) -> Html:
    plan = run.plan
    if not run.cut:
        return tag("dl", fact("Parameters", None, short(plan["params_before"]), "all of them kept"),
                   fact("Layers", None, str(run.before[DEPTH]), "all of them kept"), class_="facts",
                   style="--n:2")  # fmt: skip
    facts = [fact("Parameters", short(plan["params_before"]), short(plan["params_after"]),
                   change(plan["params_before"], plan["params_after"]))]  # fmt: skip
    if run.experts:
        before, after = plan["active_before"], plan["active_after"]
        facts.append(fact("Active on a token", short(before), short(after), change(before, after)))
    facts.append(fact("Layers", str(run.before[DEPTH]), str(run.after[DEPTH]),
                       change(run.before[DEPTH], run.after[DEPTH])))  # fmt: skip
    if run.search and run.search.winner:
        winner = run.search.winner
        for name, value in winner.scores.items():
            if name not in ("kl", "loss"):
                facts.append(fact(name, None, with_error(value, None), "score of the winner"))
    dense, pruned = measured(run, "before", "loss"), measured(run, "after", "loss")
    if dense and pruned:
        before, after = dense[0], pruned[0]
        facts.append(fact("Loss, held-out text", f"{before:.3f}", f"{after:.3f}",
                           f"perplexity {_perplexity(before)}{GAP}→{GAP}{_perplexity(after)}"))  # fmt: skip
    if kl := measured(run, "kl", "kl"):
        facts.append(fact("KL to the full model", None, f"{kl[0]:.3f}", "nats a token, held-out text"))
    return tag("dl", *facts, class_="facts", style=f"--n:{len(facts)}")


def fact(name: str, before: str | None, after: str, more: str) -> Html:
    """A number of the head: what it is, what it was, what it is now."""
    below = more if before is None or before == after else f"from {before}, {more}"
    return tag("div", tag("dt", name), tag("dd", after, class_="big"), tag("dd", below, class_="from"))


def measured(run: Run, which: str, name: str) -> tuple[float, float | None, int] | None:
    """(value, standard error, predictions) of plan.json's `loss`, or None."""
    loss = run.plan.get("loss")
    part = loss.get(which) if isinstance(loss, Mapping) else None
    if not isinstance(part, Mapping):
        return None
    value = next((part[key] for key in (name, "loss", "kl") if _finite(part.get(key))), None)
    return None if value is None else (value, part.get("se"), int(part.get("n") or 0))


def _finite(x: Any) -> bool:
    return isinstance(x, (int, float)) and math.isfinite(x)


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):,.1f}" if loss < 20 else "above 1e8"


def sizes(run: Run) -> Html:
    """Every size, before and after."""
    rows = [_row(code(h), before, run.after[h], exact) for h, before in run.before.items()]
    plan = run.plan
    rows.append(_row(tag("b", "parameters"), plan["params_before"], plan["params_after"], short))
    said = f"Parameters: {exact(plan['params_before'])} → {exact(plan['params_after'])}"
    if run.experts:
        rows.append(_row("active on a token", plan["active_before"], plan["active_after"], short))
        said += f"; active on a token: {exact(plan['active_before'])} → {exact(plan['active_after'])}"
    return join([table(["", "before", "after", "kept", ""], rows, caption="Sizes before and after the cut"),
                 tag("p", f"{said}.", class_="note")])  # fmt: skip


def _row(name: object, before: int, after: int, say: Any) -> list[object]:
    kept = after / before if before else 1.0
    bar = tag("span", tag("i", style=f"width:{100 * min(kept, 1):.1f}%"), class_="bar", aria_hidden="true")
    return [name, say(before), say(after) if after != before else "same", share(after, before), bar]


def cost(run: Run) -> Html:
    """Loss and divergence, before and after; in words where the run measured none."""
    before, after = measured(run, "before", "loss"), measured(run, "after", "loss")
    kl = measured(run, "kl", "kl")
    if not (before and after):
        command = code("python launch/evaluate.py --hf-path MODEL --data TEXT")
        return tag("p", "This run measured no loss: ", command, " does.", class_="note")
    rows = [
        ["loss, nats a token", with_error(before[0], before[1]), with_error(after[0], after[1]),
         with_error(after[0] - before[0], None)],
        ["perplexity", _perplexity(before[0]), _perplexity(after[0]),
         f"{TIMES} {math.exp(min(after[0] - before[0], 20)):.2f}"],
    ]  # fmt: skip
    if kl:
        rows.append(["KL to the full model, nats a token", "0", with_error(kl[0], kl[1]), ""])
    said = "On held-out text; ± is one standard error."
    if after[2]:
        said = f"Loss over {exact(after[2])} predictions of held-out text; ± is one standard error."
    return join([table(["held-out text", "before", "after", "difference"], rows, caption="What the cut cost"),
                 tag("p", said, class_="note") if said else None])  # fmt: skip
