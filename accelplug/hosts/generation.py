"""generate() with something before, around or behind it: the door for methods that need more than one forward."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor

from accelplug import chat
from accelplug.errors import AccelplugError, UnsupportedError
from accelplug.families import pixels
from accelplug.families.vlm import Vlm, token_grid
from accelplug.hosts.ledger import Ledger
from accelplug.hosts.prompts import number_images
from accelplug.hosts.record import Choice
from accelplug.hosts.stream import Stream, stock, watching
from accelplug.hosts.undo import Undo
from accelplug.patches.generation import Tools
from accelplug.patches.guidance.branch import refuse

_INSIDE: ContextVar[bool] = ContextVar("accelplug_generating", default=False)
_BEGUN: ContextVar[list[Stream] | None] = ContextVar("accelplug_begun", default=None)
"""The prompts that the present call of ``generate`` has read, None outside of one."""


class GeneratingHost(Protocol):
    """The language model's host, as far as it is asked here."""

    model: Any
    family: Vlm | None
    ledger: Ledger
    visual_tokens: dict[str, int]
    no_image: str
    recipe: str
    """Name of the recipe that is on."""

    @property
    def needs(self) -> frozenset[str]:
        """What the recipe's patches ask of the host."""


class Generation:
    """A model's ``generate``, wrapped on the instance by a recipe's generation patches, the first one outermost."""

    def __init__(self, host: GeneratingHost, around: tuple[Choice, ...], processor: Any) -> None:
        self.host, self.around, self.processor = host, around, processor

    def tools(self) -> Tools:
        """Return what patches are lent."""
        prompts = _Prompts(self.host, self.processor)
        return Tools(
            self.processor,
            watching,
            prompts.images,
            prompts.grids,
            prompts.pictures,
            prompts.replace,
            prompts.prompt_like,
            prompts.questions,
            _matcher,
            stock,
        )

    def note(self, stream: Stream) -> None:
        """Remember a prompt for the rest of a call of ``generate``."""
        if (begun := _BEGUN.get()) is not None:
            begun.append(stream)

    def begun(self, ids: Tensor) -> Stream | None:
        """Return the prompt that is read once more, with what was generated since: the beginning of `ids` (B, S), or None."""
        for stream in _BEGUN.get() or ():
            known = stream.prompt.ids
            if known is None or stream.host is not self.host or known.shape[0] != ids.shape[0]:
                continue
            if known.shape[1] < ids.shape[1] and torch.equal(ids[:, : known.shape[1]], known):
                return stream
        return None

    def require_whole(self, kwargs: Mapping[str, Any]) -> None:
        """Refuse a prompt in pieces where a patch takes the first forward of a sequence for all of it."""
        if "logits" in self.host.needs:
            refuse(self.host.model, kwargs, self.host.recipe)
        config = kwargs.get("generation_config") or getattr(self.host.model, "generation_config", None)
        size = kwargs.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None))
        if size and "first_forward" in self.host.needs:
            raise UnsupportedError(
                f"{self.host.recipe} takes the first forward of a sequence for its whole prompt, and this one would come in pieces of "
                f"{size} tokens. Leave out prefill_chunk_size."
            )

    def install(self, undo: Undo) -> None:
        """Put the wrapper in place."""
        if hasattr(self.host.model, "generate"):
            undo.put(self.host.model, "generate", _Generate(self, self.host.model.generate))


class _Generate:
    """Stands in for ``generate``."""

    def __init__(self, generation: Generation, own: Any) -> None:
        functools.update_wrapper(self, own)
        self.__signature__ = inspect.signature(own)
        self._generation, self._own = generation, own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._generation.require_whole(kwargs)
        begun = _BEGUN.set([])
        try:
            return self._around(*args, **kwargs)
        finally:
            _BEGUN.reset(begun)

    def _around(self, *args: Any, **kwargs: Any) -> Any:
        if _INSIDE.get() or not self._generation.around:  # or a pass that a patch asked for
            return self._own(*args, **kwargs)
        inputs = inspect.signature(self._own).bind_partial(*args, **kwargs).arguments
        inputs |= inputs.pop("kwargs", {})
        if "inputs" in inputs:
            inputs["input_ids"] = inputs.pop("inputs")
        call = self._own
        for choice in reversed(self._generation.around):
            call = functools.partial(_through, choice, self._generation, call)
        token = _INSIDE.set(True)
        try:
            return call(**inputs)
        finally:
            _INSIDE.reset(token)


def _through(choice: Choice, generation: Generation, call: Any, **inputs: Any) -> Any:
    host, tools = generation.host, generation.tools()
    if inputs.get("input_ids") is not None and not bool(tools.images(inputs).any()):
        host.ledger.fell_back("generate", host.no_image)
        return call(**inputs)
    host.ledger.count(host.ledger.served, choice.name)
    patch: Any = choice.patch
    return patch.generate(host.model, call, inputs, tools)


# ---------------------------------------------------------------------------------------------------- what patches are lent


