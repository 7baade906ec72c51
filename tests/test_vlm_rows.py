"""Head patches on every class of vision-language models that is known, against plain float64 probabilities; those that cannot be."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
import transformers as hf

import accelplug
from accelplug import compat
from accelplug.errors import NoMatchError, RecipeError
from accelplug.families import pixels, vlm
from accelplug.families.unsupported import UNSUPPORTED_VLMS
from accelplug.families.vlm import vlm_of
from accelplug.families.vlms import KNOWN_VLMS
from accelplug.patches.heads.visual_bias import VisualBias
from accelplug.testing.language_models import TEXT_CONFIG, forward
from tests.eager_oracle import Oracle
from tests.test_oracle import CLOSE, WORKING, double, hold, method, patched, sharpened
from tests.tiny_language_models import VLM, build, right_padded
from tests.tiny_vlms import TINY, Tiny
from tests.tiny_vlms_brief import BRIEF

HEADS, FEW = [patch for patch in WORKING if patch != "imbalance"], ["visual_bias", "gift"]
LEFT_OUT = {("var", "gemma4"), ("vhr", "gemma4")}
"""Its layers that read the keys of others are given the last rows of a prompt alone: see test_other_readers."""
ALL: dict[str, Tiny] = TINY | BRIEF
THERE = [name for name, row in ALL.items() if hasattr(hf, row.cls)]
NEWEST = compat.versions.installed("transformers") == compat.versions.TESTED["transformers"][-1]


@cache
def sharp(name: str) -> Any:
    """A tiny model in float64 whose heads look at some tokens and not at others."""
    return sharpened(ALL[name].build())


def settings(patch: str, name: str) -> dict[str, Any]:
    return dict(ALL[name].knobs.get(patch, {}))


def pairs() -> Iterator[tuple[str, str]]:
    """All head patches where a language model is seen first, two of them where only what it is given images by is new; or one."""
    seen = {"llama", "qwen2", "qwen3", "qwen3_vl_text"}  # by the tests of the oracle and of the host
    for name in THERE:
        kind = ALL[name].text.get("model_type")
        tried = FEW[:1] if name in BRIEF else FEW if kind in seen else HEADS
        yield from ((patch, name) for patch in tried if (patch, name) not in LEFT_OUT)
        seen |= {kind} if kind is not None else set()


@pytest.mark.parametrize(("patch", "name"), list(pairs()))
def test_every_patch_on_every_class(patch: str, name: str) -> None:
    """A batch padded on the left, whose second row shows two images, and two steps of its answer."""
    hold(sharp(name), patch, ALL[name].inputs(), settings(patch, name), max_new_tokens=2)


@pytest.mark.parametrize("name", THERE)
def test_images_are_told_apart_and_padding_may_be_on_the_right(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own, images = VisualBias.prepare, []

    def prepare(self: VisualBias, site: Any, layout: Any, *more: Any) -> Any:
        images.append(layout.image)
        return own(self, site, layout, *more)

    monkeypatch.setattr(VisualBias, "prepare", prepare)
    model, given = sharp(name), double(ALL[name].inputs())
    moved, valid = right_padded(given), right_padded(given)["attention_mask"].bool()
    with patched(model, "visual_bias"):
        found = forward(model, moved)
    torch.testing.assert_close(found[valid], Oracle(model).answer(method("visual_bias"), moved)[valid], **CLOSE)
    assert images[0].amax(-1).tolist() == [1, 2]


@pytest.mark.parametrize("name", [name for name in THERE if ALL[name].videos is not None])
def test_videos(name: str) -> None:
    """Alone, and beside an image where a prompt may have both."""
    second = (2, "V", 2, "V", 4) if name.startswith("glm") else (2, "I", 3, "V", 5)
    hold(sharp(name), "visual_bias", ALL[name].inputs(((3, "V", 6), second)), max_new_tokens=2)


def test_classes_are_what_the_rows_say() -> None:
    """Every row is a class that is known, every class that is known is tried here or in the oracle's tests, and no other is refused."""
    known = {cls for family in KNOWN_VLMS for cls in family.classes}
    tried = {row.cls for row in ALL.values()} | {type(build(name)).__name__ for name in VLM}
    assert tried == known
    assert not known & set(UNSUPPORTED_VLMS)


def test_every_class_for_images_and_text_is_known_or_refused_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    (check,) = dict(compat.contracts.contracts_of(vlm)).values()
    assert compat.contracts.why_broken(check) is None
    monkeypatch.setattr(compat.transformers, "image_text_classes", lambda: ("LlavaForConditionalGeneration", "NewForImages"))
    assert "nothing is known of NewForImages:" in (compat.contracts.why_broken(check) or "")


@pytest.mark.parametrize("name", UNSUPPORTED_VLMS)
def test_what_is_refused_is_a_class_without_a_family_and_a_sentence(name: str) -> None:
    assert name in compat.transformers.image_text_classes() or not NEWEST
    assert re.fullmatch(r"[a-z][^\n]*\.", UNSUPPORTED_VLMS[name])


def test_a_layer_without_attention_has_no_gaze() -> None:
    """Of Qwen3.5 every other layer here is linear: GIFT says so rather than do nothing."""
    model = TINY["qwen3_5"].build()
    for read, enhance, message in ((2, [3, 4], "no attention: it has that in layers 1, 3"), (1, [2, 3], "layers 2 to 2")):
        with pytest.raises(RecipeError, match=message):
            accelplug.apply(model, {"patch": "gift", "with": {"saliency_layer": read, "enhance": enhance}})


@pytest.mark.skipif(not hasattr(hf, "DeepseekV32Config"), reason="this transformers has no sparse attention of DeepSeek's")
def test_attention_that_knows_functions_by_name_is_left_alone() -> None:
    """DeepSeek's sparse attention hides keys under eager and sdpa alone: with a patch in between it would read all of them."""
    more = {"kv_lora_rank": 16, "q_lora_rank": 32, "v_head_dim": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8}
    experts = {"moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    chosen = {"num_key_value_heads": 4, "index_topk": 4, "index_head_dim": 16, "index_n_heads": 2}
    model = hf.DeepseekV32ForCausalLM(hf.DeepseekV32Config(**{**TEXT_CONFIG, **more, **experts, **chosen})).eval()
    with pytest.raises(NoMatchError, match="DeepseekV32Attention chooses keys, and hides the others"):
        accelplug.apply(model, {"patch": "stream"})


@pytest.mark.parametrize("name", ["lfm2_vl", "gemma4", "mistral3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pictures_there_and_back(name: str, dtype: torch.dtype) -> None:
    """Patches that are filled up to the same number, and pictures filled up to the same size, come together again."""
    model, given = TINY[name].build(), TINY[name].inputs()
    given["pixel_values"] = given["pixel_values"].to(dtype)
    family, vision = vlm_of(model), model.config.vision_config
    shown = pixels.pictures(family, given, vision)
    assert [tuple(x.shape) for x in shown] == (
        [(3, 32, 32)] * 3 if name == "mistral3" else [(3, 32, 48), (3, 64, 32), (3, 32, 32)]
    )
    assert all(picture.dtype == torch.float32 for picture in shown)
    back = pixels.replace(family, given, shown, vision)["pixel_values"]
    assert back.dtype == dtype
    torch.testing.assert_close(back, given["pixel_values"], rtol=0, atol=1e-7)
