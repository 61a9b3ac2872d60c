"""Text that a model writes itself: of its own training's kind, where that text is not at hand.

python tests/benchmarks/own_text.py HF_FOLDER OUTPUT.txt [--documents 400] [--length 256] [--seed 0]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--documents", type=int, default=400)
    parser.add_argument("--length", type=int, default=256, help="tokens of a document, at most")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    documents: list[str] = []
    while len(documents) < args.documents:
        begin = torch.full((args.batch, 1), model.config.bos_token_id)
        out = model.generate(
            begin,
            attention_mask=torch.ones_like(begin),
            do_sample=True,
            top_k=0,
            max_length=args.length,
            pad_token_id=model.config.eos_token_id,
        )
        documents += tokenizer.batch_decode(out, skip_special_tokens=True)
    args.output.write_text("\n\n".join(text.strip() for text in documents[: args.documents]) + "\n")


if __name__ == "__main__":
    main()
