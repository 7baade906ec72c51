"""The demo: a bundled model before and after, on two CPU cores: the video model in two minutes, the vision-language model in one."""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from accelplug import files, loading, show, zoo
from accelplug.chat import Chat
from accelplug.comparison import Comparison, Row, compare
from accelplug.comparison.result import rounded
from accelplug.inspection import VlmInspection, inspect
from accelplug.inspection.page import looking_page
from accelplug.plug import apply
from accelplug.show import Shown

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

RECIPES = ("sparse", "cache", "sparse-cache")
"""Of the video model: a patch, a step cache, and both."""
CAPTION = 0
"""Of the video model's held-out captions, which it was not trained on."""
PATCHES = ("visual_bias", "vhr")
"""Of the vision-language model."""
ONE_PICTURE = (
    "One picture, picked by hand, proves nothing: `accelplug compare llava-scenes` asks about many, and there no patch "
    "helps this model."
)
SCENE, THERE, ABSENT = 20_000_076, "star", "flag"
"""A scene of the vision-language model's test split, and what it is asked about. Picked since a patch rights an answer there."""


@dataclass(repr=False)
class Clips(Shown):
    """The video model dense and with recipes. Prints as a table, draws moments of its clips; the page is that of the comparison.

    Attributes
    ----------
    comparison : speed and quality of each recipe.
    restored : by recipe, whether the model without it makes the very same latents as before, bit for bit.
    """

    comparison: Comparison
    restored: dict[str, bool]

    def __rich__(self) -> Table:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        found = self.comparison
        settings = ", ".join(f"{name} {value}" for name, value in found.settings.items())
        caption = f'"{found.prompts[0]}" {settings}; {found.timed}'
        left: Any = {"title_justify": "left", "caption_justify": "left"}
        table = Table(title=found.verdict, caption=caption, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), **left)
        table.add_column("run", no_wrap=True)
        quality = ("foreground PSNR, dB", "shows its caption", "removed: bit for bit the same")
        for heading in ("seconds", "speed-up", found.memory, *quality):
            table.add_column(heading, justify="right")
        for row in found.rows:
            table.add_row(row.name, *self._cells(row))
        return table

    def _cells(self, row: Row) -> Iterator[str]:
        yield f"{row.latency.p50 / 1e3:.1f}"
        yield f"{self.comparison.speedup(row).p50:.2f}x"
        yield f"{row.peak_mib:.0f}" if row.peak_mib else ""
        yield rounded(row.mean("fg_psnr_db"), 1)
        yield "yes" if row.mean("agreement") == 1 else "no"
        yield {True: "yes", False: "NO", None: ""}[self.restored.get(row.name)]

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison's data, and `restored`."""
        return {**self.comparison.to_dict(), "restored": self.restored}

    def page(self) -> str:
        """Return the comparison's page."""
        return self.comparison.page()

    def to_png(self, path: str | Path) -> Path:
        """Write five moments of each clip of the first seed, a row each.

        Raises
        ------
        AccelplugError
            If it cannot be written.
        """
        found, named = self.comparison, {}
        for row in found.rows:
            quality = rounded(row.mean("fg_psnr_db"), 1)
            says = f"{found.speedup(row).p50:.2f}x, {quality} dB" if quality else f"{row.latency.p50 / 1e3:.1f} s"
            named[f"{row.name}\n{says}"] = found.clips[row.name, 0, found.seeds[0]]
        return files.write(path, filmstrip(named))


def filmstrip(clips: Mapping[str, np.ndarray], moments: int = 5, scale: int = 2, label: int = 230) -> bytes:
    """Return a PNG picture of clips, a row each.

    Parameters
    ----------
    clips : what is written beside a clip -> uint8 (F, H, W, 3), all of one size.
    moments : how many frames, from the first to the last.
    scale : how much larger frames are drawn.
    label : pixels for what is written.
    """
    from PIL import Image, ImageDraw, ImageFont

    picked = [clip[np.linspace(0, len(clip) - 1, moments).round().astype(int)] for clip in clips.values()]
    framed = np.pad(
        np.stack(picked), ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255
    )  # (clips, moments, H, W, 3)
    rows = Image.fromarray(np.concatenate(np.concatenate(framed, axis=1), axis=1))
    rows = rows.resize((scale * rows.width, scale * rows.height), Image.Resampling.LANCZOS)
    sheet = Image.new("RGB", (label + rows.width, rows.height), "white")
    sheet.paste(rows, (label, 0))
    draw = ImageDraw.Draw(sheet)
    for place, name in enumerate(clips):
        middle = (place + 0.5) * rows.height / len(clips)
        draw.multiline_text((label - 16, middle), name, "black", ImageFont.load_default(24), "rm", align="right")
    file = io.BytesIO()
    sheet.save(file, "PNG", optimize=True)
    return file.getvalue()


