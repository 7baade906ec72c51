"""Global and local: logits on the picture, plus those on the picture with all but what the question is about masked.

AGLA (arXiv 2406.12718, CVPR 2025), from the paper's formulas. A matcher says how much each pixel has to do with the question, and
how well picture and question match, c in [0, 1]. The share ``1 - c / 2`` of pixels is kept, the highest ones; a second branch
reads that picture, and ``z + alpha * z_masked`` decides, among tokens with ``z >= log(beta) + max z``.

The paper's matcher is a BLIP: the map is a GradCAM of one layer's cross-attention under its matching head, c the cosine of what it
makes of picture and question apart. The released code masks in black and blurs the map; here masked pixels are the mean pixel and
the map is bilinear.

Attention patches of the same recipe apply to both branches. Greedy decoding and sampling stay with ``generate``. Rows without
a picture are answered as ever.

``matcher: own`` is an experiment of ours, not the paper's: where the model itself looks, at the prompt's
end, stands in for the matcher's map (against a general prompt, as in `carve`, where a processor was given), and how far that
map is from flat, 1 minus its normalised entropy, for its score.

Experimental. On the bundled model, one small model of coloured shapes, with its own attention as the matcher, it made no
difference that shows: +1.4 points of hallucination (95 %: -0.8 to +3.9), at 0.29 of the speed. BLIP's matcher was not measured.
On `llava-smollm2` it made +3.6 points of hallucination (95 %: +1.7 to +5.8).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, model_validator
from torch.nn.functional import cosine_similarity, interpolate

from accelplug.errors import AccelplugError
from accelplug.patches.base import Config
from accelplug.patches.generation import GenerationPatch
from accelplug.patches.guidance.branch import Branch, Mixer, likely, refuse
from accelplug.patches.guidance.gaze import (
    GENERAL,
    Layers,
    contrast,
    highest,
    in_order,
    look,
    numbers,
    rows_with_a_picture,
    upsampled,
)

if TYPE_CHECKING:
    from torch import Tensor

    from accelplug.call import Site
    from accelplug.patches.generation import Tools

BLIP_MEAN, BLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""What BLIP's pictures are normalised with, by channel, of values from 0 to 1."""


# --------------------------------------------------------------------------------------------------------------- maths


def concentration(values: Tensor) -> float:
    """One minus the normalised entropy of values (V,), none negative: 0 where all are equal, 1 where one has everything."""
    total = values.double().sum()
    if len(values) == 1 or total == 0:
        return 0.0
    return 1 - float(torch.special.entr(values.double() / total).sum()) / math.log(len(values))


def kept_pixels(values: Tensor, score: float) -> Tensor:
    """Pixels that the second branch sees: the share ``1 - score / 2`` of (H, W) with the largest values, bool."""
    return highest(values, min(1 - score / 2, 1 - 1e-5))


def mixed(z: Tensor, z_masked: Tensor | None, alpha: float, beta: float) -> Tensor:
    """Return ``z + alpha * z_masked``, -inf where ``z < log(beta) + max z``; all (B, vocabulary), None for no second branch."""
    return likely(z if z_masked is None else z + alpha * z_masked, z, beta)


def grad_cam(blip: Any, pixels: Tensor, ids: Tensor, layer: int) -> tuple[Tensor, float]:
    """Return what a question points at in a picture, (rows, columns) float32, and how well they match: a cosine.

    The map is the cross-attention of one layer times its gradient where that is positive, mean over heads and over words, of the
    head that tells whether both match. The cosine is that of picture and question read apart.

    Parameters
    ----------
    blip : a ``BlipForImageTextRetrieval``; neither its parameters nor their gradients change.
    pixels : (1, 3, H, W), normalised for it.
    ids : int64 (1, words + 2), the question between the tokenizer's two special tokens.
    layer : text block, 0-based.
    """
    probabilities: list[Tensor] = []
    cross = blip.text_encoder.encoder.layer[layer].crossattention.self
    handle = cross.register_forward_hook(lambda module, args, out: probabilities.append(out[1]))
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(ids.device.type, enabled=False):
            words = {"input_ids": ids.clone(), "attention_mask": torch.ones_like(ids)}
            with torch.no_grad():
                seen = blip.vision_model(pixels.clone()).last_hidden_state
                alone = blip.text_encoder(**words).last_hidden_state
                match = cosine_similarity(blip.vision_proj(seen[:, 0]), blip.text_proj(alone[:, 0]))
            seen.requires_grad_()  # so that the gradient stops here
            flags = torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device)
            both = blip.text_encoder(**words, encoder_hidden_states=seen, encoder_attention_mask=flags)
            logits = blip.itm_head(both.last_hidden_state[:, 0])
            (gradient,) = torch.autograd.grad(logits[:, 1].sum(), probabilities)
    finally:
        handle.remove()
    cam = (probabilities[0] * gradient.clamp(min=0)).detach()[0, :, 1:-1, 1:].mean((0, 1))  # without class token
    side = math.isqrt(len(cam))
    return cam.float().reshape(side, side), float(match[0])


