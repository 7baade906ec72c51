"""inspect() of a language model with inputs: one text is read, and its sinks and what its heads look at are told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from accelplug import compat
from accelplug.call import AttentionCall, Clock, Prompt
from accelplug.chat import tokenizer_of
from accelplug.errors import AccelplugError, AlreadyAppliedError, ShapeError, UnsupportedError
from accelplug.hosts.attention import AttentionRecord
from accelplug.hosts.host import Setup, plug_of
from accelplug.hosts.stream import watching
from accelplug.hosts.transformers import LanguageHost
from accelplug.hosts.undo import Undo
from accelplug.inspection import drawing
from accelplug.kernels.sinks import kinds, looks, sinks
from accelplug.show import Shown

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.console import Group
    from torch import Tensor

WINDOW, NEAREST, FURTHEST = 10, 10, 50
"""Tokens: distances count up to the first, and influence is told by the rows from NEAREST to FURTHEST behind a token. Ours."""
GLOBAL = 0.3
"""Share of heads that look furthest, by which influence is told. Ours."""
LISTED = 12
"""Tokens that are listed at most."""


@dataclass(frozen=True, eq=False, repr=False)
class TextInspection(drawing.DrawsItself, Shown):
    """Where a language model's heads look in a text, and what draws their attention. Prints as tables; draws itself.

    The first row of the inputs is told, without its padding. L counts the layers whose attention can be entered, H query heads, S tokens.

    Attributes
    ----------
    model, attention : class, and attention implementation in use.
    layers : (L,) numbers of the layers.
    words : (S,) the tokens as text, or their numbers without a tokenizer.
    first : which token is the first sink, and `sink_layers` the layers behind which it is one, from and to.
    primary, secondary : tokens that point where it points: through most of the depth, and in its middle alone.
    lifetimes : (S,) in how many layers each does.
    primary_mass, secondary_mass : (L, H) attention that goes to these, mean over rows, each in [0, 1].
    distance : (L, H) windowed average attention distance, in tokens, up to `WINDOW`.
    reach : (L, H) average attention distance without a bound.
    influence : (S,) future attention influence, mean over the `GLOBAL` share of heads that look furthest.
    notes : what could not be said, and why.
    """

    model: str
    attention: str
    layers: tuple[int, ...]
    words: list[str]
    first: int
    sink_layers: tuple[int, int]
    primary: np.ndarray
    secondary: np.ndarray
    lifetimes: np.ndarray
    primary_mass: np.ndarray
    secondary_mass: np.ndarray
    distance: np.ndarray
    reach: np.ndarray
    influence: np.ndarray
    notes: tuple[str, ...] = field(default=())

    def facts(self) -> dict[str, str]:
        """What holds of the whole model, in reading order."""
        begin, end = self.sink_layers
        return {
            "model": f"{self.model} ({self.attention} attention)",
            "read": f"{len(self.words)} tokens, by {len(self.layers)} layers of {self.distance.shape[1]} heads",
            "first sink": f"{self._word(self.first)}, behind layers {begin} to {end}",
            "primary sinks": self._listed(self.primary, self.lifetimes) or "none",
            "secondary sinks": self._listed(self.secondary, self.lifetimes) or "none",
            "attention to them": f"{self.primary_mass.mean():.1%} and {self.secondary_mass.mean():.1%}, mean over layers and heads",
            "most looked at later": self._listed(np.argsort(-self.influence), self.influence),
            **{f"note {number}": note for number, note in enumerate(self.notes, 1)},
        }

    def _word(self, token: int) -> str:
        return f"{token} {self.words[token]!r}"

    def _listed(self, tokens: np.ndarray, by: np.ndarray) -> str:
        most = sorted(tokens.tolist(), key=lambda token: -by[token])[:LISTED]
        more = f" and {len(tokens) - LISTED} more" if LISTED < len(tokens) < len(self.words) else ""
        return ", ".join(map(self._word, most)) + more

    def __rich__(self) -> Group:
        from rich.console import Group
        from rich.table import Table

        facts = Table("", "", title="what draws attention", title_justify="left", show_header=False)
        for what, fact in self.facts().items():
            facts.add_row(what, fact)
        layers = Table(title="by layer, mean over heads", title_justify="left")
        for heading in (
            "layer",
            "to primary sinks",
            "to secondary sinks",
            f"distance, up to {WINDOW}",
            "distance",
            "furthest head",
        ):
            layers.add_column(heading, justify="right")
        for i, layer in enumerate(self.layers):
            masses = (f"{x[i].mean():.1%}" for x in (self.primary_mass, self.secondary_mass))
            far = int(self.reach[i].argmax())
            spans = (f"{x[i].mean():.1f}" for x in (self.distance, self.reach))
            layers.add_row(str(layer), *masses, *spans, f"{far} ({self.reach[i, far]:.0f})")
        return Group(facts, layers)

    def figures(self) -> list[Image]:
        """Draw attention to sinks, of either kind where there is one, and how far heads look, by layer and head."""
        pairs = (
            (
                ("Attention to primary sinks", "By layer and head, mean over rows.", self.primary_mass),
                ("Attention to secondary sinks", "By layer and head, mean over rows.", self.secondary_mass),
            ),
            (
                ("Windowed attention distance", f"In tokens, distances up to {WINDOW}.", self.distance),
                ("Attention distance", "In tokens.", self.reach),
            ),
        )
        shown = ([panel for panel in pair if panel[2].any()] for pair in pairs)
        return [drawing.heads_figure(self.layers, *panels) for panels in shown if panels]

    def _repr_html_(self) -> str:
        shown = "".join(f'<img style="max-width:100%" src="{drawing.inlined(figure)}">' for figure in self.figures())
        return super()._repr_html_() + shown

    def page(self) -> str:
        """Return one self-contained HTML page with the tables and the drawings."""
        from accelplug.show import as_elements, framed

        drawn = "".join(f'<p><img alt="" style="max-width:100%" src="{drawing.inlined(x)}"></p>' for x in self.figures())
        return framed(f"What draws the attention of {self.model}", as_elements(self) + drawn)


class _TextReading:
    """Looks at every attention call while one text is read, and keeps what is small, and the residual stream."""

    def __init__(self) -> None:
        self.hidden: dict[int, Tensor] = {}
        self.found: dict[int, tuple[Tensor, ...]] = {}
        self.left_out: list[int] = []
        self.valid: Tensor | None = None

    def __call__(self, record: AttentionRecord, call: AttentionCall, prompt: Prompt, clock: Clock) -> None:
        layer = record.site.layer or 0
        assert call.hidden is not None and call.place is not None  # noqa: PT018
        self.valid = prompt.valid[0]
        self.hidden[layer] = call.hidden[0, self.valid.to(call.hidden.device)].cpu()
        if call.place.explicit and compat.transformers.window_of(record.module) is None:
            self.found[layer] = tuple(x.cpu() for x in looks(call, WINDOW, NEAREST, FURTHEST))
        else:
            self.left_out.append(layer)


def inspect_text(model: Any, inputs: Mapping[str, Any], processor: Any = None) -> TextInspection:
    """Read one text and say what draws its attention; the model is left as it was.

    Parameters
    ----------
    model : a transformers language model.
    inputs : a tokenizer's output, ``input_ids`` (B, S) among it; the first row is read.
    processor : the tokenizer, to show tokens as text.

    Raises
    ------
    AlreadyAppliedError
        If a recipe is on the model.
    ShapeError
        If the first row has fewer than two tokens.
    UnsupportedError
        If no attention can be recomputed, or the model's heads are spread over processes.
    """
    name = type(model).__name__
    if (on := plug_of(model.base_model)) is not None:
        raise AlreadyAppliedError(f"{on.recipe.name} is on this {name}, and inspect() reads a stock model. Remove it first.")
    compat.versions.require("transformers")
    host, reading = LanguageHost(model, Setup(), watched=True), _TextReading()
    if host.tensor_parallel:
        raise UnsupportedError(
            f"The heads of this {name} are spread over processes, expected all in one. Load it on one device."
        )
    ids, mask = _ids(inputs), inputs.get("attention_mask")
    ids = ids if mask is None else ids[:, mask[0].bool()]
    if ids.shape[1] < 2:
        raise ShapeError(f"inspect reads a text of two tokens or more, got {ids.shape[1]}. Give a longer one.")
    with Undo() as undo, torch.no_grad():
        host.install(undo)
        with watching(reading):
            host.base(input_ids=ids.to(model.device), use_cache=False)
    if not reading.found:
        raise UnsupportedError(
            f"Every layer of this {name} slides a window, or adds to its scores, and cannot be recomputed from queries and keys. "
            "Leave the inputs out for a summary."
        )
    words = [str(token) for token in ids[0].tolist()]
    if processor is not None:
        words = [tokenizer_of(processor).decode([token]) for token in ids[0].tolist()]
    attention = compat.transformers.attention_name(host.records[0].config)
    return _result(name, attention, words, reading)


def _ids(inputs: Any) -> Tensor:
    """The tokens of the first row, int64 (1, S)."""
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2:
        got = ", ".join(map(str, inputs)) if isinstance(inputs, Mapping) else type(inputs).__name__
        raise AccelplugError(
            f"inspect: expected what the tokenizer makes of a text, with input_ids (B, S) among it, got {got or 'none'}."
        )
    return ids[:1]


def _result(name: str, attention: str, words: list[str], reading: _TextReading) -> TextInspection:
    """Put the layers together."""
    behind = sorted(reading.hidden)[1:]  # what enters a layer comes out of the one before
    first, lives, alike = sinks(torch.stack([reading.hidden[layer] for layer in behind]))
    primary, secondary = kinds(alike)
    layers = tuple(sorted(reading.found))
    distance, reach, influence, received = (
        torch.stack(x) for x in zip(*(reading.found[layer] for layer in layers), strict=True)
    )
    weight = received * torch.arange(len(words), 0, -1) / len(words)  # [L, H, S], mean over all rows
    furthest = reach.flatten().argsort(descending=True)[: max(1, round(GLOBAL * reach.numel()))]
    notes = (
        [f"layers {', '.join(map(str, reading.left_out))} slide a window or add to their scores"] if reading.left_out else []
    )
    numbers = [behind[index] - 1 for index in lives] or [behind[0] - 1]
    return TextInspection(
        model=name,
        attention=attention,
        layers=layers,
        words=words,
        first=first,
        sink_layers=(numbers[0], numbers[-1]),
        primary=primary.nonzero()[:, 0].numpy(),
        secondary=secondary.nonzero()[:, 0].numpy(),
        lifetimes=alike.sum(0).numpy(),
        primary_mass=weight[..., primary].sum(-1).numpy(),
        secondary_mass=weight[..., secondary].sum(-1).numpy(),
        distance=distance.numpy(),
        reach=reach.numpy(),
        influence=influence.flatten(0, 1)[furthest].mean(0).numpy(),
        notes=tuple(notes),
    )
