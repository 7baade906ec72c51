"""inspect() for language models: what can be entered and, with inputs, where a vision-language model looks, layer by layer."""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from accelplug import chat, compat, files
from accelplug.call import AttentionCall, Clock, Prompt, Site
from accelplug.errors import AccelplugError, AlreadyAppliedError, NoMatchError, ShapeError, UnsupportedError
from accelplug.families.vlm import Vlm, find, token_grid
from accelplug.hosts.blind import Blind
from accelplug.hosts.ledger import Ledger
from accelplug.hosts.prompts import visual_tokens
from accelplug.hosts.record import DENSE
from accelplug.hosts.transformers import AttentionRecord, LanguageHost, attention_modules, watching
from accelplug.hosts.undo import Undo
from accelplug.kernels.spans import on_spans, probabilities, read_rows, row_scores
from accelplug.kernels.vision import divergence, massive, normalised, outliers, vision_aware
from accelplug.plug import model_facts, plug_of
from accelplug.recipe import recipes_for
from accelplug.show import Shown

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from torch import Tensor

SINK = 20.0
"""Normalised value in a sink dimension from which a token is a sink."""
ALIGNED = 0.9
"""Cosine with the first token from which a token is a sink, whatever the dimension."""
MAPS = 6
"""Layers that heat maps are drawn for, spread over depth."""

# ------------------------------------------------------------------------------------------------------------ without inputs


@dataclass(frozen=True, repr=False)
class LanguageInspection(Shown):
    """What `inspect` sees in a language model before it runs. Prints as tables.

    Attributes
    ----------
    family : the vision-language family, None for a text model or an unknown one.
    layers, heads, kv_heads : of the decoder, from its config.
    attention : name of the attention implementation in use.
    modules : attention modules of the decoder, and why one cannot be entered; empty where it can.
    recipes : recipes that match, with what each would touch.
    """

    model: str
    family: str | None
    layers: int
    heads: int
    kv_heads: int
    attention: str
    modules: dict[str, str]
    recipes: dict[str, str]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.table import Table

        table = Table("", "", title=self.model, title_justify="left", show_header=False)
        table.add_row("family", self.family or "no known vision-language family")
        table.add_row("decoder", f"{self.layers} layers of {self.heads} heads, {self.kv_heads} key-value heads")
        table.add_row("attention", self.attention)
        open_to_us = sum(not why for why in self.modules.values())
        table.add_row("can be entered", f"{open_to_us} of {len(self.modules)} attention modules")
        for path, why in self.modules.items():
            if why:
                table.add_row(path, why)
        yield table
        recipes = Table("recipe", "touches", title="recipes that match this model", title_justify="left")
        for name, touches in self.recipes.items():
            recipes.add_row(name, touches)
        yield (
            recipes if self.recipes else "No shipped recipe matches this model; apply() takes a mapping or a file of yours."
        )


def summary(model: Any) -> LanguageInspection:
    """Say what accelplug sees in a language model; nothing is run."""
    decoder, config = model.get_decoder(), model.config.get_text_config()
    family, layers = find(model), compat.transformers.number_of_layers(decoder)
    modules, sites = {}, []
    for path, module in attention_modules(decoder):
        asks = compat.transformers.looks_kernel_up(type(module))
        modules[path] = "" if asks else f"{type(module).__name__} does not ask transformers for its attention function"
        if asks:
            sites.append(Site(path, LanguageHost.name, "self", module.layer_idx, layers))
    return LanguageInspection(
        model=type(model).__name__,
        family=family.name if family else None,
        layers=layers,
        heads=config.num_attention_heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        attention=compat.transformers.attention_name(config),
        modules=modules,
        recipes=recipes_for(model_facts(model), sites),
    )


def _require_inputs(inputs: Any) -> None:
    """Refuse inputs that no processor made."""
    found = inputs.get("input_ids", inputs.get("inputs_embeds")) if isinstance(inputs, Mapping) else None
    if not isinstance(found, torch.Tensor) or found.ndim != (3 if found.is_floating_point() else 2):
        got = ", ".join(map(str, inputs)) if isinstance(inputs, Mapping) else type(inputs).__name__
        raise AccelplugError(
            f"inspect: expected what the processor makes of text and images, with input_ids (B, S) among it, got {got or 'none'}."
        )


def ask(processor: Any, picture: Path, prompt: str) -> dict[str, Any]:
    """Return the inputs for a question about a picture, by the processor's chat template where it has one."""
    return chat.tokenized(processor, [chat.prompt(processor, prompt, picture=True)], [chat.open_picture(picture)])


# --------------------------------------------------------------------------------------------------------------- with inputs


