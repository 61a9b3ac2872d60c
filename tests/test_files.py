"""Files written aside, with the mode that any new file has."""

import os

import pytest
import torch
from safetensors.torch import load_file

from mbridge_prune.errors import UserError
from mbridge_prune.files import save_tensors, write_json


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_tensors_are_as_readable_as_the_umask_says(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        save_tensors({"a": torch.arange(3)}, tmp_path / "a.safetensors", {"format": "pt"})
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == mode
    assert load_file(tmp_path / "a.safetensors")["a"].tolist() == [0, 1, 2]


def test_json_is_whole_or_as_it_was(tmp_path, monkeypatch):
    write_json(tmp_path / "new" / "a.json", {"a": 1})
    assert (tmp_path / "new" / "a.json").read_text() == '{\n "a": 1\n}\n'

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=r"cannot write .*a\.json.*No space left"):
        write_json(tmp_path / "new" / "a.json", {"a": 2})
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.json"]
    assert '"a": 1' in (tmp_path / "new" / "a.json").read_text()
