"""Of several checkpoints the newest whole one counts; what is damaged is named and kept."""

from __future__ import annotations

import pytest
import torch
import yaml
from torch.distributed.checkpoint import FileSystemWriter, save

from mbridge_prune.distill.checkpoints import LAST_WRITTEN, NEEDED, READ_AGAIN, missing_part, settle
from mbridge_prune.errors import UserError


@pytest.fixture
def folder(tmp_path):
    for step in (5, 10):
        place = tmp_path / f"iter_{step:07d}"
        place.mkdir()
        save({"w": torch.arange(1000.0)}, storage_writer=FileSystemWriter(place), no_dist=True)
        for name in NEEDED:
            if not (place / name).exists():
                (place / name).write_bytes(b"x%d" % step)
        config: dict[str, dict[str, int]] = {}
        for part, name in READ_AGAIN:
            config.setdefault(part, {})[name] = 1
        (place / LAST_WRITTEN).write_text(yaml.safe_dump(config))
    return tmp_path


def tracked(folder):
    return (folder / "latest_checkpointed_iteration.txt").read_text()


def test_the_newest_is_taken_and_the_trackers_point_to_it(folder):
    (folder / "latest_train_state.pt").write_bytes(b"half")
    assert settle(folder) == 10
    assert tracked(folder) == "10" and (folder / "latest_train_state.pt").read_bytes() == b"x10"


def test_nothing_yet(tmp_path):
    assert settle(tmp_path / "none") == 0


@pytest.mark.parametrize("share", [0, 0.3, 0.7])
def test_half_written_is_removed(folder, share):
    last = folder / "iter_0000010" / LAST_WRITTEN
    text = last.read_text()
    last.write_text(text[: int(share * len(text))]) if share else last.unlink()
    assert settle(folder) == 5 and tracked(folder) == "5"
    assert not (folder / "iter_0000010").exists()


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_damaged_one_is_set_aside(folder, damage):
    place = folder / "iter_0000010"
    shard = next(place.glob("*.distcp"))
    shard.unlink() if damage == "missing" else shard.write_bytes(shard.read_bytes()[:100])
    assert ("missing" if damage == "missing" else "cut short") in missing_part(place)
    assert settle(folder) == 5
    assert (folder / "damaged_iter_0000010" / ".metadata").exists()


def test_no_whole_one_left_is_no_new_beginning(folder):
    for place in folder.glob("iter_*"):
        (place / ".metadata").write_bytes(b"no pickle")
    with pytest.raises(
        UserError, match=r"no checkpoint in .* is whole \(iter_0000010: .metadata cannot be read"
    ):
        settle(folder)
