"""Where an answer looks: the attention of each new token to its image, read beside the kernel in passes of our own.

Notation: L layers that are read, T steps, V image tokens of a row. A step is one new token, the first one the prompt's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.nn.functional import interpolate, pad

from accelplug.compat.transformers import cache_given
from accelplug.errors import UnsupportedError
from accelplug.kernels.spans import fit, row_attention
from accelplug.kernels.subsets import upper

if TYPE_CHECKING:
    from torch import Tensor

    from accelplug.call import AttentionCall, Clock, Prompt
    from accelplug.patches.generation import Tools

Layers = tuple[int, int] | tuple[float, float]
"""From where to where in the model, the end not included: whole numbers count layers from 0, fractions are shares of the depth."""
RELEASED, OF = (20, 26), 32
"""The layers that CARVE's released code reads in every model, and how many the model has that they were chosen in."""
Steps = Literal["first", "last", "all"]
GENERAL = "Write a general description of the image. Answer the question using a single word or phrase."
"""CARVE's general prompt, with the suffix that both of its prompts carry."""

_GREEDY = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "temperature": None,
    "top_p": None,
    "top_k": None,
    "return_dict_in_generate": False,
    "disable_compile": True,  # compiled code cannot be watched
}
_NOT_THE_MODELS = frozenset(
    {"negative_prompt_ids", "negative_prompt_attention_mask", "position_ids", "eos_token_id", "pad_token_id", "bos_token_id"}
)


def in_order(layers: Layers | None) -> None:
    """Refuse layers that do not exist.

    Raises
    ------
    ValueError
        If they do not begin before they end, or are shares that are not in [0, 1].
    """
    if layers is not None and not (0 <= layers[0] < layers[1] and (isinstance(layers[0], int) or layers[1] <= 1)):
        raise ValueError(f"layers: expected two layers or two shares of the depth, 0 <= from < to (<= 1), got {layers}")


def numbers(layers: Layers | None, count: int) -> range:
    """Numbers of `layers` in a model of `count`; None: as released, and their share of the depth where there are fewer.

    Raises
    ------
    UnsupportedError
        If the model has not that many.
    """
    if layers is None:
        layers = RELEASED if count >= RELEASED[1] else (RELEASED[0] / OF, RELEASED[1] / OF)
    first, stop = layers if isinstance(layers[0], int) else (round(share * count) for share in layers)
    if isinstance(layers[0], int) and stop > count:
        raise UnsupportedError(f"Layers {first} to {stop - 1} are to be read, and the model has {count}. Set other layers.")
    return range(int(first), int(max(stop, first + 1)))


# --------------------------------------------------------------------------------------------------------------- maths


def contrast(asked: Tensor, described: Tensor, floor: float, steps: Steps = "all") -> Tensor:
    """What the question makes the model look at, and a description does not: (V,) float32.

    The mean of ``asked / (described + floor)`` over layers, and over steps with weights 1, 2, ...

    Parameters
    ----------
    asked, described : (L, T, V) attention; where one has more steps, those that the other lacks are left out.
    floor : added to attention, so that tokens that nothing looks at do not win.
    """
    common = min(asked.shape[1], described.shape[1])
    pick = {"first": slice(0, 1), "last": slice(-1, None), "all": slice(0, common)}[steps]
    ratio = (asked[:, pick] / (described[:, pick] + floor)).mean(0)  # [T, V]
    weights = torch.arange(1.0, len(ratio) + 1, device=ratio.device)
    return (weights[:, None] * ratio).sum(0) / weights.sum()


def upsampled(values: Tensor, grid: Sequence[int], size: Sequence[int]) -> Tensor:
    """Lay values (V,) of tokens, row by row on a grid, on a picture's pixels: (H, W), bilinear."""
    return interpolate(values.float().reshape(1, 1, *grid), size=tuple(size), mode="bilinear", align_corners=False)[0, 0]


def highest(values: Tensor, share: float) -> Tensor:
    """The given share of entries with the largest values, at least one, and all that equal the least of them: bool."""
    number = min(max(1, round(share * values.numel())), values.numel())
    return values >= values.flatten().sort(descending=True).values[number - 1]


# ------------------------------------------------------------------------------------------------------------- reading


