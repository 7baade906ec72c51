"""The transformers host: every family, every way to generate, and nothing left behind."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch._dynamo.exc import FailOnRecompileLimitHit
from transformers import CompileConfig, ContinuousBatchingConfig, DynamicCache, QuantizedCache, StaticCache

import accelplug
from accelplug import compat
from accelplug.errors import AlreadyAppliedError, FallbackError, NoMatchError, UnsupportedError
from accelplug.hosts.prompts import answering, number_images
from accelplug.hosts.stream import Stream
from accelplug.registry import entry_of, patch_class
from accelplug.testing.language_models import forward, generate
from tests import tiny_models
from tests.patch_rows import ROWS
from tests.test_laws import alive
from tests.tiny_language_models import LLM, VLM, build, held, inputs, right_padded

LOUD: dict[str, Any] = {"patch": "visual_bias", "with": ROWS["visual_bias"].working}
WORKING = {
    name: dict(row.working)
    for name, row in ROWS.items()
    if entry_of(name).family == "heads"
    and patch_class(name).about_images
    and not {"logits", "rehearsal"} & patch_class(name).needs
}
"""Head patches that change what a prompt gives, not its answer alone."""
PAIRS = [(patch, name) for patch in WORKING for name in ROWS[patch].only or VLM]


def recipe(patch: str, config: Mapping[str, Any] | None = None, **where: Any) -> dict[str, Any]:
    return {"patch": patch, "with": WORKING[patch] if config is None else config, "where": where}


def fingerprint(model: Any) -> list:
    """Everything that a plug could leave behind; transformers' own output capture comes and goes."""
    return [
        (
            name,
            sorted(key for key in vars(module) if not key.startswith("_output_capturing")),
            id(vars(module).get("config")),
            len(module._forward_pre_hooks),
            len(module._forward_hooks),
            type(module),
        )
        for name, module in model.named_modules()
    ]


# ----------------------------------------------------------------------------------------------------------------- laws


@pytest.mark.parametrize("name", LLM)
def test_text_models_are_entered_and_left_as_they_were(name: str) -> None:
    model, given = build(name), inputs(name, ((24,), (21,)))
    logits, tokens, before = forward(model, given), generate(model, given), fingerprint(model)
    with accelplug.apply(model, LOUD) as plug:  # no image: nothing to weigh, whatever it does runs through all of it
        torch.testing.assert_close(forward(model, given), logits, atol=1e-5, rtol=1e-4)
        assert torch.equal(generate(model, given), tokens)
        assert plug.report().served["visual_bias"]
    assert fingerprint(model) == before
    assert torch.equal(forward(model, given), logits)


@pytest.mark.parametrize("name", VLM)
def test_images_are_found_in_every_family(name: str) -> None:
    model, given = build(name), inputs(name)
    expected = given["input_ids"] == 500
    with accelplug.apply(model, LOUD) as plug:
        cache = compat.transformers.cache_of(model(**given, use_cache=True))
        image = cache._accelplug.prompt.image
        assert torch.equal(image > 0, expected)
        assert image.amax(1).tolist() == [1, 2]
        generate(model, given)
        plug.remove()
    assert not hasattr(cache, "_accelplug")


def test_images_side_by_side_are_told_apart() -> None:
    visual = torch.tensor([[0, 1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 0, 0]], dtype=torch.bool)
    assert number_images(visual, [2, 3, 3]).tolist() == [[0, 1, 1, 2, 2, 2, 0], [0, 0, 1, 1, 1, 0, 0]]
    beams = visual.repeat_interleave(2, 0)
    assert number_images(beams, [2, 3, 3]).tolist() == [[0, 1, 1, 2, 2, 2, 0]] * 2 + [[0, 0, 1, 1, 1, 0, 0]] * 2
    assert number_images(visual, []).tolist() == [[0, 1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 0, 0]]
    assert number_images(visual, [4]).amax() == 1  # told nothing that adds up: each run is an image


