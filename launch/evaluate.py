"""Perplexity of a Hugging Face model on a text file: python launch/evaluate.py --help."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from mbridge_prune import cli
from mbridge_prune.config import Parser
from mbridge_prune.errors import UserError


def main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="evaluate.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--hf-path", required=True, help="Hugging Face model folder")
    parser.add_argument("--data", required=True, help="text file to predict")
    parser.add_argument("--window", type=int, default=512, help="tokens a window (default: 512)")
    parser.add_argument("--windows", type=int, default=40, help="windows at most (default: 40)")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="let transformers run the model's own code"
    )
    options = parser.parse_args(list(arguments))
    if options.window < 2 or options.windows < 1:
        raise UserError("--window must be at least 2 and --windows at least 1")
    if not Path(options.data).is_file():
        raise UserError(f"no such text file: {options.data}")

    import torch
    from transformers import AutoConfig, AutoTokenizer

    from mbridge_prune import runtime
    from mbridge_prune.bridge.export import auto_class
    from mbridge_prune.bridge.load import check_hf_folder
    from mbridge_prune.evaluate.loss import loss, windows

    check_hf_folder(options.hf_path)
    trust = options.trust_remote_code
    tokenizer = AutoTokenizer.from_pretrained(options.hf_path, trust_remote_code=trust)
    config = AutoConfig.from_pretrained(options.hf_path, trust_remote_code=trust)
    model = auto_class(config).from_pretrained(options.hf_path, dtype=torch.float32, trust_remote_code=trust)
    model = model.to(runtime.device())
    text = Path(options.data).read_text(encoding="utf-8")
    result = loss(model, windows(text, tokenizer, options.window, options.windows))
    print(
        f"perplexity {result.perplexity:.2f} (loss {result.loss:.4f} nats, {result.predictions:,} "
        f"predictions, {result.tokens_per_second:.0f} tokens/s)"
    )
    return 0


if __name__ == "__main__":
    cli.leave(cli.run(main, sys.argv[1:]))
