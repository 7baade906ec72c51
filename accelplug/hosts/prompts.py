"""What a forward's tokens are: which show images or videos, and which have their next one asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from accelplug import compat
from accelplug.call import TEMPLATE, Rows

VISUAL_KINDS = ("image", "video")
"""What visual tokens show, in the order in which models encode it."""

Told = tuple[list[int | None], list[bool]]
NO_IMAGE = "no image was found in the prompt; where it is, plug.mark(image=...) says"


def visual_tokens(config: Any) -> dict[str, int]:
    """Return the token that stands for each part of an image and of a video, as a base model's config has them, or its vision tower's.

    Where both are the same token (Molmo 2), it is an image's.
    """
    found: dict[str, int] = {}
    for kind in VISUAL_KINDS:
        names = (f"{kind}_token_id", f"{kind}_token_index")
        places = (config, getattr(config, "vision_config", None))
        told = (x for place in places for name in names if (x := getattr(place, name, None)) is not None)
        if (token := next(told, None)) is not None and token not in found.values():
            found[kind] = token
    return found


def asked_of(inputs: Mapping[str, Any]) -> Rows:
    """Return which logits a model's forward is asked for, by its arguments: of the last so many tokens, or bool (1|B, S).

    Tokens with a label have the logits of the token ahead of them asked for. Where all logits are, the last one is the answer's.
    """
    labels, kept = inputs.get("labels"), inputs.get("logits_to_keep")
    if isinstance(shifted := inputs.get("shift_labels"), Tensor):
        return shifted != compat.transformers.NO_LABEL
    if isinstance(labels, Tensor) and labels.ndim == 2:
        return pad(labels[:, 1:] != compat.transformers.NO_LABEL, (0, 1))
    if isinstance(kept, Tensor):
        tokens = next(x for name in ("input_ids", "inputs_embeds") if (x := inputs.get(name)) is not None)
        asked = torch.zeros(1, tokens.shape[1], dtype=torch.bool, device=kept.device)
        asked[:, kept] = True
        return asked
    return max(kept or 0, 1)


def answering(valid: Tensor, asked: Rows) -> Rows:
    """Return which tokens of a forward have their next one asked for, as in `Place`.

    Parameters
    ----------
    valid : bool (B, S_q), False for padding.
    asked : so many at the end of every row, or bool (1|B, S_q); the last valid token where these are none.
    """
    if isinstance(asked, int):
        number, chosen = asked if asked <= valid.shape[1] else 1, valid
        if bool(valid[:, -number:].all()):
            return number
    else:
        asked = asked.to(valid.device)
        chosen = valid & asked if asked.shape[1] == valid.shape[1] else torch.zeros_like(valid)
        chosen = torch.where(chosen.any(-1, keepdim=True), chosen, pad(valid, (0, 1)).diff(dim=-1) & valid)
        number = int(chosen.sum(-1).max())
    order = chosen.cumsum(-1)
    wanted = order[:, -1:] - torch.arange(number - 1, -1, -1, device=valid.device)
    return torch.searchsorted(order, wanted.clamp(min=1)).clamp(max=valid.shape[1] - 1)


def number_images(visual: Tensor, sizes: list[int]) -> Tensor:
    """Number the images of every row from 1.

    Parameters
    ----------
    visual : bool (B, S), image tokens.
    sizes : tokens of each image, row by row, as the image encoder told. Where rows are repeated for beams, they are those of
        the rows before. Where they do not add up, each run of image tokens is an image.

    Returns
    -------
    int16 (B, S), 0 for text.
    """
    counts = visual.sum(-1).tolist()
    total = sum(sizes)
    times = sum(counts) // total if total and sum(counts) % total == 0 else 0
    order = visual.cumsum(-1) - 1  # which of its row's image tokens this is
    numbers = torch.zeros(visual.shape, dtype=torch.int16, device=visual.device)
    if times and all(
        a == b for i in range(0, len(counts), times) for a, b in [(counts[i], c) for c in counts[i : i + times]]
    ):
        left = list(sizes)
        for row in range(0, len(counts), times):
            ends, end = [], 0
            while end < counts[row] and left:
                end += left.pop(0)
                ends.append(end)
            if end != counts[row]:
                break
            bounds = torch.tensor(ends, device=visual.device)
            found = torch.bucketize(order[row : row + times], bounds, right=True) + 1
            numbers[row : row + times] = found.to(torch.int16)
        else:
            return numbers * visual
    starts = visual & ~pad(visual, (1, 0))[:, :-1]
    return (starts.cumsum(-1) * visual).to(torch.int16)


def together(numbers: list[Tensor]) -> Tensor:
    """Number images and videos, int16 (B, S) each, in one: in the order in which they begin in their row."""
    if len(numbers) == 1:
        return numbers[0]
    found = torch.zeros_like(numbers[0])
    for each in numbers:
        found = torch.where(each > 0, each + found.amax(-1, keepdim=True), found)
    ranked = torch.zeros_like(found)
    for row, old in enumerate(found):
        begins = {int(number): int((old == number).long().argmax()) for number in old.unique() if number}
        for rank, number in enumerate(sorted(begins, key=lambda number: begins[number]), 1):
            ranked[row][old == number] = rank
    return ranked


def turns(ids: Tensor, visual: Tensor, valid: Tensor, told: Callable[[list[int]], Told], alone: bool) -> Tensor | None:
    """Say whose turn of a conversation every token is in, as `Prompt.turns` has it.

    Parameters
    ----------
    ids : int64 (B, S), below 0 where a token is not known: it goes on with what was said.
    visual, valid : bool (B, S), tokens of images, and False for padding.
    told : who begins to speak at each of a row's tokens, and which are the chat template's, as `accelplug.chat.speakers` says it.
    alone : whether a row in which nobody is seen to begin is one turn of the user's; else nothing is known of it, nor of the others.
    """
    found = torch.zeros(ids.shape, dtype=torch.int16)
    known = (valid & (ids >= 0)).cpu()
    for row, (tokens, shows, real) in enumerate(zip(ids.cpu(), visual.cpu(), known, strict=True)):
        begins, template = told(tokens[real].tolist())
        first = next((who for who in begins if who is not None), None)
        if first is None and not alone:
            return None
        number, speaker, said = 0, 1 if first in (None, -1) else 0, []
        for who, silent, image in zip(begins, template, shows[real].tolist(), strict=True):
            if who is not None:
                number, speaker = number + (who == 1), who
            ahead = not number and speaker == 0
            said.append(TEMPLATE if silent and not (ahead or image) else speaker * max(number, 1))
        place = (real.cumsum(0) - 1).clamp(min=0)
        found[row] = torch.tensor(said or [0], dtype=torch.int16)[place]
    return found.to(ids.device)


def opened(openings: Mapping[int, tuple[int, ...]], ids: list[int]) -> Told:
    """Say who begins to speak at each token, and which are the chat template's, by the tokens that open a turn."""
    begins: list[int | None] = [None] * len(ids)
    template = [False] * len(ids)
    for speaker, opening in openings.items():
        for i in range(len(ids) - len(opening) + 1):
            if ids[i] == opening[0] and tuple(ids[i : i + len(opening)]) == opening:
                begins[i] = speaker
                template[i : i + len(opening)] = [True] * len(opening)
    return begins, template
