"""Downloads a package archive once, checks it, and builds a cache folder from it once.

Ranks of one job call this at the same time, and runs die half-way: a lock and a rename see to it
that a name in the cache is either absent or complete.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mbridge_prune.errors import UserError


@dataclass(frozen=True)
class Archive:
    """A package archive: the file's name, the command that fetches it into the working folder."""

    file: str
    command: tuple[str, ...]
    sha256: str


def pip_archive(file: str, requirement: str, sha256: str, *options: str) -> Archive:
    """An archive that ``pip download`` fetches."""
    command = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *options)
    return Archive(file, (*command, requirement), sha256)


def npm_archive(file: str, package: str, sha256: str) -> Archive:
    """An archive that ``npm pack`` fetches."""
    return Archive(file, ("npm", "pack", "--silent", package), sha256)


def cache_dir() -> Path:
    """The folder everything is kept in, created when missing."""
    checkout = Path(__file__).resolve().parents[2]
    inside = any((checkout / mark).exists() for mark in ("pyproject.toml", ".git"))
    default = checkout / ".cache" if inside else Path("~/.cache/mbridge_prune")
    folder = Path(os.environ.get("MBRIDGE_PRUNE_CACHE") or default).expanduser().resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def fetch(archive: Archive) -> Path:
    """Return the archive's path in the cache, downloaded and checked when it is not there.

    Raises:
        UserError: the registry's client is missing or failed, or the SHA-256 is another.
    """
    folder = cache_dir() / "downloads"
    folder.mkdir(exist_ok=True)
    path = folder / archive.file
    with _lock(folder / f".{archive.file}.lock"):
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=folder) as aside:
                _download(archive, aside, folder)
                _check(archive, Path(aside) / archive.file)
                os.replace(Path(aside) / archive.file, path)
            return path
    _check(archive, path)
    return path


def build_once(name: str, build: Callable[[Path], None]) -> Path:
    """Return the folder ``name`` of the cache; ``build`` fills it when it is not there yet."""
    final = cache_dir() / name
    if final.is_dir():
        return final
    with _lock(final.with_name(f".{name}.lock")):
        if final.is_dir():
            return final
        with tempfile.TemporaryDirectory(dir=cache_dir(), prefix=f".{name}-") as aside:
            built = Path(aside) / name
            built.mkdir()
            build(built)
            try:
                built.rename(final)
            except OSError:  # another machine on a shared disk was first
                if not final.is_dir():
                    raise
    return final


def _download(archive: Archive, aside: str, folder: Path) -> None:
    shown = " ".join((Path(archive.command[0]).name, *archive.command[1:]))
    by_hand = f"check the network, or put {archive.file} into {folder} by hand"
    try:
        done = subprocess.run(archive.command, cwd=aside, capture_output=True, text=True, check=False)
    except OSError as error:
        raise UserError(f"cannot run `{shown}`: {error.strerror}; {by_hand}") from error
    if done.returncode or not (Path(aside) / archive.file).exists():
        lines = [line for line in done.stderr.splitlines() if "rror" in line] or ["no message"]
        raise UserError(f"`{shown}` failed: {lines[-1].strip()}; {by_hand}")


def _check(archive: Archive, path: Path) -> None:
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != archive.sha256:
        raise UserError(
            f"{path} has SHA-256 {digest.hexdigest()}, expected {archive.sha256}; delete it and run again"
        )


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock between the processes of this machine."""
    with open(path, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
