"""Models that users hold inside of something else: adapters, compiled, parallel, prepared by accelerate, a transformers pipeline."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

import accelplug
from accelplug import zoo
from accelplug.errors import AlreadyAppliedError, NoMatchError
from accelplug.hosts.host import plug_of
from accelplug.testing.language_models import forward, generate
from tests.test_language_host import LOUD, fingerprint, recipe
from tests.tiny_language_models import build, inputs


def adapted(model: Any) -> Any:
    """A LoRA model whose adapters change something."""
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    return wrapped.eval()


def prepared(model: Any) -> Any:
    return Accelerator(cpu=True, mixed_precision="bf16").prepare(model)


WRAPPERS = {
    "peft": adapted,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "parallel": torch.nn.DataParallel,
    "prepared": prepared,
    "compiled adapters": lambda model: torch.compile(adapted(model), backend="eager"),
}


@pytest.mark.parametrize("patch", ["visual_bias", "vhr", "imbalance"])
@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapped_model_is_entered(name: str, patch: str) -> None:
    torch.manual_seed(1)
    model, given = build("llava"), inputs("llava")
    wrapped = WRAPPERS[name](model)
    inside = wrapped.get_base_model() if name == "peft" else model
    plain = forward(inside, given)
    before = fingerprint(inside)
    with accelplug.apply(inside, recipe(patch)):
        expected, tokens = forward(inside, given), generate(inside, given)
    with accelplug.apply(wrapped, recipe(patch)) as plug:
        assert plug_of(inside) is plug
        assert torch.equal(forward(inside, given), expected)
        if name != "parallel":
            assert torch.equal(generate(wrapped, given), tokens)
        if "compiled" not in name:
            assert torch.equal(wrapped(**given).logits, expected)
        for other in (wrapped, inside):
            with pytest.raises(AlreadyAppliedError):
                accelplug.apply(other, LOUD)
        accelplug.remove(wrapped)
    assert not torch.equal(expected, plain)
    assert torch.equal(forward(inside, given), plain)
    assert fingerprint(inside) == before
    with pytest.raises(NoMatchError):
        accelplug.remove(wrapped)


def test_a_forward_that_is_compiled_whole_is_counted() -> None:
    """What such a forward is about cannot be told inside of its graph; generate() on the same object is not compiled whole."""
    torch._dynamo.reset()
    model, given = build("llava"), inputs("llava")
    wrapped = torch.compile(model, backend="eager")
    with torch.no_grad():
        plain = wrapped(**given).logits
        with accelplug.apply(wrapped, LOUD) as plug:
            torch.testing.assert_close(wrapped(**given).logits, plain)
            assert any("compiled" in reason for reason in plug.report().fallbacks)
    torch._dynamo.reset()


def test_a_pipeline_brings_its_processor() -> None:
    folder = zoo.path("llava-scenes")
    model, processor = AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    assert accelplug.inspect(pipe).model == "LlavaForConditionalGeneration"
    with accelplug.apply(pipe, "gift", strict=True) as plug:
        assert plug_of(model) is plug
        assert {id(row.patch.processor) for row in plug.where() if row.patch is not None} == {id(processor)}
        assert "gift" in repr(plug)
    with accelplug.apply(pipe, "carve") as plug:
        accelplug.remove(pipe)
        assert not plug.active
