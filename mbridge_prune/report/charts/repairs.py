"""What the repair has made good, by the kind of weight."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

from mbridge_prune.report.data import Run
from mbridge_prune.report.markup import Html, code, table
from mbridge_prune.report.numbers import DASH, share
from mbridge_prune.report.plot import figure

ERROR_OF = {
    None: "what it writes",
    "hidden_state": "what the hidden state lacks",
    "removed_layers": "what removed layers did",
}


def repairs(run: Run) -> Html | None:
    """A row a kind of weight, its layers and experts together; None for a run that has repaired no weight."""
    kinds: dict[tuple[str, str | None], list[dict[str, Any]]] = defaultdict(list)
    for record in run.plan.get("repaired") or []:
        kind = re.sub(r"^(layers|mtp)\.\d+\.|(?<=\bexperts\.)\d+\.", "", record["weight"])
        kinds[kind, record.get("target")].append(record)
    rows: list[list[object]] = []
    for (kind, target), records in kinds.items():
        done = [record for record in records if record["repaired"]]
        sliced, mended = (_mean(done, f"{how}_error") for how in ("sliced", "repaired"))
        rows.append([code(kind), ERROR_OF[target], f"{len(done)} of {len(records)}", sliced, mended])
    if not rows:
        return None
    said = (
        "Squared error on samples that the repair has not seen, as a share of the whole, mean over the "
        "weights that were refitted: of the plain slice, and after the repair. Weights that stay as they "
        "were sliced are named in plan.json, with the reason."
    )
    head = ["weight", "error of", "refitted", "sliced", "repaired"]
    return figure("Repair", said, table(head, rows, left=2, caption="Repaired weights"))


def _mean(records: list[dict[str, Any]], key: str) -> str:
    return share(sum(record[key] for record in records) / len(records), 1) if records else DASH
