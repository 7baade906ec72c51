"""What the model would do without its images: the same prompt, image tokens taken out, read in step with the real one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from accelplug import compat
from accelplug.call import Prompt
from accelplug.errors import UnsupportedError
from accelplug.hosts.stream import FORWARD, Attending, Forward
from accelplug.hosts.undo import Undo


class Blind:
    """A prompt without its images, going through the layers as far as it is asked to.

    It is read once whole, to learn what every layer is called with. From then on a layer whose heads are given another gain is
    run anew, and those behind it when they are asked for. It keeps no cache and changes nothing of the model.

    Parameters
    ----------
    base : the base model, which embeds tokens; `decoder` its decoder, which has ``layers``.
    prompt : the sequences with images.
    inputs : arguments of the base model's forward.
    undo : journal of the changes of the model, in which those of the reading are noted while it lasts.
    """

    def __init__(self, base: Any, decoder: Any, prompt: Prompt, inputs: dict[str, Any], undo: Undo) -> None:
        self._layers = list(decoder.layers)
        self._calls: dict[int, tuple[tuple, dict[str, Any]]] = {}
        self._hidden: dict[int, Tensor] = {}
        self._heads: dict[int | None, Tensor] = {}
        self._front = len(self._layers)  # layers before this one have been run with the gains that were set
        with Undo(within=undo) as own:
            own.add(partial(compat.transformers.set_position_offset, base, compat.transformers.position_offset(base)))
            for index, layer in enumerate(self._layers):
                own.hook(layer, "register_forward_pre_hook", self._recorder(index), with_kwargs=True)
            base(**self._inputs(prompt, inputs), use_cache=False, **{FORWARD: Forward(companion=self._note)})

    @staticmethod
    def _inputs(prompt: Prompt, inputs: dict[str, Any]) -> dict[str, Any]:
        """The tokens of the prompt that show no image, left padded, with positions of their own."""
        keep = prompt.valid & prompt.asked & ~prompt.visual
        if bool((prompt.visual.any(-1) & ~keep.any(-1)).any()):
            raise UnsupportedError(
                "A row of this prompt is all image, and is to be read without it. Add text to the prompt."
            )
        flags = [torch.ones(int(row.sum()), dtype=torch.long, device=row.device) for row in keep]
        mask = pad_sequence(flags, batch_first=True, padding_side="left")
        embedded = "input_ids" if inputs.get("input_ids") is not None else "inputs_embeds"
        tokens = {}
        for name in (embedded, "token_type_ids"):  # by which some models let a prompt read itself both ways
            if inputs.get(name) is not None:
                rows = [x[kept] for x, kept in zip(inputs[name], keep, strict=True)]
                tokens[name] = pad_sequence(rows, batch_first=True, padding_side="left")
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        return {**tokens, "attention_mask": mask, "position_ids": positions}

    def _recorder(self, index: int) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple, kwargs: dict[str, Any] | None = None) -> None:
            forward = (kwargs or {}).get(FORWARD)
            if kwargs is None or forward is None or forward.companion != self._note:  # another thread's forward
                return
            rest = {name: value for name, value in kwargs.items() if name not in ("hidden_states", FORWARD)}
            self._calls[index] = args[1:], rest
            self._hidden[index] = args[0] if args else kwargs["hidden_states"]

        return record

    def _note(self, record: Attending, out: Tensor) -> Tensor:
        self._heads[record.site.layer] = out[:, :, -1]
        return out

    def heads(self, index: int) -> Tensor:
        """Return the outputs of a layer's heads at the last token, ahead of the output projection: (B, H, D_v)."""
        while self._front < index:
            self._step(self._front, None)
        if self._front == index:  # its input has changed since it was read
            self._step(index, None)
        return self._heads[index]

    def reinforce(self, index: int, gain: Tensor) -> None:
        """Run a layer with its heads' outputs times `gain`, (B|1, H); the layers behind it go on from there."""
        self._front = index
        self._step(index, gain)

    def _step(self, index: int, gain: Tensor | None) -> None:
        def companion(record: Attending, out: Tensor) -> Tensor:
            self._heads[record.site.layer] = out[:, :, -1]
            return out if gain is None else out * gain[..., None, None].to(out.dtype)

        args, kwargs = self._calls[index]
        with compat.transformers.uncollected():
            out = self._layers[index](self._hidden[index], *args, **kwargs, **{FORWARD: Forward(companion=companion)})
        self._hidden[index + 1] = out[0] if isinstance(out, tuple) else out
        self._front = index + 1
