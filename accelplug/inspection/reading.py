"""inspect() of a vision-language model with inputs: one prompt is read, with its images and without, and every layer is looked at."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from accelplug import compat
from accelplug.call import AttentionCall, Clock, Prompt
from accelplug.chat import Chat, speakers, tokenizer_of
from accelplug.errors import AccelplugError, AlreadyAppliedError, NoMatchError, ShapeError, UnsupportedError, worded
from accelplug.families.pixels import frames, patch_grids
from accelplug.families.pixels import pictures as whole
from accelplug.families.vlm import Vlm, token_grid
from accelplug.hosts.attention import AttentionRecord
from accelplug.hosts.blind import Blind
from accelplug.hosts.host import Setup, plug_of
from accelplug.hosts.prompts import visual_tokens
from accelplug.hosts.stream import watching
from accelplug.hosts.transformers import LanguageHost
from accelplug.hosts.undo import Undo
from accelplug.inspection.looking import SINK, VlmInspection
from accelplug.kernels.spans import on_spans, probabilities, read_rows, row_scores
from accelplug.kernels.vision import divergence, massive, normalised, vision_aware

if TYPE_CHECKING:
    from torch import Tensor

SHOWN_TOKENS = 100
"""Tokens that are shown of an answer, at most."""
ALIGNED = 0.9
"""Cosine with the first token from which a token is a sink, whatever the dimension."""


def inspect_vlm(model: Any, inputs: Mapping[str, Any], processor: Any = None) -> VlmInspection:
    """Read one prompt and say where the model looks; it is left as it was.

    Parameters
    ----------
    model : a transformers vision-language model.
    inputs : a processor's output: ``input_ids``, ``attention_mask``, ``pixel_values`` ... Batches are padded on the left.
    processor : the model's, to say what was asked and what it answers.

    Raises
    ------
    AlreadyAppliedError
        If a recipe is on the model.
    NoMatchError
        If the family is not known, or the inputs show no image.
    ShapeError
        If a row is padded on the right, or has no text.
    UnsupportedError
        If the attention cannot be recomputed, or the model's heads are spread over processes.
    """
    name = type(model).__name__
    if (on := plug_of(model.base_model)) is not None:
        raise AlreadyAppliedError(f"{on.recipe.name} is on this {name}, and inspect() reads a stock model. Remove it first.")
    compat.versions.require("transformers")
    host = LanguageHost(model, Setup(), watched=True)
    if host.family is None:
        raise NoMatchError(
            f"{name} is not a known vision-language model: with inputs, inspect() expects one whose images lie in the prompt "
            f"(accelplug.register_vlm makes one known). {worded('Leave the inputs out', 'Leave --image out')} for a summary."
        )
    if host.tensor_parallel:
        raise UnsupportedError(
            f"The heads of this {name} are spread over processes, expected all in one. Load it on one device."
        )
    base, reading = host.base, _Reading()
    _require_inputs(inputs)
    inputs = {key: x.to(model.device) if isinstance(x, torch.Tensor) else x for key, x in inputs.items()}
    with Undo() as undo, torch.no_grad():
        undo.add(partial(compat.transformers.set_position_offset, base, compat.transformers.position_offset(base)))
        host.install(undo)
        with watching(reading):
            base(**inputs, use_cache=False)
        prompt = reading.checked(name)
        blind = Blind(base, host.decoder, prompt, dict(inputs), undo)
    attention = compat.transformers.attention_name(host.records[0].config)
    found = reading.result(name, attention, host.family, blind, inputs, base.config)
    return (
        found
        if processor is None
        else replace(found, question=_told_question(prompt, processor), answer=_told_answer(model, inputs, processor))
    )


def _told_question(prompt: Prompt, processor: Any) -> str:
    """What the first row asks behind its picture, without what the chat template says."""
    if prompt.ids is None:
        return ""
    tokenizer, ids = tokenizer_of(processor), prompt.ids[0].tolist()
    _, template = speakers(tokenizer, ids)
    asked = (prompt.question & prompt.later)[0].tolist()
    kept = [
        token
        for token, of_template, of_question in zip(ids, template, asked, strict=True)
        if of_question and not of_template
    ]
    return tokenizer.decode(kept, skip_special_tokens=True).strip()


def _told_answer(model: Any, inputs: dict[str, Any], processor: Any) -> str:
    chat = Chat(model, processor)
    return chat.texts(inputs, chat.generate(inputs, SHOWN_TOKENS))[0]


@dataclass
class _LayerReading:
    """What one layer's call tells: masses (3, H), VAS, its ratio and share, maps by row and image, heads (B, H, D), residual stream."""

    masses: Tensor
    vas: Tensor
    ratio: Tensor
    share: Tensor
    maps: list[list[np.ndarray]]
    heads: Tensor
    first: Tensor
    hidden: Tensor
    aligned: np.ndarray


