"""tune(): what it decides, with times told to it, and that it leaves the model as it was."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Never

import numpy as np
import peft
import pytest
import torch

import accelplug
from accelplug.call import Layout
from accelplug.comparison.journal import Journal, adapters, fingerprint
from accelplug.comparison.result import Comparison
from accelplug.comparison.rows import DENSE_ROW, Row, Sample, Variant
from accelplug.comparison.study import Study
from accelplug.errors import AccelplugError
from accelplug.hosts.host import model_facts
from accelplug.patches.sparse.rest_weights import RestWeights
from accelplug.recipe import Measured, ModelFacts, load, read_file
from accelplug.step_caches import CACHES
from accelplug.testing.laws import snapshot_of
from accelplug.tuning import Bound, caches, prediction, search, space, verification, workers
from accelplug.tuning.budget import parse_budget
from accelplug.tuning.caches import Cache
from accelplug.tuning.prediction import Predictor, Probe, Trajectory
from accelplug.tuning.probing import Prober, in_8_bits, no_8_bits
from accelplug.tuning.result import Tuned
from accelplug.tuning.space import Arm, Candidate, arms, variants
from accelplug.tuning.verdict import limit
from accelplug.tuning.workers import Job
from tests import tiny_pipelines
from tests.test_report import Page

LADDERS = {
    "sol": ([{"tau": 1.0, "block": 8, "band": 0}], ("pool", "drop")),
    "radial": ([{"decay": 0.2, "block": 8}], ("pool", "drop")),
}
SIZE = {"height": 48, "width": 64, "num_inference_steps": 2}


def pipeline() -> tuple[Any, dict[str, Any]]:
    """A pipeline whose latents are shown as they are: decoding is the half of a run that nothing is tuned in."""
    pipe, inputs = tiny_pipelines.decoding("wan")
    pipe.vae.decode = lambda latents, return_dict: (latents[:, :3],)
    return pipe, {**{key: value for key, value in inputs.items() if key != "output_type"}, **SIZE}


@pytest.fixture
def told_times(monkeypatch: pytest.MonkeyPatch) -> None:
    tell_times(monkeypatch)


def tell_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense runs take 10 s; a patched run as many seconds less as its arm is bold; a cached one 8 s."""

    def timed(self: Study, variant: Variant, prompt: int, seed: int) -> None:
        real(self, variant, prompt, seed)
        sample = self.rows[variant.name].samples[-1]
        sample.denoise_ms = sample.latency_ms = 10_000.0
        if variant.recipe is not None:
            taken = {"sol": 5_000.0, "radial": 7_000.0, "dense": 10_000.0}
            sample.latency_ms = sample.denoise_ms = min(taken[rule.patch] for rule in variant.recipe.rules)

    real = Study.time
    probed = Trajectory.probe

    def probe(self: Any, pipe: Any, recipe: dict[str, Any], snapshots: Any = None) -> Probe:
        found = probed(self, pipe, recipe, snapshots)
        return Probe(found.errors, {"sol": 0.5, "radial": 0.7}[recipe["rules"][-1]["patch"]], found.density, found.estimate)

    monkeypatch.setattr(Study, "time", timed)
    monkeypatch.setattr(Trajectory, "probe", probe)
    monkeypatch.setattr(space, "LADDERS", LADDERS)
    clock = iter(range(10**9))
    monkeypatch.setattr(search.time, "monotonic", lambda: next(clock) * 1e-3)


def run(pipe: Any, inputs: Any, budget: Any, **more: Any) -> Tuned:
    more = {"seeds": 2, "patches": ["sol", "radial"], "caches": False, "time_budget_s": 400.0, "progress": False, **more}
    return accelplug.tune(pipe, inputs, budget, **more)


def test_the_fastest_that_holds_is_proven_on_another_seed(told_times: None) -> None:
    pipe, inputs = pipeline()
    with torch.no_grad():
        pipe(**inputs)  # a pipeline of diffusers leaves a registry behind at its first run
    before = snapshot_of(pipe.transformer)
    found = run(pipe, inputs, "psnr>=1")
    assert found.proven is not None
    assert found.proven.name.startswith("sol")
    assert found.proven.speedup == 2.0
    assert math.isfinite(found.proven.worst["psnr"]), "the patch changed nothing"
    assert found.proven.runs == 2, "one run of the search, one of the proof"
    assert {(s.prompt, s.seed) for s in found.comparison.row(found.proven.name).samples} == {(0, 0), (0, 1)}
    assert "2.00x within psnr>=1" in found.why
    assert [rule.patch for rule in found.rules][-1] == "sol"
    assert snapshot_of(pipe.transformer) == before
    with accelplug.apply(pipe, found, gate="off") as plug, torch.no_grad():
        pipe(**inputs)
        assert plug.report().served["sol"] > 0


def test_recipes_that_all_denoisers_have_are_tried_as_they_stand(told_times: None, monkeypatch: pytest.MonkeyPatch) -> None:
    preset = {
        "rules": [{"where": {"steps": "0:50%"}, "patch": "dense"}, {"patch": "radial", "with": {"block": 8, "decay": 0.1}}]
    }
    made = dataclasses.replace(load(preset, ModelFacts(("Any",), {})), name="denoiser/made")
    other = dataclasses.replace(load({"patch": "tome"}, ModelFacts(("Any",), {})), name="denoiser/other")
    monkeypatch.setattr(search, "presets", lambda facts: [made, other])
    pipe, inputs = pipeline()
    found = run(pipe, inputs, "psnr>=1")
    points = {point.name: point for point in found.points}
    assert points["denoiser/made"].recipe == made.to_mapping()
    assert points["denoiser/made"].speedup == pytest.approx(10 / 7)
    assert "denoiser/other" not in points, "its patch was not asked for"
    assert found.proven is not None
    assert found.proven.name.startswith("sol"), "what is faster and holds wins all the same"


