"""Positions of a recipe: which frequencies change, what a model's rotary embedding gives then, and that nothing is left of it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed

import accelplug
from accelplug.errors import RecipeError, UnsupportedError
from accelplug.families import require_family
from accelplug.recipe import ModelFacts, Positions, load
from accelplug.testing.laws import run_once, snapshot_of
from accelplug.testing.models import Built
from tests import tiny_language_models, tiny_models

DENSE = [{"patch": "dense"}]
RIFLEX = {"kind": "riflex", "native": 2}


def recipe(**positions: Any) -> dict[str, Any]:
    return {"rules": DENSE, "positions": positions or RIFLEX}


def _of_other_positions() -> Built:
    """CogVideoX as its small model is: positions are added to the tokens."""
    model, inputs = tiny_models.MODELS["cogvideox"]()
    model.register_to_config(use_rotary_positional_embeddings=False)
    return model, inputs


# thu-ml/RIFLEx: the length from which frames repeat is 66 of HunyuanVideo's 33 trained ones, 26 of CogVideoX's 13.
@pytest.mark.parametrize(("channels", "base", "native", "number"), [(16, 256.0, 33, 4), (16, 10_000.0, 13, 2)])
def test_the_intrinsic_frequency_is_the_one_of_the_release(channels: int, base: float, native: int, number: int) -> None:
    found = Positions(kind="riflex", native=native, frequency=None).changed(channels, base, 2 * native)
    assert found == {number - 1: pytest.approx(0.9 * 2 * math.pi / (2 * native))}
    named = Positions(kind="riflex", native=native, frequency=6)
    assert list(named.changed(44, base, native + 1)) == [5]
    assert named.changed(44, base, native) == {}


def test_interpolation_puts_the_last_frame_where_the_last_trained_one_stood() -> None:
    found = Positions(kind="interpolate", native=5, frequency=None).changed(6, 100.0, 10)
    assert found == {j: pytest.approx(0.5 * 100.0 ** (-j / 3)) for j in range(3)}


@pytest.mark.parametrize("kind", ["riflex", "interpolate"])
@pytest.mark.parametrize("name", ["wan", "skyreels", "hunyuan_video", "hunyuan_video_15"])
def test_frames_are_turned_by_other_angles(name: str, kind: str) -> None:
    """Held against diffusers' own angles, of frames made anew, and the stock module's of rows and columns."""
    model, inputs = tiny_models.MODELS[name]()
    rope: Any = model.rope
    stock = rope(inputs["hidden_states"])
    dense, before = run_once(model, inputs), snapshot_of(model)
    plug = accelplug.apply(model, recipe(kind=kind, native=2), gate="off")
    rotary = require_family(model).rotary
    channels, base = rotary.channels(model.config), rotary.base(model.config)
    frames = inputs["hidden_states"].shape[2]
    turned = rope(inputs["hidden_states"])
    changed = plug.recipe.positions.changed(channels, base, frames)
    assert frames > 2
    for index in (0, 1):
        by_frame = turned[index].reshape(frames, -1, stock[0].shape[-1])
        expected = stock[index].reshape(by_frame.shape).clone()
        for j, frequency in changed.items():
            # One pair of channels has the frequency 1: frames are scaled in its place.
            alone = get_1d_rotary_pos_embed(2, torch.arange(frames) * frequency, use_real=True, freqs_dtype=torch.float64)
            expected[..., 2 * j : 2 * j + 2] = alone[index][:, None]
        torch.testing.assert_close(by_frame, expected, rtol=0, atol=1e-6)
    assert not torch.equal(run_once(model, inputs), dense)
    plug.remove()
    assert snapshot_of(model) == before
    assert torch.equal(run_once(model, inputs), dense)


@pytest.mark.parametrize("kind", ["riflex", "interpolate"])
def test_angles_that_a_denoiser_is_given_change_on_their_way(kind: str) -> None:
    """As if the pipeline had made them of other frame numbers, in the pairs of channels that change."""
    model, inputs = tiny_models.MODELS["cogvideox"]()
    dense, before = run_once(model, inputs), snapshot_of(model)
    plug = accelplug.apply(model, recipe(kind=kind, native=2), gate="off")
    changed = plug.recipe.positions.changed(4, 10_000.0, 3)
    found = run_once(model, inputs)
    plug.remove()
    assert snapshot_of(model) == before
    cosines, sines = (x.clone() for x in inputs["image_rotary_emb"])
    for j, frequency in changed.items():
        angle = (torch.arange(3.0) * frequency).repeat_interleave(24)[:, None]
        cosines[:, 2 * j : 2 * j + 2], sines[:, 2 * j : 2 * j + 2] = angle.cos(), angle.sin()
    torch.testing.assert_close(
        found, run_once(model, {**inputs, "image_rotary_emb": (cosines, sines)}), rtol=1e-5, atol=1e-6
    )
    assert not torch.equal(found, dense)
    assert torch.equal(run_once(model, inputs), dense)


def test_up_to_the_trained_length_nothing_changes() -> None:
    model, inputs = tiny_models.MODELS["wan"]()
    dense = run_once(model, inputs)
    with accelplug.apply(model, recipe(kind="interpolate", native=3), gate="off"):
        assert torch.equal(run_once(model, inputs), dense)


def test_a_copy_is_stock_and_a_patch_stands_beside_it() -> None:
    model, inputs = tiny_models.MODELS["wan"]()
    dense = run_once(model, inputs)
    window = {"patch": "lvsa", "with": {"native": 2, "window": 0, "block": 8, "backend": "reference"}}
    with accelplug.apply(model, {"rules": [window], "positions": RIFLEX}, gate="off") as plug:
        both = run_once(model, inputs)
        assert plug.report().served["lvsa"]
        assert torch.equal(run_once(copy.deepcopy(model), inputs), dense)
    with accelplug.apply(model, {"rules": [window]}, gate="off"):
        assert not torch.equal(run_once(model, inputs), both)


def test_a_stock_model_and_a_changed_one_are_compiled_in_one_process() -> None:
    (model, inputs), (other, _) = (tiny_models.MODELS["wan"]() for _ in range(2))
    other.load_state_dict(model.state_dict())
    dense = run_once(torch.compile(other, backend="eager"), inputs)
    with accelplug.apply(model, recipe(), gate="off"):
        changed = run_once(model, inputs)
        torch.testing.assert_close(run_once(torch.compile(model, backend="eager"), inputs), changed, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(run_once(torch.compile(model, backend="eager"), inputs), dense, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(changed, dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "positions", "error", "said"),
    [
        (tiny_models.MODELS["flux"], RIFLEX, UnsupportedError, "takes no positions"),
        (tiny_language_models.BUILT["llava"], RIFLEX, UnsupportedError, "positions riflex, and .* takes none"),
        (_of_other_positions, RIFLEX, UnsupportedError, "takes no positions"),
        (tiny_models.MODELS["wan"], {**RIFLEX, "frequency": 3}, RecipeError, "no frequency 3: this model has 2"),
        (tiny_models.MODELS["wan"], {"kind": "yarn", "native": 2}, RecipeError, "riflex"),
        (tiny_models.MODELS["wan"], {"kind": "interpolate", "native": 2, "frequency": 1}, RecipeError, "remove frequency"),
        (tiny_models.MODELS["wan"], {"kind": "riflex"}, RecipeError, "native"),
    ],
)
def test_what_cannot_be_is_refused(
    make: Callable[[], Built], positions: dict[str, Any], error: type[Exception], said: str
) -> None:
    model, _ = make()
    before = snapshot_of(model)
    with pytest.raises(error, match=said):
        accelplug.apply(model, recipe(**positions))
    assert snapshot_of(model) == before


def test_a_recipe_says_them_as_a_file_does() -> None:
    facts = ModelFacts(("WanTransformer3DModel",), {})
    found = load(recipe(kind="riflex", native=21, frequency=6), facts)
    assert found.to_mapping()["positions"] == {"kind": "riflex", "native": 21, "frequency": 6}
    assert load(found.to_mapping(), facts).positions == found.positions
    assert "positions: riflex beyond 21 latent frames, frequency 6" in found.describe()
