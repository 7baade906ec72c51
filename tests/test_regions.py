"""Prompts for boxes of a picture: which tokens read which."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import accelplug
from accelplug.call import Layout
from accelplug.errors import AccelplugError, RecipeError
from accelplug.patches.guidance.regions import Regions
from accelplug.testing.models import build_denoiser, unet_sd15
from tests.test_segments import call_of

BOXES = [(0, 0, 1, 0.5), (0.5, 0.25, 1, 1)]  # they overlap


def in_boxes(layout: Layout, everywhere: bool) -> torch.Tensor:
    """Which prompts each visual token reads, token by token."""
    frames, rows, columns = layout.grid_thw
    reads = torch.zeros(frames, rows, columns, 3, dtype=torch.bool)
    for row in range(rows):
        for column in range(columns):
            y, x = (row + 0.5) / rows, (column + 0.5) / columns
            inside = [top <= y < bottom and left <= x < right for top, left, bottom, right in BOXES]
            reads[:, row, column] = torch.tensor([everywhere or not any(inside), *inside])
    return reads.flatten(0, 2)


@pytest.mark.parametrize("everywhere", [True, False])
@pytest.mark.parametrize("crossed", [True, False])
def test_tokens_read_the_prompts_of_their_boxes(crossed: bool, everywhere: bool) -> None:
    layout = Layout((2, 3, 5), text_after=9, crossed=crossed, texts=(2, 3, 4))
    texts = torch.repeat_interleave(torch.arange(3), torch.tensor(layout.texts))
    own = in_boxes(layout, everywhere)[:, texts]  # [N, text]
    reads = own
    if not crossed:
        visual = torch.cat([torch.ones(layout.visual, layout.visual, dtype=torch.bool), own], 1)
        reads = torch.cat([visual, torch.cat([own.mT, texts[:, None] == texts], 1)])
    call, patch = call_of(layout), Regions({"boxes": BOXES, "everywhere": everywhere})
    params = patch.prepare(None, layout, None, {})
    assert params is not None
    torch.testing.assert_close(patch.attend(call, params), scaled_dot_product_attention(call.q, call.k, call.v, reads))


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(AccelplugError, match="one for each of 2 boxes, got 2 prompts"):
        Regions({"boxes": BOXES}).prepare(None, Layout((1, 4, 4), text_after=4, texts=(2, 2)), None, {})
    with pytest.raises(RecipeError, match="in shares of the picture"):
        Regions({"boxes": [(0, 0.5, 1, 0.5)]})


def test_unets_read_prompts_at_every_resolution() -> None:
    model, inputs = build_denoiser(unet_sd15)
    text = inputs["encoder_hidden_states"]
    rule = {"patch": "regions", "with": {"boxes": BOXES[:1], "tokens": text.shape[1]}}
    with torch.no_grad():
        stock = model(**inputs).sample
        with accelplug.apply(model, {"rules": [rule]}, strict=True) as plug:
            assert torch.equal(model(**inputs).sample, stock)
            same = model(**{**inputs, "encoder_hidden_states": torch.cat([text, text], 1)}).sample
            other = model(**{**inputs, "encoder_hidden_states": torch.cat([text, -text], 1)}).sample
            found = {row.layout.grid_thw for row in plug.where() if isinstance(row.layout, Layout) and row.name == "regions"}
            assert found == {(1, 12, 16), (1, 6, 8)}
    torch.testing.assert_close(same, stock, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(other, stock, atol=1e-4)
