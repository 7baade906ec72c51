"""Template of methods that keep fewer keys of a sequence: what they share is which calls they answer, and how they follow the cache.

What is let go of is gone: it makes room, and no later turn can ask for it. Positions stay those of the sequence, since keys hold theirs.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn.functional import pad

from accelplug.errors import UnsupportedError
from accelplug.kernels.spans import says_more
from accelplug.patches.base import Patch

if TYPE_CHECKING:
    import torch

    from accelplug.call import AttentionCall


class FewerKeys:
    """Keys and values of one layer, some of them gone. A subclass is a dataclass whose tensors (B, ...) have the batch's rows first."""

    freed = True
    length: int
    """Slots of the sequence, whatever has become of their keys."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What is kept, by name."""
        return {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}

    @abstractmethod
    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add tokens (B, H_kv, n, D); return the same, since attention is handed no others."""

    @abstractmethod
    def crop(self, length: int) -> None:
        """Drop all tokens behind the first `length`."""

    def take_rows(self, rows: Tensor) -> None:
        """Have these rows of the batch, in this order."""
        for name, x in self.tensors.items():
            setattr(self, name, x[rows.to(x.device)])

    def whole(self) -> tuple[Tensor, Tensor]:
        """Some keys are gone, so nobody may ask."""
        raise UnsupportedError("Keys that were let go of were asked for. Begin with a new cache.")


@dataclass(frozen=True, eq=False)
class Params:
    """What a call needs to know of its sequence.

    Attributes
    ----------
    valid : bool (B, S), False for padding, of the tokens up to those of the forward that read the prompt.
    padded : whether there is any.
    step : whether the call makes one token, which is none of these.
    """

    valid: Tensor
    padded: bool
    step: bool

    def of(self, past: int, tokens: int, device: torch.device) -> Tensor:
        """Which of the tokens that stand behind `past` others are not padding: bool (B, tokens)."""
        missing = max(0, past + tokens - self.valid.shape[1])
        return pad(self.valid, (0, missing), value=True)[:, past : past + tokens].to(device)


class Keeping(Patch):
    """Template of methods that keep fewer keys of a sequence."""

    family = "memory"
    needs = frozenset({"probabilities", "cache"})
    about_images = False

    def declines(self, call: AttentionCall, params: Any) -> str | None:
        place = call.place
        if place is None or not place.causal:
            return "its rows read what stands behind them"
        if place.window is not None or place.first_key:
            return "the layer reads a window of its own"
        if (
            params.step
            or call.mask is None
            or call.mask.ndim == 2
            or not says_more(call.mask, params.valid, place.first_query)
        ):
            return None
        return "the model's mask is not that of causal attention"

    def attention(self, call: AttentionCall, params: Any) -> Tensor:
        if call.kept is None:
            return super().attention(call, params)
        raise UnsupportedError(
            f"Where heads look is asked for in a forward that {type(self).__name__} answers from the keys that it kept. Leave out "
            "output_attentions, or remove the plug."
        )
