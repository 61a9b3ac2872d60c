"""What each repair keeps of a model: loss on text that calibration has not seen, at equal sizes.

    python tests/benchmarks/repairs.py HF_FOLDER CALIBRATION_TEXT HELD_OUT_TEXT... [--importance weighted] [--cuts JSON]

Prints a Markdown table: excess of the loss over the full model's, in nats, a column a text and repair.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring import load

from mbridge_prune import get_hf_mbridge_calibration_loop, prune
from mbridge_prune.bridge.load import load_tokenizer
from mbridge_prune.calibration.packing import calibration_tokens
from mbridge_prune.evaluate.loss import token_losses
from mbridge_prune.prune_config import RANKINGS, REPAIRS

CUTS = [
    {"ffn_hidden_size": 1152},
    {"ffn_hidden_size": 768},
    {"hidden_size": 512},
    {"num_attention_heads": 6},
    {"num_query_groups": 2},
    {"num_layers": 25},
    {"hidden_size": 512, "ffn_hidden_size": 1152, "num_attention_heads": 6},
]
"""Of SmolLM2-135M."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration")
    parser.add_argument("texts", nargs="+")
    parser.add_argument("--cuts", type=json.loads, default=CUTS)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--importance", choices=RANKINGS, default=RANKINGS[0])
    parser.add_argument("--repairs", nargs="+", choices=REPAIRS[1:], default=REPAIRS[1:])
    args = parser.parse_args()
    tokenizer = load_tokenizer(str(args.model), False)
    texts = {
        Path(text).name: calibration_tokens(text, tokenizer, args.windows, args.seq_length)
        for text in args.texts
    }

    def losses(model: Any) -> list[float]:
        return [float(token_losses(model, tokens).mean()) for tokens in texts.values()]

    with tempfile.TemporaryDirectory() as scratch:
        dense = losses(load(args.model, length=args.seq_length).unwrapped_model)
        print("| cut | repair | " + " | ".join(f"excess, {name}" for name in texts) + " | s |")
        print("| --- | --- |" + " ---: |" * (len(texts) + 1))
        print("| none | | " + " | ".join(f"{loss:.3f} (its loss)" for loss in dense) + " | |", flush=True)
        for cut in args.cuts:
            for repair in args.repairs:
                if repair == "norm" and "hidden_size" not in cut:
                    continue  # the same as none
                begin = time.monotonic()
                cut_model = pruned(args, tokenizer, cut, repair, Path(scratch) / "scores.safetensors")
                seconds = time.monotonic() - begin
                excess = [after - before for after, before in zip(losses(cut_model), dense, strict=True)]
                print(
                    f"| {' '.join(f'{k}={v}' for k, v in cut.items())} | {repair} | "
                    + " | ".join(f"{nats:.3f}" for nats in excess)
                    + f" | {seconds:.0f} |",
                    flush=True,
                )


def pruned(args: argparse.Namespace, tokenizer: Any, cut: dict[str, int], repair: str, scores: Path) -> Any:
    _, provider, _, model, _ = load(args.model, length=args.seq_length)
    loop = get_hf_mbridge_calibration_loop(
        model=None, provider=provider, tokenizer=tokenizer, hf_model_name_or_path=args.model,
        dataset_name=args.calibration, num_samples=args.samples, seq_length=args.seq_length,
    )  # fmt: skip
    config = {"forward_loop": loop, "checkpoint": scores, "repair": repair, "importance": args.importance}
    return prune(model, mode="mcore_minitron", constraints={"export_config": cut}, config=config)[0]


if __name__ == "__main__":
    main()
