"""Models that read images otherwise: by cross-attention, ahead of a decoder of their own, or with keys that layers share."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import transformers as hf

import accelplug
from accelplug.errors import UnsupportedError
from accelplug.families.vlm import Vlm
from accelplug.testing.language_models import CLOSE, IMAGE, OPEN, TEXT_CONFIG, forward, generate
from accelplug.testing.registered import registered
from tests.test_language_host import LOUD, WORKING, recipe

VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def given(ids: list[int], **more: Any) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long), **more}


def mllama() -> tuple[Any, dict[str, torch.Tensor]]:
    """Layers 1 and 3 read image patches, the others the text; their gates are open."""
    torch.manual_seed(0)
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 2,
    }
    tiles = {"image_size": 32, "patch_size": 8, "max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]]}
    config = hf.MllamaConfig(
        vision_config={**vision, **tiles, "vision_output_dim": 64, "intermediate_layers_indices": [0]},
        text_config={**TEXT_CONFIG, "cross_attention_layers": [1, 3]},
        image_token_index=IMAGE,
    )
    model = hf.MllamaForConditionalGeneration(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "gate" in name and "mlp.gate" not in name:
            parameter.data.fill_(1.0)
    one = torch.ones(1, 1, dtype=torch.long)
    pixels = {"pixel_values": torch.randn(1, 1, 1, 3, 32, 32), "aspect_ratio_ids": one, "aspect_ratio_mask": one[..., None]}
    return model, given([5, 6, 7, IMAGE, 9, 10, 11, 12], **pixels)


def instruct_blip() -> tuple[Any, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    config = hf.InstructBlipConfig(
        vision_config={**VISION, "image_size": 32, "patch_size": 8},
        qformer_config={**VISION, "vocab_size": 512, "encoder_hidden_size": 32, "cross_attention_frequency": 1},
        text_config={"model_type": "llama", **TEXT_CONFIG},
        num_query_tokens=4,
        image_token_index=IMAGE,
    )
    asked = torch.tensor([[5, 6, 7]])
    more = {"pixel_values": torch.randn(1, 3, 32, 32), "qformer_input_ids": asked, "qformer_attention_mask": asked > 0}
    model = hf.InstructBlipForConditionalGeneration(config).eval().requires_grad_(False)
    return model, given([IMAGE] * 4 + [5, 6, 7, 9, 10], **more)


def gemma4() -> tuple[Any, dict[str, torch.Tensor]]:
    """The last two layers read the keys of the first two, one of them in a window, and the last tokens alone where no more is asked."""
    torch.manual_seed(0)
    text = {**TEXT_CONFIG, "head_dim": 16, "global_head_dim": 16, "sliding_window": 8, "num_kv_shared_layers": 2}
    more = {"layer_types": ["sliding_attention", "full_attention"] * 2, "hidden_size_per_layer_input": 8}
    pooled = {"patch_size": 8, "pooling_kernel_size": 2, "default_output_length": 4, "position_embedding_size": 64}
    config = hf.Gemma4Config(
        text_config={**text, **more, "vocab_size_per_layer_input": 512},
        vision_config={**VISION, "num_key_value_heads": 2, "head_dim": 16, **pooled},
        audio_config=None,
        image_token_id=IMAGE,
        boi_token_id=OPEN,
        eoi_token_id=CLOSE,
    )
    model = hf.Gemma4ForConditionalGeneration(config).eval().requires_grad_(False)
    ids = [5, 6, 7, OPEN, *[IMAGE] * 4, CLOSE, *range(9, 22)]
    places = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"), -1).reshape(1, 16, 2)
    pixels = {"pixel_values": torch.randn(1, 16, 3 * 8 * 8), "image_position_ids": places}
    return model, given(ids, mm_token_type_ids=(torch.tensor([ids]) == IMAGE).int(), **pixels)


# ------------------------------------------------------------------------------------------------------------ cross-attention


@pytest.mark.filterwarnings("ignore:`hidden_state` is deprecated:FutureWarning")  # transformers 5.17 warns about itself
def test_cross_attention_is_left_as_it_is() -> None:
    """Its keys are image patches, at none of the prompt's positions: patches that look at images are refused, others read the text."""
    model, inputs = mllama()
    plain = forward(model, inputs)
    for looking in (LOUD, recipe("vhr"), {"patch": "carve"}):
        with pytest.raises(
            UnsupportedError, match="looks at images, and on MllamaForConditionalGeneration it cannot: its images are"
        ):
            accelplug.apply(model, looking)
    longer = {**inputs, **given([*inputs["input_ids"][0].tolist(), *range(13, 33)])}
    whole, near = forward(model, longer), {"block": 8, "sink": 0, "local": 0, "min_tokens": 0}
    with accelplug.apply(model, {"patch": "stream", "with": near}, gate="off") as plug:
        assert not torch.equal(forward(model, longer), whole)
        assert plug.report().served == {"stream": 2}
        assert any("cross_attn" in module for module in plug.report().skipped)
    assert torch.equal(forward(model, inputs), plain)