def clips() -> Clips:
    """Compare the video model dense and with `RECIPES`, at `zoo.MEDIUM`, and take each recipe off again."""
    from accelplug.zoo.shapes import HELD_OUT_CAPTIONS, agreement, foreground

    pipe = loading.pipeline(zoo.path("wan-shapes"), "float32", "cpu")
    pipe.set_progress_bar_config(disable=True)
    inputs = {"prompt": HELD_OUT_CAPTIONS[CAPTION], **zoo.MEDIUM}
    before = _small_run(pipe)
    comparison = compare(pipe, list(RECIPES), inputs, floors=False, foreground=foreground, detect=agreement)
    restored = {}
    with show.progress("removing", len(RECIPES)) as tell:
        for done, name in enumerate(RECIPES):
            tell(done, name)
            with apply(pipe, name, gate="off"):
                _small_run(pipe)
            restored[name] = before.equal(_small_run(pipe))
    return Clips(comparison, restored)


def _small_run(pipe: Any) -> Any:
    """What a pipeline makes of one caption and seed, at a small size."""
    import torch

    return pipe(
        "a red square moves left", **zoo.SMALL, output_type="latent", generator=torch.Generator().manual_seed(0)
    ).frames


@dataclass(repr=False)
class Answers(Shown):
    """What the vision-language model says of one picture, stock and with patches, and where it looks. Prints as a table; draws itself.

    Attributes
    ----------
    looks : where the stock model looks when it is about to answer the first question.
    questions : what it is asked.
    answers : by who answers, the truth and the stock model first: an answer to each question.
    """

    looks: VlmInspection
    questions: list[str]
    answers: dict[str, list[str]]

    def table(self) -> Table:
        """Return the answers, a line for each who answers."""
        from rich.table import Table

        table = Table("", *self.questions, title="One picture, before and after", title_justify="left")
        for who, said in self.answers.items():
            table.add_row(who, *said)
        return table

    def where(self) -> str:
        """Say in a sentence where the model looks."""
        looks = self.looks
        masses = {"image": looks.visual_mass, "text before it": looks.system_mass, "question": looks.question_mass}
        shares = ", ".join(f"{what} {mass.mean():.0%}" for what, mass in masses.items())
        return f"Where the stock model looks as it answers the first question: {shares} (mean over layers and heads)."

    def __rich__(self) -> Group:
        from rich.console import Group

        return Group(self.table(), self.where(), ONE_PICTURE)

    def page(self) -> str:
        """Return one self-contained HTML page: the answers to each question, and drawings of where the model looks."""
        said = zip(self.questions, zip(*self.answers.values(), strict=True), strict=True)
        parts = [
            f"<h3>{html.escape(asked)}</h3>{show.as_definitions(dict(zip(self.answers, answers, strict=True)))}"
            for asked, answers in said
        ]
        panels = "".join(f'<div class="panel">{part}</div>' for part in parts)
        return looking_page(self.looks, f"<h2>What it answers</h2>{panels}<p>{html.escape(ONE_PICTURE)}</p>")

    def to_png(self, path: str | Path) -> Path:
        """Write the drawings of where the model looks.

        Raises
        ------
        AccelplugError
            If it cannot be written.
        """
        return self.looks.to_png(path)


def answers() -> Answers:
    """Ask the vision-language model about a picture, stock and with `PATCHES`, and look where it looks."""
    from PIL import Image

    from accelplug.zoo import scenes

    model, processor = loading.language_model(zoo.path("llava-scenes"), "float32", "cpu")
    scene = scenes.sample(SCENE)
    picture, chat = Image.fromarray(scenes.render(scene)[0]), Chat(model, processor)
    asked = [scenes.existence(scene, kind) for kind in (THERE, ABSENT)]
    questions = [*(query.text for query in asked), scenes.CAPTION_PROMPT]
    said = {"truth": [*("yes" if query.answer else "no" for query in asked), scene.caption]}

    def answered() -> list[str]:
        inputs = chat.questions(questions, [picture] * len(questions))
        return chat.texts(inputs, chat.generate(inputs, 100))

    with show.progress("asking", 2 + len(PATCHES)) as tell:
        tell(0, "where it looks")
        looks: Any = inspect(model, chat.questions(questions[:1], [picture]))
        tell(1, "stock")
        said["stock"] = answered()
        for done, name in enumerate(PATCHES, 2):
            tell(done, name)
            with apply(model, name, gate="off", processor=processor):
                said[name] = answered()
    return Answers(looks, questions, said)


DEMOS: dict[str, Callable[[], Clips | Answers]] = {"wan-shapes": clips, "llava-scenes": answers}
"""By the name of a bundled model."""
