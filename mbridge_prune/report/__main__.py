"""``python -m mbridge_prune.report RUN_DIR``, ``... compare RUN_A RUN_B`` and ``... chain RUN...``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mbridge_prune import cli
from mbridge_prune.config import Parser
from mbridge_prune.report.chain import EVALUATION, write_chain
from mbridge_prune.report.compare import write_comparison
from mbridge_prune.report.page import write_report

PROGRAM = "python -m mbridge_prune.report"


def main(arguments: Sequence[str]) -> int:
    """Writes the page that is asked for and prints its path."""
    if list(arguments[:1]) == ["compare"]:
        parser = Parser(prog=f"{PROGRAM} compare", description="Sets two runs side by side in one page.")
        parser.add_argument("run_a", help="run folder")
        parser.add_argument("run_b", help="run folder")
        parser.add_argument("--output", help="the page (default: compare-with-<RUN_B>.html in RUN_A)")
        known = parser.parse_args(arguments[1:])
        print(write_comparison(known.run_a, known.run_b, known.output))
        return 0
    if list(arguments[:1]) == ["chain"]:
        parser = Parser(
            prog=f"{PROGRAM} chain",
            description="Cut, distilled, cut again: all steps of a chain of runs on one page. Losses: "
            f"{EVALUATION} in a run folder, which launch/evaluate.py --output RUN/{EVALUATION} writes.",
        )
        parser.add_argument(
            "places", metavar="RUN", nargs="+",
            help="run folders of prune.py and distill.py in the order in which they were made; before them, "
            "if there is one, evaluate.py's file of the parent",
        )  # fmt: skip
        parser.add_argument("--output", help="the page (default: chain.html in the last folder)")
        known = parser.parse_args(arguments[1:])
        print(write_chain(known.places, known.output))
        return 0
    parser = Parser(
        prog=PROGRAM,
        description="Rebuilds report.html of a run from the files of its folder.",
        epilog=f"Two runs side by side: {PROGRAM} compare RUN_A RUN_B; a chain: {PROGRAM} chain RUN...",
    )
    parser.add_argument("run", metavar="RUN_DIR", help="run folder")
    print(write_report(parser.parse_args(arguments).run))
    return 0


if __name__ == "__main__":
    cli.leave(cli.run(main, sys.argv[1:]))
