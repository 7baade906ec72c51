"""Methods that need more than one forward: they stand around ``generate``, with what the host lends them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from accelplug.patches.base import Patch, UnimplementedHalf

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Tools:
    """What a `GenerationPatch` is lent by its host. ``inputs`` are arguments of ``generate`` by name.

    Attributes
    ----------
    processor : what was given to `accelplug.apply`, or None.
    watch : ``with watch(look):`` has ``look(record, call, prompt, clock)`` see every attention call of this thread.
    images : inputs -> int16 (B, S), which image of its row a token shows, from 1; 0 for text and padding.
    grids : inputs -> rows and columns of tokens of each picture, in order.
    pictures : inputs -> the pictures, (3, H, W) float32 each, normalised: 0 is the mean pixel.
    replace : (inputs, pictures) -> inputs with other pictures of the same sizes.
    prompt_like : (inputs, text) -> inputs with the same images and another question, by the processor's chat template.
    questions : inputs -> the text that each row asks behind its image.
    matcher : folder -> a ``BlipForImageTextRetrieval`` and its tokenizer, read from there.
    stock : ``with stock():`` has forwards of this thread be the stock model's.
    """

    processor: Any
    watch: Callable[[Callable[..., None]], AbstractContextManager[None]]
    images: Callable[[Mapping[str, Any]], Tensor]
    grids: Callable[[Mapping[str, Any]], list[tuple[int, int]]]
    pictures: Callable[[Mapping[str, Any]], list[Tensor]]
    replace: Callable[[Mapping[str, Any], Sequence[Tensor]], dict[str, Any]]
    prompt_like: Callable[[Mapping[str, Any], str], dict[str, Any]]
    questions: Callable[[Mapping[str, Any]], list[str]]
    matcher: Callable[[str], tuple[Any, Any]]
    stock: Callable[[], AbstractContextManager[None]]


class GenerationPatch(Patch):
    """A method that needs more than one forward: it stands around ``generate``. Several of them nest, the first outermost."""

    family = "generation"
    writes = ("generate",)
    speed = False

    def generate(self, model: Any, call: Callable[..., Any], inputs: dict[str, Any], tools: Tools) -> Any:
        """Return what ``call(**inputs)`` would have returned, the method applied.

        Parameters
        ----------
        model : the model, for passes of the method's own; its ``generate`` is the plain one here.
        call : ``generate`` as it is without this patch.
        inputs : arguments of ``generate``, by name, ``input_ids`` among them.
        tools : what the host lends.
        """
        raise UnimplementedHalf(type(self), "generate")
