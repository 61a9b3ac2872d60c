"""The README.md inside the exported model: what was cut, how, and what to do next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mbridge_prune.plan import Plan


def model_card(plan: Plan, source: str, facts: dict[str, Any]) -> str:
    """Markdown with Hugging Face front matter.

    Args:
        source: the unpruned model.
        facts: further lines of the table, name -> value.
    """
    rows = [f"| {name} | {before} | {plan.sizes_after[name]} |" for name, before in plan.sizes_before.items()]
    rows.append(f"| **parameters** | {plan.params_before:,} | {plan.params_after:,} |")
    if plan.active_before not in (0, plan.params_before):
        rows.append(f"| parameters active on a token | {plan.active_before:,} | {plan.active_after:,} |")
    dropped = sorted(set(range(plan.sizes_before["num_layers"])) - set(plan.layers_kept))
    more = [f"- {name}: {value}" for name, value in facts.items()]
    if dropped:
        more.insert(0, f"- layers removed (from 0): {', '.join(map(str, dropped))}")
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "tags: [pruned, mbridge_prune]",
            "---",
            "",
            "# A pruned model",
            "",
            f"`{source}`, cut to {plan.params_after / plan.params_before:.1%} of its parameters by "
            "`mbridge_prune`. It has not been trained since: distil it from its parent before use.",
            "",
            "| | before | after |",
            "| --- | ---: | ---: |",
            *rows,
            "",
            f"- ranking: {plan.importance}; repair: {plan.repair}",
            *more,
            "",
            "Load it with transformers' `from_pretrained`, as you would its parent.",
            "",
        ]
    )


def checkpoint_card(record: Mapping[str, Any], layers: int) -> str:
    """Of a model that came back from Megatron.

    Args:
        record: `source` and `iteration` of the checkpoint, and the `dtype` of the export.
    """
    step = "" if record["iteration"] is None else f", iteration {record['iteration']:,}"
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "tags: [mbridge_prune]",
            "---",
            "",
            "# A model from a Megatron checkpoint",
            "",
            f"`{record['source']}`{step}: {layers} layers, {record['dtype']}, exported by `mbridge_prune`.",
            "",
            "Load it with transformers' `from_pretrained`.",
            "",
        ]
    )