@dataclass(frozen=True, eq=False, repr=False)
class VlmInspection(Shown):
    """Where a vision-language model looks when it is about to answer. Prints as tables; draws itself.

    Means are over the rows of the batch that show an image. L counts the layers whose attention can be entered, H query heads.
    All attention is after the softmax, recomputed in float32 from the queries and keys of the model's own forward.

    Attributes
    ----------
    model, family, attention : class, vision-language family, attention implementation in use.
    layers : (L,) numbers of the layers.
    visual_mass, system_mass, question_mass : (L, H) attention of the last token to the images, to the text ahead of the first
        image, and to the text behind it; each in [0, 1].
    vas : (L,) Visual Attention Score as a share, P_V / (P_V + P_S) in [0, 1]: attention to images beside that to the system
        text, mean over heads and question tokens; 0.5 is equal attention. A head that reads neither is left out, and so is a token
        whose window has not both; NaN where none is left. `vas_mean` is its mean over layers.
    vas_ratio : (L,) the score as published, mean over heads and question tokens of P_V / P_S. It has no bound: one head that
        does not read the system text sets it (inf where its P_S underflows), which is why `vas` comes first.
    visual_share : (L,) P_V / (P_V + P_Q) in [0, 1], attention to images beside that to the question, meant likewise.
    image_attention : by row, by image: (L, tokens), attention of the last token, mean over heads.
    sink_dims : dimensions of the residual stream in which the first token is massive, the largest first; at most four.
    phi : (L, tokens) of the first row without padding: largest normalised size in a sink dimension of what enters the layer;
        0 where no sink dimension was found.
    visual_sinks, cosine_sinks : by layer, which image tokens of the first row (from 0, its images one after the other) have a
        phi of at least `SINK`, and which point where its first token points (cosine over `ALIGNED`).
    vhd, ta : (L, H) vision-aware head divergence: how far the head's output at the last token is from its output without the
        images, and the squared norm of the latter.
    vision_heads : bool (L, H), the upper half of each layer by VHD, `outliers` counted as 0.
    tokens : how many real tokens of each kind the first row has: image, system, question.
    pictures, grids : of the first row's images: uint8 (H, W, 3) or None where pixels do not show it; token rows and columns
        or None where they lie on no single grid. Frames of a video lie one under another.
    notes : what could not be said, and why.
    """

    model: str
    family: str
    attention: str
    layers: tuple[int, ...]
    visual_mass: np.ndarray
    system_mass: np.ndarray
    question_mass: np.ndarray
    vas: np.ndarray
    vas_ratio: np.ndarray
    visual_share: np.ndarray
    image_attention: list[list[np.ndarray]]
    sink_dims: tuple[int, ...]
    phi: np.ndarray
    visual_sinks: list[np.ndarray]
    cosine_sinks: list[np.ndarray]
    vhd: np.ndarray
    ta: np.ndarray
    vision_heads: np.ndarray
    tokens: dict[str, int]
    pictures: list[np.ndarray | None] = field(default_factory=list)
    grids: list[tuple[int, int] | None] = field(default_factory=list)
    notes: tuple[str, ...] = ()

    HEADINGS = (
        "layer",
        "image",
        "system",
        "question",
        "VAS",
        "V / S",
        "V / (V + Q)",
        "sinks",
        "aligned",
        "vision-aware heads",
    )

    @property
    def vas_mean(self) -> float:
        """Mean of `vas` over layers; NaN without system text."""
        known = self.vas[np.isfinite(self.vas)]
        return float(known.mean()) if known.size else math.nan

    @property
    def outliers(self) -> np.ndarray:
        """Bool (L, H): heads whose VHD and TA are both over the layer's mean + standard deviation; they fire without the image."""
        return outliers(torch.from_numpy(self.vhd), torch.from_numpy(self.ta)).numpy()

    @property
    def sinks(self) -> list[np.ndarray]:
        """What is marked as sinks: by phi where sink dimensions were found, else by cosine."""
        return self.visual_sinks if self.sink_dims else self.cosine_sinks

    def facts(self) -> dict[str, str]:
        """What holds of the whole model, in reading order."""
        heads = self.vhd.shape[1]
        counts = ", ".join(f"{n} {kind}" for kind, n in self.tokens.items())
        return {
            "model": f"{self.model} ({self.family}, {self.attention} attention)",
            "seen": f"{len(self.layers)} layers of {heads} heads; tokens of the first row: {counts}",
            "VAS": "unknown"
            if math.isnan(self.vas_mean)
            else f"{self.vas_mean:.2f}, image / (image + system), mean over layers",
            "attention to images": f"{self.visual_mass.mean():.1%}, mean over layers and heads",
            "sink dimensions": ", ".join(map(str, self.sink_dims)) or "none found",
            **{f"note {number}": note for number, note in enumerate(self.notes, 1)},
        }

    def rows(self) -> list[tuple[str, ...]]:
        """By layer: its number, masses, VAS and its ratio, share, sinks by phi and by cosine, and the three heads with the largest VHD."""
        out = []
        for i, layer in enumerate(self.layers):
            masses = (f"{x[i].mean():.1%}" for x in (self.visual_mass, self.system_mass, self.question_mass))
            vas, share = ("-" if math.isnan(x[i]) else f"{x[i]:.2f}" for x in (self.vas, self.visual_share))
            ratio = "-" if math.isnan(self.vas_ratio[i]) else f"{self.vas_ratio[i]:.3g}"
            ranked = np.argsort(-np.where(self.vision_heads[i], self.vhd[i], -1))[: min(3, int(self.vision_heads[i].sum()))]
            heads = ", ".join(map(str, ranked))
            sinks = (str(len(found[i])) for found in (self.visual_sinks, self.cosine_sinks))
            out.append((str(layer), *masses, vas, ratio, share, *sinks, heads))
        return out

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.table import Table

        table = Table("", "", title="where it looks", title_justify="left", show_header=False)
        for what, fact in self.facts().items():
            table.add_row(what, fact)
        layers = Table(title="attention of the last token, by layer", title_justify="left")
        for heading in self.HEADINGS:
            layers.add_column(heading, justify="right")
        for row in self.rows():
            layers.add_row(*row)
        yield table
        yield layers

    def _repr_html_(self) -> str:
        return super()._repr_html_() + "".join(
            f'<img style="max-width:100%" src="{_inline(figure)}">' for figure in _figures(self)
        )

    def to_dict(self) -> dict[str, Any]:
        """Return everything but pictures as plain data; what is not finite is None."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "pictures"}
        return _plain({**named, "vas_mean": self.vas_mean, "outliers": self.outliers})

    def to_json(self, path: str | Path) -> Path:
        """Write `to_dict` to a file."""
        return files.write(path, json.dumps(self.to_dict(), allow_nan=False))

    def to_png(self, path: str | Path) -> None:
        """Draw where the last token looks: heat maps on each image of the first row, masses by layer, VHD by layer and head."""

        figures = _figures(self)
        sheet = Image.new("RGB", (WIDTH, sum(figure.height for figure in figures)), PAPER)
        top = 0
        for figure in figures:
            sheet.paste(figure, (0, top))
            top += figure.height
        data = io.BytesIO()
        sheet.save(data, "PNG")
        files.write(path, data.getvalue())

    def to_html(self, path: str | Path) -> Path:
        """Write one self-contained page with the drawings and the tables."""
        facts = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in self.facts().items())
        drawn = "".join(f'<div class="panel"><img alt="" src="{_inline(figure)}"></div>' for figure in _figures(self))
        head = "".join(f"<th>{html.escape(x)}</th>" for x in self.HEADINGS)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(x)}</td>" for x in row) + "</tr>" for row in self.rows())
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        page = PAGE.replace("<!--FACTS-->", facts).replace("<!--FIGURES-->", drawn).replace("<!--TABLE-->", table)
        return files.write(path, page.replace("<!--TITLE-->", html.escape(f"Where {self.model} looks")))


def inspect_vlm(model: Any, inputs: Mapping[str, Any]) -> VlmInspection:
    """Read one prompt and say where the model looks; it is left as it was.

    Parameters
    ----------
    model : a transformers vision-language model.
    inputs : a processor's output: ``input_ids``, ``attention_mask``, ``pixel_values`` ... Batches are padded on the left.

    Raises
    ------
    AlreadyAppliedError
        If a recipe is on the model.
    NoMatchError
        If the family is not known, or the inputs show no image.
    ShapeError
        If a row is padded on the right, or has no text.
    UnsupportedError
        If the attention cannot be recomputed, or the model's heads are spread over processes.
    """
    name = type(model).__name__
    if (on := plug_of(model.base_model)) is not None:
        raise AlreadyAppliedError(f"{on.recipe.name} is on this {name}, and inspect() reads a stock model. Remove it first.")
    compat.versions.require("transformers")
    host = LanguageHost(model, lambda *_: DENSE, Ledger(), watched=True)
    if host.family is None:
        raise NoMatchError(
            f"{name} is no known vision-language model: with inputs, inspect() expects one whose images lie in the prompt "
            "(accelplug.families.vlm.VLMS). Leave the inputs out for a summary."
        )
    if host.tensor_parallel:
        raise UnsupportedError(
            f"The heads of this {name} are spread over processes, expected all in one. Load it on one device."
        )
    base, watch = host.base, _Watch()
    _require_inputs(inputs)
    inputs = {key: x.to(model.device) if isinstance(x, torch.Tensor) else x for key, x in inputs.items()}
    with Undo() as undo, torch.no_grad():
        undo.add(partial(compat.transformers.set_position_offset, base, compat.transformers.position_offset(base)))
        host.install(undo)
        with watching(watch):
            base(**inputs, use_cache=False)
        prompt = watch.checked(name)
        blind = Blind(base, host.decoder, prompt, dict(inputs), undo)
    attention = compat.transformers.attention_name(host.records[0].config)
    return watch.result(name, attention, host.family, blind, inputs, base.config)


@dataclass
class _Layer:
    """What one layer's call tells: masses (3, H), VAS, its ratio and share, maps by row and image, heads (B, H, D), residual stream."""

    masses: Tensor
    vas: Tensor
    ratio: Tensor
    share: Tensor
    maps: list[list[np.ndarray]]
    heads: Tensor
    first: Tensor
    hidden: Tensor
    aligned: np.ndarray


