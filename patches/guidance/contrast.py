"""A contrast with the text alone: logits go on from what the model would say without its pictures to what it says with them.

The second half of PAI (arXiv 2407.21771, ECCV 2024; `pai` is the first) and of PAINT's released code (arXiv 2501.12206; `imbalance`
is its first). With z and z_text the log-probabilities of the next token with the pictures and without,

    z_text + gamma (z - z_text),   among tokens with   z >= log(cutoff) + max z.

Without its pictures means that the prompt's image tokens are taken out. That branch is the stock model's: no patch of the recipe
changes it. ``guidance_scale`` of ``generate`` is neither: it needs a negative prompt, and has no cut-off.

Greedy decoding and sampling stay with ``generate``. Rows without a picture are answered as ever.

Experimental. Nothing was measured with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch.nn.utils.rnn import pad_sequence

from accelplug.errors import UnsupportedError
from accelplug.patches.base import Config
from accelplug.patches.generation import GenerationPatch
from accelplug.patches.guidance.branch import Branch, Mixer, likely, refuse

if TYPE_CHECKING:
    from torch import Tensor

    from accelplug.patches.generation import Tools


def contrasted(z: Tensor, z_text: Tensor, gamma: float, cutoff: float) -> Tensor:
    """Return the contrast of two branches' logits, (B, vocabulary) each: log-probabilities times a factor, -inf where cut off."""
    z, z_text = z.log_softmax(-1), z_text.log_softmax(-1)
    return likely(z_text + gamma * (z - z_text), z, cutoff)


def without_pictures(inputs: Mapping[str, Any], visual: Tensor) -> dict[str, Tensor]:
    """Return a prompt's tokens but for those of pictures, `visual` bool (B, S), padded on the left with token 0.

    Raises
    ------
    UnsupportedError
        If nothing is left of a row with a picture.
    """
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    keep = ~visual if mask is None else ~visual & mask.bool()
    if bool((visual.any(-1) & ~keep.any(-1)).any()):
        raise UnsupportedError(
            "contrast reads a prompt without its pictures, and a row of this one is all picture. Add text."
        )
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if (kinds := inputs.get("token_type_ids")) is not None:  # by which some models let a prompt read itself both ways
        whole["token_type_ids"] = kinds
    rows = {name: [row[kept] for row, kept in zip(x, keep, strict=True)] for name, x in whole.items()}
    return {name: pad_sequence(x, batch_first=True, padding_side="left") for name, x in rows.items()}


class Contrast(GenerationPatch):
    """Have what the pictures add count more."""

    class Config(Config):
        gamma: float = Field(
            1.1, ge=0, le=100, description="Factor on what the pictures add; 1 for as much as it is. Paper: 1.1."
        )
        cutoff: float = Field(0.1, ge=0, le=1, description="Tokens less likely than this times the best are out. Code: 0.1.")

    config: Config

    def generate(self, model: Any, call: Callable[..., Any], inputs: dict[str, Any], tools: Tools) -> Any:
        gamma, cutoff = self.config.gamma, self.config.cutoff
        if gamma == 1 and cutoff == 0:
            return call(**inputs)
        if "input_ids" not in inputs or inputs["input_ids"].shape[1] == 0:
            raise UnsupportedError(
                f"contrast takes a prompt's image tokens out, and needs its input_ids; got {', '.join(inputs)}. Pass them."
            )
        visual = tools.images(inputs) > 0
        if not bool(visual.any()):
            return call(**inputs)
        refuse(model, inputs, "contrast")

        def text() -> Branch:
            return Branch(model, without_pictures(inputs, visual), own_positions=True, inside=tools.stock)

        def mix(z: Tensor, z_text: Tensor | None) -> Tensor:
            assert z_text is not None
            return contrasted(z, z_text, gamma, cutoff)

        mixer = Mixer(visual.any(-1, keepdim=True), text, mix)
        return call(**{**inputs, "logits_processor": [*(inputs.get("logits_processor") or ()), mixer]})
