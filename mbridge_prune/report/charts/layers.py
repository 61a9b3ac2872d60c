"""How important every layer is, and which layers went."""

from __future__ import annotations

import numpy as np

from mbridge_prune.report.data import Run
from mbridge_prune.report.markup import Html, code, join, numbers, table, tag
from mbridge_prune.report.numbers import LESS, counted, ranges, significant
from mbridge_prune.report.plot import Bands, Plot, figure, from_zero, legend, spread

UNEVEN = 6
"""Where the largest score is so many times the median, the scale is logarithmic."""


TRIED = "Layers were tried one by one, in the model that the removals before had left:"
MEASURED = {
    "cosine": f"How far a layer turns the hidden state: the mean over tokens of 1 {LESS} cosine between what "
    "goes in and what comes out.",
    "greedy": f"{TRIED} KL to the full model without the layer, in nats.",
    "greedy_logits": f"{TRIED} squared error of the logits without the layer, as a share of the full "
    "model\u2019s.",
}
"""What each `depth` measures."""


def layers(run: Run) -> Html | None:
    """The figure, or None where the run has no scores of layers."""
    scores = run.plan.get("layer_scores") or []
    if not scores:
        return None
    removed = set(run.layers_removed)
    log = max(scores) > UNEVEN * np.median(scores) and min(scores) > 0
    y = spread(scores, log=True) if log else from_zero(scores)
    plot = Plot(Bands([str(n) for n in range(len(scores))]), y, 220, "layer",
                "importance" + (", log scale" if log else ""))  # fmt: skip
    for class_, wanted in (("kept", False), ("cut", True)):
        inside = [n for n in range(len(scores)) if (n in removed) == wanted]
        if log:  # stems only lead the eye: a bar would say a length that means nothing
            plot.lines(((n, y.low, n, scores[n]) for n in inside), f"stem {class_}-edge")
            plot.dots(((n, scores[n]) for n in inside), f"{class_}-dot")
        else:
            tops = ((n, plot.fy(scores[n])) for n in inside)
            plot.shape(
                (plot.box(plot.side(n + 0.18), top, plot.side(n + 0.82), 1) for n, top in tops), class_
            )
    for n in removed:
        plot.column(n, "gone")
    fate = ["removed" if n in removed else "kept" for n in range(len(scores))]
    for n, score in enumerate(scores):
        plot.column(n, "hover", f"layer {n}: {significant(score)}, {fate[n]}")
    order = np.argsort([-s for s in scores], kind="stable").tolist()
    said = MEASURED[run.plan.get("calibration", {}).get("depth", "cosine")]
    if removed:
        said += f" {counted(len(removed), 'layer')} removed: {ranges(removed)}."
    marks = ("dot kept", "square") if log else ("kept", "cut")
    keys = list(zip(marks, ("kept", "removed"), strict=True)) if removed else []
    rows = [[n, significant(s, 4), order.index(n) + 1, fate[n]] for n, s in enumerate(scores)]
    alt = (
        f"Importance of {len(scores)} layers. Highest: layer {order[0]} ({significant(scores[order[0]])}); "
        f"lowest: layer {order[-1]} ({significant(scores[order[-1]])}). "
    )
    alt += f"Removed: {ranges(removed)}." if removed else "No layer was removed."
    sizes = f"{run.layers} → {run.after['num_layers']}" if removed else str(run.layers)
    heading = join(["Layers ", code("num_layers"), " ", tag("span", sizes, class_="sizes")])
    return figure(
        heading, said, legend(*keys) if keys else None, plot.html(alt), _kinds(run),
        numbers("The numbers of every layer",
                table(["layer", "importance", "rank", ""], rows, caption="Importance of every layer")),
    )  # fmt: skip


def _kinds(run: Run) -> Html | None:
    """Which layer is of which kind, where they differ."""
    if len(run.kinds) < 2:
        return None
    words = (join([tag("b", kind), f" {ranges(numbers)}"]) for kind, numbers in run.kinds.items())
    return tag("p", join(words, "; "), class_="note")