class _Reading:
    """Looks at every attention call while one prompt is read, and keeps what is small."""

    def __init__(self) -> None:
        self.prompt: Prompt | None = None
        self.layers: dict[int, _LayerReading] = {}
        self.closed: list[int] = []

    def __call__(self, record: AttentionRecord, call: AttentionCall, prompt: Prompt, clock: Clock) -> None:
        self.prompt = prompt
        layer = record.site.layer
        assert layer is not None and call.hidden is not None and call.place is not None  # noqa: PT018
        if not bool(prompt.visual.any()):
            return
        if not call.place.explicit:
            self.closed.append(layer)
            return
        device = call.q.device
        behind = prompt.question & prompt.later  # what stands ahead of the image cannot look at it
        image, valid, question = (x.to(device) for x in (prompt.image, prompt.valid, behind))
        spans = torch.stack([prompt.visual, prompt.system, prompt.question], -1).to(device, torch.float32)
        shown = (image > 0).any(-1)
        number = max(1, image.shape[1] - int(question.any(0).long().argmax())) if bool(question.any()) else 1
        scores = row_scores(call, number)  # [B, H, rows, S]
        p = probabilities(scores)
        masses = on_spans(call, p, spans)  # [B, H, rows, 3]
        in_reach = on_spans(call, scores.isfinite().float(), spans) > 0
        asked = question[:, None, -number:].expand(masses.shape[:3])
        on_image, on_system, on_question = masses.unbind(-1)
        nan, told = float("nan"), asked & in_reach[..., :2].all(-1)

        def mean(x: Tensor, rows: Tensor) -> Tensor:
            """Over heads and question tokens, of the rows of the batch that show an image; 0 / 0 is left out."""
            return x.masked_fill(~rows, nan).nanmean((1, 2))[shown].nanmean().cpu()

        last = p[:, :, -1].mean(1)
        maps = [
            [row[numbers == i].cpu().numpy() for i in range(1, int(numbers.max()) + 1)]
            for row, numbers in zip(last, image, strict=True)
        ]
        rows, begin = torch.arange(len(valid), device=device), valid.long().argmax(-1)
        hidden = call.hidden.to(device)
        start, stream = hidden[0, begin[0]].float(), hidden[0, valid[0]]
        cosine = torch.cosine_similarity(hidden[0, image[0] > 0].float(), start[None], dim=-1)
        self.layers[layer] = _LayerReading(
            masses[shown, :, -1].mean(0).T.cpu(),
            mean(on_image / (on_image + on_system), told),
            mean(on_image / on_system, told),
            mean(on_image / (on_image + on_question), asked),
            maps,
            read_rows(call, p[:, :, -1:])[:, :, -1],
            normalised(hidden[rows, begin])[shown].cpu(),
            stream.cpu(),
            (cosine.abs() > ALIGNED).nonzero()[:, 0].cpu().numpy(),
        )

    def checked(self, name: str) -> Prompt:
        """Return the prompt, if it is one that can be told about."""
        prompt = self.prompt
        if prompt is None:
            raise UnsupportedError(
                f"The attention of this {name} was called in a way that is not understood (dropout, or a mask of the flex "
                "kernel), so nothing was seen. Call .eval(), and load it with sdpa, eager or flash attention."
            )
        if not bool(prompt.visual.any()):
            raise NoMatchError(
                f"The inputs of {name} show no image: expected image tokens among {prompt.image.shape[1]} tokens, found none. "
                "Pass what the model's processor makes of text and images."
            )
        if not bool(prompt.valid[:, -1].all()):
            raise ShapeError(
                f"The inputs of {name} are padded on the right, so that the last token of a row is not real. "
                'Set processor.tokenizer.padding_side = "left".'
            )
        if not bool((prompt.valid & ~prompt.visual).any(-1).all()):
            raise ShapeError(f"A row of the inputs of {name} is all image: expected a question. Add text to the prompt.")
        if not self.layers:
            raise UnsupportedError(
                f"Every layer of this {name} adds sink logits or a soft cap, and cannot be recomputed from queries, keys and mask. "
                f"Load it with sdpa or eager attention, or {worded('leave the inputs out', 'leave --image out')} for a summary."
            )
        return prompt

    def result(
        self, name: str, attention: str, family: Vlm, blind: Any, inputs: Mapping[str, Any], config: Any
    ) -> VlmInspection:
        """Put the layers together."""
        prompt = self.prompt
        assert prompt is not None
        numbers = tuple(sorted(self.layers))
        layers = [self.layers[n] for n in numbers]
        visual, system, question = torch.stack([x.masses for x in layers], 1).numpy()
        dims, phi, said = _sinks(layers)
        seen = prompt.visual[0][prompt.valid[0]].cpu()
        shown = prompt.visual.any(-1).cpu()
        pairs = (divergence(x.heads, blind.heads(n).to(x.heads.device)) for n, x in zip(numbers, layers, strict=True))
        vhd, ta = (
            torch.stack(x) for x in zip(*((v.cpu()[shown].mean(0), t.cpu()[shown].mean(0)) for v, t in pairs), strict=True)
        )
        sizes = [len(x[0]) for x in _by_image(layers)]
        pictures, grids = _pictures(family, inputs, config, list(zip(_images_or_videos(prompt, config), sizes, strict=True)))
        notes = [*self._unscored(prompt), *said]
        if any(picture is None for picture in pictures):
            notes.append(f"the pixels of {family.name} do not show the picture; maps are drawn on grey")
        if any(grid is None for grid in grids):
            notes.append("a picture's tokens lie on no single grid; they are drawn in reading order")
        kinds = {"image": prompt.visual, "system": prompt.system, "question": prompt.question}
        return VlmInspection(
            model=name,
            family=family.name,
            attention=attention,
            layers=numbers,
            visual_mass=visual,
            system_mass=system,
            question_mass=question,
            vas=torch.stack([x.vas for x in layers]).numpy(),
            vas_ratio=torch.stack([x.ratio for x in layers]).numpy(),
            visual_share=torch.stack([x.share for x in layers]).numpy(),
            image_attention=[
                [np.stack([x.maps[row][i] for x in layers]) for i in range(len(layers[0].maps[row]))]
                for row in range(len(layers[0].maps))
            ],
            sink_dims=dims,
            phi=phi.numpy(),
            visual_sinks=[(x[seen] >= SINK).nonzero()[:, 0].numpy() for x in phi],
            cosine_sinks=[x.aligned for x in layers],
            vhd=vhd.numpy(),
            ta=ta.numpy(),
            vision_heads=vision_aware(vhd, ta).numpy(),
            tokens={kind: int(span[0].sum()) for kind, span in kinds.items()},
            pictures=pictures,
            grids=grids,
            notes=tuple(notes),
            origin=Path(getattr(config, compat.transformers.ORIGIN, "")).name,
        )

    def _unscored(self, prompt: Prompt) -> Iterator[str]:
        """Which layers are left out, and which have no VAS."""

        def named(layers: Iterable[int]) -> str:
            return ", ".join(map(str, sorted(layers)))

        if self.closed:
            yield f"layers {named(self.closed)} add sink logits or a soft cap, and are left out"
        if not bool(prompt.system.any()):
            yield "no system text stands before the first picture: there is no picture : system"
        elif short := [n for n, x in self.layers.items() if math.isnan(x.vas)]:
            yield f"no question token of layers {named(short)} sees both the picture and the system text: they have no picture : system"


