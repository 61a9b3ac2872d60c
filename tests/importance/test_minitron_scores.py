"""The minitron scores against transformers' own activations, and what calibration leaves behind."""

from __future__ import annotations

import pytest
import torch
from models import FAMILIES, LAYERS, cut, load, load_hf, loop_over, run, tokens
from safetensors.torch import load_file

import mbridge_prune as mbp
from mbridge_prune import mcore
from mbridge_prune.dynamic import SliceTable
from mbridge_prune.importance import Collector

TARGET = {"hidden_size": 40}
PAD = 0


def scores(folder, tmp_path, *batches, name="scores.safetensors", **config):
    """The scores file of a run, as a plain dict of tensors."""
    path = tmp_path / name
    cut(load(folder).unwrapped_model, TARGET, forward_loop=loop_over(*batches), checkpoint=path, **config)
    return load_file(path)


@torch.no_grad()
def independent(folder, ids_bs, valid_bs=None):
    """Section 5's table over a transformers model, sample by sample, in fp64."""
    hf = load_hf(folder)
    valid_bs = torch.ones_like(ids_bs, dtype=torch.bool) if valid_bs is None else valid_bs
    seen, wanted = {}, {}
    for i, layer in enumerate(hf.model.layers):
        wanted |= {
            f"{i}.norm1": (layer.input_layernorm, "out"), f"{i}.norm2": (layer.post_attention_layernorm, "out"),
            f"{i}.ffn": (layer.mlp.down_proj, "in"), f"{i}.heads": (layer.self_attn.o_proj, "in"),
            f"{i}.layer": (layer, "both"),
        }  # fmt: skip

    def keep(name, side):
        def hook(module, args, kwargs, out):
            before = args[0] if args else kwargs["hidden_states"]
            after = out[0] if isinstance(out, tuple) else out
            seen[name] = {"in": before, "out": after, "both": (before, after)}[side]

        return hook

    for name, (module, side) in wanted.items():
        module.register_forward_hook(keep(name, side), with_kwargs=True)
    hf(input_ids=ids_bs, use_cache=False)

    def squares(x_bsc):
        total = torch.zeros(x_bsc.shape[-1], dtype=torch.float64)
        for x_sc, valid_s in zip(x_bsc.double(), valid_bs, strict=True):
            if valid_s.any():
                total += x_sc[valid_s].abs().mean(0) ** 2
        return total

    want = {"hidden_size": 0, "num_layers": []}
    for i, layer in enumerate(hf.model.layers):
        want["hidden_size"] += squares(seen[f"{i}.norm1"]).sqrt() + squares(seen[f"{i}.norm2"]).sqrt()
        want[f"layers.{i}.ffn_hidden_size"] = squares(seen[f"{i}.ffn"]).sqrt()
        heads = squares(seen[f"{i}.heads"]).view(-1, layer.self_attn.head_dim)
        want[f"layers.{i}.num_attention_heads"] = heads.sum(1).sqrt()
        if hf.config.num_key_value_heads < len(heads):
            groups = heads.view(hf.config.num_key_value_heads, -1)
            want[f"layers.{i}.num_query_groups"] = groups.sum(1).sqrt()
        before, after = (x.double()[valid_bs] for x in seen[f"{i}.layer"])
        want["num_layers"].append((1 - torch.cosine_similarity(before, after, dim=-1)).mean())
    want["num_layers"] = torch.stack(want["num_layers"])
    return want


def assert_same(have, want, tolerance=1e-5):
    assert have.keys() == want.keys()
    for key in want:
        a, b = have[key].double(), want[key].double()
        assert a.shape == b.shape, key
        # 1 - cosine loses digits to cancellation in fp32, whatever its size.
        assert torch.allclose(a, b, rtol=tolerance, atol=1e-6 if key == "num_layers" else 0), key


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_transformers_activations(family, hf_folder, tmp_path):
    ids = tokens(4)
    assert_same(scores(hf_folder(family), tmp_path, ids), independent(hf_folder(family), ids))


def test_calls_and_batch_sizes_do_not_matter(hf_folder, tmp_path):
    folder, ids = hf_folder("llama"), tokens(5)
    whole = scores(folder, tmp_path, ids, name="a")
    assert_same(scores(folder, tmp_path, *ids.split(1), name="b"), whole, 1e-6)
    assert_same(scores(folder, tmp_path, *ids.split(2), name="c"), whole, 1e-6)


def test_more_samples_add_up(hf_folder, tmp_path):
    """Twice the same text is sqrt(2) of every channel's score, and the same depth score."""
    folder, ids = hf_folder("llama"), tokens(2)
    once, twice = (scores(folder, tmp_path, *[ids] * n, name=str(n)) for n in (1, 2))
    for key in once:
        assert torch.allclose(twice[key], once[key] * (1 if key == "num_layers" else 2**0.5), rtol=1e-5)


