"""A Megatron checkpoint back to an ordinary Hugging Face folder: [torchrun] launch/export.py --help."""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mbridge_prune import cli, runtime
from mbridge_prune.config import Parser
from mbridge_prune.errors import UserError

log = logging.getLogger("mbridge_prune")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def parser() -> Parser:
    parser = Parser(prog="export.py", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--megatron-path", metavar="DIR", required=True,
        help="torch_dist checkpoint: an iteration's folder, or that of several (the latest)")  # fmt: skip
    add("--hf-path", metavar="MODEL", help="its Hugging Face config and tokenizer (default: those beside it)")
    add("--output", "-o", metavar="DIR", required=True, help="the Hugging Face folder to write")
    add(
        "--dtype", choices=DTYPES, default="auto", help="of the weights (default: as the checkpoint has them)"
    )
    add("--pp", type=int, default=1, help="pipeline stages to spread it over (default: 1)")
    add("--tp", type=int, default=1, help="tensor parallel ranks (default: 1)")
    add("--ep", type=int, default=1, help="expert parallel ranks (default: 1)")
    add("--trust-remote-code", action="store_true", help="let transformers run the model's own code")
    return parser


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(list(arguments))
    for name in ("pp", "tp", "ep"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} must be at least 1")

    from mbridge_prune import export_hf
    from mbridge_prune.bridge.checkpoint import iteration_number
    from mbridge_prune.bridge.exported import holds, refuse_foreign
    from mbridge_prune.bridge.source import Source
    from mbridge_prune.report.model_card import checkpoint_card

    source, output = Source.of(options.hf_path, options.megatron_path), Path(options.output)
    assert source.iteration is not None
    source.check()
    runtime.start_distributed()
    overrides = provider_overrides(options, source.iteration)
    record = {
        "source": str(source.iteration.resolve()),
        "iteration": iteration_number(source.iteration),
        "written": int((source.iteration / "metadata.json").stat().st_mtime),
        "dtype": str(overrides["params_dtype"]).removeprefix("torch."),
    }
    if holds(output, record):
        log.info("%s is this checkpoint's export already: nothing to do", output)
        return 0
    refuse_foreign(output)
    loaded = source.load(overrides, options.trust_remote_code)
    layers = loaded.provider.num_layers
    export_hf(
        loaded.bridge, loaded.model, output, layers_kept=range(layers), tokenizer=loaded.tokenizer,
        trust_remote_code=options.trust_remote_code, source=source.hf_path, record=record,
        model_card=checkpoint_card(record, layers),
    )  # fmt: skip
    log.info(
        "wrote %s: iteration %s, %s, %s layers\nnext: measure it with\n"
        "  python launch/evaluate.py --hf-path %s --data TEXT_FILE",
        output, record["iteration"], record["dtype"], layers, shlex.quote(str(output)),
    )  # fmt: skip
    return 0


def provider_overrides(options: argparse.Namespace, iteration: Path) -> dict[str, Any]:
    """The Megatron-Bridge provider fields of the layout and the dtype that were asked for."""
    import torch

    from mbridge_prune.bridge.checkpoint import dtype_in

    dtype = dtype_in(iteration) if options.dtype == "auto" else getattr(torch, options.dtype)
    return {
        "pipeline_model_parallel_size": options.pp, "tensor_model_parallel_size": options.tp,
        "expert_model_parallel_size": options.ep, "params_dtype": dtype, "pipeline_dtype": dtype,
    }  # fmt: skip


if __name__ == "__main__":
    cli.leave(cli.run(main, sys.argv[1:]))
