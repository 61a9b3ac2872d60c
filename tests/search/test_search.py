"""The search on a small model whose whole space can be measured."""

from __future__ import annotations

import json

import pytest
import torch
from models import difference, load, load_hf, run, run_hf, tokens, write_hf

import mbridge_prune as mbp
from mbridge_prune import UserError
from mbridge_prune.evaluate.divergence import Reference
from mbridge_prune.evaluate.loss import token_losses
from mbridge_prune.search import search as search_module

SPACE = {"hidden_size_divisor": 16, "ffn_hidden_size_divisor": 32, "num_layers_divisor": 1}
OPTIONS = {"max_width_pruning": 0.5, "max_depth_pruning": 0.5, "top_k": 4}
HELD_OUT = tokens(8, seed=33)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("search") / "model"
    write_hf("llama", path, seed=4)
    return path


def auto(folder, constraints, checkpoint, **config):
    loaded = load(folder)
    options = {
        "forward_loop": mbp.CalibrationLoop(tokens(8), 1),
        "held_out": HELD_OUT,
        "checkpoint": checkpoint,
    }
    _, plan = mbp.prune(
        loaded.unwrapped_model,
        [("mcore_minitron", SPACE)],
        constraints,
        config={**options, **OPTIONS, **config},
    )
    return loaded, plan