class _Prompts:
    """Pictures and prompts in the arguments of ``generate``."""

    def __init__(self, host: GeneratingHost, processor: Any) -> None:
        self.host, self.processor = host, processor
        self.vision: Any = getattr(host.model.config, "vision_config", None)

    def images(self, inputs: Mapping[str, Any]) -> Tensor:
        ids, tokens = inputs["input_ids"], self.host.visual_tokens
        if "video" in tokens and bool((ids == tokens["video"]).any()):
            raise UnsupportedError(
                f"{self.host.recipe} works on pictures, and the prompt shows a video. Pass its frames as pictures, one a "
                "row, or take a recipe of attention patches."
            )
        if "image" not in tokens:
            return torch.zeros_like(ids, dtype=torch.int16)
        visual = ids == tokens["image"]
        return number_images(visual, self._sizes(inputs, int(visual.sum())))

    def _sizes(self, inputs: Mapping[str, Any], tokens: int) -> list[int]:
        """How many tokens each picture takes."""
        given = inputs.get("pixel_values")
        if given is None or not tokens:
            return []
        if (grids := self._patches(inputs)) is not None:
            patches = [frames * rows * columns for frames, rows, columns in grids]
            return [number * tokens // sum(patches) for number in patches]
        return [tokens // len(given)] * len(given)

    def _patches(self, inputs: Mapping[str, Any]) -> list[tuple[int, int, int]] | None:
        """Frames, rows and columns of patches of each picture, where its tokens lie by them."""
        told = "image_grid_thw" in inputs or (self.host.family is not None and self.host.family.grid == "own")
        return pixels.patch_grids(inputs, self.vision) if told else None

    def grids(self, inputs: Mapping[str, Any]) -> list[tuple[int, int]]:
        assert self.host.family is not None
        sizes = self._sizes(inputs, int((self.images(inputs) > 0).sum()))
        patches, found = self._patches(inputs), []
        for i, size in enumerate(sizes):
            grid = token_grid(self.host.family, size, None if patches is None else patches[i])
            if grid is None:
                raise UnsupportedError(
                    f"{size} tokens of {self.host.family.name}'s picture {i + 1} lie on no single grid, so what they show has "
                    "no place on it. Take a model that sees whole pictures: LLaVA-1.5, Qwen-VL, Gemma 3."
                )
            found.append(grid)
        return found

    def pictures(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        return pixels.pictures(self._family(), inputs, self.vision)

    def replace(self, inputs: Mapping[str, Any], pictures: Sequence[Tensor]) -> dict[str, Any]:
        return pixels.replace(self._family(), inputs, pictures, self.vision)

    def _family(self) -> Vlm:
        if self.host.family is None:
            raise UnsupportedError(
                f"How the pixels of {type(self.host.model).__name__} lie is not known; see families/vlm.py."
            )
        return self.host.family

    def prompt_like(self, inputs: Mapping[str, Any], text: str) -> dict[str, Any]:
        old, numbers = inputs["input_ids"], self.images(inputs)
        token = self.host.visual_tokens["image"]
        rows = []
        for row in numbers:
            size = int((row > 0).sum())
            row_ids = self._tokenized(self._expanded(self._rendered(text, size > 0), size))
            if (given := row_ids.count(token)) != size:
                raise AccelplugError(
                    f"The chat template of {type(self.processor).__name__} gave {given} image tokens, expected {size}. Pass the "
                    "processor that belongs to the model."
                )
            rows.append(row_ids)
        padded = chat.padded_left(self.processor.tokenizer, rows)
        ids, mask = padded["input_ids"].to(old), padded["attention_mask"].to(old.device)
        kinds = {name: (ids == token).int() for name in ("token_type_ids", "mm_token_type_ids") if name in inputs}
        rest = {name: value for name, value in inputs.items() if name != "position_ids"}
        return {**rest, "input_ids": ids, "attention_mask": mask, **kinds}

    def _rendered(self, text: str, image: bool) -> str:
        """One turn of the user's, and the opening of the answer, by the chat template."""
        if not hasattr(self.processor, "tokenizer"):
            raise AccelplugError(
                f"This recipe writes a prompt of its own, and needs the model's processor, got {type(self.processor).__name__}. "
                "Pass it: accelplug.apply(model, recipe, processor=processor)."
            )
        try:
            return chat.templated(self.processor, text, image)
        except ValueError as error:
            raise AccelplugError(
                f"{type(self.processor).__name__} has no chat template that can be used: {error} Set processor.chat_template."
            ) from error

    def _expanded(self, text: str, size: int) -> str:
        """Put as many image tokens as the image has where the template has one."""
        processor = self.processor
        if whole := getattr(processor, "full_image_sequence", None):  # Gemma 3
            return text.replace(processor.boi_token, whole)
        opening, closing = (getattr(processor, name, "") for name in ("start_image_token", "end_image_token"))  # InternVL
        return text.replace(processor.image_token, opening + processor.image_token * size + closing)

    def _tokenized(self, text: str) -> list[int]:
        tokenizer = self.processor.tokenizer
        begun = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
        return list(tokenizer(text, add_special_tokens=not begun)["input_ids"])

    def questions(self, inputs: Mapping[str, Any]) -> list[str]:
        mark = "accelplug"
        closing = self._plain(self._tokenized(self._rendered(mark, False).rpartition(mark)[2]))
        behind = (self.images(inputs) > 0).cumsum(-1)
        ids, last = inputs["input_ids"], behind.amax(-1, keepdim=True)
        return [
            self._plain(row[kept].tolist()).removesuffix(closing).strip()
            for row, kept in zip(ids, (behind == last) & (ids != self.host.visual_tokens["image"]), strict=True)
        ]

    def _plain(self, ids: list[int]) -> str:
        return self.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()


def _matcher(folder: str) -> tuple[Any, Any]:
    from transformers import AutoTokenizer, BlipForImageTextRetrieval

    try:
        with torch.random.fork_rng(devices=[]):  # loading may draw weights that the folder then overwrites
            model = BlipForImageTextRetrieval.from_pretrained(folder, local_files_only=True)
        return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise AccelplugError(
            f"blip_dir: expected a local folder with a BlipForImageTextRetrieval and its tokenizer, got {folder!r}: {error}"
        ) from error