def test_nothing_holds_an_impossible_budget_and_dense_says_why(told_times: None) -> None:
    pipe, inputs = pipeline()
    found = run(pipe, inputs, [Bound("never", 1.0, score=lambda dense, candidate: 0.0)])
    assert found.proven is None
    assert "Stay dense: none of" in found.why
    assert [rule.patch for rule in found.rules] == ["dense"]
    assert all(point.margin == -1.0 for point in found.points)


def test_what_fails_on_unseen_seeds_is_overturned_and_the_next_one_tried(told_times: None) -> None:
    pipe, inputs = pipeline()
    scored: list[str] = []

    def lucky(dense: np.ndarray, candidate: np.ndarray) -> float:
        scored.append("")
        return 1.0 if len(scored) < search_runs else 0.0

    search_runs = 10**6
    searched = run(pipe, inputs, [Bound("lucky", 0.5, score=lucky)])
    proof = next(point.runs for point in searched.points if point.verdict == "proven") - 1
    search_runs = len(scored) - proof + 1
    scored.clear()
    found = run(pipe, inputs, [Bound("lucky", 0.5, score=lucky)])
    assert found.proven is None
    assert any(point.verdict == "overturned" for point in found.points)
    assert "unseen" in found.why


def test_measurements_are_kept_and_taken_up_again(told_times: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, inputs = pipeline()
    first = run(pipe, inputs, "psnr>=1", resume=tmp_path / "journal")
    lines = (tmp_path / "journal").read_text().splitlines()
    assert any("probe sol" in line for line in lines)

    def never(*_: object) -> Never:
        raise AssertionError("a probe was measured again")

    monkeypatch.setattr(Trajectory, "probe", never)
    second = run(pipe, inputs, "psnr>=1", resume=tmp_path / "journal")
    assert second.proven.name == first.proven.name
    with pytest.raises(AccelplugError, match="another model, adapters, prompts"):
        run(pipe, {**inputs, "height": 64}, "psnr>=1", resume=tmp_path / "journal")


def test_a_line_that_an_interrupt_left_half_written_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    for half in ("", '{"finger'):
        path.write_text(half)
        assert Journal(path, "of this").get("a", lambda: 1) == 1
    path.write_text(path.read_text() + '{"key": "b", "val')
    kept = Journal(path, "of this")
    assert kept.entries == {"a": 1}
    assert kept.get("b", lambda: 2) == 2
    assert Journal(path, "of this").entries == {"a": 1, "b": 2}
    path.write_text(path.read_text().replace('"value": 1', "1"))
    with pytest.raises(AccelplugError, match="is not the journal of a search"):
        Journal(path, "of this")


def test_adapters_are_part_of_what_was_measured() -> None:
    pipe, inputs = pipeline()
    seen = [fingerprint(pipe, [inputs], [0, 1])]
    lora = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["to_q"], init_lora_weights=False)
    pipe.transformer.add_adapter(lora, adapter_name="style")
    seen.append(fingerprint(pipe, [inputs], [0, 1]))
    assert adapters(pipe) == {"style": "2"}
    pipe.transformer.set_adapters("style", weights=0.25)
    seen.append(fingerprint(pipe, [inputs], [0, 1]))
    assert adapters(pipe) == {"style": "0.5"}
    assert fingerprint(pipe, [inputs], [0, 1]) == seen[-1]
    pipe.fuse_lora(components=["transformer"])
    pipe.unload_lora_weights()
    seen.append(fingerprint(pipe, [inputs], [0, 1]))
    assert len(set(seen)) == 4, "loaded, at another scale, fused into the weights"


