"""Starts a prune on two pipeline stages, in which rank 1 fails inside the forward loop."""

from __future__ import annotations

import os
import sys

import torch
from jobs import load

import mbridge_prune as mbp
from mbridge_prune import cli, runtime
from mbridge_prune.calibration.schedule import forward_only


def main(arguments: list[str]) -> int:
    model, how = arguments

    def loop(model: torch.nn.Module) -> None:
        forward_only(model, torch.ones(2, 12, dtype=torch.long), 1)
        if runtime.rank() == 1:
            if how == "raise":
                raise RuntimeError("the accelerator fell off")
            if how == "refuse":
                raise mbp.UserError("the text of this rank is missing")
            os._exit(9)
        forward_only(model, torch.ones(8, 12, dtype=torch.long), 1)

    unwrapped = load({"model": model, "pp": 2}).unwrapped_model
    mbp.prune(
        unwrapped, "mcore_minitron", {"export_config": {"num_layers": 5}}, config={"forward_loop": loop}
    )
    print("finished all the same")
    return 0


if __name__ == "__main__":
    cli.leave(cli.run(main, sys.argv[1:]))