def _sinks(layers: list[_LayerReading]) -> tuple[tuple[int, ...], Tensor, list[str]]:
    """Sink dimensions, phi (L, tokens) of the first row, and what to say where no dimension was found."""
    first = torch.stack([x.first for x in layers])  # [L, rows, C]
    if dims := sink_dimensions(first):
        return dims, torch.stack([normalised(x.hidden)[:, list(dims)].abs().amax(-1) for x in layers]), []
    width, largest = first.shape[-1], math.sqrt(first.shape[-1])
    why = (
        f"of {width} dimensions none can reach {SINK:g} times their root mean square"
        if largest < SINK
        else "no dimension of the first token is massive in the middle layers"
    )
    return (), torch.zeros(len(layers), len(layers[0].hidden)), [f"{why}: sinks are told by likeness to the first token"]


def sink_dimensions(first: Tensor) -> tuple[int, ...]:
    """Return the dimensions in which first tokens are massive, the largest first, at most four.

    Parameters
    ----------
    first : float32 (L, rows, C), the normalised first token as it enters each layer. A dimension counts if its size is at
        least `SINK` and it is massive, in more than half of the rows of the middle half of layers.
    """
    layers = len(first)
    middle = first[layers // 4 : 3 * layers // 4 + 1].flatten(0, 1)
    often = massive(middle, SINK).float().mean(0) > 0.5
    ranked = torch.where(often, middle.abs().mean(0), 0).argsort(descending=True)[: min(4, int(often.sum()))]
    return tuple(ranked.tolist())


def _by_image(layers: list[_LayerReading]) -> list[list[np.ndarray]]:
    """The first row's maps, by image, then by layer."""
    return [list(maps) for maps in zip(*(x.maps[0] for x in layers), strict=True)]


def _pictures(
    family: Vlm, inputs: Mapping[str, Any], config: Any, shown: list[tuple[str, int]]
) -> tuple[list[np.ndarray | None], list[tuple[int, int] | None]]:
    """Pictures and token grids of what the first row shows (image or video, tokens), the first of its kind in the batch.

    Frames of a video lie one under another.
    """
    vision = config.vision_config
    own = patch_grids(inputs, vision) if family.grid == "own" else None
    pictures: list[np.ndarray | None] = []
    grids: list[tuple[int, int] | None] = []
    index, start = Counter[str](), Counter[str]()
    for kind, number in shown:
        pixels = inputs.get("pixel_values" if kind == "image" else "pixel_values_videos")
        thw, at = inputs.get(f"{kind}_grid_thw"), index[kind]
        index[kind] += 1
        told = own if kind == "image" and own is not None else None if thw is None else thw.tolist()
        sizes = None if told is None or at >= len(told) else told[at]
        grids.append(token_grid(family, number, sizes and [1, sizes[0] * sizes[1], sizes[2]]))
        picture = None
        if own is not None and family.pixels in ("filled", "images") and kind == "image" and at < len(own):
            picture = whole(family, inputs, vision)[at]
        elif pixels is not None and family.pixels == "images" and pixels.ndim == 4 and at < len(pixels):
            picture = pixels[at]
        elif pixels is not None and family.pixels == "patches" and sizes is not None:
            begin = start[kind]
            start[kind] += math.prod(sizes)
            picture = frames(pixels[begin : start[kind]], sizes, vision).transpose(0, 1).flatten(1, 2)
        pictures.append(None if picture is None else _as_bytes(picture))
    return pictures, grids


def _images_or_videos(prompt: Prompt, config: Any) -> list[str]:
    """Whether each of what the first row shows is an image or a video."""
    video = visual_tokens(config).get("video")
    begins = [int((prompt.image[0] == number).long().argmax()) for number in range(1, int(prompt.image[0].max()) + 1)]
    return ["video" if prompt.ids is not None and prompt.ids[0, at] == video else "image" for at in begins]


def _as_bytes(picture: Tensor) -> np.ndarray:
    """A normalised picture (3, H, W) as uint8 (H, W, 3), stretched from black to white: its mean and scale are not known."""
    low, high = picture.float().aminmax()
    return (255 * (picture.float() - low) / (high - low).clamp(min=1e-6)).round().byte().permute(1, 2, 0).cpu().numpy()


def _require_inputs(inputs: Any) -> None:
    """Refuse inputs that no processor made."""
    found = inputs.get("input_ids", inputs.get("inputs_embeds")) if isinstance(inputs, Mapping) else None
    if not isinstance(found, torch.Tensor) or found.ndim != (3 if found.is_floating_point() else 2):
        got = ", ".join(map(str, inputs)) if isinstance(inputs, Mapping) else type(inputs).__name__
        raise AccelplugError(
            f"inspect: expected what the processor makes of text and images, with input_ids (B, S) among it, got {got or 'none'}."
        )
