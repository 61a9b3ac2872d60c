"""Vision-language models: the language tower alone is cut, and what stands around it is not touched."""

from __future__ import annotations

import pytest
import torch
from masks import language_stack
from matrix import TOLERANCE, VISION, cuts, load, load_hf
from models import cut, difference, run, run_hf, tokens
from references import VISION_PARTS
from safetensors import safe_open
from safetensors.torch import load_file

import mbridge_prune as mbp


@pytest.fixture(scope="module", params=VISION)
def pruned(request, hf_folder, tmp_path_factory):
    """(family, source, pruned Megatron model, plan, exported folder) of all hparams cut at once."""
    source, out = hf_folder(request.param), tmp_path_factory.mktemp("vision") / "hf"
    loaded = load(source)
    plan = cut(loaded.unwrapped_model, cuts(request.param)["all"])
    mbp.export_hf(loaded.bridge, loaded.model, out, layers_kept=plan.layers_kept, source=source)
    return request.param, source, loaded.unwrapped_model, plan, out


def outside(folder):
    """Name -> the bytes of every tensor that is not of the language tower."""
    found = {}
    with safe_open(folder / "model.safetensors", "pt") as file:
        for name in file.keys():
            if any(part in name for part in VISION_PARTS):
                tensor = file.get_tensor(name)
                found[name] = (
                    tensor.dtype,
                    tuple(tensor.shape),
                    tensor.contiguous().view(torch.uint8).numpy().tobytes(),
                )
    return found


def test_everything_outside_is_byte_identical(pruned):
    _, source, _, _, out = pruned
    before, after = outside(source), outside(out)
    assert before.keys() == after.keys() and len(before) > 10
    assert [name for name in before if before[name] != after[name]] == []
    inside = load_file(out / "model.safetensors").keys() - after.keys()
    stack = language_stack(load_hf(out)[0])
    tower = {name for name in inside if "lm_head" not in name}
    assert len(tower) == len(stack.state_dict().keys() - buffers(stack))


def buffers(module):
    """Buffers that a checkpoint does not hold."""
    return {n for n, _ in module.named_buffers() if not n.endswith("e_score_correction_bias")}


def test_everything_outside_is_the_same_in_megatron(pruned):
    """In the process, too: its vision tower is that of a model that was never pruned."""
    _, source, model, _, _ = pruned
    untouched = load(source).unwrapped_model
    have, want = (
        {
            n: t
            for n, t in m.state_dict().items()
            if torch.is_tensor(t) and not n.startswith("language_model.")
        }
        for m in (model, untouched)
    )
    assert have.keys() == want.keys() and have
    assert [name for name in want if not torch.equal(have[name], want[name])] == []


def test_config_outside_the_language_model_stays(pruned):
    _, source, _, _, out = pruned
    before, after = (load_hf(folder)[0].config.to_dict() for folder in (source, out))
    before.pop("text_config"), after.pop("text_config")
    for name in ("_name_or_path", "transformers_version"):
        before.pop(name, None), after.pop(name, None)
    assert after == before


def test_an_image_through_the_pruned_model(pruned):
    """Vision tower, projector, 3-d positions and features injected into early layers: as the export in transformers."""
    family, _, model, _, out = pruned
    if family == "gemma3_vl":
        pytest.skip("its projector pools to 256 tokens an image, of which the tiny tower has 4")
    hf, _ = load_hf(out)
    ids, pixels, grid = image_and_text(hf.config)
    with torch.no_grad():
        want = hf(
            input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, image_grid_thw=grid
        ).logits
        got = model(
            input_ids=ids, position_ids=None, attention_mask=None, pixel_values=pixels, image_grid_thw=grid
        )
    got = got[0] if isinstance(got, tuple) else got
    assert difference(got, want) <= TOLERANCE
    assert difference(got, run_hf(hf, ids)) > 1e-2, "the image is not looked at"


def image_and_text(config):
    """A sentence with an image of 4 x 4 random patches in it."""
    vision, generator = config.vision_config, torch.Generator().manual_seed(9)
    numbers = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(16, numbers, generator=generator)
    image = torch.full((1, 16 // vision.spatial_merge_size**2), config.image_token_id)
    start = torch.tensor([[getattr(config, "vision_start_token_id", 5)]])
    ids = tokens(1, vocab=100)  # none of them special
    return torch.cat([ids[:, :3], start, image, ids[:, 4:]], dim=1), pixels, torch.tensor([[1, 4, 4]])


def test_text_through_the_pruned_model(pruned):
    _, _, model, plan, out = pruned
    ids = tokens(seed=17)
    assert difference(run(model, ids), run_hf(load_hf(out)[0], ids)) <= TOLERANCE
    assert plan.sizes_after["hidden_size"] == plan.sizes_before["hidden_size"]
