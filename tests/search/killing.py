"""Runs launch/prune.py and ends this process, as `kill -9` does, at the first file event of a name.

    python tests/search/killing.py "open .plan.json.partial" ARGUMENTS...

An event is one of Python's audit events (`open` for writing, `os.rename`, `os.mkdir`), before it happens. Of
an `open`, the file is left half-written.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from commands import launched

from mbridge_prune import cli

HALF = b'{"sizes_bef'


def main(what: str, *arguments: str) -> None:
    wanted, name = what.split(" ")
    dying = False

    def watch(event: str, details: tuple) -> None:
        nonlocal dying
        if dying or event != wanted or not isinstance(details[0], (str, os.PathLike)):
            return
        path = Path(details[0])
        if path.name != name or (event == "open" and not details[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        dying = True  # writing the half is an event as well
        if event == "open":
            path.write_bytes(HALF)
        os.kill(os.getpid(), signal.SIGKILL)

    command = launched("prune")
    sys.addaudithook(watch)
    cli.leave(cli.run(command.main, arguments))


if __name__ == "__main__":
    main(*sys.argv[1:])
