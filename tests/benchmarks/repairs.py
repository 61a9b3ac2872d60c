"""What each repair keeps of a model: loss on text that calibration has not seen, at equal sizes.

    python tests/benchmarks/repairs.py HF_FOLDER CALIBRATION_TEXT HELD_OUT_TEXT... [--ways minitron/none ...] [--cuts JSON]

Prints a Markdown table: a text's two columns are the excess of the loss over the full model's and KL(full || cut), both
in nats. The last column is the processor time of cut and repair, without scoring, over that of a scoring pass.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring import load

from mbridge_prune import get_hf_mbridge_calibration_loop, prune
from mbridge_prune.bridge.load import load_tokenizer
from mbridge_prune.calibration.packing import calibration_tokens
from mbridge_prune.evaluate.divergence import Reference
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
WAYS = ["minitron/none", "weighted/none", "weighted/norm", "weighted/least_squares", "weighted/sequential"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration")
    parser.add_argument("texts", nargs="+")
    parser.add_argument("--cuts", type=json.loads, default=CUTS)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--add-bos", action="store_true")
    parser.add_argument(
        "--ways", nargs="+", default=WAYS, choices=[f"{a}/{b}" for a in RANKINGS for b in REPAIRS]
    )
    args = parser.parse_args()
    tokenizer = load_tokenizer(str(args.model), False)
    held_out = {
        Path(text).name: calibration_tokens(
            text, tokenizer, args.windows, args.seq_length, split="validation", add_bos=args.add_bos
        )
        for text in args.texts
    }
    full = load(args.model, length=args.seq_length).unwrapped_model
    dense = {name: float(token_losses(full, tokens).mean()) for name, tokens in held_out.items()}
    references = {name: Reference.of(full, tokens) for name, tokens in held_out.items()}
    del full
    print("| cut | ranking/repair | " + " | ".join(f"{name}, loss | KL" for name in held_out) + " | time |")
    print("| --- | --- |" + " ---: |" * (2 * len(held_out) + 1))
    print("| none | | " + " | ".join(f"{loss:.3f} |" for loss in dense.values()) + " |", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        scoring: dict[str, float] = {}
        for cut, way in itertools.product(args.cuts, args.ways):
            ranking, repair = way.split("/")
            if repair == "norm" and "hidden_size" not in cut:
                continue  # the same as none
            scores = Path(scratch) / f"{ranking}.safetensors"
            if ranking not in scoring:
                scoring[ranking] = prune_once(args, tokenizer, cut, ranking, "none", scores)[1]
            model, seconds = prune_once(args, tokenizer, cut, ranking, repair, scores)
            cells = [" ".join(f"{name}={size}" for name, size in cut.items()), way]
            for name, tokens in held_out.items():
                cells.append(f"{float(token_losses(model, tokens).mean()) - dense[name]:.3f}")
                cells.append(f"{float(references[name].kl(model).mean()):.3f}")
            cells.append(f"{seconds / scoring[ranking]:.2f}")
            print("| " + " | ".join(cells) + " |", flush=True)


def prune_once(
    args: argparse.Namespace, tokenizer: Any, cut: dict[str, int], ranking: str, repair: str, scores: Path
) -> tuple[Any, float]:
    """The cut model, and the processor seconds it took; the first time with a ranking, with its scoring pass."""
    _, provider, _, model, _ = load(args.model, length=args.seq_length)
    loop = get_hf_mbridge_calibration_loop(
        model=None, provider=provider, tokenizer=tokenizer, hf_model_name_or_path=args.model,
        dataset_name=args.calibration, num_samples=args.samples, seq_length=args.seq_length,
        add_bos=args.add_bos,
    )  # fmt: skip
    config = {"forward_loop": loop, "checkpoint": scores, "repair": repair, "importance": ranking}
    begin = time.process_time()
    pruned, _ = prune(model, mode="mcore_minitron", constraints={"export_config": cut}, config=config)
    return pruned, time.process_time() - begin


if __name__ == "__main__":
    main()