TAKEN_ON_TRUST = Vlm("instructblip", ("InstructBlipForConditionalGeneration",))


def test_what_is_refused_can_be_taken_on_trust() -> None:
    """A family that is registered is the word of who registers it; what it cannot be is refused all the same."""
    model, _ = instruct_blip()
    with pytest.raises(UnsupportedError, match=r"pai looks at images, and on InstructBlip.* past it"):
        accelplug.apply(model, recipe("pai"))
    with registered(TAKEN_ON_TRUST), pytest.raises(UnsupportedError, match="a second time without its images"):
        accelplug.apply(model, recipe("vhr"))


def test_a_decoder_that_is_called_past_its_model_is_counted() -> None:
    model, inputs = instruct_blip()
    plain = forward(model, inputs)
    with registered(TAKEN_ON_TRUST), accelplug.apply(model, recipe("pai")) as plug:
        assert not torch.equal(forward(model, inputs), plain)
        assert plug.report().served == {"pai": 4}
        generate(model, inputs)
        assert any("past its model" in reason for reason in plug.report().fallbacks)


# ------------------------------------------------------------------------------------------------------------------ shared keys


@pytest.mark.parametrize("patch", ["visual_bias", "gift", "pai"])
def test_layers_that_share_keys(patch: str) -> None:
    """A prompt whole, its last token alone, decode steps, and all of them read at once say the same."""
    model, inputs = gemma4()
    one = recipe(patch, {**WORKING[patch], "enhance": [2, 4]} if patch == "gift" else None)
    plain = forward(model, inputs)
    with accelplug.apply(model, one, strict=True):
        whole = forward(model, inputs)
        assert not torch.equal(whole, plain)
        torch.testing.assert_close(
            forward(model, {**inputs, "logits_to_keep": 1})[:, -1], whole[:, -1], atol=2e-5, rtol=1e-4
        )
        out = generate(model, inputs, 4, output_logits=True, return_dict_in_generate=True)
        answer = out.sequences[:, -4:]
        more = {
            "input_ids": answer,
            "attention_mask": torch.ones_like(answer),
            "mm_token_type_ids": torch.zeros_like(answer),
        }
        labelled = {**inputs, **{name: torch.cat([inputs[name], new], 1) for name, new in more.items()}}
        labels = torch.cat([torch.full_like(inputs["input_ids"], -100), answer], 1)
        read = forward(model, {**labelled, "labels": labels})[:, -5:-1]
        torch.testing.assert_close(read, torch.stack(out.logits, 1), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("patch", ["var", "vhr"])
def test_layers_that_are_given_the_last_tokens_alone_are_counted(patch: str) -> None:
    model, inputs = gemma4()
    rows: dict[str, int] = {}

    def note(name: str, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        rows[name] = max(rows.get(name, 0), (args[0] if args else kwargs["hidden_states"]).shape[1])

    for i, layer in enumerate(model.get_decoder().layers):
        layer.self_attn.register_forward_pre_hook(partial(note, f"layers.{i}.self_attn"), with_kwargs=True)
    with accelplug.apply(model, recipe(patch)) as plug:
        generate(model, inputs, 2)
        short = {
            name for name, number in rows.items() if number < inputs["input_ids"].shape[1]
        }  # of no layer in transformers 5.17
        assert {reason.split(": ")[0] for reason in plug.report().fallbacks} == short
        assert all("tokens alone" in reason for reason in plug.report().fallbacks)


@pytest.mark.parametrize("same", [True, False])
def test_a_forward_that_an_interrupt_left_behind_is_nothing_to_the_next(same: bool) -> None:
    """torch runs no hooks behind a forward that Ctrl-C ends. (The decoder of InstructBLIP is called past its model.)"""
    model, inputs = instruct_blip() if same else gemma4()
    with registered(TAKEN_ON_TRUST), accelplug.apply(model, recipe("pai")) as plug:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(type(plug.hosts[0]), "prepare", interrupted)
            with pytest.raises(KeyboardInterrupt):
                forward(model, inputs)
        other, theirs = (model, inputs) if same else instruct_blip()
        with nullcontext(plug) if same else accelplug.apply(other, recipe("pai")) as second:
            generate(other, theirs)
            assert all("past its model" in reason for reason in second.report().fallbacks)
            assert second.report().fallbacks


def interrupted(*given: Any) -> None:
    raise KeyboardInterrupt
