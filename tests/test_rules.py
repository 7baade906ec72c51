"""Rules that cannot hold are told: at apply where the model shows it, else in the report, and under strict as an error."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

import accelplug
from accelplug.call import AttentionCall, Clock, Site
from accelplug.errors import FallbackError, NoMatchError, RecipeError, UnsupportedError
from accelplug.patches.base import Patch
from accelplug.patches.guidance.contrast import Contrast
from accelplug.patches.sparse.neighborhood import Neighborhood
from accelplug.recipe import Span, Where
from accelplug.testing.models import TIMESTEP, noise, sample_of
from tests import tiny_language_models, tiny_models, tiny_pipelines

PATCH = {"patch": "neighborhood", "with": {"block": 8, "backend": "reference", "window": [1, 3, 3]}}


def rule(**where: Any) -> dict[str, Any]:
    return {"where": where, **PATCH}


@pytest.mark.parametrize(
    ("rules", "why"),
    [
        ([rule(layers="90:"), rule()], r"Rule 1 .*where layers 90:\) fits no attention .* 3 of kind self in 3 layers"),
        ([rule(kind="temporal"), rule()], "Rule 1 .* fits no attention"),
        ([rule(module="block.0.*"), rule()], "Rule 1 .* fits no attention"),
        ([rule(), rule(steps="1:")], r"Rule 2 .*where steps 1:\) can never hold: Rule 1 .*everywhere\) stands ahead"),
        ([{"patch": "dense"}, rule()], None),
        ([rule(steps="0:"), rule(tokens=">=8")], "Rule 2 .* can never hold: Rule 1"),
        ([rule(grid="*x*x*", tokens=">=0", steps=["5:", ":100%"]), rule()], "Rule 2 .* can never hold: Rule 1"),
        ([rule(denoiser="transfomer"), rule()], "Rule 1 .* fits no attention"),
        ([rule(layers=[0, 1]), rule(layers="2:"), rule(layers=0, steps="1:")], "Rule 3 .* can never hold: Rule 1"),
    ],
)
def test_a_rule_that_can_never_hold_is_refused_at_apply(rules: list, why: str | None) -> None:
    model, _ = tiny_models.build("wan")
    before = set(vars(model))
    with pytest.raises(RecipeError if why else NoMatchError, match=why):
        accelplug.apply(model, {"rules": rules})
    assert set(vars(model)) == before


class Doubled(Patch):
    """Twice what attention gives."""

    family = "bias"

    def prepare(self, site: Site, layout: Any, clock: Clock, state: dict[str, Any]) -> float:
        return 2.0

    def attend(self, call: AttentionCall, params: float) -> torch.Tensor:
        return params * call.dense()


def test_a_patch_goes_on_as_it_is_alone_and_in_a_rule() -> None:
    model, inputs = tiny_models.build("wan")
    doubled, windows = Doubled(), Neighborhood(PATCH["with"])
    with torch.no_grad():
        before = model(**inputs)[0]
        with accelplug.apply(model, PATCH, gate="off"):
            by_name = model(**inputs)[0]
        with accelplug.apply(model, windows, gate="off") as plug:
            assert torch.equal(model(**inputs)[0], by_name)
            assert plug.recipe.name == "Neighborhood(block=8, backend=reference, window=1x3x3)"
            assert plug.report().served == {"neighborhood": 3}
            assert {id(row.patch) for row in plug.where() if row.patch is not None} == {id(windows)}
        rules = {"rules": [{"where": {"layers": 0}, "patch": doubled}, {"where": {"layers": 1}, "patch": windows}]}
        with accelplug.apply(model, rules, gate="off") as plug:
            assert not torch.equal(model(**inputs)[0], by_name)
            assert plug.report().served == {"doubled": 1, "neighborhood": 1, "dense": 1}
            assert "layers 0: Doubled()" in plug.recipe.describe()
        with accelplug.apply(model, rules, backend="blocked", gate="off") as plug, torch.no_grad():
            assert doubled is next(row.patch for row in plug.where() if row.name == "doubled")
        open_choice = Neighborhood({"block": 8, "window": [1, 3, 3]})
        with accelplug.apply(model, open_choice, backend="reference", gate="off"):
            assert torch.equal(model(**inputs)[0], by_name)
        assert open_choice.config.backend == "auto"
        assert torch.equal(model(**inputs)[0], before)


def test_what_stands_around_generate_goes_on_as_it_is() -> None:
    model, given = tiny_language_models.build("llava"), tiny_language_models.inputs("llava", ((3, "I", 6),))
    answers = []
    for recipe in (None, {"patch": "contrast", "with": {"gamma": 9.0}}, Contrast({"gamma": 9.0})):
        with nullcontext() if recipe is None else accelplug.apply(model, recipe):
            made = model.generate(
                **given, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
            answers.append(torch.stack(made.logits))
    stock, by_name, as_it_is = answers
    assert torch.equal(as_it_is, by_name)
    assert not torch.equal(as_it_is, stock)


def test_a_patch_of_another_family_is_refused_as_an_instance_too() -> None:
    with pytest.raises(UnsupportedError, match="uses doubled, a patch of the family bias"):
        accelplug.apply(tiny_language_models.build("llama"), Doubled())


def test_rules_of_other_denoisers_are_fine_on_a_bare_one_and_refused_on_a_pipeline() -> None:
    rules = {"rules": [rule(denoiser="transformer_2"), rule(layers=0)]}
    pipe, _ = tiny_pipelines.decoding("wan")
    with accelplug.apply(pipe.transformer, rules):
        pass
    with pytest.raises(RecipeError, match=r"Rule 1 .* fits no attention"):
        accelplug.apply(pipe, rules)


@pytest.mark.parametrize("where", [{"steps": "1:"}, {"branch": "cond"}, {"tokens": ">=1"}, {"grid": "1x*x*"}])
def test_conditions_of_denoisers_are_refused_on_language_models(where: dict[str, str]) -> None:
    (key,) = where
    recipe = {"rules": [{"patch": "visual_bias", "where": where}]}
    with pytest.raises(RecipeError, match=f"where.{key}, and a language model has neither"):
        accelplug.apply(tiny_language_models.build("llava"), recipe)
    ramp = {"image_weight": {"from": 1.0, "to": 2.0, "over": "steps"}}
    with pytest.raises(RecipeError, match=r"with\.image_weight over steps"):
        accelplug.apply(tiny_language_models.build("llava"), {"rules": [{"patch": "visual_bias", "with": ramp}]})


def test_patches_around_generate_have_no_place() -> None:
    with pytest.raises(RecipeError, match=r"carve stands around generate.*remove where: layers 1"):
        accelplug.apply(tiny_language_models.build("llava"), {"rules": [{"patch": "carve", "where": {"layers": 1}}]})


NEVER = [
    ({"branch": "condd"}, "the branches are cond and uncond"),
    ({"tokens": ">=99999999"}, r"the grids are 3x4x6 \(72 tokens\)"),
    ({"grid": "3x4x7"}, r"the grids are 3x4x6 \(72 tokens\)"),
    ({"steps": "100:200"}, "a run has 4 steps"),
]


@pytest.mark.parametrize(("where", "why"), NEVER)
def test_what_never_held_in_a_run_is_reported_and_an_error_under_strict(where: dict[str, str], why: str) -> None:
    pipe, inputs = tiny_pipelines.decoding("wan")
    recipe = {"rules": [rule(**where)]}
    with accelplug.apply(pipe, recipe, gate="off") as plug:
        assert plug.report().idle == []  # nothing ran yet
        pipe(**inputs)
        (idle,) = plug.report().idle
        assert idle.startswith("Rule 1 of custom (neighborhood where ")
        assert why.replace("\\", "") in idle
    with accelplug.apply(pipe, recipe, gate="off", strict=True), pytest.raises(FallbackError, match=f"never holds: {why}"):
        pipe(**inputs)


def test_rules_for_other_sizes_are_reported_and_no_error_where_one_is_for_this() -> None:
    pipe, inputs = tiny_pipelines.decoding("wan")
    rules = {"rules": [rule(tokens=">=100"), rule(steps="2:", tokens="<100")]}
    with accelplug.apply(pipe, rules, gate="off", strict=True) as plug:
        pipe(**inputs)
        assert plug.report().served["neighborhood"] > 0
        assert len(plug.report().idle) == 1
    rules = {"rules": [rule(steps=["0:2", "2:"]), rule()]}  # told by a run alone
    with accelplug.apply(pipe, rules, gate="off", strict=True) as plug:
        pipe(**inputs)
        assert plug.report().idle == ["Rule 2 of custom (neighborhood everywhere): other rules took its calls"]


def test_conditions_are_held_against_all_that_was_seen() -> None:
    from accelplug.recipe import RunFacts

    seen = RunFacts(10, frozenset({"cond", None}))
    assert Where(steps=(Span.parse("-1:"),)).unmet(seen) is None
    assert Where(steps=(Span.parse("10:"),)).unmet(seen) == ("steps", "a run has 10 steps")
    assert Where(branch=("cond",)).unmet(seen) is None
    assert (
        Where(steps=(Span.parse("10:"),), branch=("uncond",)).unmet(RunFacts(None, frozenset({None}))) is None
    )  # nobody can know


# --------------------------------------------------------------------------------------- what keeps a recipe from working


def test_attention_slicing_set_before_is_named_with_the_way_out() -> None:
    pipe, _ = tiny_pipelines.decoding("sd15")
    pipe.enable_attention_slicing()
    with pytest.raises(NoMatchError, match=r"SlicedAttnProcessor .*; call pipe.disable_attention_slicing\(\) first"):
        accelplug.apply(pipe, {"patch": "tome"})
    pipe.disable_attention_slicing()
    with accelplug.apply(pipe, {"patch": "tome"}) as plug:
        assert not plug.report().skipped


def test_a_foreign_processor_at_some_modules_is_a_counted_fallback() -> None:
    class Foreign:
        def __call__(self, attn: Any, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            return hidden_states

    model, _ = tiny_models.build("wan")
    model.blocks[1].attn1.processor = Foreign()
    with accelplug.apply(model, {"rules": [PATCH]}) as plug:
        (fallback,) = plug.report().fallbacks
        assert "blocks.1.attn1: Foreign reaches attention by no name" in fallback
    with accelplug.apply(model, {"rules": [rule(layers=0)]}, strict=True):
        pass
    before = set(vars(model))
    with pytest.raises(FallbackError, match="Foreign"):
        accelplug.apply(model, {"rules": [PATCH]}, strict=True)
    assert set(vars(model)) == before


@pytest.mark.parametrize(
    ("kind", "settings"), [("first_block", {"threshold": 0.1}), ("taylorseer", {"use_lite_mode": True})]
)
def test_a_step_cache_outside_of_a_cache_context_is_refused_in_words(kind: str, settings: dict[str, Any]) -> None:
    model, inputs = tiny_models.build("wan")
    recipe = {"rules": [{"patch": "dense"}], "cache": {"kind": kind, "with": settings}}
    with accelplug.apply(model, recipe), torch.no_grad():
        with pytest.raises(UnsupportedError, match=r"without a cache context.*Leave cache: out"):
            model(**inputs)
        with model.cache_context("cond"):
            model(**inputs)


@pytest.mark.parametrize("name", ["flux", "wan", "unet_sd15"])
def test_a_forward_of_somebody_elses_may_take_more_keywords(name: str) -> None:
    import types

    model, inputs = tiny_models.build(name)
    stock = type(model).forward
    model.forward = types.MethodType(lambda self, *a, id_embeddings=None, **k: stock(self, *a, **k), model)
    with torch.no_grad():
        dense = sample_of(model(**inputs, id_embeddings=1))
        with accelplug.apply(model, {"patch": "tome", "with": {"ratio": 0.5}}, gate="off", strict=True) as plug:
            patched = sample_of(model(**inputs, id_embeddings=1))
            assert plug.report().served["tome"] > 0
        assert not torch.equal(patched, dense)
        assert torch.equal(sample_of(model(**inputs, id_embeddings=1)), dense)
    assert "forward" in vars(model)


@pytest.mark.parametrize("how", ["module", "wrapper"])
def test_the_gate_judges_denoisers_compiled_whole(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelplug.hosts import gate

    torch._dynamo.reset()
    ms = iter([1.0, 2.0] * 10)
    monkeypatch.setattr(gate, "median_ms", lambda run, device: next(ms))
    pipe, inputs = tiny_pipelines.decoding("wan")
    if how == "module":
        pipe.transformer.compile(backend="eager")
    else:
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    with accelplug.apply(pipe, {"rules": [PATCH]}) as plug:
        with torch.no_grad(), pipe.transformer.cache_context("cond"):
            pipe.transformer(
                hidden_states=noise(1, 16, 3, 8, 12),
                timestep=TIMESTEP,
                encoder_hidden_states=inputs["prompt_embeds"],
            )
        (unjudged,) = plug.report().unjudged
        assert unjudged.startswith("neighborhood in transformer: compiled whole")
        assert plug.report().compiled == ["neighborhood at 2 modules of transformer"]
        pipe(**inputs)
        assert [verdict["pays"] for verdict in plug.choices["verdicts"]] == [False]
        assert not plug.report().unjudged
        assert plug.report().compiled == ["dense at 2 modules of transformer"]
    torch._dynamo.reset()