class _Watch:
    """Looks at every attention call of one prefill and keeps what is small."""

    def __init__(self) -> None:
        self.prompt: Prompt | None = None
        self.layers: dict[int, _Layer] = {}
        self.closed: list[int] = []

    def __call__(self, record: AttentionRecord, call: AttentionCall, prompt: Prompt, clock: Clock) -> None:
        self.prompt = prompt
        layer = record.site.layer
        assert layer is not None and call.hidden is not None and call.place is not None  # noqa: PT018
        if not bool(prompt.visual.any()):
            return
        if not call.place.explicit:
            self.closed.append(layer)
            return
        device = call.q.device
        behind = prompt.question & prompt.later  # what stands ahead of the image cannot look at it
        image, valid, question = (x.to(device) for x in (prompt.image, prompt.valid, behind))
        spans = torch.stack([prompt.visual, prompt.system, prompt.question], -1).to(device, torch.float32)
        shown = (image > 0).any(-1)
        number = max(1, image.shape[1] - int(question.any(0).long().argmax())) if bool(question.any()) else 1
        scores = row_scores(call, number)  # [B, H, rows, S]
        p = probabilities(scores)
        masses = on_spans(call, p, spans)  # [B, H, rows, 3]
        in_reach = on_spans(call, scores.isfinite().float(), spans) > 0
        asked = question[:, None, -number:].expand(masses.shape[:3])
        on_image, on_system, on_question = masses.unbind(-1)
        nan, told = float("nan"), asked & in_reach[..., :2].all(-1)

        def mean(x: Tensor, rows: Tensor) -> Tensor:
            """Over heads and question tokens, of the rows of the batch that show an image; 0 / 0 is left out."""
            return x.masked_fill(~rows, nan).nanmean((1, 2))[shown].nanmean().cpu()

        last = p[:, :, -1].mean(1)
        maps = [
            [row[numbers == i].cpu().numpy() for i in range(1, int(numbers.max()) + 1)]
            for row, numbers in zip(last, image, strict=True)
        ]
        rows, begin = torch.arange(len(valid), device=device), valid.long().argmax(-1)
        hidden = call.hidden.to(device)
        start, stream = hidden[0, begin[0]].float(), hidden[0, valid[0]]
        cosine = torch.cosine_similarity(hidden[0, image[0] > 0].float(), start[None], dim=-1)
        self.layers[layer] = _Layer(
            masses[shown, :, -1].mean(0).T.cpu(),
            mean(on_image / (on_image + on_system), told),
            mean(on_image / on_system, told),
            mean(on_image / (on_image + on_question), asked),
            maps,
            read_rows(call, p[:, :, -1:])[:, :, -1],
            normalised(hidden[rows, begin])[shown].cpu(),
            stream.cpu(),
            (cosine.abs() > ALIGNED).nonzero()[:, 0].cpu().numpy(),
        )

    def checked(self, name: str) -> Prompt:
        """Return the prompt, if it is one that can be told about."""
        prompt = self.prompt
        if prompt is None:
            raise UnsupportedError(
                f"The attention of this {name} was called in a way that is not understood (dropout, or a mask of the flex "
                "kernel), so nothing was seen. Call .eval(), and load it with sdpa, eager or flash attention."
            )
        if not bool(prompt.visual.any()):
            raise NoMatchError(
                f"The inputs of {name} show no image: expected image tokens among {prompt.image.shape[1]} tokens, found none. "
                "Pass what the model's processor makes of text and images."
            )
        if not bool(prompt.valid[:, -1].all()):
            raise ShapeError(
                f"The inputs of {name} are padded on the right, so that the last token of a row is none. "
                'Set processor.tokenizer.padding_side = "left".'
            )
        if not bool((prompt.valid & ~prompt.visual).any(-1).all()):
            raise ShapeError(f"A row of the inputs of {name} is all image: expected a question. Add text to the prompt.")
        if not self.layers:
            raise UnsupportedError(
                f"Every layer of this {name} adds sink logits or a soft cap, and cannot be recomputed from queries, keys and mask. "
                "Load it with sdpa or eager attention, or leave the inputs out for a summary."
            )
        return prompt

    def result(
        self, name: str, attention: str, family: Vlm, blind: Any, inputs: Mapping[str, Any], config: Any
    ) -> VlmInspection:
        """Put the layers together."""
        prompt = self.prompt
        assert prompt is not None
        numbers = tuple(sorted(self.layers))
        layers = [self.layers[n] for n in numbers]
        notes = []
        if self.closed:
            closed = ", ".join(map(str, sorted(self.closed)))
            notes.append(f"layers {closed} add sink logits or a soft cap, and are left out")
        visual, system, question = torch.stack([x.masses for x in layers], 1).numpy()
        if not bool(prompt.system.any()):
            notes.append("no text stands ahead of the first image, so that there is no VAS")
        elif short := [n for n, x in zip(numbers, layers, strict=True) if math.isnan(x.vas)]:
            closed = ", ".join(map(str, short))
            notes.append(
                f"no question token of layers {closed} has both image and system text in its window: they have no VAS"
            )

        first = torch.stack([x.first for x in layers])  # [L, rows, C]
        dims = sink_dimensions(first)
        if not dims and math.sqrt(first.shape[-1]) < SINK:
            notes.append(
                f"a normalised value of {first.shape[-1]} dimensions is at most {math.sqrt(first.shape[-1]):.1f} and cannot reach "
                f"{SINK:g}: sinks are told by cosine alone"
            )
        elif not dims:
            notes.append("the first token is massive in no dimension of the middle layers: sinks are told by cosine alone")
        phi = torch.zeros(len(layers), len(layers[0].hidden))
        if dims:
            phi = torch.stack([normalised(x.hidden)[:, list(dims)].abs().amax(-1) for x in layers])
        seen = prompt.visual[0][prompt.valid[0]].cpu()

        shown = prompt.visual.any(-1).cpu()
        pairs = (divergence(x.heads, blind.heads(n).to(x.heads.device)) for n, x in zip(numbers, layers, strict=True))
        vhd, ta = (
            torch.stack(x) for x in zip(*((v.cpu()[shown].mean(0), t.cpu()[shown].mean(0)) for v, t in pairs), strict=True)
        )
        sizes = [len(x[0]) for x in _by_image(layers)]
        pictures, grids = _pictures(family, inputs, config, list(zip(_kinds(prompt, config), sizes, strict=True)))
        if any(picture is None for picture in pictures):
            notes.append(f"pictures of {family.name} cannot be told from its pixels; they are drawn on grey")
        if any(grid is None for grid in grids):
            notes.append("an image's tokens lie on no single grid; they are drawn in reading order")
        kinds = {"image": prompt.visual, "system": prompt.system, "question": prompt.question}
        return VlmInspection(
            model=name,
            family=family.name,
            attention=attention,
            layers=numbers,
            visual_mass=visual,
            system_mass=system,
            question_mass=question,
            vas=torch.stack([x.vas for x in layers]).numpy(),
            vas_ratio=torch.stack([x.ratio for x in layers]).numpy(),
            visual_share=torch.stack([x.share for x in layers]).numpy(),
            image_attention=[
                [np.stack([x.maps[row][i] for x in layers]) for i in range(len(layers[0].maps[row]))]
                for row in range(len(layers[0].maps))
            ],
            sink_dims=dims,
            phi=phi.numpy(),
            visual_sinks=[(x[seen] >= SINK).nonzero()[:, 0].numpy() for x in phi],
            cosine_sinks=[x.aligned for x in layers],
            vhd=vhd.numpy(),
            ta=ta.numpy(),
            vision_heads=vision_aware(vhd, ta).numpy(),
            tokens={kind: int(span[0].sum()) for kind, span in kinds.items()},
            pictures=pictures,
            grids=grids,
            notes=tuple(notes),
        )


