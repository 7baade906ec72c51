"""Families of image denoisers where they are more than one layout: references, layers, cached keys, captions of several lengths."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21FlexAttnProcessor, QwenImage21KVCache

import accelplug
from accelplug.call import Layout
from accelplug.families import FAMILIES
from accelplug.families.base import Geometry
from accelplug.kernels.orders import tiles
from accelplug.patches.sparse.neighborhood import Neighborhood
from accelplug.testing.laws import run_once
from accelplug.testing.models import batch_of_two, build_denoiser, noise, raster_ids, valid_first
from tests import tiny_images, tiny_models
from tests.patch_rows import ROWS

SPARSE = {"rules": [{"patch": "sol", "with": {"block": 8, "backend": "reference", "tau": 0.5, "band": 0}}]}
EVERYTHING = ROWS["sol"].recipe(ROWS["sol"].everything)


def geometry(class_name: str, config: Any = None, **inputs: Any) -> Geometry | None:
    family = next(family for family in FAMILIES if class_name in family.classes)
    return family.geometry(SimpleNamespace(patch_size=2) if config is None else config, inputs)


def latents(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


def packed(tokens: int, text: int, **more: Any) -> dict[str, Any]:
    return {"hidden_states": latents(1, tokens, 64), "encoder_hidden_states": latents(1, text, 64), **more}


def test_references_of_qwen_image_stand_behind_the_image() -> None:
    found = geometry(
        "QwenImageTransformer2DModel", **packed(48 + 24 + 10, 7, img_shapes=[[(1, 6, 8), (1, 4, 6), (1, 2, 5)]])
    )
    assert found == Geometry((1, 6, 8), (7, 7), text_first=True, behind=34)
    assert found.layout("joint", 7 + 82) == Layout((1, 6, 8), text_before=7, text_after=34)
    assert found.layout("joint", 7 + 81) is None


def test_layers_of_qwen_image_lie_as_frames() -> None:
    config = SimpleNamespace(patch_size=2, use_layer3d_rope=True)
    shapes = [[(1, 4, 6)] * 3 + [(1, 4, 5)]]
    found = geometry("QwenImageTransformer2DModel", config, **packed(72 + 20, 7, img_shapes=shapes))
    assert found == Geometry((3, 4, 6), (7, 7), text_first=True, behind=20)
    uneven = packed(24 + 48 + 20, 7, img_shapes=[[(1, 4, 6), (1, 6, 8), (1, 4, 5)]])
    assert geometry("QwenImageTransformer2DModel", config, **uneven) is None


def test_references_of_flux_stand_behind_the_image() -> None:
    ids = torch.cat([raster_ids(1, 6, 8), raster_ids(1, 3, 5) + torch.tensor([1, 0, 0])]).float()
    found = geometry("FluxTransformer2DModel", **packed(63, 7, img_ids=ids))
    assert found == Geometry((1, 6, 8), (7, 7), text_first=True, behind=15)


@pytest.mark.parametrize("name", tiny_images.IMAGES)
def test_everything_through_the_kernel_is_dense_in_batches_of_two(name: str) -> None:
    """Whatever stands around the grid, and whoever asks: the same keys with the same queries."""
    model, inputs = tiny_models.build(name)
    both = tiny_images.two_of(inputs)
    dense = run_once(model, both)
    with accelplug.apply(model, EVERYTHING, gate="off", strict=True) as plug, plug.trace() as events:
        out = run_once(model, both)
    assert events
    assert {event.patch for event in events} == {"sol"}
    torch.testing.assert_close(out, dense, rtol=1e-3, atol=2e-5 * float(dense.abs().max()) + 1e-6)


def test_cached_keys_of_qwen_image_21_are_exact() -> None:
    """With the keys of the text cached, a step is the one that reads all the text, bit for bit but for rounding, sparse too."""
    model, inputs = tiny_models.build("qwen_image_21_edit")
    cache = QwenImage21KVCache(2)
    with accelplug.apply(model, SPARSE, gate="off", strict=True) as plug:
        with torch.no_grad():
            first = model(**inputs, kv_cache=cache, kv_cache_mode="extract")[0][:, -48:]
        with plug.trace() as events, torch.no_grad():
            again = model(**inputs, kv_cache=cache, kv_cache_mode="cached")[0]
    torch.testing.assert_close(again, first, rtol=1e-4, atol=1e-5)
    assert {(event.patch, event.density < 1) for event in events} == {("sol", True)}
    assert plug.report().fallbacks == {}


def test_a_block_mask_of_qwen_image_21_is_dense_and_counted() -> None:
    model, inputs = tiny_models.build("qwen_image_21")
    for block in model.transformer_blocks:
        block.attn.set_processor(QwenImage21FlexAttnProcessor())
    with accelplug.apply(model, SPARSE, gate="off") as plug:
        run_once(model, inputs)
    assert plug.report().fallbacks


def test_keys_of_references_that_glm_image_has_cached_ask_nothing() -> None:
    model, inputs = tiny_models.build("glm_image")
    caches = GlmImageKVCache(2)
    caches.set_mode("write")
    reference = {"hidden_states": noise(1, 4, 8, 12, seed=1), "encoder_hidden_states": noise(1, 0, 16)}
    prior = {"prior_token_id": torch.arange(24)[None] % 16, "prior_token_drop": torch.zeros(1, 24, dtype=torch.bool)}
    with torch.no_grad():
        model(**{**inputs, **reference, **prior, "kv_caches": caches})
    with_reference = {**inputs, "kv_caches": caches}

    def read() -> torch.Tensor:
        caches.set_mode("read")
        with torch.no_grad():
            return model(**with_reference)[0]

    dense = read()
    for recipe, same in ((EVERYTHING, True), (SPARSE, False)):
        with accelplug.apply(model, recipe, gate="off", strict=True) as plug:
            out = read()
            assert {row.layout for row in plug.where()} == {Layout((1, 6, 8), text_before=24 + 7, unasked=(24, 0))}
        assert torch.allclose(out, dense, rtol=1e-3, atol=1e-5) == same


def test_keys_that_ask_nothing_have_no_rows() -> None:
    """Of 23 tokens of text the first 20 do not ask: two blocks of eight are left out, one holds some that do."""
    layout = Layout((1, 6, 8), text_before=20, text_after=3, unasked=(20, 0))
    lined_up = tiles(layout, "raster", 8)
    assert (layout.length, layout.queries, layout.asked) == (71, 51, slice(20, 71))
    assert lined_up.query_lengths(8).tolist() == [8] * 6 + [0, 0, 7]
    plan = Neighborhood({"window": [1, 3, 3], "block": 8}).params(layout).plan
    assert plan is not None
    assert not plan.members[..., 6:8, :].any()
    assert plan.members[..., 8, :].all()
    assert plan.members[..., :6, 6:].all(), "all read the text"
    rows = plan.members.double() * plan.k_len
    assert float(plan.density()) == pytest.approx(float((rows.sum(-1) * plan.q_len).sum() / (55 * 71)))


def test_captions_of_several_lengths_put_images_at_several_places() -> None:
    config, two = SimpleNamespace(patch_size=2), {"hidden_states": latents(2, 4, 12, 16)}
    alike = geometry("Lumina2Transformer2DModel", config, **two, encoder_attention_mask=valid_first(9, 7).repeat(2, 1))
    assert alike == Geometry((1, 6, 8), (7, 7), text_first=True)
    apart = torch.cat([valid_first(9, 7), valid_first(9, 5)])
    assert geometry("Lumina2Transformer2DModel", config, **two, encoder_attention_mask=apart) is None


def test_padded_gist_of_fibo_2_stands_at_the_end() -> None:
    model, inputs = tiny_models.build("fibo2")
    both, _ = batch_of_two({**inputs, "context_latents": None, "encoder_attention_mask": valid_first(9, 9).bool()})
    both["encoder_attention_mask"] = torch.cat([valid_first(9, 9), valid_first(9, 4)]).bool()
    dense = run_once(model, both)
    with accelplug.apply(model, EVERYTHING, gate="off", strict=True) as plug:
        torch.testing.assert_close(run_once(model, both), dense, rtol=1e-3, atol=1e-5)
        assert {row.layout for row in plug.where()} == {Layout((1, 6, 8), text_after=6)}


def test_ideogram_reads_one_image_at_the_end() -> None:
    model, inputs = tiny_models.build("ideogram4")
    named = {name: inputs[name] for name in ("position_ids", "indicator", "segment_ids")}
    assert geometry("Ideogram4Transformer2DModel", model.config, **named) == Geometry((1, 6, 8), (7, 7), text_first=True)
    for name, place, value in (("indicator", 20, 3), ("segment_ids", 20, 2), ("position_ids", 20, 0)):
        other = named[name].clone()
        other[0, place] = value
        assert geometry("Ideogram4Transformer2DModel", model.config, **{**named, name: other}) is None


def test_padding_of_ideogram_is_read_by_nobody() -> None:
    """What it answers is another than in the stock model, and no token of the image is the wiser."""
    model, inputs = tiny_models.build("ideogram4")
    ids, segments, roles = diffusers.Ideogram4Pipeline._prepare_ids([5, 7], 6, 8, 7, "cpu")
    both = {**tiny_images.two_of(inputs), "position_ids": ids, "segment_ids": segments, "indicator": roles}
    dense = run_once(model, both)[:, 7:]
    with accelplug.apply(model, EVERYTHING, gate="off", strict=True):
        torch.testing.assert_close(run_once(model, both)[:, 7:], dense, rtol=1e-3, atol=1e-5)


def test_omnigen_is_dense_and_says_why() -> None:
    model, inputs = build_denoiser(tiny_images.omnigen)
    dense = run_once(model, inputs)
    with accelplug.apply(model, SPARSE, gate="off") as plug:
        assert torch.equal(run_once(model, inputs), dense)
    assert len(plug.report().fallbacks) == 2
    assert all("layout is not understood" in reason for reason in plug.report().fallbacks)
