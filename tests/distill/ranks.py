"""Distils as often as a JSON list has argument lists, in the processes of one torchrun.

torchrun --nproc-per-node 2 tests/distill/ranks.py runs.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from commands import launched

from mbridge_prune import cli


def main(arguments: list[str]) -> int:
    from megatron.core import parallel_state

    for words in json.loads(Path(arguments[0]).read_text()):
        code = launched("distill").main(words)
        if code:
            return code
        parallel_state.destroy_model_parallel()
    return 0


if __name__ == "__main__":
    cli.leave(cli.run(main, sys.argv[1:]))