class Agla(GenerationPatch):
    """Add the logits on a picture that is masked down to what the question is about."""

    class Config(Config):
        alpha: float = Field(2.0, ge=0, le=10, description="Weight of the second branch's logits; 0 for none. Paper: 2.")
        beta: float = Field(0.5, ge=0, le=1, description="Tokens less likely than this times the best are out. Paper: 0.5.")
        matcher: Literal["own", "blip"] = Field("own", description="Who says what the question is about. Paper: blip.")
        blip_dir: str | None = Field(None, description="Local folder of a BlipForImageTextRetrieval. Paper: ITM large.")
        blip_layer: int = Field(6, ge=0, description="Text block whose cross-attention is read, 0-based. Paper: 6.")
        layers: Layers | None = Field(
            None, description="Layers that own reads, from and up to a number or a share of the depth. As in carve."
        )
        floor: float = Field(1e-8, gt=0, description="Added to attention under the general prompt. As in carve.")

        @model_validator(mode="after")
        def _fits(self) -> Agla.Config:
            if self.matcher == "blip" and not self.blip_dir:
                raise ValueError("matcher: blip needs blip_dir, a local folder of a BlipForImageTextRetrieval")
            in_order(self.layers)
            return self

    config: Config

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self._blip: tuple[Any, Any] | None = None

    def check(self, sites: Sequence[Site], heads: int, width: int) -> None:
        numbers(self.config.layers, sites[0].layers)

    def generate(self, model: Any, call: Callable[..., Any], inputs: dict[str, Any], tools: Tools) -> Any:
        alpha, beta = self.config.alpha, self.config.beta
        if alpha == beta == 0:
            return call(**inputs)
        refuse(model, inputs, "agla")
        if not (rows := rows_with_a_picture(inputs, tools, "agla")):
            return call(**inputs)
        branch = None
        if alpha:
            masked = tools.replace(inputs, self._masked(model, inputs, rows, tools))

            def branch() -> Branch:
                return Branch(model, masked)

        shown = torch.zeros(len(inputs["input_ids"]), 1, dtype=torch.bool)
        shown[rows] = True

        def mix(z: Tensor, z_masked: Tensor | None) -> Tensor:
            return mixed(z, z_masked, alpha, beta)

        return call(**{**inputs, "logits_processor": [*(inputs.get("logits_processor") or ()), Mixer(shown, branch, mix)]})

    def _masked(self, model: Any, inputs: dict[str, Any], rows: list[int], tools: Tools) -> list[Tensor]:
        """The pictures with everything else at the mean pixel."""
        pictures = tools.pictures(inputs)
        match = self._by_blip if self.config.matcher == "blip" else self._by_gaze
        masked = []
        for picture, (values, score) in zip(pictures, match(model, inputs, rows, pictures, tools), strict=True):
            masked.append(picture * kept_pixels(values.to(picture.device), score).to(picture))
        return masked

    def _by_gaze(
        self, model: Any, inputs: dict[str, Any], rows: list[int], pictures: list[Tensor], tools: Tools
    ) -> list[tuple[Tensor, float]]:
        asked = look(model, tools, inputs, self.config.layers, 1)
        described = None
        if tools.processor is not None:
            described = look(model, tools, tools.prompt_like(inputs, GENERAL), self.config.layers, 1)
        found = []
        for row, picture, grid in zip(rows, pictures, tools.grids(inputs), strict=True):
            tokens = asked[row].mean((0, 1))
            if described is not None:
                tokens = contrast(asked[row], described[row], self.config.floor)
            found.append((upsampled(tokens, grid, picture.shape[-2:]), concentration(tokens)))
        return found

    def _by_blip(
        self, model: Any, inputs: dict[str, Any], rows: list[int], pictures: list[Tensor], tools: Tools
    ) -> list[tuple[Tensor, float]]:
        if not hasattr(tools.processor, "image_processor"):
            raise AccelplugError(
                f"matcher: blip reads the question and undoes the picture's normalisation, and needs the model's processor, got "
                f"{type(tools.processor).__name__}. Pass it: accelplug.apply(model, recipe, processor=processor)."
            )
        if self._blip is None:
            self._blip = tools.matcher(str(self.config.blip_dir))
        blip, tokenizer = self._blip
        if self.config.blip_layer >= (count := len(blip.text_encoder.encoder.layer)):
            raise AccelplugError(f"blip_layer: this BLIP has {count} text blocks, got block {self.config.blip_layer}.")
        blip = blip.to(pictures[0].device)
        side, questions = blip.config.vision_config.image_size, tools.questions(inputs)
        own, theirs = tools.processor.image_processor, (BLIP_MEAN, BLIP_STD)
        found = []
        for row, picture in zip(rows, pictures, strict=True):
            mean, std = (picture.new_tensor(x)[:, None, None] for x in (own.image_mean, own.image_std))
            new_mean, new_std = (picture.new_tensor(x)[:, None, None] for x in theirs)
            colours = interpolate((picture * std + mean)[None], size=(side, side), mode="bicubic", antialias=True)
            pixels = (colours.clamp(0, 1) - new_mean) / new_std
            ids = torch.tensor([tokenizer(questions[row], truncation=True)["input_ids"]], device=picture.device)
            cam, score = grad_cam(blip, pixels, ids, self.config.blip_layer)
            found.append((upsampled(cam.flatten(), cam.shape, picture.shape[-2:]), score))
        return found
