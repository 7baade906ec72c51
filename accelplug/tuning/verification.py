"""verify(): run what a recipe file says was measured, once more."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from accelplug import files
from accelplug.comparison import arguments
from accelplug.comparison.entry import compare
from accelplug.comparison.environment import device_name
from accelplug.comparison.floors import Floors
from accelplug.comparison.journal import Journal
from accelplug.comparison.metrics import ANSWER_METRICS
from accelplug.comparison.questions import Asker, Item, digest, require_pictures
from accelplug.comparison.rows import DENSE_ROW
from accelplug.comparison.texts.context import Context
from accelplug.comparison.texts.reader import ContextReader
from accelplug.comparison.texts.scores import TEXT_METRICS
from accelplug.errors import AccelplugError, RecipeError, worded
from accelplug.hosts.models import unwrapped
from accelplug.recipe import Measured, Recipe, read_file
from accelplug.show import Shown, table
from accelplug.tuning.aims import Aim
from accelplug.tuning.budget import Bound, parse_budget
from accelplug.tuning.contest import STOCK, Contest
from accelplug.tuning.language import questions, split
from accelplug.tuning.texts import ReadingContest, contexts_again, of_contexts

if TYPE_CHECKING:
    from rich.console import RenderableType

    from accelplug.comparison.result import Comparison

DRIFT_DB = 1.0
"""PSNR that may be lost before a figure has drifted, in dB."""
BROKEN_DB = 3.0
"""PSNR lost from which a recipe no longer does what it did, in dB."""
SLOWER = 0.9
"""Share of the recorded speed-up that must be left, on the same device."""
DRIFT_SHARE, DRIFT_NATS = 0.05, 0.02
"""What a recipe may lose on long texts, beside what it lost then, before a figure has drifted: of a share, and in nats a token. Three
times as much, and it is broken."""


@dataclass(frozen=True)
class Verified:
    """What came of one `measured` row: confirmed, drifted or broken, and why."""

    recipe: str
    date: str
    outcome: Literal["confirmed", "drifted", "broken"]
    why: str


@dataclass(frozen=True, repr=False)
class Verification(Shown):
    """What came of all rows, one after the other. Prints as a table."""

    name: str
    rows: tuple[Verified, ...]

    @property
    def confirmed(self) -> bool:
        """Whether every row is."""
        return all(row.outcome == "confirmed" for row in self.rows)

    def __iter__(self) -> Iterator[Verified]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Verified:
        return self.rows[number]

    def __rich__(self) -> RenderableType:
        found = table(self.name, "recipe", "measured", "verdict", "")
        for row in self.rows:
            found.add_row(row.recipe, row.date, row.outcome, row.why)
        return found


def verify(
    pipe: Any,
    recipe: str | Path | Recipe,
    inputs: Any = None,
    progress: bool = True,
    processor: Any = None,
    budget: str | Bound | Sequence[str | Bound] | None = None,
) -> Verification:
    """Run every `measured` row of a recipe again, with its own inputs and seeds, and hold the figures against it.

    Parameters
    ----------
    pipe : the pipeline or language model that it was measured on.
    recipe : a recipe file, all of whose recipes are verified; or one `Recipe`.
    inputs : arguments of the pipeline's call, for rows that name no prompt; of a language model, the questions of `tune`, or a
        `TextExam` with the file of text that it was tuned on; rows say all else that makes the same contexts.
    processor : a language model's.
    budget : of a pipeline, bounds that every run must keep, as for `tune`; what a row says that it was proven within, if left out. A row
        within its budget is never broken: another machine's kernels may cost more decibels than drift does.

    Returns
    -------
    One `Verified` a row. Speed is held against the row on the same device only.

    Raises
    ------
    AccelplugError
        If no row was measured, a row names no prompt and no inputs are given, or the budget cannot be read.
    """
    given_bounds = () if budget is None else parse_budget(budget)
    rows = measured(recipe)
    if given_bounds and any(row.task or row.objective for _, row in rows):
        raise AccelplugError("A budget is about clips, and these rows are a language model's. Leave it out.")
    pipe, processor = unwrapped(pipe, processor)
    given = [_given(pipe, found, row, inputs, processor) for found, row in rows]  # all, before the first is run
    found = (
        _verified(pipe, *pair, asked, progress, processor, given_bounds) for pair, asked in zip(rows, given, strict=True)
    )
    return Verification(recipe.name if isinstance(recipe, Recipe) else str(recipe), tuple(found))


def measured(recipe: str | Path | Recipe) -> list[tuple[Recipe, Measured]]:
    """Return the `measured` rows of a recipe or of a file, each with its recipe.

    Raises
    ------
    AccelplugError
        If there are none, or the file cannot be read.
    """
    if isinstance(recipe, Recipe):
        recipes, name = [recipe], recipe.name
    else:
        path = files.path_of(recipe, "A recipe file")
        recipes, name = list(read_file(path).recipes.values()), str(path)
    rows = [(found, row) for found in recipes for row in found.measured]
    if not rows:
        raise AccelplugError(f"{name} has no measured rows to verify; `accelplug tune` and `compare --record` write them.")
    return rows


def _given(pipe: Any, recipe: Recipe, row: Measured, inputs: Any, processor: Any) -> Any:
    """What a row is run on: the questions that it was measured on, or arguments of the pipeline's calls.

    Raises
    ------
    AccelplugError
        If there are none, or they are not those that it was measured on.
    """
    if row.objective == "speed":
        return contexts_again(pipe, recipe.name, row, inputs, processor)
    if row.task:
        _, held = split(questions(pipe, inputs, processor), row.seeds[0])
        asked = held[: int(row.inputs.get("questions", 0))]
        if digest(asked) != row.inputs.get("questions_sha256"):
            raise AccelplugError(
                f"{recipe.name}: the row of {row.date} was measured on other questions. "
                + worded("Give those it was tuned on.", "Give those it was tuned on: --questions, --coco.")
            )
        require_pictures(asked)
        return asked
    if not row.prompts and inputs is None:
        raise AccelplugError(
            f"{recipe.name}: the row of {row.date} names no prompts. Give {worded('inputs', 'a --prompt')} that it was measured with."
        )
    made = [{"prompt": text, **row.inputs} for text in row.prompts]
    return made or [{**call, **row.inputs} for call in arguments.calls(pipe, inputs, "verify")]


def _verified(
    pipe: Any, recipe: Recipe, row: Measured, given: Any, progress: bool, processor: Any, bounds: Sequence[Bound]
) -> Verified:
    if row.task:
        contest = (_reading if row.objective == "speed" else _asking)(pipe, row, given, processor)
        return Verified(recipe.name, row.date, *_ask_again(contest, recipe, row))
    bounds = bounds or (parse_budget(row.budget) if row.budget else ())
    floors = "all" if any(bound.to for bound in bounds) else False
    try:
        found = compare(pipe, {"now": recipe}, given, row.seeds, floors=floors, progress=progress)
    except RecipeError as error:
        return Verified(recipe.name, row.date, "broken", str(error))
    outcome, why = judge(row, found, bounds)
    return Verified(recipe.name, row.date, outcome, why)


def judge(
    row: Measured, found: Comparison, bounds: Sequence[Bound] = ()
) -> tuple[Literal["confirmed", "drifted", "broken"], str]:
    """Hold a new comparison's row ``now`` against a recorded one, and against bounds."""
    now = found.row("now")
    lost_db = 0.0
    if row.psnr_db is not None and (worst := now.worst("psnr_db")) is not None:
        lost_db = row.psnr_db.worst - worst
    gain, recorded = found.speedup(now).p50, row.gain
    same_device = row.device == device_name()
    said = f"{gain:.2f}x (recorded {recorded:.2f}x" + ("" if same_device else f" on {row.device}") + ")"
    if row.psnr_db is not None:
        said += f", worst PSNR {row.psnr_db.worst - lost_db:.1f} dB (recorded {row.psnr_db.worst:.1f} dB)"
    if row.psnr_db is not None and now.is_dense:
        return "broken", f"it is dense now: {'; '.join(now.notes) or 'its output is the same to the last bit'}"
    if any("fell back" in note for note in now.notes) and now.mean_density == 1:
        return "broken", f"every call fell back to dense: {now.notes[0]}"
    for bound in bounds:
        worst = min(bounded(bound, found), key=bound.margin)
        said += f", {bound.figure} {worst:.2f} (budget {bound})"
        if bound.margin(worst) < 0:
            return "broken", said
    if lost_db > BROKEN_DB and not bounds:
        return "broken", said
    if lost_db > DRIFT_DB or (same_device and gain < SLOWER * recorded):
        return "drifted", said
    return "confirmed", said


