"""``python -m mbridge_prune.demo_data NAME...``: fetch, convert, print one path a name."""

from __future__ import annotations

import argparse
import sys

from mbridge_prune import demo_data
from mbridge_prune.errors import UserError, nearest

SOURCES = (
    "smollm2", "stories15m", "glassllm", "qwen2_5_coder", "minimind2", "minilm", "enwik8", "wikitext2",
    "mmlu", "sst2", "cifar10", "cifar_cnn",
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code (2 for an error the user can mend)."""
    parser = argparse.ArgumentParser(prog="mbridge_prune.demo_data", description=__doc__)
    parser.add_argument("names", nargs="+", metavar="NAME", help=f"one of: {', '.join(SOURCES)}")
    names = parser.parse_args(argv).names
    try:
        for name in names:
            if name not in SOURCES:
                known = ", ".join(SOURCES)
                raise UserError(f"no demo data {name!r}{nearest(name, SOURCES)}; there are: {known}")
        for name in names:
            print(getattr(demo_data, name)(), flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
