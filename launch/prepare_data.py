"""Makes a Megatron indexed dataset of text: python launch/prepare_data.py --help."""

from __future__ import annotations

import sys

from mbridge_prune import cli
from mbridge_prune.distill.prepare import main

if __name__ == "__main__":
    cli.leave(cli.run(main, sys.argv[1:]))