def test_what_holds_the_proof_and_gains_nothing_there_is_not_the_recipe(
    told_times: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told = Study.time

    def slow_where_unseen(self: Study, variant: Variant, prompt: int, seed: int) -> None:
        told(self, variant, prompt, seed)
        if prompt == 1:
            self.rows[variant.name].samples[-1].latency_ms = 10_000.0

    monkeypatch.setattr(Study, "time", slow_where_unseen)
    pipe, inputs = pipeline()
    found = run(pipe, [inputs, inputs], "psnr>=1", patches=["sol"])
    assert {point.speedup for point in found.points if point.worst_run == (1, 1)} == {1.0}
    assert found.proven is None
    assert "gains less than 1.03x, at best" in found.why
    written = read_file(found.to_yaml(tmp_path / "mine.yaml")).recipe()
    assert [rule.patch for rule in written.rules] == ["dense"]
    found.to_html(tmp_path / "page.html")


@pytest.mark.parametrize(
    ("where", "at", "proven", "says"),
    [
        ("arm", 2, False, "interrupted before anything was proven; nothing was seen to hold"),
        ("_next", 2, True, "within psnr>=1"),
        ("_halve", 1, True, "within psnr>=1"),
        ("prove", 1, False, "kept psnr>=1 at 2.00x in 1 runs of the search"),
    ],
)
def test_an_interrupt_in_any_phase_keeps_the_best_so_far(
    told_times: None, monkeypatch: pytest.MonkeyPatch, where: str, at: int, proven: bool, says: str
) -> None:
    pipe, inputs = pipeline()
    owner = Prober if where == "arm" else search.Search
    real, asked = getattr(owner, where), []

    def interrupted(self: Any, *given: Any) -> Any:
        asked.append("")
        if len(asked) == at:
            raise KeyboardInterrupt
        return real(self, *given)

    monkeypatch.setattr(owner, where, interrupted)
    found = run(pipe, inputs, "psnr>=1", patches=["sol"])
    assert (found.proven is not None) == proven
    assert says in found.why
    assert "no patch can gain more than" in found.why, "two steps are few"
    assert accelplug.plug.plug_of(pipe.transformer) is None


ARMS = [Arm(name, (("strength", k),)) for k in range(4) for name in ("a", "b")]


def offline(seeds: int, budget: str = "psnr>=26") -> tuple[search.Search, list[tuple[str, int]]]:
    """A search among made-up arms, whose whole runs are told: the stronger the faster and the worse, `b` more so than `a`."""
    row = Row(DENSE_ROW, "dense", samples=[Sample(0, 0, 1000.0, 900.0)])
    study: Any = SimpleNamespace(rows={DENSE_ROW: row}, dense_runs={})
    found = search.Search(
        study, parse_budget(budget), [(0, seed) for seed in range(seeds)], [(0, 99)], 1e9, Journal(None, "")
    )
    found.predictor = Predictor(Trajectory([], [0.1] * 10, [], 4), found.bounds, 900.0, 100.0)
    strength = {arm: dict(arm.settings)["strength"] + (arm.patch == "b") for arm in ARMS}
    found.predictor.probes = {arm: Probe({0: 0.01 * 2**k, 9: 0.01 * 2**k}, 0.8 - 0.1 * k) for arm, k in strength.items()}
    found.candidates = [candidate for arm in ARMS for candidate in variants(arm, [], 10)]
    runs = []

    def told(candidate: Candidate, pairs: Sequence[tuple[int, int]]) -> None:
        runs.append((str(candidate), len(pairs)))
        point = found.points.setdefault(candidate, search.Point(str(candidate), {}, 0, 0.0, {}, 0.0))
        psnr = 38 - 5 * strength[candidate.arm] + candidate.dense_steps / 10
        point.runs, point.worst, point.margin = point.runs + len(pairs), {"psnr": psnr}, psnr - 26
        point.speedup = 1000 / found.predictor._probed_ms(candidate)
        found.predictor.runs = [(c, p.worst, p.speedup) for c, p in found.points.items()]

    found._run = told
    return found, runs


def test_equal_measurements_lead_to_equal_proposals_in_equal_order() -> None:
    (first, runs), (second, again) = offline(2), offline(2)
    first.explore()
    second.explore()
    assert runs == again
    assert len(set(runs)) > 4


def test_a_dense_run_that_was_held_up_flatters_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first dense run takes 2.3 times as long as any later one; a candidate that takes as long as dense gains nothing."""
    times, clip = {DENSE_ROW: iter([2300.0, 1000.0, 1000.0]), "idle": iter([1000.0])}, np.zeros((1, 2, 2, 3), np.uint8)
    rows = {DENSE_ROW: Row(DENSE_ROW, "dense")}

    def run(variant: Variant, prompt: int, seed: int) -> None:
        ms = next(times[variant.name])
        rows[variant.name].samples.append(Sample(prompt, seed, ms, 0.9 * ms, scores={"psnr_db": 40.0}))
        study.dense_runs[prompt, seed] = study.clips[variant.name, prompt, seed] = clip

    study: Any = SimpleNamespace(
        rows=rows, pipe=None, dense_runs={}, clips={}, time=run, new_row=lambda v: Row(v.name, "recipe")
    )
    found = search.Search(study, parse_budget("psnr>=26"), [(0, 0)], [(0, 99)], 1e9, Journal(None, ""))
    found.workers.run(Job(((0, 0),)))
    found.predictor = Predictor(Trajectory([], [0.1] * 10, [], 4), found.bounds, 2000.0, 300.0)
    found.predictor.probes = {Arm("idle", ()): Probe({0: 0.01}, 0.5)}
    monkeypatch.setattr(workers, "load", lambda *_: None)
    monkeypatch.setattr(workers, "model_facts", lambda _: None)
    monkeypatch.setattr(workers, "runs_compiled", lambda _: False)
    monkeypatch.setattr(Arm, "__str__", lambda arm: arm.patch)
    found._run(Candidate(Arm("idle", ())), [(0, 0)])
    assert [point.speedup for point in found.points.values()] == [1.0]
    assert found.predictor.dense_ms == 1000.0


def test_patches_are_tried_beside_a_cache_that_is_faster_than_all_of_them() -> None:
    found, _ = offline(1)
    cache = Cache("first_block", (("threshold", 0.1),))
    found.points[Candidate(None, cache=cache)] = search.Point("cache", {}, 1, 4.0, {"psnr": 40.0}, 14.0)
    found.predictor.cache_ratio = {cache: 0.15}
    assert all(found.predictor.latency_ms(candidate) > 1000 / 4 for candidate in found.candidates), "none is faster alone"
    alone = found._next()
    assert (alone.cache, alone.arm is None) == (None, False), "what it loses by itself is seen first"
    found._run(alone, found.seen)
    beside = found._next()
    assert (beside.cache, beside.arm is None) == (cache, False)
    together = found.predictor.margin(beside)
    assert together < min(14.0, found.predictor.margin(dataclasses.replace(beside, cache=None)))
    found._run = lambda *_: None
    found.points[beside] = search.Point("both", {}, 1, 5.0, {"psnr": 26 + together - 2.0}, together - 2.0)
    found.predictor.runs = [(c, p.worst, p.speedup) for c, p in found.points.items()]
    assert found.predictor.margin(beside) < together, "whole runs say more"


def test_two_losses_together() -> None:
    assert prediction.margin_of_both(4.0, 4.0, in_db=True) == pytest.approx(4.0 - 3.0103)
    assert prediction.margin_of_both(4.0, 24.0, in_db=True) == pytest.approx(4.0 - 0.0432, abs=1e-4)
    assert prediction.margin_of_both(4.0, math.inf, in_db=True) == 4.0
    assert prediction.margin_of_both(math.inf, math.inf, in_db=True) == math.inf
    assert prediction.margin_of_both(0.1, 0.3, in_db=False) == 0.1


def test_arms_are_pruned_by_what_they_lose_and_take(told_times: None) -> None:
    """What another arm beats in both is repaired by nobody, and run by nobody."""
    found, _ = offline(1)
    told = {
        "slow and bad": (0.9, 0.2),
        "fast and bad": (0.5, 0.2),
        "slow and good": (0.9, 0.1),
        "as fast, worse": (0.5, 0.3),
    }
    arms = {name: Arm("a", (("is", name),)) for name in told}
    found.predictor.probes = {arms[name]: Probe({0: error}, ratio) for name, (ratio, error) in told.items()}
    kept = [dict(arm.settings)["is"] for arm in found.predictor.front()]
    assert kept == ["fast and bad", "as fast, worse", "slow and good"], "times are off by some percent"


def test_repair_is_tried_and_what_it_estimates_is_told(told_times: None) -> None:
    layout = Layout((2, 10, 10))
    (few, many) = space.repaired(Arm("sol", (("tau", 1.0),)), layout)
    assert (dict(few.settings)["probes"], dict(many.settings)["probes"]) == (8, 16)
    assert not space.repaired(few, layout), "twice is once"
    assert [str(arm) for arm in space.repaired(Arm("rows", ()), layout)] == ["rows repair=output_query"], "it has exact rows"
    assert not space.repaired(Arm("tome", (("ratio", 0.5),)), layout), "it has no blocks"
    pipe, inputs = pipeline()
    found = run(pipe, inputs, "psnr>=1")
    mended = [point for point in found.points if "repair=output_query" in point.name]
    assert mended
    for point in found.points:
        ran, foretold = found.comparison.row(point.name).error, point.predicted["estimate"]
        assert (ran is None, foretold is None) == ((False, False) if point in mended else (True, True))
    assert all(point.verdict != "overturned" or found.proven is not point for point in found.points)


def test_the_search_goes_on_where_no_finalist_is_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is fastest holds on the seed of the search only; what is slower holds everywhere."""
    monkeypatch.setattr(search, "FINALISTS", 1)
    found, _ = offline(1)
    told = found._run

    def unseen_is_harder(candidate: Candidate, pairs: Sequence[tuple[int, int]]) -> None:
        told(candidate, pairs)
        if pairs == found.unseen and found.points[candidate].speedup > 1.35:
            found.points[candidate].margin = -1.0

    found._run = unseen_is_harder
    found.explore()
    found.prove()
    verdicts = [point.verdict for point in sorted(found.points.values(), key=lambda point: -point.speedup)]
    assert verdicts.count("proven") == 1
    assert "overturned" in verdicts[: verdicts.index("proven")]


@pytest.mark.parametrize("lost", [4.0, 9.0], ids=["the third has as much to lose", "none has more to lose: the safest"])
def test_what_an_overturned_finalist_lost_the_next_must_have_to_lose(lost: float) -> None:
    found, _ = offline(1)
    order: list[str] = []
    for number, margin in enumerate((1.0, 2.0, 9.0)):  # the fastest holds by least; each loses where the search never looked
        point = search.Point(str(number), {}, 1, 3.0 - number / 10, {"psnr": 26 + margin}, margin)
        found.points[found.candidates[number]] = point

    def told(candidate: Candidate, pairs: Sequence[tuple[int, int]]) -> None:
        found.points[candidate].margin -= lost
        order.append(found.points[candidate].name)

    found._run = told
    found.prove()
    assert order == ["0", "2", "1"], "what is faster than the proven one has its turn behind it"
    assert [point.verdict for point in found.points.values()] == ["overturned", "overturned", "proven"]


def test_survivors_are_halved_while_the_seeds_they_see_double() -> None:
    found, runs = offline(8)
    fastest = sorted((c for c in found.candidates if c.arm.patch == "a"), key=lambda c: found.predictor.latency_ms(c))
    held = [
        candidate for candidate in fastest if not candidate.dense_layers and dict(candidate.arm.settings)["strength"] < 3
    ]
    for candidate in held:
        found._run(candidate, found.seen[:1])
    found._halve()
    assert len(held) > 8
    assert [pairs for _, pairs in runs[len(held) :]] == [1] * 8 + [2] * 4 + [4] * 2
    assert runs[-2][0] == str(held[0]), "the fastest has seen all eight pairs"


def test_few_steps_leave_little_and_say_how_much() -> None:
    predictor = Predictor(Trajectory([], [0.25] * 4, [], 2, attention=0.6), parse_budget("psnr>=26"), 900.0, 100.0)
    assert predictor.ceiling(1) == pytest.approx(1 / (1 - 0.9 * 0.6 * 0.75))
    assert "4 steps, one of them dense, attention being 60% of a step and denoising 90% of a run" in limit(predictor)
    assert "more than 1.68x; with none dense 2.17x" in limit(predictor)
    predictor.trajectory.attention = None
    assert "is not known" in limit(predictor)


def test_8_bits_are_kept_where_they_are_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "a CPU gains nothing" in no_8_bits(torch.device("cpu"))
    arm, found = Arm("sol", (("tau", 1.0),)), Predictor(Trajectory([], [], [], 2), (), 900.0, 100.0)
    ratios = {str(arm): 0.6, f"{arm} precision=int8": 0.5, f"{arm} precision=fp8": 0.6}
    monkeypatch.setattr(Prober, "arm", lambda self, arm: found.probes.update({arm: Probe({0: 0.1}, ratios[str(arm)])}))
    prober = Prober(found, None, Journal(None, ""), print)
    prober.arm(arm)
    prober.arm_in_8_bits(arm)
    assert [str(arm) for arm in found.probes] == ["sol tau=1", "sol tau=1 precision=int8"]
    assert not in_8_bits(Arm("tome", (("ratio", 0.5),))), "nothing is read in blocks"


def test_weights_of_pooled_blocks_are_calibrated_where_they_could_help(
    told_times: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The arm keeps the budget with calibrated weights alone. Random models are best off with weights of 1: others are told."""
    pipe, inputs = pipeline()
    calibrated = RestWeights.tables
    monkeypatch.setattr(RestWeights, "tables", lambda self: {k: 0.9 * v for k, v in calibrated(self).items()})
    monkeypatch.setattr(space, "LADDERS", {"sol": ([{"tau": 4.0, "block": 8, "band": 0}], ("pool",))})
    monkeypatch.setattr(space, "DENSE_STEPS", (0,))
    monkeypatch.setattr(Prober, "layers", lambda self: None)
    real, ran = Study.time, []
    monkeypatch.setattr(Study, "time", lambda self, variant, *pair: (ran.append(variant.name), real(self, variant, *pair)))
    budget = Bound("told", 1.0, score=lambda dense, clip: 1.0 if "calibrated" in ran[-1] else 0.99)
    found = run(pipe, inputs, budget, patches=["sol"], resume=tmp_path / "journal")
    assert found.proven is not None
    assert "rest_weight=calibrated" in found.proven.name
    path = found.to_yaml(tmp_path / "mine.yaml")
    assert path.with_suffix(".safetensors").exists()
    read = load(path, model_facts(pipe))
    weights = [recipe.with_tables().rules[-1].settings["rest_weight"].values for recipe in (found, read)]
    assert torch.equal(*weights)
    assert weights[0].shape == (2, 2)
    with accelplug.apply(pipe, read, gate="off") as plug, torch.no_grad():
        pipe(**inputs)
        assert plug.report().served["sol"] > 0
    assert "Table(rest_weight" in found.to_json(tmp_path / "mine.json").read_text()
    lines = map(json.loads, (tmp_path / "journal").read_text().splitlines()[1:])
    (kept,) = (line["value"]["values"] for line in lines if line["key"].startswith("weights"))
    assert torch.equal(torch.tensor(kept), weights[0])


def test_caches_are_set_for_the_model_or_said_not_to_fit() -> None:
    pipe, inputs = pipeline()
    inputs |= {"num_inference_steps": 9}
    study, parts = Study(pipe, [inputs], [0], None, None), {"transformer": pipe.transformer}
    with torch.no_grad():
        pipe(**inputs)  # a pipeline of diffusers leaves a registry behind at its first run
    before = snapshot_of(pipe.transformer)
    trajectory = Trajectory.record(study, 0, 0)
    assert snapshot_of(pipe.transformer) == before
    assert trajectory.contexts == {"cond", "uncond"}
    assert 0 < trajectory.attention < 1
    ladders, why_not = caches.fitting(parts, caches.CacheFacts(9, trajectory.contexts, trajectory.magnitudes))
    assert [ladder[0].ladder for ladder in ladders] == ["first_block", "mag", "taylorseer lite"]
    assert why_not[0].startswith("No cache taylorseer: ")
    assert "no module of transformer to hook" in why_not[0]
    ratios = dict(ladders[1][0].settings)["mag_ratios"]
    assert ratios == pytest.approx(measured_ratios(pipe, study), abs=2e-3)
    for ladder in ladders[1:]:
        with accelplug.apply(pipe, Candidate(None, cache=ladder[-1]).rules(), gate="off") as plug, plug.trace() as events:
            study.run(0, 0)
        computed = sorted({event.clock.step for event in events})
        assert {0, 1, 8} <= set(computed) < set(range(9)), "the first steps and the last are computed, others are not"
    assert snapshot_of(pipe.transformer) == before
    few, why = caches.fitting(parts, caches.CacheFacts(8, trajectory.contexts, trajectory.magnitudes))
    assert not few
    assert "too few" in why[0]
    mag = CACHES["mag"]
    two = {"transformer": pipe.transformer, "transformer_2": pipe.transformer}
    assert "share those of a run" in caches._obstacle(mag, mag.ladders[0], two, caches.CacheFacts(9, frozenset(), {}))


def measured_ratios(pipe: Any, study: Study) -> list[float]:
    """MagCache's ratios by their definition, from what goes into the first block and comes out of the last; 0 at the last step."""
    entered, residuals = [], []
    first, last = pipe.transformer.blocks[0], pipe.transformer.blocks[-1]
    handles = [
        first.register_forward_pre_hook(lambda _, args: entered.append(args[0].clone())),
        last.register_forward_hook(lambda _, args, out: residuals.append((out - entered[-1]).norm(dim=-1))),
    ]
    study.run(0, 0)
    for handle in handles:
        handle.remove()
    branches = [residuals[::2], residuals[1::2]]
    ratios = [[float((new / old).mean()) for old, new in itertools.pairwise(branch)] for branch in branches]
    means = [sum(pair) / 2 for pair in zip(*ratios, strict=True)]
    return [1.0, *means[:-1], 0.0]


def test_a_compiled_pipeline_warms_each_candidate_up_once(told_times: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, inputs = pipeline()
    pipe.transformer.compile_repeated_blocks(backend="eager")
    warmed = []
    real = Study.warm_up
    monkeypatch.setattr(
        Study, "warm_up", lambda self, variant, *pair: (warmed.append(variant.name), real(self, variant, *pair))
    )
    limit = torch._dynamo.config.recompile_limit
    monkeypatch.setattr(space, "LADDERS", {"sol": (LADDERS["sol"][0], ("drop",))})
    monkeypatch.setattr(space, "DENSE_STEPS", (0,))
    monkeypatch.setattr(Prober, "layers", lambda self: None)
    found = run(pipe, inputs, "psnr>=1", patches=["sol"])
    assert warmed == ["dense", *(point.name for point in found.points)] == list(dict.fromkeys(warmed))
    assert found.proven.speedup == 2.0
    assert torch._dynamo.config.recompile_limit == limit


def test_the_recipe_file_is_read_back_with_its_measurement(told_times: None, tmp_path: Path) -> None:
    pipe, inputs = pipeline()
    pipe.transformer.add_adapter(peft.LoraConfig(r=2, lora_alpha=4, target_modules=["to_q"]), adapter_name="style")
    found = run(pipe, inputs, "psnr>=1")
    file = read_file(found.to_yaml(tmp_path / "mine.yaml"))
    assert file.recipe().measured[0].seeds == [0, 1]
    assert file.recipe().summary.endswith("Tuned with the LoRA adapters style (2); for others tune again")
    assert file.recipe().measured[0].prompts == [], "prompt embeddings are no words"
    assert load(tmp_path / "mine.yaml", model_facts(pipe)).rules == found.rules
    assert json.loads(found.to_json(tmp_path / "mine.json").read_text())["points"]
    dots = Page(found.to_html(tmp_path / "mine.html").read_text()).data["dots"]
    assert [dot["name"] for dot in dots] == [point.name for point in found.points]
    assert 0 < found.proven.predicted["density"] < 1


def test_too_little_time_says_how_much_is_needed(told_times: None) -> None:
    pipe, inputs = pipeline()
    found = run(pipe, inputs, "psnr>=1", time_budget_s=0.0)
    assert "before a patch could be probed" in found.why
    assert "at least 300" in found.why


def test_unusable_requests_say_what_to_do() -> None:
    pipe, inputs = pipeline()
    with pytest.raises(AccelplugError, match="at least two seeds"):
        accelplug.tune(pipe, inputs, seeds=1)
    for budget, says in {
        "psnr>26": "A bound is a metric",
        "psrn>=26": "did you mean 'psnr'|There is no metric 'psrn'",
        "psnr<=26": "other side",
        "lpips<=.1": "AlexNet",
    }.items():
        with pytest.raises(AccelplugError, match=says):
            parse_budget(budget)


def test_margins_are_distances_to_the_good_side() -> None:
    (low,) = parse_budget("psnr>=26")
    (high,) = parse_budget("latent_distance<=.5")
    assert low.margin(28.0) == 2.0
    assert high.margin(0.75) == -0.25
    assert low.margin(math.nan) == -math.inf
    assert [str(bound) for bound in parse_budget("psnr >= 26, ssim>=.9")] == ["psnr>=26", "ssim>=0.9"]


def test_arms_leave_out_what_reads_everything() -> None:
    names = {str(arm) for arm in arms(Layout((2, 6, 10)))}
    assert not any(name.startswith("radial") for name in names), "two frames read each other whole"
    assert any(name.startswith("sol") for name in names)
    seen = [arm.patch for arm in arms(Layout((5, 6, 10)))]
    assert len(set(seen[: len(set(seen))])) == len(set(seen)), "one of each patch comes first"
    with pytest.raises(AccelplugError, match="no settings to try for 'vhr'"):
        arms(Layout((2, 6, 10)), ["vhr"])


def test_candidates_are_recipes() -> None:
    arm = Arm("sol", (("tau", 1.0),))
    made = list(variants(arm, [3, 0, 2, 1], 20))
    assert {c.dense_steps for c in variants(arm, [], 4)} == {0, 25, 40}, "10 % of four steps is none"
    layers = [{c.dense_layers for c in variants(arm, by_share, 4)} for by_share in ([1, 0], [3, 0, 2], [3, 0, 2, 1])]
    assert layers == [{()}, {(), (3,)}, {(), (3,), (0, 3)}], "two stay patched"
    assert made[0].rules() == {"rules": [{"patch": "sol", "with": {"tau": 1.0}}]}
    assert Candidate(arm, 25, (0, 3), Cache("first_block", (("threshold", 0.1),))).rules() == {
        "rules": [
            {"where": {"layers": [0, 3]}, "patch": "dense"},
            {"where": {"steps": "0:25%"}, "patch": "dense"},
            {"patch": "sol", "with": {"tau": 1.0}},
        ],
        "cache": {"kind": "first_block", "with": {"threshold": 0.1}},
    }
    assert len(set(made)) == len(made) == 12


def test_a_forecast_learns_the_line_that_full_runs_draw() -> None:
    """Values made by psnr = 40 - 20 log10(1000 spoil): four runs, one with dense steps, are enough to foretell others."""
    arms_ = [Arm("sol", (("tau", float(tau)),)) for tau in range(4)]
    trajectory = Trajectory([], [0.1] * 10, [], 4)
    predictor = Predictor(trajectory, parse_budget("psnr>=26"), 1000.0, 100.0)
    predictor.probes = {arm: Probe({0: e, 9: e}, 0.5) for arm, e in zip(arms_, (0.01, 0.02, 0.05, 0.1), strict=True)}

    def true(candidate: Candidate) -> float:
        return 40 - 20 * math.log10(1000 * predictor.predicted_error(candidate, 0.0))

    known = [*map(Candidate, arms_[:3]), Candidate(arms_[0], dense_steps=25)]
    assert predictor.margin(known[0]) is None
    predictor.runs = [(candidate, {"psnr": true(candidate)}, 1100 / predictor.latency_ms(candidate)) for candidate in known]
    for candidate in (Candidate(arms_[3]), Candidate(arms_[3], dense_steps=40)):
        assert predictor.margin(candidate) == pytest.approx(true(candidate) - 26, abs=0.5)
    assert predictor.latency_ms(Candidate(arms_[0])) == pytest.approx(600.0)
    predictor.runs.append((Candidate(arms_[3]), {"psnr": 0.0}, 1100 / 1200))
    assert predictor.latency_ms(Candidate(arms_[3], dense_steps=40)) == pytest.approx(1600.0), "twice what probes foretold"
    assert predictor.latency_ms(Candidate(arms_[0], dense_steps=40)) == pytest.approx(800.0)
    assert predictor.latency_ms(Candidate(arms_[0], dense_layers=(0,))) == pytest.approx(725.0)


def test_a_metric_that_is_better_low_falls_out_of_the_budget_as_errors_grow() -> None:
    predictor = Predictor(Trajectory([], [0.1] * 10, [], 4), parse_budget("latent_distance<=.4"), 900.0, 100.0)
    arms_ = [Arm("sol", (("tau", float(tau)),)) for tau in range(5)]
    predictor.probes = {arm: Probe({0: 10.0 ** (tau - 4)}, 0.5) for tau, arm in enumerate(arms_)}
    told = {Candidate(arm): 0.1 * tau for tau, arm in enumerate(arms_[:4])}
    predictor.runs = [(candidate, {"latent_distance": told[candidate]}, 2.0) for candidate in told]
    assert predictor.margin(Candidate(arms_[4])) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("psnr", "seconds", "outcome"),
    [(30.0, 5.0, "confirmed"), (28.5, 5.0, "drifted"), (30.0, 7.0, "drifted"), (26.0, 5.0, "broken")],
)
def test_verify_judges_against_the_record(
    monkeypatch: pytest.MonkeyPatch, psnr: float, seconds: float, outcome: str
) -> None:
    monkeypatch.setattr(verification, "device_name", lambda: "here")
    spread = {"p20": 5e3, "p50": 5e3, "p80": 5e3}
    dense = {"p20": 1e4, "p50": 1e4, "p80": 1e4}
    quality = {"mean": 30.0, "worst": 30.0}
    row = Measured.model_validate(
        {
            "date": "2026-01-01",
            "device": "here",
            "versions": {},
            "seeds": [0],
            "dense_ms": dense,
            "ms": spread,
            "psnr_db": quality,
        }
    )
    rows = [
        Row(DENSE_ROW, "dense", samples=[Sample(0, 0, 1e4, 1e4)]),
        Row("now", "recipe", samples=[Sample(0, 0, 1e3 * seconds, 1e3, scores={"psnr_db": psnr})]),
    ]
    assert verification.judge(row, Comparison("", [], [0], {}, "", {}, rows))[0] == outcome


def test_one_gain_is_told_everywhere(told_times: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Dense runs that something holds up now and then: headline, point, row, page and verify say the same."""
    pipe, inputs = pipeline()
    timed, slow = Study.time, itertools.cycle([2.3, 1.0, 1.1, 1.7])

    def held_up(self: Study, variant: Variant, prompt: int, seed: int) -> None:
        timed(self, variant, prompt, seed)
        if variant.name == DENSE_ROW:
            self.rows[DENSE_ROW].samples[-1].latency_ms *= next(slow)

    monkeypatch.setattr(Study, "time", held_up)
    found = run(pipe, inputs, "psnr>=1", seeds=4)
    row, gain = found.measured[0], found.proven.speedup
    assert gain > 1.0
    assert row.gain == gain
    assert f"{gain:.2f}x within" in found.why
    assert row.seeds == [0, 1, 2, 3]
    data = Page(found.to_html(tmp_path / "a.html").read_text()).data
    assert max(dot["speedup"] for dot in data["dots"] if dot["verdict"] == "proven") == gain
    assert data["verdict"] == found.comparison.verdict == found.why
    path = found.to_yaml(tmp_path / "mine.yaml")
    assert read_file(path).recipe().measured[0].gain == pytest.approx(gain)
    (verdict,) = accelplug.verify(pipe, path, inputs, progress=False)
    assert f"(recorded {gain:.2f}x" in verdict.why
    assert f"{gain:.2f}x" in load(path, model_facts(pipe)).describe()


def test_where_a_prompt_was_held_out_all_is_told_of_it(told_times: None, tmp_path: Path) -> None:
    """The search ran the first prompt; what the row says, `verify` runs: the second prompt, at the seeds of the proof."""
    pipe, inputs = pipeline()
    found = run(pipe, [inputs, {**inputs, "guidance_scale": 1.0}], "psnr>=1", seeds=4)
    point, row = found.proven, found.measured[0]
    samples = found.comparison.row(point.name).samples
    assert [(sample.prompt, sample.seed) for sample in samples] == [(1, 2), (1, 3)]
    assert (point.runs, point.worst_run[0]) == (2, 1)
    assert (row.seeds, row.inputs["guidance_scale"]) == ([2, 3], 1.0)
    assert row.psnr_db.worst == point.worst["psnr"] == min(sample.scores["psnr_db"] for sample in samples)
    assert row.gain == point.speedup


def test_a_cache_that_skips_nothing_is_not_on_the_front(told_times: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes half the time, says the clock; its clips are dense's."""
    pipe, inputs = pipeline()
    timed = Study.time

    def noisy(self: Study, variant: Variant, prompt: int, seed: int) -> None:
        timed(self, variant, prompt, seed)
        if variant.kind == "cache":
            self.rows[variant.name].samples[-1].latency_ms = 5_000.0

    monkeypatch.setattr(Study, "time", noisy)
    idle = Cache("first_block", (("threshold", 1e-9),))
    monkeypatch.setattr(search, "fitting", lambda *_: ([[idle]], []))
    found = run(pipe, inputs, "psnr>=1", patches=["sol"], caches=True)
    (point,) = [point for point in found.points if point.name == str(Candidate(None, cache=idle))]
    assert math.isinf(point.worst["psnr"])
    assert point.speedup == 1.0
    assert point not in found.front
    assert found.proven.name.startswith("sol")
    assert any("Dense to the last bit" in note and point.name in note for note in found.notes)


def test_verify_runs_the_rows_of_a_file(told_times: None, tmp_path: Path) -> None:
    pipe, inputs = pipeline()
    found = run(pipe, inputs, "psnr>=1")
    path = found.to_yaml(tmp_path / "mine.yaml")
    (verdict,) = accelplug.verify(pipe, path, inputs, progress=False)
    assert verdict.outcome == "confirmed", verdict.why
    with pytest.raises(AccelplugError, match="names no prompts"):
        accelplug.verify(pipe, path, progress=False)
    dense = {"rules": [{"patch": "dense"}]}
    with pytest.raises(AccelplugError, match="no measured rows"):
        accelplug.verify(pipe, load(dense, model_facts(pipe)), progress=False)


def test_bounds_are_relative_to_floors_and_say_which_there_are() -> None:
    written = ["psnr>=seed+9", "ssim>=floor-0.05", "flicker<=dtype+0.1", "psnr>=kernel"]
    assert [
        str(bound) for bound in parse_budget("psnr>=seed + 9, ssim>=floor-.05, flicker<=dtype+.1, psnr>=kernel")
    ] == written
    for budget, says in {
        "psnr>=sed+9": "relative to floor or kernel or dtype or seed.*nearest: seed",
        "psnr>=stock+9": "relative to floor",
        "psnr<=seed+9": "write psnr>=seed\\+9",
        "psnr>=seed9": "relative to floor",
        "psnr>=seed+": "A bound is a metric",
    }.items():
        with pytest.raises(AccelplugError, match=says):
            parse_budget(budget)
    with pytest.raises(AccelplugError, match="expected a metric of the tables"):
        parse_budget(Bound("mine", 1.0, score=lambda *_: 1.0, to="seed"))


def test_a_budget_in_floors_is_kept_by_every_run_against_the_floor_of_its_prompt(told_times: None, tmp_path: Path) -> None:
    pipe, inputs = pipeline()
    floors: list[tuple[str, int]] = []
    floor = Study.floor
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Study, "floor", lambda self, of, prompt, seed: floors.append((of.name, prompt)) or floor(self, of, prompt, seed)
        )
        found = run(pipe, [inputs, {**inputs, "guidance_scale": 1.0}], "psnr>=seed+0.01, psnr>=1", seeds=4)
    assert floors == [("seed", 0), ("seed", 1)], "once a prompt"
    point, (measured,) = found.proven, found.measured
    floor_db = found.comparison.floors["seed"].samples[1].scores["psnr_db"]
    assert found.budget == "psnr>=seed+0.01, psnr>=1"
    assert point.worst["psnr - seed"] == pytest.approx(point.worst["psnr"] - floor_db)
    assert measured.budget == found.budget
    assert "psnr - seed" in found.why
    path = found.to_yaml(tmp_path / "mine.yaml")
    given = {**inputs, "guidance_scale": 1.0}
    (verdict,) = accelplug.verify(pipe, path, given, progress=False)
    assert verdict.outcome == "confirmed", verdict.why
    assert "(budget psnr>=seed+0.01)" in verdict.why
    (verdict,) = accelplug.verify(pipe, path, given, progress=False, budget="psnr>=seed+500")
    assert verdict.outcome == "broken"


def test_a_run_within_its_budget_has_drifted_at_most() -> None:
    """Another machine's kernels may cost decibels."""
    spread, quality = {"p20": 5e3, "p50": 5e3, "p80": 5e3}, {"mean": 40.0, "worst": 40.0}
    given = {
        "date": "",
        "device": "elsewhere",
        "versions": {},
        "seeds": [0],
        "dense_ms": spread,
        "ms": spread,
        "psnr_db": quality,
    }
    rows = [
        Row(DENSE_ROW, "dense", samples=[Sample(0, 0, 1e4, 1e4)]),
        Row("now", "recipe", samples=[Sample(0, 0, 5e3, 1e3, scores={"psnr_db": 30.0})]),
        Row("dense, another kernel", "floor", samples=[Sample(0, 0, 1.0, 1.0, scores={"psnr_db": 33.0})]),
        Row("dense, another dtype", "floor", samples=[Sample(0, 0, 1.0, 1.0, scores={"psnr_db": 35.0})]),
    ]
    clips = {(name, 0, 0): np.zeros((1, 2, 2, 3), np.uint8) for name in (DENSE_ROW, "now")}
    found = Comparison("", [""], [0], {}, "", {}, rows, clips)
    row = Measured.model_validate(given)
    assert verification.judge(row, found)[0] == "broken"
    assert verification.judge(row, found, parse_budget("psnr>=floor-4"))[0] == "drifted"
    assert verification.judge(row, found, parse_budget("psnr>=floor-2"))[0] == "broken"
