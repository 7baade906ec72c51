"""Arms that are functions: they equal recipes, and one that undoes nothing is named."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

import accelplug
from accelplug.comparison.prompts import PROMPTS, own, with_prompts
from accelplug.errors import AccelplugError
from tests.patch_rows import ROWS
from tests.test_floors import calls
from tests.test_report import Page
from tests.test_texts import LETTERS, llama

RADIAL = ROWS["radial"].recipe()


def radial(pipe: Any) -> Callable[[], None]:
    """Puts a recipe on, as a stranger's package would."""
    return accelplug.apply(pipe, RADIAL, gate="off").remove


def forgets(pipe: Any) -> None:
    """Changes nothing, and returns nothing."""


def breaks(pipe: Any) -> Callable[[], None]:
    """Its undo does nothing."""
    weight = pipe.transformer.proj_out.weight.data
    weight.mul_(1.5)
    return lambda: None


def test_a_function_equals_the_recipe_that_it_puts_on() -> None:
    pipe, inputs = calls(3)
    found = accelplug.compare(pipe, {"recipe": RADIAL, "function": radial}, inputs, floors=False, progress=False)
    recipe, function = found.row("recipe"), found.row("function")
    assert (recipe.kind, function.kind) == ("recipe", "function")
    assert [s.scores for s in recipe.samples] == [s.scores for s in function.samples]
    assert math.isfinite(recipe.samples[0].scores["psnr_db"]), "it changes something"
    (quality,) = (d for d in found.paired() if (d.first, d.second, d.figure) == ("recipe", "function", "psnr_db"))
    assert quality.none
    assert "def radial(pipe" in function.rules
    assert {dot["name"] for dot in Page(found.page()).data["dots"]} == {"recipe", "function"}


def test_a_function_goes_by_its_name() -> None:
    pipe, inputs = calls(1)
    found = accelplug.compare(pipe, [radial, lambda pipe: radial(pipe)], inputs, floors=False, progress=False)
    assert [row.name for row in found.rows] == ["dense", "radial", "function"]
    assert found.verdict.startswith(("radial: ", "function: "))


@pytest.mark.parametrize(("arm", "said"), [(forgets, "returned None"), (breaks, "does not undo what it did")])
def test_an_arm_that_undoes_nothing_is_named(arm: Any, said: str) -> None:
    pipe, inputs = calls(1)
    with pytest.raises(AccelplugError, match=rf"The arm 'mine' {said}"):
        accelplug.compare(pipe, {"mine": arm}, inputs, floors=False, progress=False)


def step_cache(pipe: Any) -> Callable[[], None]:
    """As docs/measuring.md has it."""
    from diffusers import FirstBlockCacheConfig

    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.5))
    return pipe.transformer.disable_cache


def kernel(pipe: Any) -> Callable[[], None]:
    """As it stands there, too."""
    pipe.transformer.set_attention_backend("_native_math")
    return lambda: pipe.transformer.set_attention_backend("native")


def test_what_diffusers_itself_has_is_undone() -> None:
    pipe, inputs = calls(1)
    found = accelplug.compare(pipe, {"cache": step_cache, "math": kernel}, inputs, floors=False, progress=False)
    assert found.row("math").samples[0].scores["psnr_db"] > 60
    assert [row.kind for row in found.rows] == ["dense", "function", "function"]


def test_an_undo_that_looks_like_one_is_seen_through() -> None:
    """``reset_attention_backend`` leaves the backend that ``set_attention_backend`` made the active one of the process."""
    pipe, inputs = calls(1)

    def half(pipe: Any) -> Callable[[], None]:
        pipe.transformer.set_attention_backend("_native_math")
        return pipe.transformer.reset_attention_backend

    try:
        with pytest.raises(AccelplugError, match="The arm 'half' does not undo what it did"):
            accelplug.compare(pipe, half, inputs, floors=False, progress=False)
    finally:
        pipe.transformer.set_attention_backend("native")


def test_an_exception_in_a_run_undoes_the_function() -> None:
    pipe, inputs = calls(1)
    undone = []

    def arm(pipe: Any) -> Callable[[], None]:
        pipe.vae.decode = lambda *args, **kwargs: 1 / 0
        decode = pipe.vae.__dict__.pop("decode")
        pipe.vae.decode = decode
        return lambda: undone.append(pipe.vae.__dict__.pop("decode"))

    with pytest.raises(ZeroDivisionError):
        accelplug.compare(pipe, {"mine": arm}, inputs, floors=False, progress=False)
    assert len(undone) == 1


def test_language_models_have_recipes_alone() -> None:
    with pytest.raises(AccelplugError, match="radial is a function"):
        accelplug.compare(llama(), {"radial": radial}, processor=LETTERS)


@pytest.mark.parametrize(
    ("inputs", "prompts", "texts"),
    [
        ({"steps": 2}, 3, list(PROMPTS[:3])),
        (None, ["a", "b"], ["a", "b"]),
        ([{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}], 2, ["a", "b"]),
        ({"prompt": "a"}, None, ["a"]),
    ],
)
def test_prompts_are_given_or_ours(inputs: Any, prompts: Any, texts: list[str]) -> None:
    found = with_prompts(object(), inputs, prompts)
    found = [found] if isinstance(found, dict) else found
    assert [call["prompt"] for call in found] == texts
    assert all(call.get("steps") == 2 for call in found) == (inputs == {"steps": 2})


@pytest.mark.parametrize(
    ("inputs", "prompts", "said"),
    [
        ({}, 999, "from 1 to 20"),
        ({}, 0, "from 1 to 20"),
        ({"prompt": "a"}, 3, "have a prompt, too"),
        ([{"prompt": "a"}], ["b"], "both say"),
        ({}, "a", "a list of texts"),
        ({}, [1], "a list of texts"),
        (3, 3, "a mapping of settings"),
    ],
)
def test_prompts_that_cannot_be_meant_are_refused(inputs: Any, prompts: Any, said: str) -> None:
    with pytest.raises(AccelplugError, match=said):
        with_prompts(object(), inputs, prompts)


def test_the_bundled_model_draws_what_it_was_trained_for() -> None:
    from types import SimpleNamespace

    from accelplug import zoo
    from accelplug.zoo.shapes import HELD_OUT_CAPTIONS

    assert own(SimpleNamespace(name_or_path=str(zoo.path()))) == tuple(HELD_OUT_CAPTIONS)
    assert len(HELD_OUT_CAPTIONS) >= 15
    assert len(set(PROMPTS)) == len(PROMPTS) >= 15
