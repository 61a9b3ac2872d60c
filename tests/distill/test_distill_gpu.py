"""What only a GPU does: bf16 with the distributed optimizer, saved and taken up again."""

from __future__ import annotations

import pytest
import torch
from distill.conftest import arguments, copied, losses
from distill.test_distill_layouts import forget_the_end
from safetensors.torch import load_file

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_a_bf16_run_is_saved_and_goes_on(site, tmp_path, distil):
    whole = tmp_path / "whole"
    assert distil(*arguments(site, whole, "--dtype", "bfloat16")).code == 0
    trained = [line["train"]["loss"] for line in losses(whole) if "train" in line]
    assert len(trained) == 6 and all(torch.tensor(trained).isfinite())
    weights = load_file(whole / "hf" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    again = copied(whole, tmp_path / "again")
    forget_the_end(again)
    said = distil(*arguments(site, again, "--dtype", "bfloat16"))
    assert said.code == 0 and "going on from the checkpoint of step 3" in said.out, said
    assert [line["step"] for line in losses(again)] == [line["step"] for line in losses(whole)]
    resumed = [line["train"]["loss"] for line in losses(again) if "train" in line]
    assert resumed == pytest.approx(trained, rel=1e-2)
    for name, tensor in load_file(again / "hf" / "model.safetensors").items():
        assert torch.allclose(tensor.float(), weights[name].float(), atol=1e-2), name