def sink_dimensions(first: Tensor) -> tuple[int, ...]:
    """Return the dimensions in which first tokens are massive, the largest first, at most four.

    Parameters
    ----------
    first : float32 (L, rows, C), the normalised first token as it enters each layer. A dimension counts if its size is at
        least `SINK` and it is massive, in more than half of the rows of the middle half of layers.
    """
    layers = len(first)
    middle = first[layers // 4 : 3 * layers // 4 + 1].flatten(0, 1)
    often = massive(middle, SINK).float().mean(0) > 0.5
    ranked = torch.where(often, middle.abs().mean(0), 0).argsort(descending=True)[: min(4, int(often.sum()))]
    return tuple(ranked.tolist())


def _by_image(layers: list[_Layer]) -> list[list[np.ndarray]]:
    """The first row's maps, by image, then by layer."""
    return [list(maps) for maps in zip(*(x.maps[0] for x in layers), strict=True)]


def _pictures(
    family: Vlm, inputs: Mapping[str, Any], config: Any, shown: list[tuple[str, int]]
) -> tuple[list[np.ndarray | None], list[tuple[int, int] | None]]:
    """Pictures and token grids of what the first row shows (image or video, tokens), the first of its kind in the batch.

    Frames of a video lie one under another.
    """
    vision = config.vision_config
    merge = getattr(vision, "spatial_merge_size", 1)
    pictures: list[np.ndarray | None] = []
    grids: list[tuple[int, int] | None] = []
    index, start = Counter[str](), Counter[str]()
    for kind, number in shown:
        pixels = inputs.get("pixel_values" if kind == "image" else "pixel_values_videos")
        thw, at = inputs.get(f"{kind}_grid_thw"), index[kind]
        index[kind] += 1
        sizes = None if thw is None or at >= len(thw) else thw[at].tolist()
        grids.append(token_grid(family, number, sizes and [1, sizes[0] * sizes[1], sizes[2]], merge))
        picture = None
        if pixels is not None and family.pixels == "images" and pixels.ndim == 4 and at < len(pixels):
            picture = pixels[at]
        elif pixels is not None and family.pixels == "patches" and sizes is not None:
            t, h, w = sizes
            # patches of a merged token stand together: [t, h/m, w/m, m, m, C, T_p, P, P]
            side, patches = vision.patch_size, pixels[start[kind] : start[kind] + t * h * w]
            start[kind] += t * h * w
            lying = patches.reshape(t, h // merge, w // merge, merge, merge, 3, -1, side, side)[..., 0, :, :]
            picture = lying.permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(3, t * h * side, w * side)
        pictures.append(None if picture is None else _as_bytes(picture))
    return pictures, grids


def _kinds(prompt: Prompt, config: Any) -> list[str]:
    """Whether each of what the first row shows is an image or a video."""
    video = visual_tokens(config).get("video")
    begins = [int((prompt.image[0] == number).long().argmax()) for number in range(1, int(prompt.image[0].max()) + 1)]
    return ["video" if prompt.ids is not None and prompt.ids[0, at] == video else "image" for at in begins]


def _as_bytes(picture: Tensor) -> np.ndarray:
    """A normalised picture (3, H, W) as uint8 (H, W, 3), stretched from black to white: its mean and scale are not known."""
    low, high = picture.float().aminmax()
    return (255 * (picture.float() - low) / (high - low).clamp(min=1e-6)).round().byte().permute(1, 2, 0).cpu().numpy()


def _plain(value: Any) -> Any:
    """Arrays, tuples and floats as JSON has them."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ------------------------------------------------------------------------------------------------------------------- drawing

WIDTH, MARGIN, GAP = 1600, 40, 16
PAPER, INK, SOFT, LINE = (255, 255, 255), (29, 32, 36), (100, 107, 117), (226, 227, 223)
SPANS = {"image": (194, 87, 26), "system": (176, 182, 190), "question": (45, 108, 223)}
HEAT = np.array([(0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 164)], np.float32)
"""Anchors of a perceptually even colour map, dark to light."""


def colours(x: np.ndarray) -> np.ndarray:
    """Return colours (..., 3) uint8 of values in [0, 1]."""
    place = np.clip(x, 0, 1) * (len(HEAT) - 1)
    return np.stack([np.interp(place, range(len(HEAT)), channel) for channel in HEAT.T], -1).round().astype(np.uint8)


def spread(layers: int, number: int = MAPS) -> list[int]:
    """Return up to `number` indices from the first layer to the last, evenly spaced."""
    return sorted({round(x) for x in np.linspace(0, layers - 1, min(number, layers))})


def _figures(inspection: VlmInspection) -> list[Image.Image]:
    images = inspection.image_attention[0]
    return [*(_image_figure(inspection, i) for i in range(len(images))), _layer_figure(inspection)]


def _inline(figure: Image.Image) -> str:
    file = io.BytesIO()
    figure.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _sheet(height: int, title: str, under: str) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    sheet = Image.new("RGB", (WIDTH, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    _text(draw, (MARGIN, 30), title, 28)
    _text(draw, (MARGIN, 70), under, 18, SOFT)
    return sheet, draw


def _text(
    draw: ImageDraw.ImageDraw, at: tuple[float, float], text: str, size: int, ink: Any = INK, anchor: str = "la"
) -> None:
    draw.text(at, text, ink, _font(size), anchor)


def _scale(sheet: Image.Image, draw: ImageDraw.ImageDraw, right: int, top: int, largest: str) -> None:
    """A colour bar that ends at `right`."""
    end = right - round(draw.textlength(largest, _font(18))) - 8
    bar = np.broadcast_to(colours(np.linspace(0, 1, 160)), (16, 160, 3))
    sheet.paste(Image.fromarray(np.ascontiguousarray(bar)), (end - 160, top))
    _text(draw, (end - 168, top + 8), "0", 18, SOFT, "rm")
    _text(draw, (right, top + 8), largest, 18, SOFT, "rm")


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _image_figure(inspection: VlmInspection, index: int) -> Image.Image:
    """The picture and its heat maps, side by side."""
    attention = inspection.image_attention[0][index]
    picture, grid = inspection.pictures[index], inspection.grids[index]
    lie = f"{attention.shape[1]} tokens, reading order" if grid is None else f"{grid[1]} x {grid[0]} tokens"
    if grid is None:
        columns = math.ceil(math.sqrt(attention.shape[1]))
        grid, picture = (-(-attention.shape[1] // columns), columns), None
    shape = picture.shape[:2] if picture is not None else grid
    chosen = spread(len(attention))
    pitch = (WIDTH - 2 * MARGIN - MAPS * GAP) // (MAPS + 1)
    shrink = max(1.0, shape[0] / shape[1] / 1.6)  # tall pictures get narrower, not longer
    size = round(pitch / shrink), max(1, round(pitch / shrink * shape[0] / shape[1]))
    ground = Image.new("RGB", size, (150, 150, 150))
    if picture is not None:
        ground = Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS)

    rule = f"phi of at least {SINK:g}" if inspection.sink_dims else "aligned with the first token"
    marks = f"Squares: sinks, {rule}." if any(map(len, inspection.sinks)) else "No sinks were found on it."
    count = len(inspection.image_attention[0])
    sheet, draw = _sheet(
        118 + size[1] + 66,
        "What the last token looks at" + (f": image {index + 1} of {count}" if count > 1 else ""),
        f"Attention to image tokens, mean over heads; each map has its own peak. {marks}",
    )
    _scale(sheet, draw, WIDTH - MARGIN, 38, "peak")
    before = sum(maps.shape[1] for maps in inspection.image_attention[0][:index])
    for place, layer in enumerate([None, *chosen]):
        left, top = MARGIN + place * (pitch + GAP), 118
        if layer is None:
            sheet.paste(ground, (left, top))
            _text(draw, (left, top + size[1] + 8), "picture" if picture is not None else "picture not shown", 20)
            _text(draw, (left, top + size[1] + 34), lie, 17, SOFT)
            continue
        heat = attention[layer]
        sheet.paste(_overlay(ground, heat, grid), (left, top))
        for token in inspection.sinks[layer] - before:
            if 0 <= token < len(heat):
                _mark(draw, left, top, size, grid, int(token))
        _text(draw, (left, top + size[1] + 8), f"layer {inspection.layers[layer]}", 20)
        _text(draw, (left, top + size[1] + 34), f"image {heat.sum():.1%}, peak {heat.max():.1%}", 17, SOFT)
    return sheet


def _overlay(ground: Image.Image, heat: np.ndarray, grid: tuple[int, int]) -> Image.Image:
    """A heat map on a dimmed picture; where there is more, less of the picture shows."""
    cells = np.zeros(grid, np.float32)
    cells.flat[: len(heat)] = heat / max(float(heat.max()), 1e-12)
    strength = Image.fromarray(np.round(255 * (0.35 + 0.55 * cells)).astype(np.uint8)).resize(ground.size, 0)
    dim = ground.convert("L").point(lambda x: 0.75 * x).convert("RGB")
    return Image.composite(Image.fromarray(colours(cells)).resize(ground.size, 0), dim, strength)


def _mark(draw: ImageDraw.ImageDraw, left: int, top: int, size: tuple[int, int], grid: tuple[int, int], token: int) -> None:
    row, column = divmod(token, grid[1])
    height, width = size[1] / grid[0], size[0] / grid[1]
    x, y, half = left + (column + 0.5) * width, top + (row + 0.5) * height, max(3.0, min(5.0, min(height, width) / 4))
    draw.rectangle((x - half, y - half, x + half, y + half), outline=(90, 240, 250), width=2)


def _layer_figure(inspection: VlmInspection) -> Image.Image:
    """Masses of the three spans by layer, and VHD by layer and head, side by side."""
    layers, heads = inspection.vhd.shape
    high, wide, top, gutter = 330, 680, 118, 60
    vas = "" if math.isnan(inspection.vas_mean) else f"; VAS {inspection.vas_mean:.2f}"
    sheet, draw = _sheet(top + high + 80, "Attention by layer", f"Last token, mean over heads{vas}.")
    left = MARGIN + gutter
    at = left + wide
    for name, ink in reversed(SPANS.items()):
        at -= round(draw.textlength(name, _font(18)))
        _text(draw, (at, 48), name, 18, SOFT, "lm")
        draw.rectangle((at - 24, 40, at - 8, 56), fill=ink)
        at -= 46
    for part in (0, 0.5, 1):
        y = top + high * (1 - part)
        draw.line((left - 6, y, left + wide, y), fill=LINE)
        _text(draw, (left - 10, y), f"{part:.0%}", 17, SOFT, "rm")
    pitch = wide / layers
    space = min(6.0, pitch / 5)
    masses = [x.mean(1) for x in (inspection.visual_mass, inspection.system_mass, inspection.question_mass)]
    for i in range(layers):
        floor = float(top + high)
        for mass, ink in zip(masses, SPANS.values(), strict=True):
            roof = floor - high * float(mass[i])
            if floor - roof >= 1:
                draw.rectangle((left + i * pitch + space / 2, roof, left + (i + 1) * pitch - space / 2, floor - 1), fill=ink)
            floor = roof
    _layer_ticks(draw, inspection.layers, left, top + high, pitch)

    left = WIDTH - MARGIN - wide
    _text(draw, (left - gutter, 30), "Vision-aware head divergence", 28)
    _text(
        draw,
        (left - gutter, 70),
        "What the image changes in each head; dots: upper half of a layer, outliers left out.",
        18,
        SOFT,
    )
    largest = max(float(inspection.vhd.max()), 1e-12)
    _scale(sheet, draw, WIDTH - MARGIN, 38, f"{largest:.2g}")
    tall = high / heads
    for i in range(layers):
        for h in range(heads):
            value = inspection.vhd[i, h] / largest
            box = left + i * pitch, top + h * tall, left + (i + 1) * pitch - 1, top + (h + 1) * tall - 1
            draw.rectangle(box, fill=tuple(colours(value).tolist()))
            if inspection.vision_heads[i, h] and min(pitch, tall) >= 6:
                x, y, r = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2, min(5.0, min(pitch, tall) / 4)
                draw.ellipse((x - r, y - r, x + r, y + r), fill=INK if value > 0.6 else PAPER)
    for h in range(0, heads, max(1, -(-heads // 16))):
        _text(draw, (left - 10, top + (h + 0.5) * tall), str(h), 17, SOFT, "rm")
    _text(draw, (left - 10, top + high + 8), "head", 17, SOFT, "ra")
    _layer_ticks(draw, inspection.layers, left, top + high, pitch)
    return sheet


def _layer_ticks(draw: ImageDraw.ImageDraw, layers: tuple[int, ...], left: int, floor: int, pitch: float) -> None:
    for i in range(0, len(layers), max(1, math.ceil(34 / pitch))):
        _text(draw, (left + (i + 0.5) * pitch, floor + 8), str(layers[i]), 17, SOFT, "ma")
    _text(draw, (left + len(layers) * pitch / 2, floor + 34), "layer", 17, SOFT, "ma")


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title><!--TITLE--></title>
<style>
:root { color-scheme: light dark; --ground: #fbfbf9; --panel: #fff; --ink: #1d2024; --soft: #646b75; --line: #e2e3df; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #131519; --panel: #1b1e24; --ink: #e9eaec; --soft: #9aa2ad; --line: #2c313a; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 20px 80px; }
h1 { font-size: clamp(22px, 3.4vw, 32px); line-height: 1.2; margin: 6px 0 18px; }
h2 { font-size: 18px; margin: 44px 0 4px; }
p { color: var(--soft); font-size: 14px; max-width: 90ch; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 18px; font-size: 14px; margin: 0 0 24px; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
.panel { background: #fff; border: 1px solid var(--line); border-radius: 10px; overflow: hidden; margin-bottom: 18px; }
.panel img { width: 100%; display: block; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 7px 8px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 500; }
</style>
</head>
<body>
<main>
<h1><!--TITLE--></h1>
<dl><!--FACTS--></dl>
<!--FIGURES-->
<h2>By layer</h2>
<p>Image, system and question: attention of the last token, mean over heads. VAS, the Visual Attention
Score: attention to images / (images + system text), mean over heads and question tokens; V / S is the ratio as published, which one
head that does not read the system text can blow up; V / (V + Q) has the question in its place. Sinks: image tokens
of the first row with a phi of at least 20; aligned: those with a cosine of over 0.9 with the first token. Vision-aware heads:
the largest three of the upper half by divergence.</p>
<div class="scroll"><!--TABLE--></div>
</main>
</body>
</html>
"""