def test_padded_positions_count_nowhere(hf_folder, tmp_path):
    folder, ids = hf_folder("llama"), tokens(4)
    ids[0, 5:], ids[1, -1], ids[3, :] = PAD, PAD, PAD
    valid = ids != PAD
    have = scores(folder, tmp_path, ids[:1], ids[1:], pad_token_id=PAD)
    assert_same(have, independent(folder, ids, valid))
    plain = scores(folder, tmp_path, ids, name="plain")
    assert not torch.allclose(plain["hidden_size"], have["hidden_size"], rtol=1e-2)


def test_padding_equals_shorter_text(hf_folder, tmp_path):
    """Causal attention: right padding left out is the text without it."""
    folder, ids = hf_folder("qwen2"), tokens(2)
    padded = torch.cat([ids, torch.full((2, 4), PAD)], dim=1)
    assert_same(
        scores(folder, tmp_path, padded, name="a", pad_token_id=PAD), scores(folder, tmp_path, ids, name="b")
    )


def test_collection_leaves_nothing_behind(hf_folder):
    model = load(hf_folder("nemotron")).unwrapped_model
    before, ids = run(model, tokens()), tokens()
    flags = [m.return_layernorm_output for m in model.modules() if hasattr(m, "return_layernorm_output")]
    table = SliceTable.of(model, mcore.root_scope(model))
    with Collector(table, pad_token_id=PAD):
        assert torch.equal(run(model, ids), before), "watching changes no output"
        assert hooks(model)
    assert not hooks(model)
    assert flags and flags == [
        m.return_layernorm_output for m in model.modules() if hasattr(m, "return_layernorm_output")
    ]
    assert torch.equal(run(model, ids), before)


def hooks(model):
    return [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


@pytest.mark.parametrize("training", [True, False])
def test_a_loop_that_dies_leaves_the_model_as_it_was(training, hf_folder):
    model = load(hf_folder("llama")).unwrapped_model
    model.train(training)
    weights = {n: p.clone() for n, p in model.named_parameters()}

    def die(m):
        run(m, tokens())
        assert not m.training
        raise KeyError("no more text")

    with pytest.raises(KeyError):
        cut(model, TARGET, forward_loop=die)
    assert not hooks(model) and model.training is training
    assert not any(getattr(m, "return_layernorm_output", False) for m in model.modules())
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())


def test_no_gradients_and_the_mode_comes_back(hf_folder):
    model, seen = load(hf_folder("llama")).unwrapped_model, []
    model.train()
    cut(model, TARGET, forward_loop=lambda m: seen.append(
        m(tokens(), torch.arange(12).expand(3, 12), None).requires_grad
    ))  # fmt: skip
    assert seen == [False] and model.training and not hooks(model)


def test_a_loop_that_never_runs_the_model(hf_folder):
    with pytest.raises(mbp.UserError, match="did not run the model"):
        cut(load(hf_folder("llama")).unwrapped_model, TARGET, forward_loop=lambda m: None)


def test_scores_that_are_not_finite(hf_folder):
    model = load(hf_folder("llama")).unwrapped_model
    with torch.no_grad():
        model.decoder.layers[2].mlp.linear_fc1.weight[0, 0] = float("nan")
    with pytest.raises(mbp.UserError, match="not finite"):
        cut(model, TARGET)


def test_the_highest_scores_are_kept(hf_folder, tmp_path):
    path = tmp_path / "s"
    sizes = {"hidden_size": 40, "ffn_hidden_size": 56, "num_attention_heads": 4, "num_layers": 2}
    plan = cut(load(hf_folder("llama")).unwrapped_model, sizes, checkpoint=path)
    units = load_file(path)
    assert plan.kept["hidden_size"] == [units["hidden_size"].argsort(descending=True)[:40].tolist()]
    for i in range(LAYERS):
        ffn = units[f"layers.{i}.ffn_hidden_size"]
        assert plan.kept[f"layers.{i}.ffn_hidden_size"] == [ffn.argsort(descending=True)[:56].tolist()]
        heads = units[f"layers.{i}.num_attention_heads"].view(2, 4)
        assert (
            plan.kept[f"layers.{i}.num_attention_heads"] == heads.argsort(1, descending=True)[:, :2].tolist()
        )
    assert plan.layers_kept == sorted(units["num_layers"].argsort(descending=True)[:2].tolist())
    assert plan.layer_scores == units["num_layers"].tolist()
