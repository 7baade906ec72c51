"""What is known of a prompt: where images and videos lie, which rows answer, and what becomes of it when its cache is not whole."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache

import accelplug
from accelplug import zoo
from accelplug.call import Prompt
from accelplug.chat import speakers
from accelplug.errors import FallbackError, ShapeError, UnsupportedError
from accelplug.families.vlm import vlm_of
from accelplug.hosts.prompts import NO_IMAGE, opened, together, turns
from accelplug.registry import patch_class
from accelplug.testing.language_models import IMAGE, VIDEO, forward, generate
from tests.test_language_host import LOUD, PAIRS, WORKING, recipe
from tests.tiny_language_models import VIDEOS, build, held, inputs, looked, right_padded
from tests.tiny_models import build as denoiser

ONE = ((3, "I", 6),)
PATCHES = list(WORKING)
TIGHT: dict[str, Any] = {"atol": 2e-5, "rtol": 1e-4}


def read(model: Any, given: dict[str, Any], plug: Any) -> Any:
    """What a forward was found to be."""
    cache = DynamicCache(config=model.config.get_text_config())
    forward(model, {**given, **held(cache)})
    return vars(cache)["_accelplug"].prompt


# ------------------------------------------------------------------------------------------------------------ images and videos


def test_images_and_videos_are_numbered_as_they_come() -> None:
    images = torch.tensor([[0, 1, 1, 0, 0, 0, 2, 0], [0, 1, 1, 0, 2, 2, 0, 0]], dtype=torch.int16)
    videos = torch.tensor([[0, 0, 0, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0]], dtype=torch.int16)
    assert together([images, videos]).tolist() == [[0, 1, 1, 2, 0, 2, 3, 0], [0, 1, 1, 0, 2, 2, 0, 0]]
    assert torch.equal(together([videos]), videos)


@pytest.mark.parametrize("name", VIDEOS)
def test_videos_are_images_over_time(name: str) -> None:
    """Alone, beside images, and two of them next to each other; none of their tokens is system or question."""
    model = build(name)
    rows = ((2, "V", 5), (3, "I", 2, "V", 4), (1, "V", "V", 6))
    given = inputs(name, rows)
    ids = given["input_ids"]
    visual = (ids == IMAGE) | (ids == VIDEO)
    plain = forward(model, given)
    with accelplug.apply(model, LOUD, strict=True) as plug:
        prompt = read(model, given, plug)
        assert not torch.equal(forward(model, given), plain)
    assert torch.equal(prompt.visual, visual)
    assert prompt.image.amax(1).tolist() == [1, 2, 2]
    assert prompt.image[1][ids[1] == IMAGE].unique().tolist() == [1]
    assert prompt.image[1][ids[1] == VIDEO].unique().tolist() == [2]
    halves = [int((prompt.image[2] == number).sum()) for number in (1, 2)]
    assert halves[0] == halves[1]
    assert not (prompt.visual & (prompt.system | prompt.question)).any()


def test_a_video_is_no_picture_to_cut() -> None:
    model = build("qwen2_5_vl")
    for patch in ("carve", "agla"):
        with accelplug.apply(model, {"patch": patch}), pytest.raises(UnsupportedError, match="shows a video"):
            generate(model, inputs("qwen2_5_vl", ((2, "V", 5),)))


# ----------------------------------------------------------------------------------------------------------- where no image is


@pytest.mark.parametrize("patch", [*PATCHES, "carve", "agla"])
def test_a_prompt_without_an_image_is_counted(patch: str) -> None:
    model, given = build("llava"), inputs("llava", ((9,), (6,)))
    tokens = generate(model, given)
    one = recipe(patch) if patch in WORKING else {"patch": patch}
    with accelplug.apply(model, one) as plug:
        assert torch.equal(generate(model, given), tokens)
        assert not plug.report().served
        assert all(NO_IMAGE in reason for reason in plug.report().fallbacks)
        assert plug.report().fallbacks
    with accelplug.apply(model, one, strict=True), pytest.raises(FallbackError, match="no image was found"):
        generate(model, given)


@pytest.mark.parametrize("patch", ["carve", "agla"])
def test_pictures_that_a_model_does_not_read_are_none(patch: str) -> None:
    model, given = build("llama"), inputs("llama", ((9,),))
    tokens = generate(model, given)
    with accelplug.apply(model, {"patch": patch}) as plug:
        assert torch.equal(generate(model, given), tokens)
        assert plug.report().fallbacks == {f"generate: {NO_IMAGE}": 1}
        assert not plug.report().served


def merged(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Inputs whose images a caller has put among the embeddings."""
    ids = given["input_ids"]
    features = torch.cat(list(model.base_model.get_image_features(given["pixel_values"]).pooler_output))
    embeds = model.get_input_embeddings()(ids)
    return {
        "inputs_embeds": embeds.masked_scatter((ids == IMAGE)[..., None], features),
        "attention_mask": given["attention_mask"],
    }


