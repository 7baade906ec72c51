"""A second branch: the model on other inputs, in step with a generation, and what becomes of both branches' logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad

from accelplug import compat
from accelplug.errors import UnsupportedError
from accelplug.patches.guidance.gaze import model_inputs, option

if TYPE_CHECKING:
    from torch import Tensor


def likely(mixed: Tensor, z: Tensor, share: float) -> Tensor:
    """Leave logits only to tokens that the first branch, `z`, finds at least `share` times as likely as its best; (B, vocabulary)."""
    if share == 0:
        return mixed
    return mixed.masked_fill(z < math.log(share) + z.amax(-1, keepdim=True), float("-inf"))


class Branch:
    """The model on other inputs, in step with a generation: same new tokens, and a cache of its own.

    Parameters
    ----------
    inputs : what it begins with, tensors by name.
    own_positions : whether positions count its own tokens, and are not those of the generation.
    inside : makes a context for its forwards.
    """

    def __init__(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        own_positions: bool = False,
        inside: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._model, self._own_positions, self._inside = model, own_positions, inside
        self._inputs = model_inputs(inputs)
        ids = inputs["input_ids"]
        given = self._inputs.pop("attention_mask", None)
        self._mask = torch.ones_like(ids) if given is None else given
        self._cache: Any = None

    def logits(self, ids: Tensor) -> Tensor:
        """Return the logits behind the last of `ids` (B, S), float32 (B, vocabulary); S grows by 1 a call."""
        held = {compat.transformers.cache_keyword(self._model.forward): self._cache}
        given = self._inputs if self._cache is None else {"input_ids": ids[:, -1:], **held}
        if self._cache is not None:
            self._mask = pad(self._mask, (0, 1), value=1)
        with self._inside(), compat.transformers.positions_kept(self._model.base_model):
            out = self._model(
                **given, attention_mask=self._mask, position_ids=self._positions(), use_cache=True, logits_to_keep=1
            )
        self._cache = compat.transformers.cache_of(out)
        return out.logits[:, -1].float()

    def _positions(self) -> Tensor | None:
        """Positions as ``generate`` counts them; None for the model to lay out pictures in three dimensions."""
        text = (self._mask.cumsum(-1) - 1).clamp(min=0)
        offset = None if self._own_positions else compat.transformers.position_offset(self._model.base_model)
        if self._cache is None:
            return None if offset is not None and "mm_token_type_ids" in self._inputs else text
        return text[:, -1:] if offset is None else (text[:, -1:] + offset).expand(3, -1, -1)


class Mixer:
    """A logits processor that adds the second branch; rows repeated for several answers have a branch each.

    Parameters
    ----------
    rows : bool (B, 1), rows with a picture; the others are left alone.
    branch : makes a second branch of all B rows; None for none.
    mix : logits of both branches, (B, vocabulary) each, None for no second one -> logits.
    """

    def __init__(
        self, rows: Tensor, branch: Callable[[], Branch] | None, mix: Callable[[Tensor, Tensor | None], Tensor]
    ) -> None:
        self._rows, self._mix = rows, mix
        self._make, self._branches = branch, list[Branch]()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        times = len(scores) // len(self._rows)
        second = None if self._make is None else torch.empty_like(scores)
        if second is not None and self._make is not None:
            self._branches = self._branches or [self._make() for _ in range(times)]
            for copy, branch in enumerate(self._branches):
                second[copy::times] = branch.logits(input_ids[copy::times]).to(second)
        rows = self._rows.repeat_interleave(times, 0).to(scores.device)
        return torch.where(rows, self._mix(scores, second), scores)


def refuse(model: Any, inputs: Mapping[str, Any], name: str) -> None:
    """Refuse ways to decode that do not tell who follows them step by step, as a second branch does, what becomes of its rows.

    Raises
    ------
    UnsupportedError
    """
    reason = None
    if (option(model, inputs, "num_beams") or 1) > 1:
        reason = "beams are reordered, which no logits processor is told"
    elif inputs.get("assistant_model") is not None or option(model, inputs, "prompt_lookup_num_tokens"):
        reason = "drafts are taken back, which no logits processor is told"
    elif inputs.get("custom_generate") is not None:
        reason = "what custom_generate does is not known"
    if reason is not None:
        raise UnsupportedError(
            f"{name} keeps a second branch, or what it was told, in step with the generation, and cannot here: {reason}. Decode "
            "greedily or by sampling."
        )