def records(checkpoint, kind):
    lines = checkpoint.with_name("candidates.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


@pytest.fixture(scope="module")
def found(folder, tmp_path_factory):
    """(loaded model, plan, scores file) of a search at 70 % of the parameters."""
    checkpoint = tmp_path_factory.mktemp("run") / "scores.safetensors"
    return *auto(folder, {"params": "70%"}, checkpoint), checkpoint


@pytest.fixture(scope="module")
def truth(folder, found):
    """True KL and parameters of every candidate inside the budget, measured one by one."""
    _loaded, _, checkpoint = found
    config = {"checkpoint": checkpoint, "top_k": 1000}
    space = records(checkpoint, "search")[0]["space"]
    everything = auto_all(folder, config, checkpoint)
    assert 20 < len(everything) < 200 and space["hidden_size"] == [32, 48, 64]
    return everything


def auto_all(folder, config, checkpoint):
    """Every candidate inside 70 %, scored by its KL on all held-out text."""
    _loaded, plan = auto(
        folder, {"params": "70%"}, checkpoint, top_k=1000, candidates=checkpoint.with_name("all.jsonl")
    )
    return plan.search["best"]


def test_the_winner_keeps_the_budget_and_is_among_the_best(found, truth):
    _, plan, _ = found
    assert plan.params_after <= 0.7 * plan.params_before
    true = {json.dumps(c["sizes"], sort_keys=True): -c["score"] for c in truth}
    order = sorted(true.values())
    winner = true[json.dumps(plan.sizes_after, sort_keys=True)]
    assert order.index(winner) <= 0.05 * len(order), "within the best 5 % of the whole space"


def test_better_than_the_candidates_nearest_to_the_budget(found, truth):
    """The rule that scores the largest models inside the budget, given as many scores."""
    _, plan, _ = found
    largest = sorted(truth, key=lambda c: -c["params"])[: OPTIONS["top_k"]]
    assert plan.search["best"][0]["score"] >= max(c["score"] for c in largest)
    mean = sum(c["score"] for c in largest) / len(largest)
    assert plan.search["best"][0]["score"] > mean


def test_the_surrogate_ranks_candidates(found, truth):
    _, _, checkpoint = found
    (surrogate,) = records(checkpoint, "surrogate")
    assert surrogate["spearman"] > 0.5 and set(surrogate["curves"]) == set(truth[0]["sizes"])
    for curve in surrogate["curves"].values():
        sizes, losses = zip(*curve, strict=True)
        assert (
            list(sizes) == sorted(sizes) and list(losses) == sorted(losses, reverse=True) and losses[-1] == 0
        )


def test_what_is_scored_is_what_is_exported(folder, found, tmp_path):
    loaded, plan, _checkpoint = found
    mbp.export_hf(
        loaded.bridge, loaded.model, tmp_path / "hf", layers_kept=plan.layers_kept, sizes=plan.sizes_after
    )
    ids = tokens(seed=2)
    assert difference(run(loaded.unwrapped_model, ids), run_hf(load_hf(tmp_path / "hf"), ids)) <= 1e-5
    full = load(folder).unwrapped_model
    reference = Reference.of(full, HELD_OUT)
    exported = load(tmp_path / "hf").unwrapped_model
    assert plan.search["best"][0]["score"] == pytest.approx(-float(reference.kl(exported).mean()), rel=1e-4)


def test_a_second_search_measures_nothing_again(folder, found, monkeypatch):
    _, plan, checkpoint = found

    def never(*_, **__):
        raise AssertionError("this was measured before")

    monkeypatch.setattr("mbridge_prune.search.judge.Judge._divergence", never)
    monkeypatch.setattr("mbridge_prune.search.judge.Judge.score", never)
    before = checkpoint.with_name("candidates.jsonl").read_bytes()
    _, again = auto(folder, {"params": "70%"}, checkpoint)
    assert again.sizes_after == plan.sizes_after and again.kept == plan.kept
    assert checkpoint.with_name("candidates.jsonl").read_bytes() == before


def test_a_callable_a_filter_and_two_budgets(folder, found, tmp_path):
    seen = []

    def deepest(model):
        return len(model.decoder.layers) + 0.001 * model.config.hidden_size

    def wanted(sizes):
        seen.append(sizes)
        return sizes["hidden_size"] <= 48

    _, plan = auto(
        folder,
        {"params": "70%", "memory_mb": "70%"},
        tmp_path / "s",
        score_func=deepest,
        candidate_filter=wanted,
    )
    assert plan.sizes_after["hidden_size"] <= 48 and all(set(s) == set(plan.sizes_after) for s in seen)
    best = plan.search["best"]
    assert [c["score"] for c in best] == sorted((c["score"] for c in best), reverse=True)
    limit = plan.search["budgets"]["memory_mb"]
    assert all(c["memory_mb"] <= limit for c in records(tmp_path / "s", "score"))


def shallow(model):
    return -len(model.decoder.layers)


def test_another_winner_of_the_same_search_has_its_own_losses(folder, tmp_path):
    first, second = (
        auto(folder, {"params": "70%"}, tmp_path / "s", score_func=shallow, top_k=n) for n in (1, 30)
    )
    assert first[1].sizes_after != second[1].sizes_after
    after = float(token_losses(second[0].unwrapped_model, HELD_OUT).mean())
    assert second[1].loss["after"]["loss"] == pytest.approx(after, rel=1e-5)
    assert len(records(tmp_path / "s", "winner")) == 2


def test_loss_as_the_score(folder, tmp_path):
    loaded, plan = auto(folder, {"params": 110_000}, tmp_path / "s", score_func="loss", top_k=2)
    after = float(token_losses(loaded.unwrapped_model, HELD_OUT).mean())
    assert plan.search["best"][0]["score"] == pytest.approx(-after, rel=1e-5)


def test_the_best_are_handed_over_in_their_own_shapes(folder, found, tmp_path):
    got = []

    def take(place, model, sizes, layers):
        got.append((place, sizes, len(model.decoder.layers), model.config.hidden_size, len(layers)))

    _, plan = auto(folder, {"params": "70%"}, tmp_path / "s", export_candidate=take, export_top_k=2)
    want = [(i, c["sizes"], c["sizes"]["num_layers"], c["sizes"]["hidden_size"], c["sizes"]["num_layers"])
            for i, c in enumerate(plan.search["best"][:2])]  # fmt: skip
    assert got == want


@pytest.mark.parametrize(
    ("constraints", "config", "message"),
    [
        ({"params": "20%"}, {}, "params at most .* cannot be reached: the smallest candidate has"),
        ({"params": "120%"}, {}, "inside the budget as it is"),
        ({"params": "70%"}, {"held_out": None}, "text that calibration has not seen"),
        ({"params": "70%"}, {"score_func": "los"}, "did you mean 'loss'"),
        (
            {"params": "70%"},
            {"score_func": "mmlu_10pct_bs1"},
            r"score_function\(name, tokenizer=..., data=...\)",
        ),
        ({"params": "70%"}, {"max_width_pruning": 1.5}, "max_width_pruning=1.5 is no share"),
        ({"params": "70%"}, {"top_k": 0}, "top_k=0 must be"),
        ({"params": "70%"}, {"serving": {"kv_dtype": "int4"}}, "kv_dtype='int4' is no choice"),
        ({"params": "70%", "export_config": {"hidden_size": 32}}, {}, "both an export_config and a budget"),
        ({"prams": "70%"}, {}, "did you mean 'params'"),
    ],
)
def test_what_is_refused_before_anything_runs(folder, tmp_path, constraints, config, message):
    def fail(model):
        raise AssertionError("nothing may be run for a request that cannot be met")

    with pytest.raises(UserError, match=message):
        auto(folder, constraints, tmp_path / "s", **{"forward_loop": fail, **config})
    assert list(tmp_path.iterdir()) == []


def test_a_score_that_is_not_good_enough_cuts_nothing(folder, tmp_path):
    loaded = load(folder)
    before = run(loaded.unwrapped_model, HELD_OUT)
    with pytest.raises(UserError, match="below score_lower_bound=0; nothing was cut"):
        mbp.prune(
            loaded.unwrapped_model, [("mcore_minitron", SPACE)], {"params": "70%"},
            config={"forward_loop": mbp.CalibrationLoop(tokens(8), 1), "held_out": HELD_OUT, "score_lower_bound": 0,
                    "checkpoint": tmp_path / "s", **OPTIONS},
        )  # fmt: skip
    assert torch.allclose(run(loaded.unwrapped_model, HELD_OUT), before, atol=1e-4)


def test_halving_keeps_the_best_and_ends_at_top_k(monkeypatch):
    """Sixteen candidates on ever more text: the measured order decides."""
    asked = []

    class Fake:
        samples = 8

        def divergences(self, kind, candidates, samples, done, **more):
            asked.append((len(candidates), samples))
            return [{"kl": c["a"]} for c in candidates]

    chosen = [{"a": n} for n in (5, 3, 9, 1, 7, 0, 8, 2, 6, 4, 11, 10, 15, 12, 14, 13)]
    surrogate = type("S", (), {"of": lambda self, sizes: 0.0})()
    best = search_module._halve(Fake(), chosen, surrogate, 4)
    assert sorted(c["a"] for c in best) == [0, 1, 2, 3]
    assert asked == [(16, 2), (8, 4)]


def test_a_filter_sees_more_than_the_most_promising(folder, monkeypatch, tmp_path):
    """Of three kept candidates none is wanted: the wanted ones are found, and alone are measured."""
    monkeypatch.setattr("mbridge_prune.search.candidates.KEPT", 3)
    monkeypatch.setattr("mbridge_prune.search.space.CHUNK", 16)
    wanted = lambda sizes: sizes["hidden_size"] == 32 and sizes["num_layers"] == 2
    _, plan = auto(folder, {"params": "70%"}, tmp_path / "s", candidate_filter=wanted)
    assert wanted(plan.sizes_after)
    assert all(
        wanted(r["sizes"]) for kind in ("pair", "halving", "score") for r in records(tmp_path / "s", kind)
    )
    with pytest.raises(UserError, match=r"candidate_filter refused each of the \d+ candidates inside"):
        auto(folder, {"params": "70%"}, tmp_path / "t", candidate_filter=lambda sizes: False)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"search_space": {"hidden_size": 8}}, "hidden_size=8 is no range"),
        (
            {"candidate_filter": lambda sizes: sizes["no"]},
            "candidate_filter .*lambda.* failed for .*KeyError: 'no'",
        ),
        ({"candidate_filter": lambda sizes: None}, "candidate_filter .* returned None"),
    ],
)
def test_bad_settings_of_a_search(folder, tmp_path, config, message):
    with pytest.raises(UserError, match=message):
        auto(folder, {"params": "70%"}, tmp_path / "s", **config)
    assert list(tmp_path.iterdir()) == []