@pytest.mark.parametrize("patch", [patch for patch in PATCHES if patch != "imbalance"])
def test_images_that_a_caller_has_merged_can_be_marked(patch: str) -> None:
    model, given = build("llava"), inputs("llava")
    image = given["input_ids"] == IMAGE
    blind = merged(model, given)
    plain = forward(model, blind)
    torch.testing.assert_close(plain, forward(model, given), **TIGHT)
    with accelplug.apply(model, recipe(patch)) as plug:
        expected, tokens = forward(model, given), generate(model, given)
        assert torch.equal(forward(model, blind), plain)
        assert any(NO_IMAGE in reason for reason in plug.report().fallbacks)
    with accelplug.apply(model, recipe(patch), strict=True) as plug:
        plug.mark(image=image)
        torch.testing.assert_close(forward(model, blind), expected, **TIGHT)
        assert torch.equal(generate(model, blind), tokens[:, -6:])
        assert len(generate(model, blind, num_beams=2, num_return_sequences=2)) == 4
        plug.mark(image=image.int())
        torch.testing.assert_close(forward(model, blind), expected, **TIGHT)
        with pytest.raises(ShapeError, match="marked"):
            forward(model, inputs("llava", ONE))
        plug.mark(image=None)
        with pytest.raises(FallbackError, match="no image"):
            forward(model, blind)


def test_what_is_no_mark() -> None:
    with accelplug.apply(build("llava"), LOUD) as plug:
        for image in (torch.ones(3, dtype=torch.bool), torch.ones(2, 3)):
            with pytest.raises(ShapeError, match="True or a number"):
                plug.mark(image=image)
    with accelplug.apply(denoiser("wan")[0], {"patch": "radial"}) as plug, pytest.raises(UnsupportedError, match="denoiser"):
        plug.mark(image=None)


# -------------------------------------------------------------------------------------------------- labels, no cache, in pieces


@pytest.mark.parametrize(("patch", "name"), PAIRS)
def test_a_labelled_answer_is_read_as_it_was_generated(patch: str, name: str) -> None:
    """Forwards with labels have the loss of the patched model: every row with a labelled next token answers."""
    model, prompt = build(name), inputs(name)
    one = recipe(patch, {**WORKING[patch], "enhance": [2, 4]} if patch == "gift" else None)
    with torch.no_grad(), accelplug.apply(model, one, strict=True):
        out = generate(model, prompt, 4, output_logits=True, return_dict_in_generate=True)
        steps, answer = torch.stack(out.logits, 1), out.sequences[:, -4:]
        zeros: dict[str, Any] = {
            key: torch.zeros_like(answer) for key in ("mm_token_type_ids", "token_type_ids") if key in prompt
        }
        more: dict[str, Any] = {"input_ids": answer, "attention_mask": torch.ones_like(answer), **zeros}
        whole = {**prompt, **{key: torch.cat([prompt[key], new], 1) for key, new in more.items()}}
        labels = whole["input_ids"].clone()
        labels[:, :-4] = -100
        for given, tokens in ((whole, labels), _moved(whole, labels)):
            if hasattr(model.base_model, "rope_deltas"):
                model.base_model.rope_deltas = None
            read = model(**given, labels=tokens)
            asks = torch.nn.functional.pad(tokens[:, 1:] != -100, (0, 1))
            torch.testing.assert_close(read.logits[asks], steps.flatten(0, 1), **TIGHT)
            torch.testing.assert_close(read.loss, cross_entropy(steps.flatten(0, 1), answer.flatten()), atol=1e-4, rtol=1e-4)


