"""Repairs of whole models against what transformers sees at the same places, solved anew on its data."""

from __future__ import annotations

import logging
from typing import Any

import matrix
import pytest
import torch
from matrix import load as load_any
from models import FFN, HIDDEN, cut, difference, kept_heads, load, load_hf, loop_over, run, tokens
from torch import nn

import mbridge_prune as mbp
from mbridge_prune.repair import run as repair_run
from mbridge_prune.repair.openings import with_openings
from mbridge_prune.repair.routing import judging

TEXT = tokens(200, seed=5)
LOOP = {"forward_loop": loop_over(*TEXT.split(4))}
JUDGES = torch.arange(len(TEXT)) % 10 == 9
FITTED = TEXT[~JUDGES]


def seen(hf: nn.Module, module: nn.Module, ids_bs: torch.Tensor) -> torch.Tensor:
    """[tokens, channels] fp64: the inputs of a transformers module."""
    found: list[torch.Tensor] = []
    hook = module.register_forward_pre_hook(lambda m, args: found.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        hf(input_ids=ids_bs, use_cache=False)
    hook.remove()
    return torch.cat(found).double()


def solved(x_tc: torch.Tensor, weight: torch.Tensor, kept: list[int], ridge: float) -> torch.Tensor:
    """The refitted columns, by lstsq on the inputs themselves."""
    inner, full = x_tc[:, kept], weight.double()
    missing = x_tc @ full.t() - inner @ full[:, kept].t()
    return full[:, kept] + fitted_to(inner, missing, ridge)


def fitted_to(x_tc: torch.Tensor, missing_td: torch.Tensor, ridge: float) -> torch.Tensor:
    """[d, c]: the weight nearest to what is missing, by lstsq with rows for the ridge."""
    pull = torch.diag((ridge * x_tc.square().sum(0)).sqrt())
    rows = torch.cat([missing_td, torch.zeros(len(pull), missing_td.shape[1], dtype=torch.float64)])
    return torch.linalg.lstsq(torch.cat([x_tc, pull]), rows).solution.t()


def same(got: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def pruned(path: Any, sizes: dict[str, int], out: Any, **config: Any) -> tuple[mbp.Plan, nn.Module]:
    """The plan and the exported model in transformers."""
    loaded = load(path)
    plan = cut(loaded.unwrapped_model, sizes, **{**LOOP, **config})
    mbp.export_hf(loaded.bridge, loaded.model, out, layers_kept=plan.layers_kept, sizes=plan.sizes_after)
    return plan, load_hf(out)


def test_ffn_is_refitted_on_what_transformers_feeds_it(hf_folder, tmp_path):
    path, hf = hf_folder("llama"), load_hf(hf_folder("llama"))
    plan, small = pruned(path, {"ffn_hidden_size": 64}, tmp_path / "hf", repair="least_squares")
    assert [r["repaired"] for r in plan.repaired] == [True] * len(hf.model.layers)
    for number, layer in enumerate(hf.model.layers):
        kept = plan.kept[f"layers.{number}.ffn_hidden_size"][0]
        x_tc = seen(hf, layer.mlp.down_proj, FITTED)
        ridge = fit_of(plan, f"layers.{number}.mlp.linear_fc2", None)["ridge"]
        wanted = solved(x_tc, layer.mlp.down_proj.weight.detach(), kept, ridge)
        got = small.model.layers[number].mlp.down_proj.weight
        hidden = plan.kept["hidden_size"][0]
        same(got, wanted[hidden])
        producer = small.model.layers[number].mlp.up_proj.weight
        assert torch.equal(producer, layer.mlp.up_proj.weight[kept][:, hidden]), "a slice, as it was"


def test_heads_are_refitted(hf_folder, tmp_path):
    path, hf = hf_folder("llama_mha"), load_hf(hf_folder("llama_mha"))
    plan, small = pruned(path, {"num_attention_heads": 6}, tmp_path / "hf", repair="least_squares")
    layer, width = hf.model.layers[2], HIDDEN // 8
    heads, _ = kept_heads(plan, 2)
    kept = [head * width + i for head in heads for i in range(width)]
    ridge = fit_of(plan, "layers.2.self_attention.linear_proj", None)["ridge"]
    weight = layer.self_attn.o_proj.weight.detach()
    wanted = solved(seen(hf, layer.self_attn.o_proj, FITTED), weight, kept, ridge)
    same(small.model.layers[2].self_attn.o_proj.weight, wanted[plan.kept["hidden_size"][0]])


@pytest.mark.parametrize("family", ["llama", "nemotron", "gemma2"])
def test_gains_of_norms_follow_the_energy_that_is_left(hf_folder, tmp_path, family):
    hf = load_hf(hf_folder(family))
    plan, small = pruned(hf_folder(family), {"hidden_size": 48}, tmp_path / "hf", repair="norm")
    _, plain = pruned(hf_folder(family), {"hidden_size": 48}, tmp_path / "plain")
    kept = plan.kept["hidden_size"][0]
    offset = {"llama": 0.0, "nemotron": 1.0, "gemma2": 1.0}[family]
    names = [name for name, _ in hf.named_modules() if name.endswith(("layernorm", "model.norm"))]
    assert len(names) > 2 * len(hf.model.layers)
    for name in names:
        x_tc = seen(hf, hf.get_submodule(name), TEXT)
        if family == "nemotron":
            x_tc = x_tc - x_tc.mean(1, keepdim=True)
        energy = (x_tc.square() / x_tc.square().mean(1, keepdim=True)).mean(0)
        factor = float((energy[kept].mean() / energy.mean()).sqrt())
        assert abs(factor - 1) > 1e-4
        got, before = (m.get_submodule(name).weight.detach() + offset for m in (small, plain))
        torch.testing.assert_close(got, before * factor, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
    "family", ["llama", "qwen3", "nemotron", "deepseek_v3", "qwen3_next", "gpt_oss", "gemma2"]
)
def test_every_cut_at_once_is_nearer_to_the_dense_model(hf_folder, family):
    """At each weight, on tokens that nothing was fitted on; the least of what a repair must do."""
    model = load(hf_folder(family)).unwrapped_model
    sizes = {"hidden_size": 48, "num_attention_heads": 4}
    plan = cut(model, sizes, **LOOP, repair="least_squares")
    done = [record for record in plan.repaired if record["repaired"]]
    enough = [record for record in plan.repaired if not record.get("why", "").startswith("needs")]
    assert len(done) > len(enough) / 2
    assert all(record["repaired_error"] < record["sliced_error"] for record in done)
    assert torch.isfinite(run(model, TEXT[:2])).all()


def test_channels_that_copies_stand_in_for_cost_nothing(hf_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("mbridge_prune.repair.solve.RIDGES", [1e-9])
    hf = load_hf(hf_folder("llama_tied"))
    with torch.no_grad():
        for layer in hf.model.layers:
            for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
                linear.weight[FFN // 2 :] = linear.weight[: FFN // 2]
    hf.save_pretrained(tmp_path / "in")
    model = load(tmp_path / "in").unwrapped_model
    dense = run(model, TEXT[:3])
    order = {"ffn_hidden_size": FFN // 2}
    # Sorted by hand: the first half stays, whose copies are what goes.
    plan = cut(model, order, **LOOP, repair="least_squares", skip_sorting=True)
    assert all(record["repaired_error"] < 1e-9 for record in plan.repaired)
    assert difference(run(model, TEXT[:3]), dense) < 1e-4


def test_memory_bound_makes_more_passes_and_the_same_model(hf_folder):
    sizes = {"ffn_hidden_size": 64, "hidden_size": 48, "num_layers": 3}
    states, passes = [], []
    for bound in (8.0, 1e-6):
        calls = []

        def loop(model: nn.Module, calls: list = calls) -> None:
            calls.append(len(model.decoder.layers))
            LOOP["forward_loop"](model)

        model = load(hf_folder("llama")).unwrapped_model
        cut(model, sizes, forward_loop=loop, repair="least_squares", repair_memory_gb=bound)
        states.append(model.state_dict())
        passes.append(calls)
    assert passes[0] == [4, 4, 3], "for the scores, for what goes, and on the layers that stay"
    assert len(passes[1]) > 4
    for name, tensor in states[0].items():
        if isinstance(tensor, torch.Tensor):
            assert torch.equal(tensor, states[1][name]), name


def test_an_expert_with_too_little_text_costs_no_pass(hf_folder):
    passes = []

    def loop(model: nn.Module) -> None:
        passes.append(model)
        loop_over(*TEXT.split(20))(model)

    model = matrix.load(hf_folder("qwen3_moe")).unwrapped_model
    plan = cut(model, {"hidden_size": 56}, forward_loop=loop, repair="least_squares", repair_memory_gb=1e-6)
    fitted = [record for record in plan.repaired if not record.get("why", "").startswith("needs")]
    few = [record for record in plan.repaired if record not in fitted]
    assert few and all(".experts." in record["weight"] and record["tokens"] for record in few)
    assert len(passes) == 1 + len(fitted), "one for the scores, then one for each weight"
    assert any(".experts." in record["weight"] for record in fitted)


def first_written(model: nn.Module) -> torch.Tensor:
    """[s, b, hidden] fp64: what the first layer's mixer writes of the judging samples; Megatron adds to it in place."""
    found: list[torch.Tensor] = []
    out_proj = model.decoder.layers[0].mixer.out_proj
    hook = out_proj.register_forward_hook(lambda module, args, out: found.append(out[0].double()))
    run(model, TEXT[JUDGES])
    hook.remove()
    return found[0]


@pytest.mark.parametrize(
    "sizes", [{"mamba_num_heads": 4}, {"mamba_head_dim": 7}, {"mamba_num_heads": 6, "mamba_head_dim": 8}]
)
def test_what_a_mixer_writes_is_as_near_as_its_record_says(hf_folder, sizes):
    """Behind its gated norm: the cut model's own forward, on the samples that are kept for judging."""
    written = {}
    for repair in ("dense", "none", "least_squares"):
        model = matrix.load(hf_folder("nemotron_h")).unwrapped_model
        if repair != "dense":
            plan = cut(model, sizes, **LOOP, repair=repair)
        written[repair] = first_written(model)
    record = next(r for r in plan.repaired if r["weight"] == "layers.0.mixer.out_proj")
    dense, kept = written["dense"], plan.kept["hidden_size"][0]
    for repair, key in (("none", "sliced_error"), ("least_squares", "repaired_error")):
        error = (written[repair] - dense[..., kept]).square().sum() / dense.square().sum()
        assert record[key] == pytest.approx(float(error), rel=1e-3)
    assert record["repaired"] and record["repaired_error"] < record["sliced_error"]


def test_too_little_text_keeps_the_plain_slice(hf_folder, caplog):
    short = loop_over(*tokens(12).split(3))
    states = []
    for repair in ("none", "least_squares"):
        model = load(hf_folder("llama")).unwrapped_model
        with caplog.at_level(logging.WARNING, "mbridge_prune"):
            plan = cut(model, {"ffn_hidden_size": 64}, forward_loop=short, repair=repair)
        states.append(model.state_dict())
    assert "needs 1,280 calibration tokens" in caplog.text
    assert not any(record["repaired"] for record in plan.repaired)
    for name, tensor in states[0].items():
        if isinstance(tensor, torch.Tensor):
            assert torch.equal(tensor, states[1][name]), name


def test_a_fit_that_is_worse_is_not_taken(hf_folder, monkeypatch):
    states = []
    monkeypatch.setattr(repair_run, "refit", lambda weight, kept, carried: -weight[:, kept].double())
    for repair in ("none", "least_squares"):
        model = load(hf_folder("llama")).unwrapped_model
        plan = cut(model, {"ffn_hidden_size": 64}, **LOOP, repair=repair)
        states.append(model.state_dict())
    assert {r["why"] for r in plan.repaired} == {"no better on samples that the fit has not seen"}
    for name, tensor in states[0].items():
        if isinstance(tensor, torch.Tensor):
            assert torch.equal(tensor, states[1][name]), name


def test_prediction_heads_and_vision_towers_come_along(hf_folder):
    for family, sizes in (("glm4_moe_mtp", {"hidden_size": 48}), ("qwen3_vl", {"ffn_hidden_size": 64})):
        model = load(hf_folder(family)).unwrapped_model
        loop = mbp.CalibrationLoop(TEXT, 4)  # it runs prediction heads too
        plan = cut(model, sizes, forward_loop=loop, importance="weighted", repair="least_squares")
        assert family != "glm4_moe_mtp" or any(r["weight"].startswith("mtp.0") for r in plan.repaired)
        assert any(record["repaired"] for record in plan.repaired), family
        assert torch.isfinite(run(model, TEXT[:2])).all()


def test_without_samples_to_judge_it_on_nothing_is_refitted(hf_folder):
    model = load(hf_folder("llama")).unwrapped_model
    long = loop_over(*tokens(9, length=400).split(3))
    plan = cut(model, {"ffn_hidden_size": 64}, forward_loop=long, repair="least_squares")
    assert {record["why"] for record in plan.repaired} == {"needs 10 calibration samples, one to judge it on"}


@pytest.mark.parametrize(
    ("constraints", "config", "says"),
    [
        (
            {"export_config": {"num_layers": 3}},
            {"skip_sorting": True},
            "repair='norm' runs the model on text",
        ),
        ({"export_config": {"num_layers": 3}}, {**LOOP, "pad_token_id": 0}, "full sequences"),
        ({"export_config": {"num_layers": 3}}, {**LOOP, "repair_memory_gb": 0}, "must be above 0"),
    ],
)
def test_refusals(hf_folder, constraints, config, says):
    model = load(hf_folder("llama")).unwrapped_model
    before = {k: v.clone() for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}
    with pytest.raises(mbp.UserError, match=says):
        mbp.prune(model, "mcore_minitron", constraints, config={**config, "repair": "norm"})
    for name, tensor in before.items():
        assert torch.equal(tensor, model.state_dict()[name])


def test_sequential_fits_the_first_layer_to_what_the_dense_hidden_state_is(hf_folder, tmp_path):
    hf = load_hf(hf_folder("llama"))
    plan, small = pruned(hf_folder("llama"), {"ffn_hidden_size": 48}, tmp_path / "hf", repair="sequential")
    layer, kept = hf.model.layers[0], plan.kept["layers.0.ffn_hidden_size"][0]
    weight_t1 = token_weights(seen(hf, hf.model.layers[1], FITTED), seen(hf, hf.model.layers[1], TEXT))
    x_tc, weight = seen(hf, layer.mlp.down_proj, FITTED), layer.mlp.down_proj.weight.detach()
    refitted = solved(x_tc, weight, kept, fit_of(plan, "layers.0.mlp.linear_fc2", None)["ridge"])
    missing_td = x_tc @ weight.double().t() - x_tc[:, kept] @ refitted.t()
    ridge = fit_of(plan, "layers.0.mlp.linear_fc2")["ridge"]
    wanted = refitted + fitted_to(x_tc[:, kept] * weight_t1, missing_td * weight_t1, ridge)
    same(small.model.layers[0].mlp.down_proj.weight, wanted[plan.kept["hidden_size"][0]])


@pytest.mark.parametrize(("repair", "target"), [("least_squares", None), ("sequential", "hidden_state")])
def test_a_fit_takes_the_ridge_that_judging_samples_like_best(hf_folder, monkeypatch, repair, target):
    """Each ridge alone, at the first weight that is fitted: what is chosen of all has the least error."""
    errors = {}
    for ridges in ([0.1], [1.0], [10.0], [10.0, 0.1, 1.0]):
        monkeypatch.setattr("mbridge_prune.repair.solve.RIDGES", ridges)
        model = load(hf_folder("llama")).unwrapped_model
        plan = cut(model, {"ffn_hidden_size": 64}, **LOOP, repair=repair)
        first = next(r for r in plan.repaired if r.get("target") == target)
        errors[len(ridges), first["ridge"]] = first["repaired_error"]
    alone = {ridge: error for (count, ridge), error in errors.items() if count == 1}
    ((chosen, least),) = [(ridge, error) for (count, ridge), error in errors.items() if count == 3]
    assert len(set(alone.values())) == 3
    assert chosen == min(alone, key=lambda ridge: alone[ridge]) and least == alone[chosen]


def token_weights(states_td: torch.Tensor, all_td: torch.Tensor | None = None) -> torch.Tensor:
    """[t, 1]: what a row is multiplied by: its error as a share, and the plain one where all are given."""
    square_t1 = 1 / states_td.square().mean(1, keepdim=True)
    return (square_t1 if all_td is None else square_t1 + 1 / all_td.square().mean()).sqrt()


def taking_over(
    hf: nn.Module, gone: int, ridge: float, inputs: list[int], walks: bool = False
) -> torch.Tensor:
    """What is to be added to the columns `inputs` of the down projection before a layer that goes."""
    behind = [*hf.model.layers, hf.model.norm]
    before, after = (seen(hf, behind[place], FITTED) for place in (gone, gone + 1))
    weight_t1 = token_weights(after, seen(hf, behind[gone + 1], TEXT) if walks else None)
    x_tc = seen(hf, hf.model.layers[gone - 1].mlp.down_proj, FITTED)[:, inputs]
    return fitted_to(x_tc * weight_t1, (after - before) * weight_t1, ridge)


def test_sequential_takes_over_what_a_layer_did_that_goes(hf_folder, tmp_path):
    hf = load_hf(hf_folder("llama"))
    plan, small = pruned(hf_folder("llama"), {"num_layers": 3}, tmp_path / "hf", repair="sequential")
    (gone,) = set(range(4)) - set(plan.layers_kept)
    assert gone > 0, "a layer stands before it"
    ridge = fit_of(plan, f"layers.{gone - 1}.mlp.linear_fc2")["ridge"]
    weight = hf.model.layers[gone - 1].mlp.down_proj.weight.detach()
    wanted = weight + taking_over(hf, gone, ridge, list(range(FFN)), walks=True)
    channels = plan.kept[f"layers.{gone - 1}.ffn_hidden_size"][0]
    same(small.model.layers[gone - 1].mlp.down_proj.weight, wanted[plan.kept["hidden_size"][0]][:, channels])


def test_least_squares_takes_over_what_a_layer_did_and_then_refits(hf_folder, tmp_path):
    """The inputs that stay learn what the layer did; widths are refitted on the model that is left then."""
    hf, sizes = load_hf(hf_folder("llama")), {"num_layers": 3, "ffn_hidden_size": 64}
    plan, small = pruned(hf_folder("llama"), sizes, tmp_path / "hf", repair="least_squares")
    (gone,) = set(range(4)) - set(plan.layers_kept)
    kept = {n: plan.kept[f"layers.{n}.ffn_hidden_size"][0] for n in range(4)}
    record = fit_of(plan, f"layers.{gone - 1}.mlp.linear_fc2", "removed_layers")
    assert record["channels"] == [FFN, 64] and record["repaired_error"] < record["sliced_error"] == 1
    added = taking_over(hf, gone, record["ridge"], kept[gone - 1])
    with torch.no_grad():
        hf.model.layers[gone - 1].mlp.down_proj.weight[:, kept[gone - 1]] += added.float()
    del hf.model.layers[gone]
    for place, number in enumerate(plan.layers_kept):
        projection = hf.model.layers[place].mlp.down_proj
        ridge = fit_of(plan, f"layers.{number}.mlp.linear_fc2", None)["ridge"]
        wanted = solved(seen(hf, projection, FITTED), projection.weight.detach(), kept[number], ridge)
        same(small.model.layers[place].mlp.down_proj.weight, wanted[plan.kept["hidden_size"][0]])


@pytest.mark.parametrize(
    ("family", "keeps", "says"),
    [
        ("llama", [0, 3], {}),
        ("llama", [1, 2, 3], {"layers.0": "no layer that stays is in front"}),
        ("nemotron_h", [0, 3, 4], {}),
        ("qwen3_moe", [0, 2, 3], {"layers.1": "not one weight's output"}),
        ("gemma2", [0, 3], {"layers.1-2": "not one weight's output"}),
    ],
)
def test_layers_go_in_one_gap_or_more(hf_folder, monkeypatch, family, keeps, says):
    """Nearer to the dense hidden state than the plain cut; where there is nothing to fold into, the same."""
    order = "mbridge_prune.importance.scores.Scores.layer_order"
    monkeypatch.setattr(
        order, lambda s: sorted(range(len(s.units["num_layers"])), key=lambda n: n not in keeps)
    )
    dense = last_states(load_any(hf_folder(family), grouped=False).unwrapped_model)
    apart, loop = {}, loop_over(*tokens(300, seed=5).split(10))
    for repair in ("none", "least_squares"):
        model = load_any(hf_folder(family), grouped=False).unwrapped_model
        plan = cut(model, {"num_layers": len(keeps)}, forward_loop=loop, repair=repair)
        kept = plan.kept["hidden_size"][0]
        apart[repair] = float((last_states(model) - dense[..., kept]).square().mean())
    done = [record for record in plan.repaired if record["repaired"]]
    left = {record["weight"]: record["why"] for record in plan.repaired if not record["repaired"]}
    assert left.keys() == says.keys() and all(says[name] in why for name, why in left.items())
    assert all(r["target"] == "removed_layers" and r["repaired_error"] < 1 for r in done)
    if family == "nemotron_h":  # of a Mamba layer and of attention alone
        assert [r["weight"] for r in done] == [
            "layers.0.mixer.out_proj",
            "layers.4.self_attention.linear_proj",
        ]
    assert apart["least_squares"] < apart["none"] if done else apart["least_squares"] == apart["none"]


@pytest.mark.parametrize(("repair", "fits"), [("least_squares", 1), ("sequential", 6)])
def test_the_widest_weight_has_text_enough_though_no_width_goes(hf_folder, monkeypatch, repair, fits):
    monkeypatch.setattr(repair_run, "TEXT", 1000)  # 20 for each of FFN channels are more
    model, loop = load(hf_folder("llama")).unwrapped_model, mbp.CalibrationLoop(tokens(600, seed=5), 10)
    plan = cut(model, {"num_layers": 3}, forward_loop=loop, repair=repair)
    assert len(plan.repaired) == fits
    samples = -(-2 * 20 * FFN // (10 * tokens().shape[1])) * 10  # whole microbatches of 10
    run_ns = with_openings(mbp.CalibrationLoop(tokens(600, seed=5)[:samples], 10))
    read = sum(
        batch.shape[1] * judging(call, len(batch)).count(False)
        for call, batch in enumerate([*run_ns.tokens_ns.split(10), *run_ns.more])
    )
    assert all(r["tokens"] == read and "needs" not in r.get("why", "") for r in plan.repaired)


@pytest.mark.parametrize("repair", ["least_squares", "sequential"])
def test_a_loop_that_has_run_out_is_refused(hf_folder, repair):
    batches = iter(TEXT.split(4))
    model = load(hf_folder("llama")).unwrapped_model
    with pytest.raises(mbp.UserError, match="did not run the model this time"):
        cut(model, {"num_layers": 3}, forward_loop=lambda m: loop_over(*batches)(m), repair=repair)


def test_what_layers_did_is_not_taken_over_by_a_fit_that_is_worse(hf_folder, monkeypatch):
    monkeypatch.setattr("mbridge_prune.repair.missing.ridge_solve", lambda moment, cross, ridge: -cross)
    states = []
    for repair in ("none", "least_squares"):
        model = load(hf_folder("llama")).unwrapped_model
        plan = cut(model, {"num_layers": 3}, **LOOP, repair=repair)
        states.append(model.state_dict())
    assert [r["why"] for r in plan.repaired] == ["no better on samples that the fit has not seen"]
    for name, tensor in states[0].items():
        if isinstance(tensor, torch.Tensor):
            assert torch.equal(tensor, states[1][name]), name


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("llama", {"ffn_hidden_size": 48, "num_attention_heads": 4}),
        ("llama", {"num_layers": 3}),
        ("nemotron", {"hidden_size": 48}),
        ("gpt_oss", {"hidden_size": 48, "num_attention_heads": 4}),
        ("deepseek_v3", {"hidden_size": 48, "num_attention_heads": 4}),
        ("qwen3_next", {"hidden_size": 48, "num_layers": 3}),
        ("gemma2", {"hidden_size": 48, "num_attention_heads": 4}),
    ],
)
def test_sequential_is_nearer_to_the_dense_hidden_state(hf_folder, family, sizes):
    model = load(hf_folder(family)).unwrapped_model
    dense = last_states(model)
    apart = {}
    for repair in ("none", "sequential"):
        model = load(hf_folder(family)).unwrapped_model
        plan = cut(model, sizes, **LOOP, repair=repair)
        kept = plan.kept["hidden_size"][0]
        apart[repair] = float((last_states(model) - dense[..., kept]).square().mean())
        fits = [record for record in plan.repaired if record.get("target")]
        assert all(r["repaired_error"] < r["sliced_error"] for r in fits if r["repaired"])
    assert fits if family != "gemma2" else not fits, "a norm stands behind each of Gemma 2's"
    assert apart["sequential"] < apart["none"]


def fit_of(plan: mbp.Plan, weight: str, target: str | None = "hidden_state") -> dict[str, Any]:
    """What is said of a fitted weight; target None: fitted to what it wrote itself."""
    (record,) = [r for r in plan.repaired if r["weight"] == weight and r.get("target") == target]
    assert record["repaired"]
    return record


def last_states(model: nn.Module) -> torch.Tensor:
    """[s, b, hidden]: behind the last layer, on samples that nothing was fitted on."""
    found: list[torch.Tensor] = []

    def see(layer: nn.Module, args: tuple, out: Any) -> None:
        found.append((out[0] if isinstance(out, tuple) else out).clone())

    hook = model.decoder.layers[-1].register_forward_hook(see)
    run(model, TEXT[JUDGES])
    hook.remove()
    return torch.cat(found, dim=1)