def bounded(bound: Bound, found: Comparison) -> list[float]:
    """Return what a bound says of each run of the row ``now``."""
    floors = Floors({(name, s.prompt): s for name, of in found.floors.items() for s in of.samples})
    clips = found.clips
    return [
        bound.value(s, clips[DENSE_ROW, s.prompt, s.seed], clips["now", s.prompt, s.seed], floors)
        for s in found.row("now").samples
    ]


def _asking(model: Any, row: Measured, asked: list[Item], processor: Any) -> Contest:
    """What puts the questions of a row again."""
    parse: Any = row.inputs.get("parse", "strict")
    asker = Asker(model, processor, says="accuracy" in row.task, likelihoods="nll" in row.task, parse=parse)
    return Contest(asker, [], asked, row.objective or "accuracy", (), math.inf, Journal(None, ""))


def _reading(model: Any, row: Measured, contexts: list[Context], processor: Any) -> Contest:
    """What has the contexts of a row read again."""
    reader = ContextReader(model, processor, contexts, bool(row.inputs["anew"]))
    return ReadingContest(reader, [], of_contexts(contexts), "speed", (), math.inf, Journal(None, ""))


def _ask_again(contest: Contest, recipe: Recipe, row: Measured) -> tuple[Literal["confirmed", "drifted", "broken"], str]:
    """Have the pages of a `measured` row answered again, stock and with the recipe, by turns."""
    aim = Aim(recipe.name, recipe.to_mapping())
    contest.warm()
    contest.answer_all([STOCK, aim], range(len(contest.pages)))
    if aim.name in contest.refused:
        return "broken", contest.refused[aim.name]
    contest.proof = list(range(len(contest.pages)))
    asked, stock, own = contest.answered(aim)
    speed = contest.standing(aim, contest.proof).figures["speed"]
    judged = judge_reading if row.objective == "speed" else judge_task
    return judged(row, contest.worth(asked, stock), contest.worth(asked, own), speed, row.device == device_name())