@pytest.mark.parametrize("patch", [patch for patch in WORKING if patch != "imbalance"])
def test_a_padded_batch_is_its_rows(patch: str) -> None:
    model = build("llava")
    rows = ((3, "I", 6), (4, "I", 5, "I", 7))
    both = inputs("llava", rows)
    with accelplug.apply(model, recipe(patch)):
        together = forward(model, both)[:, -1]
        for i, pixels in enumerate((both["pixel_values"][:1], both["pixel_values"][1:])):
            ids = both["input_ids"][i][both["attention_mask"][i].bool()][None]
            alone = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
            torch.testing.assert_close(forward(model, alone)[:, -1], together[i : i + 1], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("patch", "name"), PAIRS)
def test_padding_on_either_side_gives_the_same(patch: str, name: str) -> None:
    """Every row's last valid token answers; the short row's padding is longer than Gemma 3's window."""
    model, left = build(name), inputs(name, ((3, "I", 6), (4, "I", 5, "I", 17)))
    right = right_padded(left)
    on_left, on_right = (given["attention_mask"].bool() for given in (left, right))
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        with accelplug.apply(model, recipe(patch), strict=True):
            expected, found = forward(model, left), forward(model, right)
        torch.testing.assert_close(found[on_right], expected[on_left], atol=2e-5, rtol=1e-4)


def test_the_rows_that_answer() -> None:
    rows: Callable[..., Any] = answering
    valid = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
    assert rows(valid[:1], 3) == 3
    assert rows(valid[:3], 1).tolist() == [[4], [2], [0]]
    assert rows(valid, 2).tolist() == [[3, 4], [1, 2], [0, 0], [4, 4]]
    assert rows(valid[:1], 9) == 1  # more than there are: the last one
    asked = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)
    assert rows(valid[:2], asked).tolist() == [[3, 4], [2, 2]]
    assert rows(valid[:2], asked[:, :3]).tolist() == [[4], [2]]  # of other tokens than these


