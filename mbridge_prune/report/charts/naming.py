"""What the page calls hparams, their units and their layers."""

from __future__ import annotations

from collections.abc import Sequence

from mbridge_prune.report.data import Axis, Run
from mbridge_prune.report.markup import Html, code, join, tag
from mbridge_prune.report.numbers import exact
from mbridge_prune.report.plot import Linear, Log, Plot

WORDS = {
    "hidden_size": ("Hidden channels", "channel"),
    "ffn_hidden_size": ("FFN channels", "channel"),
    "num_attention_heads": ("Attention heads", "head"),
    "num_query_groups": ("Query groups", "group"),
    "mamba_num_heads": ("Mamba heads", "head"),
    "mamba_head_dim": ("Channels of the Mamba heads", "channel"),
    "num_moe_experts": ("Experts", "expert"),
    "moe_ffn_hidden_size": ("FFN channels of the experts", "channel"),
    "moe_shared_expert_intermediate_size": ("FFN channels of the shared expert", "channel"),
}
OBSERVED = {
    "hidden_size": "mean magnitude at the norms before every sublayer, summed over the model",
    "ffn_hidden_size": "mean magnitude at the input of the second FFN matrix",
    "num_attention_heads": "mean magnitude of the head\u2019s output",
    "num_query_groups": "mean magnitude of the outputs of the group\u2019s heads",
    "mamba_num_heads": "mean magnitude of what the head takes in",
    "mamba_head_dim": "mean magnitude of the channel, ranked inside its head",
    "num_moe_experts": "mean size of the expert\u2019s output times its routing weight",
    "moe_ffn_hidden_size": "mean magnitude over the expert\u2019s tokens, ranked inside each expert",
    "moe_shared_expert_intermediate_size": "mean magnitude at the input of the second FFN matrix",
}
"""What the `minitron` ranking measures; of experts, what every ranking does."""
GATE_FREE = "mean size of the expert\u2019s output, whatever its routing weight"


def title(run: Run, hparam: str) -> Html:
    """`FFN channels  ffn_hidden_size  1,536 → 1,152`"""
    name, _ = WORDS.get(hparam, (hparam, "unit"))
    before, after = run.before.get(hparam), run.after.get(hparam)
    sizes = None
    if before is not None and after is not None:
        sizes = exact(before) if before == after else f"{exact(before)} → {exact(after)}"
    return join([name, " ", code(hparam), " ", tag("span", sizes, class_="sizes") if sizes else None])


def observed(run: Run, hparam: str) -> str:
    _, unit = WORDS.get(hparam, (hparam, "unit"))
    article = "an" if unit[0] in "aeiou" else "a"
    ranking = run.plan.get("importance", "minitron")
    if hparam == "num_moe_experts" and run.plan.get("calibration", {}).get("experts") == "gate_free":
        return f"Importance of an expert: {GATE_FREE}."
    if (ranking == "minitron" or hparam == "num_moe_experts") and hparam in OBSERVED:
        return f"Importance of {article} {unit}: {OBSERVED[hparam]}."
    return f"Importance of {article} {unit} by the {ranking} ranking."


def names(run: Run, axes: Sequence[Axis]) -> list[str]:
    """Names of the columns: every layer of the trunk, then prediction heads that have this axis."""
    return [str(n) for n in range(run.layers)] + [column_name(axis) for axis in axes if axis.layer is None]


def column_name(axis: Axis) -> str:
    return str(axis.layer) if axis.layer is not None else axis.place.replace(".", " ")


def removed_columns(plot: Plot, run: Run) -> None:
    for layer in run.layers_removed:
        plot.column(layer, "gone", f"layer {layer} was removed")


def log_scale(scale: Linear | Log) -> str:
    """What an axis's title says of its scale."""
    return ", log scale" if isinstance(scale, Log) else ""