def judge_reading(
    row: Measured, stock: Mapping[str, float], found: Mapping[str, float], speed: float, same_device: bool
) -> tuple[Literal["confirmed", "drifted", "broken"], str]:
    """Hold new figures on long texts against a row: it has drifted where more is lost beside stock than was then, or speed is."""
    said = [f"{speed:.2f}x (recorded {row.gain:.2f}x{'' if same_device else ' on ' + row.device})"]
    lost = 0.0
    for name, then in row.task.items():
        metric = TEXT_METRICS[name]
        recorded, now = metric.gain(then.dense, then.value), metric.gain(stock[name], found[name])
        lost = max(lost, (recorded - now) / (DRIFT_NATS if metric.unit else DRIFT_SHARE))
        said.append(f"{name} {found[name]:.3f}, stock {stock[name]:.3f} (recorded {then.value:.3f}, {then.dense:.3f})")
    if lost > 3:
        return "broken", ", ".join(said)
    if lost > 1 or (same_device and speed < SLOWER * row.gain):
        return "drifted", ", ".join(said)
    return "confirmed", ", ".join(said)


def judge_task(
    row: Measured, stock: Mapping[str, float], found: Mapping[str, float], speed: float, same_device: bool
) -> tuple[Literal["confirmed", "drifted", "broken"], str]:
    """Hold new figures against a row: broken where nothing is gained any more, drifted where less than half of it is, or speed is lost."""
    name = row.objective or "accuracy"
    gain = ANSWER_METRICS[name].gain
    recorded = gain(row.task[name].dense, row.task[name].value)
    now, recorded_speed = gain(stock[name], found[name]), row.gain
    said = (
        f"{name} {found[name]:.3f}, stock {stock[name]:.3f}: gain {now:+.3f} (recorded {recorded:+.3f}), "
        f"{speed:.2f}x the speed (recorded {recorded_speed:.2f}x{'' if same_device else ' on ' + row.device})"
    )
    if not now > 0:
        return "broken", said
    if now < recorded / 2 or (same_device and speed < SLOWER * recorded_speed):
        return "drifted", said
    return "confirmed", said
