"""Whether the surrogate deserved its say: predictions against measurements, and the curves behind them."""

from __future__ import annotations

from mbridge_prune.report.charts.naming import log_scale
from mbridge_prune.report.markup import Html, code, numbers, table, tag
from mbridge_prune.report.numbers import DASH, counted, exact, rounded, significant, spearman, with_error
from mbridge_prune.report.plot import Linear, Plot, figure, from_zero, legend, spread
from mbridge_prune.report.search_record import Candidate, Search


def agreement(search: Search) -> Html | None:
    """Predicted against measured KL, of the candidates that test the surrogate and of the halving's."""
    checks, halving = _both(search.checks), _both(search.halving)
    points = [*checks, *halving]
    if not points:
        return None
    scale = spread(v for point in points for v in point)
    log = log_scale(scale)
    plot = Plot(scale, scale, 320, f"predicted KL{log}", f"measured KL{log}")
    plot.lines([(scale.low, scale.low, scale.high, scale.high)], "diagonal")
    plot.dots(checks, "check")
    plot.dots(halving, "kept-dot")
    keys = [("diagonal", "as predicted")]
    keys += [("square", "measured to check")] if checks else []
    keys += [("dot kept", "halving")] if halving else []
    said = _correlations(search, halving)
    alt = f"Predicted and measured KL of {counted(len(points), 'measurement')}. {said}"
    return figure("Predicted and measured", said, legend(*keys), plot.html(alt))


def _correlations(search: Search, halving: list[tuple[float, float]]) -> str:
    rho, n = search.surrogate.get("spearman"), search.surrogate.get("pairs")
    said = []
    if isinstance(rho, (int, float)):
        of = f"{n} " if n else ""
        said.append(f"on {of}candidates measured to check it {rounded(rho)}")
    if len(halving) > 3 and (rho := spearman(*zip(*halving, strict=True))) is not None:
        said.append(f"on {len(halving)} of the halving, all of them promising, {rounded(rho)}")
    return f"Rank correlation of the surrogate (Spearman): {'; '.join(said)}." if said else ""


def _both(candidates: list[Candidate]) -> list[tuple[float, float]]:
    return [(c.predicted, c.kl) for c in candidates if c.predicted is not None and c.kl is not None]


def curves(search: Search) -> Html | None:
    """KL against the size of one hparam alone: the measured cuts and the curve laid through them."""
    fitted = {h: [(float(x), float(y)) for x, y in points]
              for h, points in (search.surrogate.get("curves") or {}).items()}  # fmt: skip
    measured: dict[str, list[Candidate]] = {}
    for c in search.axis:
        hparam = _cut_alone(search, c)
        if hparam and c.kl is not None:
            measured.setdefault(hparam, []).append(c)
    hparams = [h for h in search.full if h in fitted or h in measured] or list(fitted | measured)
    hparams = [h for h in hparams if len(fitted.get(h, [])) > 1 or measured.get(h)]
    if not hparams:
        return None
    values = [y for points in fitted.values() for _, y in points] + [
        c.kl for group in measured.values() for c in group if c.kl is not None
    ]
    y = from_zero(values)
    parts = [_curve(search, h, fitted.get(h, []), measured.get(h, []), y) for h in hparams]
    rows = [
        [code(h), exact(c.sizes[h]), with_error(c.kl or 0, c.se), str(c.samples or DASH)]
        for h in hparams
        for c in sorted(measured.get(h, []), key=lambda c: c.sizes[h])
    ]
    keys = legend(("dot kept", "measured, ± one standard error"), ("front", "surrogate"))
    text = "What the surrogate adds up. One scale for all: a steep curve is a dimension that is dear to cut."
    more = numbers("The measured cuts", table(["", "size", "KL", "samples"], rows,
                                              caption="Measured single cuts")) if rows else None  # fmt: skip
    return figure("KL of each dimension cut alone", text, keys, tag("div", *parts, class_="many"), more)


def _cut_alone(search: Search, c: Candidate) -> str | None:
    """The hparam that a single cut is of; others may have had to follow it (heads follow their groups)."""
    cut, curves_ = search.cut(c), search.surrogate.get("curves") or {}
    if len(cut) == 1:
        return next(iter(cut))
    return next((h for h in cut if [c.sizes[h], c.kl] in curves_.get(h, [])), None)


def _curve(
    search: Search, hparam: str, fitted: list[tuple[float, float]], measured: list[Candidate], y: Linear
) -> Html:
    cuts = [(float(c.sizes[hparam]), c.kl or 0.0) for c in measured]
    full = search.full.get(hparam)
    xs = [x for x, _ in fitted + cuts] + ([float(full)] if full else [])
    air = (max(xs) - min(xs)) * 0.07 or 1
    plot = Plot(Linear(min(xs) - air, max(xs) + air, 4, big=True), y, 150)
    plot.line(sorted(fitted), "front")
    plot.lines(((float(c.sizes[hparam]), c.kl - c.se, float(c.sizes[hparam]), c.kl + c.se)
                for c in measured if c.kl is not None and c.se), "whisker")  # fmt: skip
    plot.dots(cuts, "kept-dot")
    worst = max(fitted + cuts, key=lambda p: p[1])
    alt = f"{hparam}: KL up to {significant(worst[1])} at size {exact(worst[0])}."
    return tag("div", tag("h4", code(hparam)), plot.html(alt), class_="small")
