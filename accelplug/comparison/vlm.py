"""Before and after on questions and descriptions: what recipes do to a vision-language model's truth, length and speed."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelplug import files, show
from accelplug.chat import Chat
from accelplug.comparison import arguments
from accelplug.comparison.answers import answers_page
from accelplug.comparison.environment import environment, forget_peak, peak_mib
from accelplug.comparison.evaluators.pope import questions_sha256
from accelplug.comparison.exam import Exam
from accelplug.comparison.outcome import Outcome, hold_against_stock
from accelplug.comparison.protocols import Protocol, protocol
from accelplug.comparison.rows import STOCK_ROW, Variant
from accelplug.comparison.said import records
from accelplug.errors import AccelplugError
from accelplug.kernels.timing import synchronise
from accelplug.plug import apply
from accelplug.show import Shown, Tell, jsonable

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table


@dataclass(repr=False)
class VlmComparison(Shown):
    """What `compare` found on a vision-language model. Prints as a table; writes JSON or a page."""

    model: str
    exam: Exam
    rows: list[Outcome]
    environment: dict[str, Any]

    def __getitem__(self, name: str) -> Outcome:
        for row in self.rows:
            if row.name == name:
                return row
        raise AccelplugError(f"There is no row {name!r}; there are {', '.join(row.name for row in self.rows)}.")

    def tables(self) -> list[Table]:
        """Return the rows side by side, a table for each evaluator."""
        from rich.box import SIMPLE_HEAD

        lines = [row.cells() for row in self.rows]
        tables = []
        for title in dict.fromkeys(title for line in lines for title in line):
            found = [line.get(title, {}) for line in lines]
            heads = [head for head in dict.fromkeys(h for cells in found for h in cells) if any(c.get(head) for c in found)]
            if not heads:
                continue
            table = show.table(title, "", *heads, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
            for column in table.columns[1:]:
                column.justify = "right"
            for row, cells in zip(self.rows, found, strict=True):
                table.add_row(
                    row.name, *(cells.get(head, "") for head in heads), style="dim" if row.kind == "control" else None
                )
            tables.append(table)
        return [*tables, self.protocol.table(self.rows, self.model)] if self.protocol else tables

    def __rich__(self) -> Group:
        from rich.console import Group

        said = [f"[bold red]{row.name}:[/] {alarm}" for row in self.rows for alarm in row.alarms]
        notes = [f"{row.name}: {note}" for row in self.rows for note in row.notes]
        return Group(f"[bold]{self.model} on {self.exam.name}[/]", *self.tables(), *said, *notes)

    @property
    def protocol(self) -> Protocol | None:
        """The published protocol that the exam follows."""
        return protocol(self.exam.protocol) if self.exam.protocol else None

    def page(self) -> str:
        """Return one self-contained HTML page."""
        return answers_page(self.model, self.exam, self.rows, self.environment, self.tables())

    def to_dict(self) -> dict[str, Any]:
        """Return all figures, the settings of the exam and the environment; no pictures and no answers."""
        exam = {
            "name": self.exam.name,
            "truth": self.exam.source,
            "pictures": len(self.exam.pictures),
            "questions": len(self.exam.questions),
            "parse": self.exam.parse,
            "questions_sha256": questions_sha256(self.exam.questions),
            "describe": self.exam.describe,
            "max_new_tokens": self.exam.max_new_tokens,
        }
        rows = [row.summary() for row in self.rows]
        held = {"protocol": self.protocol.to_dict(self.rows)} if self.protocol else {}
        return jsonable({"model": self.model, "exam": exam, **held, "environment": self.environment, "rows": rows})

    def to_jsonl(self, path: str | Path) -> Path:
        """Write all that was said and how each word of it was counted; see `said.records`.

        Raises
        ------
        AccelplugError
            If it cannot be written.
        """
        lines = (json.dumps(record, ensure_ascii=False) for record in records(self.model, self.exam, self.rows))
        return files.write(path, "\n".join(lines) + "\n")


def compare_vlm(
    model: Any,
    recipes: Mapping[str, Any] | Sequence[Variant],
    exam: Exam,
    processor: Any,
    *,
    batch: int = 32,
    descriptions: bool | None = None,
    progress: bool = True,
) -> VlmComparison:
    """Examine a model stock and with recipes, on the same pictures, greedily, with the same attention kernel.

    Parameters
    ----------
    model : a transformers vision-language model; it is left as it was.
    recipes : by name, anything that `accelplug.apply` takes; or variants, controls among them.
    exam : what is asked.
    processor : the model's.
    batch : prompts at a time.
    descriptions : whether pictures are described too, for CHAIR, AMBER, length and speed; as the exam says if left out.

    Raises
    ------
    AccelplugError
        If the exam asks for nothing.
    """
    descriptions = exam.described if descriptions is None else descriptions
    if not exam.prompts and not (descriptions and exam.pictures):
        raise AccelplugError("The exam asks for nothing; Exam.scenes(), Exam.coco(folder) and Exam.amber(folder) make some.")
    arguments.require_whole(batch, "compare, prompts at a time", 1)
    exam.require_pictures()
    named = [Variant(name, recipe) for name, recipe in recipes.items()] if isinstance(recipes, Mapping) else list(recipes)
    examiner = Examiner(model, processor, exam, batch)
    variants = [Variant(STOCK_ROW, kind=STOCK_ROW), *named]
    with show.progress("examining", len(variants) * examiner.work(descriptions), progress) as examiner.tell:
        rows = [examiner.examine(variant, descriptions) for variant in variants]
    hold_against_stock(rows, exam)
    return VlmComparison(type(model).__name__, exam, rows, environment(model))


@dataclass
class Examiner:
    """Asks a model everything in an exam.

    Attributes
    ----------
    tell : is told of the tokens that were asked for, see `show.progress`; done : how many they are; row : what they are for.
    """

    model: Any
    processor: Any
    exam: Exam
    batch: int
    tell: Tell = show.silent
    done: int = 0
    row: str = ""

    def work(self, descriptions: bool = True) -> int:
        """Tokens that a row is asked for, at most."""
        described = len(self.exam.pictures) * self.exam.max_new_tokens if descriptions else 0
        return len(self.exam.prompts) * self.exam.answer_tokens + described

    def examine(self, variant: Variant, descriptions: bool = True) -> Outcome:
        """Ask, score, and take the recipe off again."""
        row, exam, self.row = Outcome(variant.name, variant.kind), self.exam, variant.name
        stock = variant.recipe is None
        plug: Any = nullcontext() if stock else apply(self.model, variant.recipe, gate="off", processor=self.processor)
        with plug as on:
            told = forget_peak(self.model.device)
            said = self.ask(variant.picture)
            for split in exam.splits:
                found = [said[question.image, question.text] for question in exam.of(split)]
                row.said.replies[split], row.said.margins[split] = [reply for reply, _ in found], [by for _, by in found]
            row.said.pairs = [(said[key, yes][0], said[key, no][0]) for _, key, yes, no in exam.pairs]
            if descriptions:
                row.said.descriptions, row.tokens_per_s = self.describe(variant.picture)
            row.peak_mib = peak_mib(self.model.device) if told else None
            if on is not None:
                row.notes = on.report().left_dense
        row.score(exam)
        return row

    @functools.cached_property
    def chat(self) -> Chat:
        """The model as one that is put questions to."""
        return Chat(self.model, self.processor)

    def ask(self, picture: Any = None) -> dict[tuple[Any, str], tuple[str, float]]:
        """Return the answer to each of the prompts, a few tokens, and by how much it is rather yes than no."""
        said: dict[tuple[Any, str], tuple[str, float]] = {}
        for asked in self._chunks(self.exam.prompts, "answers", self.exam.answer_tokens):
            found = self.chat.say(self._inputs(asked, picture), self.exam.answer_tokens)
            said |= dict(zip(asked, zip(*found, strict=True), strict=True))
        return said

    def describe(self, picture: Any = None) -> tuple[dict[Any, str], float]:
        """Return a description of every picture, and tokens a second."""
        texts: dict[Any, str] = {}
        tokens, seconds = 0, 0.0
        for keys in self._chunks(list(self.exam.pictures), "descriptions", self.exam.max_new_tokens):
            start = time.perf_counter()
            inputs = self._inputs([(key, self.exam.describe) for key in keys], picture)
            out = self.chat.generate(inputs, self.exam.max_new_tokens)
            synchronise(out.device)
            seconds += time.perf_counter() - start
            tokens += int((out[:, inputs["input_ids"].shape[1] :] != self.chat.pad).sum())
            texts |= dict(zip(keys, self.chat.texts(inputs, out), strict=True))
        return texts, tokens / seconds

    def _inputs(self, asked: Sequence[tuple[Any, str]], picture: Any) -> dict[str, Any]:
        shown = [self.exam.picture(key) for key, _ in asked]
        return self.chat.questions([text for _, text in asked], [picture(item) for item in shown] if picture else shown)

    def _chunks(self, items: Sequence[Any], what: str, tokens: int) -> Iterator[Sequence[Any]]:
        """Items of so many tokens each, a batch at a time; told as they come."""
        for begin in range(0, len(items), self.batch):
            self.tell(self.done, self.row, f"{begin:,} of {len(items):,} {what}")
            chunk = items[begin : begin + self.batch]
            yield chunk
            self.done += len(chunk) * tokens