class Gaze:
    """Watches attention calls and keeps the last query's row, mean over heads: by layer, a (B, S) for every step.

    Of the heads, the share `head_share` with the most attention to images.
    """

    def __init__(self, layers: Layers | None, head_share: float = 1.0) -> None:
        self.layers, self.head_share = layers, head_share
        self.rows: dict[int, list[Tensor]] = {}

    def __call__(self, record: Any, call: AttentionCall, prompt: Prompt, clock: Clock) -> None:
        layer = record.site.layer
        if call.place is None or not call.place.explicit or layer not in numbers(self.layers, record.site.layers):
            return
        p = row_attention(call, call.place.answers)[:, :, -1]
        p = call.place.gather_heads(p)  # [B, H, S_k]
        if self.head_share < 1:
            heads = upper((p * fit(prompt.visual, call).to(p.device)[:, None]).sum(-1), self.head_share)
            p = (p * heads[..., None]).sum(1) / heads.sum(1, keepdim=True)  # [B, S_k]
        else:
            p = p.mean(1)
        p = pad(p, (call.place.first_key, 0))  # a sliding window has lost the first keys
        p = pad(p, (0, max(0, prompt.image.shape[1] - p.shape[1])))[:, : prompt.image.shape[1]]
        if clock.phase == "prefill":  # a prompt in pieces ends with the last one
            self.rows[layer] = []
        self.rows[layer].append(p)


def look(
    model: Any, tools: Tools, inputs: Mapping[str, Any], layers: Layers | None, tokens: int, head_share: float = 1.0
) -> list[Tensor]:
    """Answer greedily and return what every row's answer looked at: (L, T, V) float32 each, T at most `tokens`; see `Gaze`.

    Raises
    ------
    UnsupportedError
        If the model's attention cannot be read.
    """
    gaze, eos = Gaze(layers, head_share), _ends(model, inputs)
    with tools.watch(gaze):
        given = {
            **model_inputs(inputs),
            **_GREEDY,
            "eos_token_id": eos,
            "pad_token_id": option(model, inputs, "pad_token_id"),
        }
        ids = model.generate(**given, max_new_tokens=tokens)[:, inputs["input_ids"].shape[1] :]
    if not gaze.rows:
        raise UnsupportedError(
            f"No attention of {type(model).__name__} in the layers {layers or 'that were asked for'} could be read: they are not "
            "transformers', or add sink logits or a soft cap. Set other layers, or take a recipe that does not look."
        )
    maps = torch.stack([torch.stack(steps, 1) for steps in gaze.rows.values()])  # [L, B, T, S]
    visual = tools.images(inputs) > 0
    ended = torch.isin(ids, torch.tensor(eos or [], dtype=ids.dtype, device=ids.device)).cumsum(-1)
    steps = (ended == 0).sum(-1).add(1).clamp(max=maps.shape[2]).tolist()
    return [maps[:, row, :stop, visual[row]] for row, stop in enumerate(steps)]


def model_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return what goes to the model, of all that goes to ``generate``."""
    return {k: v for k, v in inputs.items() if isinstance(v, torch.Tensor) and k not in _NOT_THE_MODELS}


def option(model: Any, inputs: Mapping[str, Any], name: str) -> Any:
    """Return an option of ``generate`` as it will be: by name, in its config, or in the model's."""
    if name in inputs:
        return inputs[name]
    given = getattr(inputs.get("generation_config"), name, None)
    return getattr(model.generation_config, name, None) if given is None else given


def _ends(model: Any, inputs: Mapping[str, Any]) -> list[int] | None:
    eos = option(model, inputs, "eos_token_id")
    if eos is None:
        return None
    return eos.flatten().tolist() if isinstance(eos, torch.Tensor) else [eos] if isinstance(eos, int) else list(eos)


def rows_with_a_picture(inputs: Mapping[str, Any], tools: Tools, name: str) -> list[int]:
    """Return the rows that show a picture, in order of the pictures.

    Raises
    ------
    UnsupportedError
        If a row shows several, or tokens and pixels are not both there, from the start of the conversation.
    """
    if "input_ids" not in inputs or cache_given(inputs) is not None:
        raise UnsupportedError(
            f"{name} needs a whole prompt: expected input_ids and no cache, got {', '.join(inputs)}. Pass the "
            "conversation from its start."
        )
    number = tools.images(inputs).amax(-1).tolist()
    if max(number) > 1:
        raise UnsupportedError(
            f"{name} works on one picture a row, in one tile; row {number.index(max(number))} has {max(number)}. Ask about one "
            "picture at a time, or take a recipe of attention patches."
        )
    rows = [row for row, count in enumerate(number) if count]
    if rows and inputs.get("pixel_values") is None:
        raise UnsupportedError(f"{name} changes the picture, and the prompt has image tokens only. Pass pixel_values.")
    return rows