def test_a_row_without_an_image_is_left_alone() -> None:
    model, given = build("llava"), inputs("llava", ((3, "I", 6), (25,)))
    for patch in WORKING:
        plain = forward(model, given)
        with accelplug.apply(model, recipe(patch)):
            changed = forward(model, given)
        valid = given["attention_mask"].bool()
        torch.testing.assert_close(changed[1][valid[1]], plain[1][valid[1]], atol=1e-5, rtol=1e-4)
        assert not torch.allclose(changed[0, -1], plain[0, -1])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_models_own_kernel_is_used(implementation: str) -> None:
    model, given = build("qwen2_5_vl"), inputs("qwen2_5_vl")
    with accelplug.apply(model, LOUD):
        reference = forward(model, given)
    model.set_attn_implementation(implementation)
    plain = forward(model, given)
    with accelplug.apply(model, recipe("visual_bias", ROWS["visual_bias"].neutral)):
        assert torch.equal(forward(model, given), plain)
    with accelplug.apply(model, LOUD):
        valid = given["attention_mask"].bool()
        torch.testing.assert_close(forward(model, given)[valid], reference[valid], atol=2e-5, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------- ways to generate


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
@pytest.mark.parametrize("patch", [patch for patch in WORKING if patch != "imbalance"])
def test_every_way_to_generate_gives_the_same(patch: str, name: str) -> None:
    model, given, one = build(name), inputs(name), inputs(name, ((3, "I", 6),))
    # The stock model does not, either: Gemma 3, whose images read themselves both ways, and any with images before transformers 5.23.
    reads_in_pieces = name != "gemma3" and Version(transformers.__version__) >= Version("5.23")
    with accelplug.apply(model, recipe(patch)):
        tokens = generate(model, given)
        assert torch.equal(generate(model, given, cache_implementation="static", disable_compile=True), tokens)
        assert torch.equal(generate(model, one, prompt_lookup_num_tokens=3), generate(model, one))
        if patch in ("visual_bias", "var"):  # the others act on the prompt's last token
            assert torch.equal(generate(model, given, use_cache=False), tokens)
            if reads_in_pieces:
                assert torch.equal(generate(model, given, prefill_chunk_size=9), tokens)
        # Beams of a row with several images are given another's by the stock model, where images are no patches, before 5.24.
        beamed = given if name == "qwen2_5_vl" or Version(transformers.__version__) >= Version("5.24") else one
        assert len(generate(model, beamed, num_beams=3, num_return_sequences=3)) == 3 * len(beamed["input_ids"])


BACKENDS = {"fp8": "torch", "quanto": "optimum.quanto", "hqq": "hqq"}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("patch", [patch for patch in WORKING if patch != "imbalance"])
def test_a_quantised_cache(patch: str, backend: str) -> None:
    """What a patch does at a decode step is what it does with an exact cache, but for what the cache has rounded away."""
    pytest.importorskip(BACKENDS[backend], reason=f"the {backend} cache needs a package that is not installed")
    if backend == "fp8" and Version(transformers.__version__) < Version("5.21"):
        pytest.skip("transformers has no fp8 cache before 5.21")
    model, given = build("llava"), inputs("llava")
    quantised: dict[str, Any] = {"cache_implementation": "quantized", "cache_config": {"backend": backend}}
    stock = generate(model, given, **quantised)
    with accelplug.apply(model, recipe(patch, ROWS[patch].neutral)):
        assert torch.equal(generate(model, given, **quantised), stock)
    text = model.config.get_text_config()
    step = torch.tensor([[11], [12]])

    def steps(cache: Any) -> torch.Tensor:
        with torch.no_grad():
            model(**given, **held(cache))
            return torch.stack([model(input_ids=step, **held(cache)).logits for _ in range(3)])

    plain = steps(DynamicCache(config=text))
    with accelplug.apply(model, recipe(patch), strict=True) as plug:
        exact, rounded = steps(DynamicCache(config=text)), steps(QuantizedCache(backend, text))
        assert plug.report().served[patch]
        several = generate(model, given, num_beams=3, num_return_sequences=3, **quantised)
    assert not torch.equal(exact, rounded)
    assert (rounded - exact).norm() < 0.05 * exact.norm()
    assert (rounded - exact).norm() < (rounded - plain).norm()
    assert len(several) == 6


class _Stream:
    """A stream on a machine whose work is done when it is asked for."""

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    def wait_stream(self, other: Any) -> None: ...


@pytest.mark.parametrize("implementation", ["offloaded", "offloaded_static"])
@pytest.mark.parametrize("patch", ["visual_bias", "var", "vhr", "gift", "pai"])
def test_an_offloaded_cache(patch: str, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers asks for a CUDA stream even on a CPU; with stand-ins for it the offloading itself runs."""
    monkeypatch.setattr(torch, "Stream", _Stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device=None: _Stream())
    model, given = build("llava"), inputs("llava")
    more = {"disable_compile": True} if "static" in implementation else {}
    stock = generate(model, given, cache_implementation=implementation, **more)
    assert torch.equal(stock, generate(model, given))
    with accelplug.apply(model, recipe(patch), strict=True):
        tokens = generate(model, given)
        assert torch.equal(generate(model, given, cache_implementation=implementation, **more), tokens)


@pytest.mark.parametrize("patch", ["vhr", "gift"])
def test_a_prompt_in_pieces_is_refused_where_it_must_be_whole(patch: str) -> None:
    model, given = build("llava"), inputs("llava")
    generate(model, given)
    before = fingerprint(model)
    with pytest.raises(UnsupportedError, match="prefill_chunk_size"), accelplug.apply(model, recipe(patch)):
        generate(model, given, prefill_chunk_size=9)
    assert fingerprint(model) == before


def test_one_beam_is_greedy() -> None:
    model, given = build("llava"), inputs("llava")
    with accelplug.apply(model, LOUD):
        first = model.generate(**given, max_new_tokens=1, num_beams=3, do_sample=False, pad_token_id=0)
        assert torch.equal(first, generate(model, given, tokens=1))


@pytest.mark.parametrize("patch", ["visual_bias", "var", "vhr", "gift", "pai"])
def test_the_decode_step_compiles_whole(patch: str) -> None:
    torch._dynamo.reset()
    config = CompileConfig(backend="eager", fullgraph=True)
    config._compile_all_devices = True
    model, given = build("llava"), inputs("llava")
    compiled = {"cache_implementation": "static", "compile_config": config}
    stock = generate(model, given, **compiled)
    with accelplug.apply(model, recipe(patch)) as plug:
        tokens = generate(model, given)
        assert torch.equal(generate(model, given, **compiled), tokens)
        assert not plug.report().fallbacks
    assert torch.equal(generate(model, given, **compiled), stock)
    torch._dynamo.reset()


@pytest.mark.parametrize("isolated", [False, True])
def test_many_recipes_compiled_in_one_process(isolated: bool) -> None:
    """Dynamo counts what it compiled by code object, and every plug's decode step is transformers' own: the limit is one for all.

    A compile config that isolates them gives each a count of its own.
    """
    torch._dynamo.reset()
    model, given = build("llava"), inputs("llava")

    def compiled(weight: float) -> None:
        config = CompileConfig(backend="eager", fullgraph=True)
        config._compile_all_devices = True
        config.isolate_recompiles = isolated
        with accelplug.apply(model, {"patch": "visual_bias", "with": {"image_weight": weight}}, strict=True):
            tokens = generate(model, given, cache_implementation="static", compile_config=config)
            assert torch.equal(tokens, generate(model, given))

    try:
        with torch._dynamo.config.patch(recompile_limit=2):
            compiled(2.0)
            compiled(3.0)
            with nullcontext() if isolated else pytest.raises(FailOnRecompileLimitHit):
                compiled(4.0)
            if not isolated:
                torch._dynamo.reset()
                compiled(4.0)
    finally:
        torch._dynamo.reset()


def test_a_compiled_sliding_window_is_counted() -> None:
    torch._dynamo.reset()
    config = CompileConfig(backend="eager", fullgraph=True)
    config._compile_all_devices = True
    model, given = build("gemma3"), inputs("gemma3")
    with accelplug.apply(model, LOUD) as plug:
        generate(model, given, cache_implementation="static", compile_config=config)
        assert any("compiled" in reason for reason in plug.report().fallbacks)
    torch._dynamo.reset()


def test_guidance_has_a_stream_of_its_own() -> None:
    model, given = build("llava"), inputs("llava")
    with accelplug.apply(model, LOUD):
        tokens = generate(model, given, guidance_scale=1.5)
    with accelplug.apply(model, recipe("visual_bias", ROWS["visual_bias"].neutral)):
        plain = generate(model, given, guidance_scale=1.5)
    assert torch.equal(plain, generate(model, given, guidance_scale=1.5))
    assert tokens.shape == plain.shape


@pytest.mark.parametrize("patch", ["visual_bias", "vhr"])
def test_two_threads_on_one_model(patch: str) -> None:
    model = build("llava")
    cases = [inputs("llava", ((3, "I", 6),)), inputs("llava", ((9, "I", 2, "I", 4),))]
    with accelplug.apply(model, recipe(patch)):
        expected = [generate(model, case, tokens=12) for case in cases]
        found: list[list[torch.Tensor]] = [[], []]

        def work(i: int) -> None:
            for _ in range(5):
                found[i].append(generate(model, cases[i], tokens=12))

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(tokens, expected[i]) for i in range(2) for tokens in found[i])
    assert [len(tokens) for tokens in found] == [5, 5]


def test_an_image_behind_a_turn_of_text_alone_is_counted_where_all_sinks_are_needed() -> None:
    model, (first, second) = build("llava"), (inputs("llava", rows) for rows in (((7,),), ((3, "I", 6),)))
    mask = torch.ones(1, 7 + second["input_ids"].shape[1], dtype=torch.long)
    with accelplug.apply(model, recipe("var")) as plug, torch.no_grad():
        cache = DynamicCache(config=model.config.get_text_config())
        for given in (first, {**second, "attention_mask": mask}):
            model(**given, **held(cache))
        counts = [number for why, number in plug.report().fallbacks.items() if "ran dense, so" in why]
    assert counts == [1] * model.config.text_config.num_hidden_layers


def test_a_second_turn_on_the_same_cache() -> None:
    model, first = build("llava"), inputs("llava", ((3, "I", 6),))
    more = torch.tensor([[11, 12, 13, 14]])
    ids = torch.cat([first["input_ids"], more], 1)
    whole = {**first, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with accelplug.apply(model, LOUD), torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(**first, **held(cache))
        branch = copy.deepcopy(cache)  # as when many questions share a prompt
        for turn in (cache, branch):
            logits = model(input_ids=more, **held(turn)).logits
            torch.testing.assert_close(logits, forward(model, whole)[:, -4:], atol=1e-5, rtol=1e-4)
        cache.crop(-4)
        again = model(input_ids=more, **held(cache)).logits
        torch.testing.assert_close(again, logits)


@pytest.mark.parametrize("patch", ["visual_bias", "pai", "vhr"])
def test_a_cache_whose_rows_are_repeated(patch: str) -> None:
    """Patches that remember nothing follow; one that remembers heads by row refuses."""
    model, one = build("llava"), inputs("llava", ((3, "I", 6),))
    step = torch.tensor([[11], [11]])
    with accelplug.apply(model, recipe(patch), strict=True), torch.no_grad():
        cache = DynamicCache(config=model.config.get_text_config())
        model(**one, **held(cache))
        alone = model(input_ids=step[:1], **held(copy.deepcopy(cache))).logits
        cache.batch_repeat_interleave(2)
        if patch == "vhr":
            with pytest.raises(UnsupportedError, match="rows of a cache were repeated"):
                model(input_ids=step, **held(cache))
        else:
            both = model(input_ids=step, **held(cache)).logits
            torch.testing.assert_close(both, alone.expand(2, -1, -1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("patch", ["visual_bias", "pai", "gift"])
def test_a_cache_whose_rows_change_places(patch: str, static: bool) -> None:
    """Rows take what is known of them along, or are refused."""
    model, two, step = build("llava"), inputs("llava"), torch.tensor([[11], [12]])
    config, swapped = model.config.get_text_config(), [1, 0]
    length = two["input_ids"].shape[1] + 1
    masks = torch.cat([two["attention_mask"], torch.ones_like(step)], 1)
    at = (masks.cumsum(-1) - 1)[:, -1:]
    with accelplug.apply(model, recipe(patch), strict=True), torch.no_grad():
        cache = StaticCache(config, max_cache_len=length) if static else DynamicCache(config=config)
        model(**two, **held(cache))
        branch = copy.deepcopy(cache)
        alone = model(input_ids=step, attention_mask=masks, position_ids=at, **held(cache)).logits
        branch.reorder_cache(torch.tensor(swapped))
        given = {"input_ids": step[swapped], "attention_mask": masks[swapped], "position_ids": at[swapped]}
        if patch == "gift":
            with pytest.raises(UnsupportedError, match="changed places"):
                model(**given, **held(branch))
        else:
            torch.testing.assert_close(model(**given, **held(branch)).logits, alone[swapped], atol=1e-6, rtol=0)


def test_embeddings_instead_of_ids() -> None:
    model, given = build("llava"), inputs("llava")
    embeds = model.get_input_embeddings()(given["input_ids"])
    others = {key: value for key, value in given.items() if key != "input_ids"}
    with accelplug.apply(model, LOUD):
        torch.testing.assert_close(forward(model, {**others, "inputs_embeds": embeds}), forward(model, given))


# --------------------------------------------------------------------------------------------------------- errors, copies


def test_continuous_batching_is_refused() -> None:
    model = build("llama")
    with accelplug.apply(model, LOUD):
        small = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=16)  # or it takes most of the machine's memory
        answers = model.generate_batch([[1, 2, 3], [4, 5]], continuous_batching_config=small, max_new_tokens=2)
    assert all("Use generate() instead of generate_batch()" in answer.error for answer in answers.values())


def test_a_cache_from_before_is_counted_and_an_error_under_strict() -> None:
    model, given = build("llava"), inputs("llava")
    with torch.no_grad():
        cache = compat.transformers.cache_of(model(**given))
        step = {"input_ids": torch.tensor([[5], [6]])}
        plain = model(**step, **held(copy.deepcopy(cache))).logits
        with accelplug.apply(model, LOUD) as plug:
            assert torch.equal(model(**step, **held(copy.deepcopy(cache))).logits, plain)
            assert any("before apply" in reason for reason in plug.report().fallbacks)
        with pytest.raises(FallbackError), accelplug.apply(model, LOUD, strict=True):
            model(**step, **held(copy.deepcopy(cache)))


@pytest.mark.parametrize("patch", WORKING)
def test_a_cache_that_is_not_found_is_counted_and_an_error_under_strict(monkeypatch: pytest.MonkeyPatch, patch: str) -> None:
    """As if a model took its cache by a name of tomorrow: a decode step knows nothing of the prompt, and is no prompt itself."""
    monkeypatch.setattr(compat.transformers, "CACHE_NAMES", ("hoard", "stash"))
    model, given = build("llava"), inputs("llava")
    with accelplug.apply(model, recipe(patch)) as plug:
        generate(model, given, tokens=3)
        calls = [count for reason, count in plug.report().fallbacks.items() if "was not found" in reason]
    assert sum(calls) >= 2 * len(plug.where())  # all of both decode steps, and gift's second reading of the prompt
    with pytest.raises(FallbackError, match="was not found"), accelplug.apply(model, recipe(patch), strict=True):
        generate(model, given, tokens=3)


def test_apply_twice_remove_twice_and_a_rule_that_fits_nothing() -> None:
    model = build("llava")
    plug = accelplug.apply(model, LOUD)
    with pytest.raises(AlreadyAppliedError):
        accelplug.apply(model, LOUD)
    accelplug.remove(model)
    plug.remove()
    with pytest.raises(NoMatchError):
        accelplug.remove(model)
    with pytest.raises(NoMatchError):
        accelplug.apply(model, {**LOUD, "where": {"layers": "90:"}})


def test_a_patch_for_other_models_is_refused_on_both_sides() -> None:
    with pytest.raises(UnsupportedError, match="family sparse"):
        accelplug.apply(build("llama"), {"patch": "radial"})
    denoiser, _ = tiny_models.build("wan")
    for patch in ("visual_bias", "carve"):
        with pytest.raises(UnsupportedError, match=r"takes .*sparse"):
            accelplug.apply(denoiser, {"patch": patch})


def test_sink_logits_are_counted_where_probabilities_are_needed() -> None:
    model, given = build("gpt_oss"), inputs("gpt_oss", ((24,),))
    plain = forward(model, given)
    with accelplug.apply(model, recipe("pai")) as plug:
        assert torch.equal(forward(model, given), plain)
        assert any("sink logits" in reason for reason in plug.report().fallbacks)


def test_images_of_a_family_nobody_listed_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelplug.hosts.transformers.vlm_of", lambda model: None)
    model, given = build("llava"), inputs("llava")
    plain = forward(model, given)
    with accelplug.apply(model, LOUD):
        assert not torch.equal(forward(model, given), plain)


def test_an_error_inside_a_forward_leaves_nothing() -> None:
    model, given = build("llava"), inputs("llava")
    plain, _, before = forward(model, given), generate(model, given), fingerprint(model)
    broken = {**given, "pixel_values": given["pixel_values"][:, :, :16]}
    with pytest.raises(Exception), accelplug.apply(model, LOUD):  # noqa: B017, PT011
        forward(model, broken)
    assert fingerprint(model) == before
    with accelplug.apply(model, LOUD):
        changed = forward(model, given)
    assert not torch.equal(changed, plain)
    assert torch.equal(forward(model, given), plain)


def test_layers_are_chosen_by_rules() -> None:
    model, given = build("llava"), inputs("llava")
    with accelplug.apply(model, {**LOUD, "where": {"layers": [1, "-1:"]}}) as plug:
        forward(model, given)
        assert plug.report().served["visual_bias"] == 2
        views = [
            type(layer.self_attn.config) is not type(model.config.text_config) for layer in model.model.language_model.layers
        ]
    assert views == [False, True, False, True]


def test_copies_are_stock_and_another_model_never_notices(tmp_path: Path) -> None:
    model, other, given = build("llava"), build("llava"), inputs("llava")
    plain, tokens, before = forward(model, given), generate(model, given), fingerprint(model)
    keys = list(model.state_dict())
    with accelplug.apply(model, recipe("imbalance")) as plug:
        twin = copy.deepcopy(model)
        assert torch.equal(forward(other, given), plain)
        assert torch.equal(forward(twin, given), plain)
        assert torch.equal(generate(twin, given), tokens)
        assert not torch.equal(forward(model, given), plain)
        assert list(model.state_dict()) == keys
        pickle.loads(pickle.dumps(model.model.language_model.layers[0].self_attn.config))
        model.save_pretrained(tmp_path)
        assert "accelplug" not in (tmp_path / "config.json").read_text()
        plug.remove()
    assert fingerprint(model) == before
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(forward(again, given), plain)


def test_switching_the_implementation_while_on() -> None:
    model, given = build("llava"), inputs("llava")
    with accelplug.apply(model, recipe("visual_bias", ROWS["visual_bias"].neutral)):
        model.set_attn_implementation("eager")
        on = forward(model, given)
    assert torch.equal(on, forward(model, given))


@pytest.mark.parametrize("first", ["hooks", "plug"])
def test_accelerate_offload_in_both_orders(first: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, given = build("llava"), inputs("llava")
    with accelplug.apply(model, recipe("vhr")):
        expected = forward(model, given)
    plain = forward(model, given)
    if first == "hooks":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        plug = accelplug.apply(model, recipe("vhr"))
    else:
        plug = accelplug.apply(model, recipe("vhr"))
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(forward(model, given), expected)
    plug.remove()
    assert torch.equal(forward(model, given), plain)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert torch.equal(forward(model, given), plain)


def test_half_precision() -> None:
    """In float16; the laws try bfloat16."""
    model, given = build("llava").half(), inputs("llava")
    given["pixel_values"] = given["pixel_values"].half()
    for patch in WORKING:
        with accelplug.apply(model, recipe(patch)):
            assert forward(model, given)[given["attention_mask"].bool()].isfinite().all()


def test_training_is_refused() -> None:
    model, given = build("llava").train().requires_grad_(True), inputs("llava")
    with accelplug.apply(model, LOUD), pytest.raises(UnsupportedError, match="training mode"):
        model(**given)


def test_memory_does_not_grow() -> None:
    model, given = build("llava"), inputs("llava")
    with accelplug.apply(model, LOUD):
        forward(model, given)
        before = alive(Stream)
        for _ in range(20):
            forward(model, given)
        assert alive(Stream) == before
