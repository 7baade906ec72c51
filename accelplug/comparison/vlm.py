"""Before and after on questions and descriptions: what recipes do to a vision-language model's truth, length and speed."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from accelplug import show
from accelplug.chat import Chat
from accelplug.comparison import arguments
from accelplug.comparison.answers import answers_page
from accelplug.comparison.environment import environment
from accelplug.comparison.evaluators.pope import questions_sha256
from accelplug.comparison.exam import Exam
from accelplug.comparison.outcome import Outcome, hold_against_dense
from accelplug.comparison.rows import STOCK_ROW, Variant
from accelplug.errors import AccelplugError
from accelplug.kernels.timing import synchronise
from accelplug.plug import apply
from accelplug.show import Shown, jsonable

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

    def table(self) -> Table:
        """Return the rows side by side."""
        from rich.table import Table

        table = Table(title=f"{self.model} on {self.exam.name}", title_justify="left")
        lines = [row.cells() for row in self.rows]
        heads = [head for head in {head: None for line in lines for head in line} if any(line.get(head) for line in lines)]
        for head in heads:
            table.add_column(head, no_wrap=not head)  # names stay whole
        for line in lines:
            table.add_row(*(line.get(head, "") for head in heads))
        return table

    def __rich__(self) -> Group:
        from rich.console import Group

        said = [f"[bold red]{row.name}:[/] {alarm}" for row in self.rows for alarm in row.alarms]
        return Group(self.table(), *said, *(f"{row.name}: {note}" for row in self.rows for note in row.notes))

    def page(self) -> str:
        """Return one self-contained HTML page."""
        return answers_page(self.model, self.exam, self.rows, self.environment, self.table())

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
        return jsonable({"model": self.model, "exam": exam, "environment": self.environment, "rows": rows})


def compare_vlm(
    model: Any,
    recipes: Mapping[str, Any] | Sequence[Variant],
    exam: Exam,
    processor: Any,
    *,
    batch: int = 32,
    descriptions: bool = True,
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
    descriptions : whether pictures are described too, for CHAIR, AMBER, length and speed.

    Raises
    ------
    AccelplugError
        If the exam has no question.
    """
    if not exam.questions:
        raise AccelplugError("The exam has no questions; Exam.scenes(), Exam.coco(folder) and Exam.amber(folder) make some.")
    arguments.require_whole(batch, "compare, prompts at a time", 1)
    exam.require_pictures()
    named = [Variant(name, recipe) for name, recipe in recipes.items()] if isinstance(recipes, Mapping) else list(recipes)
    examiner = Examiner(model, processor, exam, batch)
    rows = []
    variants = [Variant(STOCK_ROW, kind="dense"), *named]
    with show.progress("examining", len(variants), progress) as tell:
        for done, variant in enumerate(variants):
            tell(done, variant.name)
            rows.append(examiner.examine(variant, descriptions))
    hold_against_dense(rows, exam)
    return VlmComparison(type(model).__name__, exam, rows, environment(model))


@dataclass
class Examiner:
    """Asks a model everything in an exam."""

    model: Any
    processor: Any
    exam: Exam
    batch: int

    def examine(self, variant: Variant, descriptions: bool = True) -> Outcome:
        """Ask, score, and take the recipe off again."""
        row = Outcome(variant.name, variant.kind)
        stock = variant.recipe is None
        plug: Any = nullcontext() if stock else apply(self.model, variant.recipe, gate="off", processor=self.processor)
        with plug as on:
            for split in self.exam.splits:
                texts = [(question.image, question.text) for question in self.exam.of(split)]
                row.said.replies[split], row.said.margins[split] = self.ask(texts, variant.picture)
            texts = [(key, text) for _, key, *both in self.exam.pairs for text in both]
            answers, _ = self.ask(texts, variant.picture)
            row.said.pairs = list(zip(answers[::2], answers[1::2], strict=True))
            if descriptions:
                row.said.descriptions, row.tokens_per_s = self.describe(variant.picture)
            if on is not None:
                report = on.report()
                row.notes = [f"fell back to dense: {what} ({n} calls)" for what, n in report.fallbacks.items()]
                row.notes += [] if report.served else ["no call was answered: this row is dense"]
        row.score(self.exam)
        return row

    @functools.cached_property
    def chat(self) -> Chat:
        """The model as one that is put questions to."""
        return Chat(self.model, self.processor)

    def ask(self, asked: Sequence[tuple[Any, str]], picture: Any = None) -> tuple[list[str], list[float]]:
        """Return answers of a few tokens, and margins of yes over no."""
        replies, margins = [], []
        for chunk in _chunks(asked, self.batch):
            said, by = self.chat.say(self._inputs(chunk, picture), 4)
            replies += said
            margins += by
        return replies, margins

    def describe(self, picture: Any = None) -> tuple[dict[Any, str], float]:
        """Return a description of every picture, and tokens a second."""
        texts: dict[Any, str] = {}
        tokens, seconds = 0, 0.0
        for keys in _chunks(list(self.exam.pictures), self.batch):
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


def _chunks(items: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    return (items[i : i + size] for i in range(0, len(items), size))
