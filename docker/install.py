"""Installs mbridge_prune into the Python that runs this, beside what is there: the NeMo container's, say.

    python docker/install.py [--also MODULE...]

The package is installed editable and without its dependencies, so that launch/, configs/ and the package are
one tree and no package of the container is replaced. Of what it imports only what is missing is installed,
pinned, and under constraints that keep every version that is there. Torch, Megatron and transformers are not
among it.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEEDED = {  # module: what to install where it is missing
    "datasets": "datasets==5.0.1",
    "gguf": "gguf==0.19.0",
    "pyarrow": "pyarrow==26.0.1",
    "rich": "rich==15.0.0",
    "safetensors": "safetensors==0.8.0",
    "yaml": "PyYAML==6.0.4",
}
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--also", nargs="*", default=[], metavar="MODULE", help="further modules, as PyPI has them"
    )
    wanted = NEEDED | {name: name.replace("_", "-") for name in parser.parse_args().also}

    if importlib.util.find_spec("pip") is None:
        subprocess.run([sys.executable, "-m", "ensurepip"], check=True)
    subprocess.run([*PIP, "install", "--no-cache-dir", "--no-deps", "-e", ROOT], check=True)
    missing = [package for module, package in wanted.items() if importlib.util.find_spec(module) is None]
    if missing:
        command = [*PIP, "list", "--format=freeze", "--exclude-editable"]
        there = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
            constraints.write(there)
            constraints.flush()
            install = [*PIP, "install", "--no-cache-dir", "-c", constraints.name, *missing]
            subprocess.run(install, check=True)
    print(f"mbridge_prune in {sys.prefix}; installed beside it: {', '.join(missing) or 'nothing'}")
    lacking = [
        name for name in ("torch", "transformers", "megatron") if importlib.util.find_spec(name) is None
    ]
    if lacking:
        print(f"not here, and needed: {', '.join(lacking)} (the NeMo container has them; see README.md)")


if __name__ == "__main__":
    main()