def test_no_size_that_the_model_can_have(tmp_path):
    write_hf("qwen3_moe", tmp_path / "model")
    bounds = {"num_moe_experts": {"min": 1, "max": 1}}
    from mbridge_prune.dry_run import check_target

    with pytest.raises(
        UserError, match="none of num_moe_experts 1: num_moe_experts=1 is too few for moe_router_topk=2"
    ):
        check_target(tmp_path / "model", {}, search=({"params": "70%"}, {"search_space": bounds}),
                     divisors={"num_moe_experts_divisor": 1})  # fmt: skip


@pytest.mark.parametrize("score", ["kl", "loss"])
def test_scores_say_how_far_to_trust_them(folder, tmp_path, score):
    _, plan = auto(folder, {"params": "70%"}, tmp_path / "s", score_func=score, top_k=2)
    for record in records(tmp_path / "s", "score"):
        assert 0 < record["se"] < 1 and 0 < record["delta_se"] < 1
    best = plan.search["best"][0]
    record = next(r for r in records(tmp_path / "s", "score") if r["sizes"] == best["sizes"])
    want = (
        plan.loss["after"]["loss"] - plan.loss["before"]["loss"] if score == "loss" else plan.loss["kl"]["kl"]
    )
    assert record["delta"] == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize(
    ("returned", "message"), [(None, "no number"), (float("inf"), "gave inf"), ("a", "no number")]
)
def test_functions_that_give_no_score(folder, tmp_path, returned, message):
    with pytest.raises(UserError, match=message):
        auto(folder, {"params": "70%"}, tmp_path / "s", score_func=lambda model: returned)


def test_a_function_that_fails(folder, tmp_path):
    with pytest.raises(UserError, match="failed: ZeroDivisionError"):
        auto(folder, {"params": "70%"}, tmp_path / "s", score_func=lambda model: 1 / 0)


def test_an_unknown_error_is_null(folder, tmp_path):
    _, plan = auto(folder, {"params": "70%"}, tmp_path / "s", held_out=HELD_OUT[:1], score_func=shallow)
    assert plan.loss["after"]["se"] is None and records(tmp_path / "s", "score")[0]["se"] is None