def _moved(given: dict[str, torch.Tensor], labels: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The same with padding on the right."""
    valid = given["attention_mask"].bool()
    return right_padded(given), torch.full_like(labels, -100).masked_scatter(valid.flip(-1), labels[valid])


@pytest.mark.parametrize("patch", ["vhr", "gift"])
def test_labels_that_begin_ahead_of_the_image_are_counted(patch: str) -> None:
    model, given = build("llava"), inputs("llava", ONE)
    with accelplug.apply(model, recipe(patch)) as plug:
        forward(model, {**given, "labels": given["input_ids"]})
        assert all("labels" in reason for reason in plug.report().fallbacks)
        assert plug.report().fallbacks


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
@pytest.mark.parametrize("patch", PATCHES)
def test_without_a_cache_it_is_the_same(patch: str, name: str) -> None:
    if (patch, name) not in PAIRS:
        return
    model, given = build(name), inputs(name)
    told = {"output_logits": True, "return_dict_in_generate": True}
    with accelplug.apply(
        model, recipe(patch, {**WORKING[patch], "enhance": [2, 4]} if patch == "gift" else None), strict=True
    ):
        cached, anew = (generate(model, given, use_cache=cache, **told) for cache in (True, False))
        assert torch.equal(anew.sequences, cached.sequences)
        torch.testing.assert_close(torch.stack(anew.logits), torch.stack(cached.logits), **TIGHT)
        one = inputs(name, ONE)
        beams = [generate(model, one, num_beams=3, use_cache=cache) for cache in (True, False)]
        assert torch.equal(*beams)


@pytest.mark.parametrize("patch", PATCHES)
def test_a_prefix_that_questions_share(patch: str) -> None:
    """A patch that changes the row that answers cannot know that a prefix is none: it is refused. Others go on from it."""
    model, given = build("llava"), inputs("llava", ONE)
    ids, text = given["input_ids"], model.config.get_text_config()
    cut = ids.shape[1] - 4
    prefix = {"input_ids": ids[:, :cut], "pixel_values": given["pixel_values"]}
    with torch.no_grad(), accelplug.apply(model, recipe(patch), strict=patch != "gift"):
        cache = DynamicCache(config=text)
        model(**prefix, **held(cache))
        if patch in ("visual_bias", "var"):
            torch.testing.assert_close(model(ids[:, cut:], **held(cache)).logits, forward(model, given)[:, cut:], **TIGHT)
        else:
            with pytest.raises(UnsupportedError, match="in pieces"):
                model(ids[:, cut:], **held(cache))


# ------------------------------------------------------------------------------------------------------------ pruned caches


def _prune(cache: Any, layers: range, kept: torch.Tensor) -> None:
    for layer in (cache.layers[i] for i in layers):
        layer.keys, layer.values = layer.keys[:, :, kept], layer.values[:, :, kept]


@pytest.mark.parametrize("layers", [range(4), range(2, 4)])
@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("patch", ["visual_bias", "pai"])
def test_a_pruned_cache_is_counted(patch: str, told: bool, layers: range) -> None:
    """However long one goes on: more tokens may come than were pruned."""
    model, given = build("llava"), inputs("llava", ONE)
    kept, length = torch.tensor([0, 1, 5, 9, 20]), given["input_ids"].shape[1]

    def steps() -> torch.Tensor:
        cache = DynamicCache(config=model.config.get_text_config())
        logits = [model(**given, **held(cache)).logits[:, -1]]
        _prune(cache, layers, kept)
        for i in range(25):
            at = {"position_ids": torch.tensor([[length + i]])} if told else {}
            logits.append(model(torch.tensor([[11]]), **at, **held(cache)).logits[:, -1])
        return torch.stack(logits)

    with torch.no_grad(), accelplug.apply(model, recipe(patch)) as plug:
        steps()
        counts = {module: n for module, n in plug.report().fallbacks.items() if "pruned" in module}
    assert len({module.partition(":")[0] for module in counts}) == len(layers)
    assert sum(counts.values()) == 25 * len(layers)
    with torch.no_grad(), accelplug.apply(model, recipe(patch), strict=True), pytest.raises(FallbackError, match="pruned"):
        steps()


def test_a_cache_that_hooks_prune_is_counted() -> None:
    """As presses do, on every layer, while the prompt is read."""
    model, given = build("llava"), inputs("llava", ONE)
    length = given["input_ids"].shape[1]

    def press(module: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        cache = next(x for x in kwargs.values() if isinstance(x, DynamicCache))
        layer = cache.layers[module.layer_idx]
        if layer.keys.shape[2] == length:
            layer.keys, layer.values = layer.keys[:, :, ::2], layer.values[:, :, ::2]

    attention = [layer.self_attn for layer in model.get_decoder().layers]
    hooks = [module.register_forward_hook(press, with_kwargs=True) for module in attention]
    with accelplug.apply(model, LOUD) as plug:
        generate(model, given, 4)
        report = plug.report()
    for hook in hooks:
        hook.remove()
    assert report.served == {"visual_bias": 4}
    assert sum(n for reason, n in report.fallbacks.items() if "pruned" in reason) == 3 * 4


def test_a_cropped_cache_is_not_pruned() -> None:
    model, given = build("llava"), inputs("llava", ONE)
    with torch.no_grad(), accelplug.apply(model, LOUD, strict=True):
        cache = DynamicCache(config=model.config.get_text_config())
        model(**given, **held(cache))
        first = [model(torch.tensor([[token]]), **held(cache)).logits for token in (11, 12, 13)]
        cache.crop(-2)
        torch.testing.assert_close(model(torch.tensor([[12]]), **held(cache)).logits, first[1])


# -------------------------------------------------------------------------------------------------------------------- turns


IMAGE_PART, USER, MODEL = {"type": "image"}, "user", "assistant"


def chat(*turns: tuple[str, list[str | None]]) -> list[dict[str, Any]]:
    """A conversation; None stands for the picture."""
    parts = [[IMAGE_PART if part is None else {"type": "text", "text": part} for part in said] for _, said in turns]
    return [{"role": role, "content": said} for (role, _), said in zip(turns, parts, strict=True)]


CHATS = {
    "image first": (chat((USER, [None, "is there a house ?"])), "is there a house?"),
    "image last": (chat((USER, ["is there a house ?", None])), "is there a house?"),
    "in between": (chat((USER, ["is there", None, "a house ?"])), "is there a house?"),
    "two turns": (
        chat((USER, ["is there a house ?", None]), (MODEL, ["yes"]), (USER, ["a large house ?"])),
        "is there a house? a large house?",
    ),
    "image in the second turn": (
        chat((USER, ["a large house ?"]), (MODEL, ["yes"]), (USER, [None, "is there a house ?"])),
        "is there a house?",
    ),
}


@pytest.fixture(scope="module")
def scenes() -> tuple[Any, Any]:
    folder = zoo.path("llava-scenes")
    return AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


@pytest.mark.parametrize("name", CHATS)
def test_the_system_ends_with_its_turn_and_the_question_is_what_the_user_says(name: str, scenes: tuple[Any, Any]) -> None:
    model, processor = scenes
    messages, question = CHATS[name]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    picture = Image.new("RGB", (64, 64), (90, 20, 20))
    given = dict(processor(text=[text], images=[[picture]], return_tensors="pt"))
    with accelplug.apply(model, LOUD, processor=processor, strict=True) as plug:
        prompt = read(model, given, plug)
        told = [processor.tokenizer.decode(given["input_ids"][0][span[0]]) for span in (prompt.system, prompt.question)]
    assert told == ["<s> a chat about pictures.", question]


class Letters:
    """A tokenizer of one letter a token."""

    @staticmethod
    def decode(ids: list[int]) -> str:
        return "".join(map(chr, ids))


@pytest.mark.parametrize("said", ["USER: which operating system: old? ASSISTANT: new", "user: which one? assistant: new"])
def test_a_colon_in_a_question_opens_no_turn(said: str) -> None:
    begins, _ = speakers(Letters(), [ord(letter) for letter in said])
    assert {i: who for i, who in enumerate(begins) if who is not None} == {0: 1, said.lower().index("assistant"): -1}


def test_what_the_question_says_is_not_turned_down(scenes: tuple[Any, Any]) -> None:
    """Where it stands ahead of the image it is no system prompt: a weight on that alone is the same as where there is no question."""
    model, processor = scenes
    text = [
        processor.apply_chat_template(CHATS[name][0], add_generation_prompt=True) for name in ("image first", "image last")
    ]
    picture = Image.new("RGB", (64, 64), (90, 20, 20))
    down = {"patch": "visual_bias", "with": {"image_weight": 1.0, "system_weight": 0.1}}
    for each in text:
        given = dict(processor(text=[each], images=[[picture]], return_tensors="pt"))
        with accelplug.apply(model, down, processor=processor) as plug:
            prompt = read(model, given, plug)
        assert int(prompt.system.sum()) == 6


QWEN = {"system": (151644, 8948, 198), "user": (151644, 872, 198), "model": (151644, 77091, 198)}


def test_turns_by_a_familys_own_tokens() -> None:
    """Without a processor, by the tokens that open a turn of the released models."""
    end, image = (151645, 198), (151655,) * 3
    row = [*QWEN["system"], 7, 8, *end, *QWEN["user"], 9, 10, *image, 11, *end, *QWEN["model"]]
    ids = torch.tensor([[0, 0, *row]])
    told = partial(opened, vlm_of(build("qwen2_vl")).turns)
    found = turns(ids, ids == 151655, ids > 0, told, alone=False)
    prompt = Prompt((ids == 151655).to(torch.int16), ids > 0, ids.shape[1], ids=ids, turns=found)
    assert ids[prompt.system].tolist() == [*QWEN["system"], 7, 8, *end]
    assert ids[prompt.question].tolist() == [198, 9, 10, 11, *end]
    assert turns(ids % 7, ids == 151655, ids > 0, told, alone=False) is None


def test_what_is_not_known_of_turns_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model, given = build("llava"), inputs("llava")
    for patch, said in (("visual_bias", 1), ("pai", 0)):
        caplog.clear()
        with accelplug.apply(model, recipe(patch)) as plug:
            for _ in range(2):
                prompt = read(model, given, plug)
        assert prompt.turns is None
        assert sum("turn" in record.message for record in caplog.records) == said


# ---------------------------------------------------------------------------------------------------------- where heads look


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen2_5_vl"])
@pytest.mark.parametrize("patch", PATCHES)
def test_attention_that_is_asked_for_is_the_patched_one(patch: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every layer, in its place, and what its values are added up with; a gain of heads is none of it."""
    if (patch, name) not in PAIRS:
        return
    model, given = build(name), inputs(name)
    model.set_attn_implementation("eager")
    one = recipe(patch, {**WORKING[patch], "enhance": [2, 4]} if patch == "gift" else None, layers="1:3")
    asked = {**given, "output_attentions": True, "output_hidden_states": True}
    outputs: list[tuple[torch.Tensor, torch.Tensor]] = []
    kind = patch_class(patch)
    attend = kind.attend

    def spy(self: Any, call: Any, params: Any) -> torch.Tensor:
        out = attend(self, call, params)
        if call.v.shape[-1] == 16:  # not unit vectors
            v = call.v.repeat_interleave(call.q.shape[1] // call.v.shape[1], 1)
            outputs.append((out, v))
        return out

    monkeypatch.setattr(kind, "attend", spy)
    forward(model, given)
    stock = model(**asked)
    with torch.no_grad(), accelplug.apply(model, one, strict=True):
        plain = forward(model, given)
        outputs.clear()
        if hasattr(model.base_model, "rope_deltas"):
            model.base_model.rope_deltas = None
        read = model(**asked)
        found = list(outputs)
        out = generate(model, given, 3, output_attentions=True, return_dict_in_generate=True)
    torch.testing.assert_close(read.logits, plain, **TIGHT)
    assert [len(step) for step in (read.attentions, *out.attentions)] == [4] * 4
    assert [h.shape for h in read.hidden_states] == [h.shape for h in stock.hidden_states]
    assert torch.equal(read.attentions[0], stock.attentions[0])
    assert not torch.allclose(read.attentions[3], stock.attentions[3], atol=1e-6)
    valid = given["attention_mask"].bool()
    for p, (answer, v) in zip(read.attentions[1:3], found, strict=True):
        rows = p.transpose(1, 2)[valid]
        total = rows.sum(-1).clamp(min=1.0) if patch in ("adhh", "farsight") else rows.sum(-1)  # which let go of some
        torch.testing.assert_close(total, torch.ones_like(rows[..., 0]), **TIGHT)
        gained = (answer / (p @ v)).transpose(1, 2)[valid]
        if (gain := {"vhr": 2.0, "spin": 0.1}.get(patch)) is not None:
            assert set(gained.double().round(decimals=2).unique().tolist()) == {1.0, gain}
        else:
            torch.testing.assert_close(answer.transpose(1, 2)[valid], (p @ v).transpose(1, 2)[valid], **TIGHT)


def test_inspect_shows_a_video_ahead_of_an_image_on_its_own_grid() -> None:
    model, given = build("qwen2_vl"), inputs("qwen2_vl", ((2, "V", 3, "I", 5),))
    seen = looked(model, given)
    (frames, high, wide), (_, rows, columns) = given["video_grid_thw"][0].tolist(), given["image_grid_thw"][0].tolist()
    assert seen.grids == [(frames * high // 2, wide // 2), (rows // 2, columns // 2)]
    assert [picture.shape[:2] for picture in seen.pictures] == [(frames * high * 8, wide * 8), (rows * 8, columns * 8)]
    patch = given["pixel_values_videos"].reshape(frames, -1, 3, 2, 8, 8)[1, 0, :, 0]  # the first one of the second frame
    shown = torch.from_numpy(seen.pictures[0][high * 8 : high * 8 + 8, :8]).permute(2, 0, 1).double()
    assert torch.corrcoef(torch.stack([shown.flatten(), patch.double().flatten()]))[0, 1] > 0.999
