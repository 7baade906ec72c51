"""Several prompts for one video: who reads whom, how prompts come in, and what is refused."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import accelplug
from accelplug import zoo
from accelplug.call import AttentionCall, Layout
from accelplug.errors import AccelplugError, NoMatchError, RecipeError, UnsupportedError
from accelplug.hosts import rebind
from accelplug.patches.guidance.segments import Segments
from accelplug.testing.models import build_denoiser, noise, wan

SEGMENTS = {"rules": [{"patch": "segments"}]}
ONE, OTHER = "a red circle moves left", "a blue square moves up"


def call_of(layout: Layout, valid: Tensor | None = None) -> AttentionCall:
    q, k, v = (noise(2, 3, n, 8, seed=n) for n in (layout.queries, layout.keys, layout.keys))
    mask = None if valid is None else valid[:, None, None]
    return AttentionCall(q, k, v, valid, 8**-0.5, rebind.dense_sdpa(q, k, v, attn_mask=mask))


def owners(layout: Layout, ends: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Of every token its prompt, and whether it is of a frame; `ends`: the frame behind each span."""
    per_frame = layout.visual // layout.grid_thw[0]
    frames = torch.bucketize(torch.arange(layout.visual) // per_frame, torch.tensor(ends), right=True)
    words = torch.repeat_interleave(torch.arange(len(layout.texts)), torch.tensor(layout.texts))
    before, after = words.split([layout.text_before, layout.text_after])
    owner = torch.cat([before, frames, after])
    visual = torch.zeros(layout.length, dtype=torch.bool)
    visual[layout.text_before : layout.text_before + layout.visual] = True
    return owner, visual


@pytest.mark.parametrize(
    ("layout", "config", "ends"),
    [
        (Layout((5, 2, 3), text_after=9, texts=(5, 4)), {}, (2, 5)),
        (Layout((4, 3, 2), text_before=6, texts=(1, 2, 3)), {"shares": (1, 1, 2)}, (1, 2, 4)),
        (Layout((5, 2, 3), text_after=9, crossed=True, texts=(5, 4)), {"shares": (9, 0.1)}, (4, 5)),
    ],
)
def test_tokens_read_their_own_prompt_and_frames_each_other(layout: Layout, config: dict, ends: tuple[int, ...]) -> None:
    owner, visual = owners(layout, ends)
    reads = (owner[:, None] == owner) | (visual[:, None] & visual)
    reads = reads[visual][:, ~visual] if layout.crossed else reads
    valid = torch.ones(2, layout.keys, dtype=torch.bool)
    valid[1, -1] = False  # the last word of the last prompt
    for mask in (None, valid):
        call = call_of(layout, mask)
        patch = Segments(config)
        params = patch.prepare(None, layout, None, {})
        assert params is not None
        allowed = reads if mask is None else reads & mask[:, None, None]
        torch.testing.assert_close(patch.attend(call, params), scaled_dot_product_attention(call.q, call.k, call.v, allowed))
        assert patch.inspect(call, params)[0] == pytest.approx(float(reads.float().mean()))


def test_a_prompt_that_is_all_padding_gives_numbers() -> None:
    layout = Layout((2, 2, 3), text_after=6, crossed=True, texts=(3, 3))
    valid = torch.tensor([[True] * 3 + [False] * 3, [True] * 6])
    call, patch = call_of(layout, valid), Segments()
    assert torch.isfinite(patch.attend(call, patch.prepare(None, layout, None, {}))).all()


def test_what_cannot_be_is_refused() -> None:
    def prepare(layout: Layout, **config: Any) -> Any:
        return Segments(config).prepare(None, layout, None, {})

    assert prepare(Layout((3, 2, 2), text_after=4, texts=(4,))) is None
    assert prepare(Layout((3, 2, 2), text_after=4), tokens=4) is None
    for error, layout, config in (
        (UnsupportedError, Layout((3, 2, 2), text_after=4), {}),
        (AccelplugError, Layout((1, 2, 2), text_after=4, texts=(2, 2)), {}),
        (AccelplugError, Layout((3, 2, 2), text_after=4, texts=(2, 2)), {"shares": (1, 1, 1)}),
        (AccelplugError, Layout((3, 2, 2), text_after=4), {"tokens": 3}),
    ):
        with pytest.raises(error, match="segments"):
            prepare(layout, **config)


def test_cross_attention_is_touched_where_a_patch_asks_for_it() -> None:
    model, _ = build_denoiser(wan)
    with accelplug.apply(model, {"rules": [{"patch": "segments", "with": {"tokens": 4}}]}) as plug:
        assert {site.kind for site in plug.sites} == {"self", "cross"}
        assert "0 of 3 self-attention modules and 3 of cross-attention" in plug.summary()
    with accelplug.apply(model, {"rules": [{"patch": "radial"}]}) as plug:
        assert {site.kind for site in plug.sites} == {"self"}
    with pytest.raises(RecipeError, match="does not answer cross-attention"):
        accelplug.apply(model, {"rules": [{"where": {"kind": "cross"}, "patch": "radial"}]})
    with pytest.raises(NoMatchError, match="No rule"):
        accelplug.apply(model, {"rules": [{"where": {"layers": 0}, "patch": "segments"}]})


@functools.cache
def pipeline() -> WanPipeline:
    pipe = WanPipeline.from_pretrained(zoo.path())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def clip(prompt: str, **more: Any) -> Tensor:
    settings = {**zoo.SMALL, "num_inference_steps": 2, "output_type": "latent", **more}
    return pipeline()(prompt, generator=torch.Generator().manual_seed(0), **settings).frames


def test_prompts_between_bars_are_encoded_each_for_itself() -> None:
    pipe = pipeline()
    apart = [pipe.encode_prompt(prompt, negative_prompt="a green circle") for prompt in (ONE, OTHER)]
    with accelplug.apply(pipe, SEGMENTS):
        text, negative = pipe.encode_prompt(f"{ONE} | {OTHER}", negative_prompt="a green circle")
        batch, _ = pipe.encode_prompt([f"{ONE}|{OTHER}", f"{OTHER}|{ONE}"])
        assert torch.equal(pipe.encode_prompt(f" {ONE}")[0], apart[0][0])
        with pytest.raises(AccelplugError, match="negative_prompt: expected 3 prompts"):
            pipe.encode_prompt("a | b | c", negative_prompt="a | b")
    assert torch.equal(text, torch.cat([apart[0][0], apart[1][0]], 1))
    assert torch.equal(negative, torch.cat([apart[0][1]] * 2, 1))
    assert torch.equal(batch[1], torch.cat([apart[1][0], apart[0][0]], 1)[0])
    assert "encode_prompt" not in vars(pipe)


def test_a_clip_of_one_prompt_twice_is_that_of_the_prompt() -> None:
    stock, other = clip(ONE), clip(OTHER)
    with accelplug.apply(pipeline(), SEGMENTS, strict=True) as plug:
        assert torch.equal(clip(ONE), stock)
        torch.testing.assert_close(clip(f"{ONE} | {ONE}"), stock, atol=1e-4, rtol=1e-4)
        mixed = clip(f"{ONE} | {OTHER}")
        assert plug.report().served["segments"]
    assert not torch.allclose(mixed, stock, atol=1e-2)
    assert not torch.allclose(mixed, other, atol=1e-2)
    assert torch.equal(clip(ONE), stock)
