"""tune() for language models: which patch answers better than the stock model, shown on pictures that the search never saw."""

from __future__ import annotations

import html
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from accelplug import show
from accelplug.comparison import arguments
from accelplug.comparison.charts import CHARTS_STYLE, Mark, chart
from accelplug.comparison.environment import environment
from accelplug.comparison.exam import Exam
from accelplug.comparison.journal import Journal, fingerprint_of
from accelplug.comparison.metrics import ANSWER_METRICS, ANSWERS, LIKELIHOODS, POLAR
from accelplug.comparison.questions import Asker, Item, digest, items, require_pictures, shifted_accuracy
from accelplug.comparison.rows import Quantiles
from accelplug.errors import AccelplugError, worded
from accelplug.hosts.host import model_facts
from accelplug.recipe import Measured, load
from accelplug.show import as_elements, framed
from accelplug.tuning import aims
from accelplug.tuning.aims import Aim
from accelplug.tuning.budget import Bound, parse_budget
from accelplug.tuning.contest import PAGE_SIZE, SEARCH_SHARE, STOCK, Contest
from accelplug.tuning.result import Point, Tuned
from accelplug.tuning.space import FINALISTS, require_ladders

logger = logging.getLogger("accelplug")

OBJECTIVES = tuple(name for name, metric in ANSWER_METRICS.items() if metric.objective)


def tune_language(
    model: Any,
    given: Any,
    budget: str | Bound | Sequence[str | Bound] | None,
    *,
    objective: str | None,
    processor: Any,
    time_budget_s: float,
    seed: int,
    patches: Sequence[str] | None,
    resume: str | Path | None,
    progress: bool,
) -> Tuned:
    """Find a patch that answers better than the stock model within a budget; see `accelplug.tune` for the arguments.

    Raises
    ------
    AccelplugError
        If questions, processor, objective or budget cannot be used.
    """
    asked = questions(model, given, processor)
    bounds = () if budget is None else parse_budget(budget, ANSWER_METRICS)
    polar = any(item.truth is not None for item in asked)
    objective = objective or ("accuracy" if all(item.truth is not None for item in asked) else "nll")
    named = {objective, *(bound.name for bound in bounds if bound.score is None)}
    if objective not in OBJECTIVES:
        raise AccelplugError(
            f"The objective of a language model is one of {', '.join(OBJECTIVES)}, got {objective!r}. Bound the others."
        )
    if (wanting := sorted(name for name in named if ANSWER_METRICS[name].needs == POLAR)) and not polar:
        raise AccelplugError(f"{', '.join(wanting)}: expected questions of yes and no, got none. Bound accuracy or nll.")
    require_ladders(patches, aims.AIM_LADDERS, "a language model")
    require_pictures(asked)
    needs = {ANSWER_METRICS[name].needs for name in named}
    says = bool(needs & {ANSWERS, POLAR}) or any(bound.score for bound in bounds)
    asker = Asker(model, processor, says=says, likelihoods=LIKELIHOODS in needs, parse=getattr(given, "parse", "strict"))
    journal = Journal(
        resume, fingerprint_of(model, digest(asked), seed, asker.says, asker.likelihoods, asker.parse, PAGE_SIZE)
    )
    contest = Contest(asker, *split(asked, seed), objective, bounds, time_budget_s, journal)
    with show.progress("tuning", time_budget_s, progress) as contest.tell:
        try:
            if asked[0].picture is not None:
                contest.candidates = aims.aims(model_facts(model), model.config.get_text_config().num_hidden_layers, patches)
            contest.explore()
        except KeyboardInterrupt:
            if STOCK.name not in contest.sheets:
                raise
            logger.warning("tune: interrupted; the best so far is proven now. Interrupt again to stop at once.")
        contest.prove()
    return tuned(contest, seed, _why(contest), _notes(contest), parse=asker.parse)


def questions(model: Any, given: Any, processor: Any) -> tuple[Item, ...]:
    """Return what is asked: of an `Exam`, of mappings, or on generated scenes where nothing is given."""
    arguments.require_processor(processor, "tune")
    if given is None and hasattr(processor, "image_processor"):
        return items(Exam.scenes())
    if not isinstance(given, Exam | Sequence) or isinstance(given, str):
        raise AccelplugError(
            f"{type(model).__name__} is tuned on an Exam or a list of {{text, answer, image}}, got {type(given).__name__}."
        )
    return items(given)


def split(asked: Sequence[Item], seed: int) -> tuple[list[Item], list[Item]]:
    """Return the questions of the search and those held out for the proof: of half of the pictures each, in an order of the seed's."""
    rng = np.random.default_rng(seed)
    groups = list(dict.fromkeys(item.group for item in asked))
    if len(groups) < 2:
        raise AccelplugError(
            "tune needs questions about two pictures at least, one to search and one to prove with; got one."
        )
    seen = {groups[i] for i in rng.permutation(len(groups))[: len(groups) // 2]}
    shuffled = [asked[i] for i in rng.permutation(len(asked))]  # so that the first page shows many pictures
    return [item for item in shuffled if item.group in seen], [item for item in shuffled if item.group not in seen]


# ------------------------------------------------------------------------------------------------------------- the result


@dataclass(frozen=True, eq=False, repr=False)
class Answered(Tuned):
    """What tune() found on a language model; its table has figures of answers, and the gain over stock on the proof.

    Attributes
    ----------
    objective : the figure that was to be better than the stock model's.
    """

    objective: str = ""

    @property
    def budget(self) -> str:
        return ", ".join([f"{self.objective} better than stock", *map(str, self.bounds)])

    def headings(self) -> list[str]:
        return ["candidate", "questions", "speed", "figures", "gain (95 % on the proof)", "p (Holm)", "verdict"]

    def cells(self, point: Point) -> list[str]:
        return [
            point.name,
            str(point.runs),
            f"{point.speedup:.2f}x",
            ", ".join(f"{name} {value:.3f}" for name, value in point.worst.items()),
            _gain(point) if point.gain else "",
            f"{point.holm:.2g}" if point.holm is not None else "",
            point.verdict,
        ]

    def page(self) -> str:
        """Return one self-contained HTML page: what was gained, with its interval where it was proven, and the table."""
        marks = [
            Mark(point.name, point.verdict, *point.gain, f"{point.gain[0]:+.3f}") for point in self.points if point.gain
        ]
        by = "contexts" if self.objective == "speed" else "pictures"
        hint = f"more is better; bars: 95 % on the proof, by {by}; dashed: stock"
        drawn = chart(f"gain in {self.objective}", hint, marks, 0.0)
        head = (
            f'<div class="soft">{html.escape(self.model)}: {html.escape(self.budget)}</div><h1>{html.escape(self.why)}</h1>'
        )
        table = self.table()
        table.title = "All that was tried"
        return framed("accelplug: tuned", f"{head}\n{drawn}\n{as_elements(table)}", CHARTS_STYLE)


def tuned(
    contest: Contest, seed: int, why: str, notes: tuple[str, ...], looked_at: Sequence[Point] = (), **inputs: Any
) -> Answered:
    """Put the recipe, its measurement and what was tried together; `inputs` say what it was measured on.

    `looked_at`: candidates that were asked nothing.
    """
    winner = contest.winner
    facts = model_facts(contest.asker.model)
    recipe = load((winner or STOCK).recipe, facts)
    stock, *tried = points(contest).values()
    return Answered(
        name="tuned",
        model="tuned",
        rules=recipe.rules,
        source=recipe.source,
        loc=recipe.loc,
        summary=why,
        measured=(_measured(contest, winner, seed, inputs),) if winner else (),
        why=why,
        bounds=contest.bounds,
        notes=notes,
        points=(stock, *sorted(tried, key=lambda p: (p.verdict == "tried", -p.runs, -p.margin)), *looked_at),
        seconds={**contest.seconds, "all": round(contest.spent_s, 1)},
        facts=facts,
        objective=contest.objective,
    )


def points(contest: Contest) -> dict[str, Point]:
    """Return the stock model and all that was tried, by name."""
    return {aim.name: _point(contest, aim) for aim in (STOCK, *contest.tried)}


def _point(contest: Contest, aim: Aim) -> Point:
    finalist = aim in contest.finalists
    pages = contest.proof if finalist or (aim is STOCK and contest.proof) else contest.searched(aim)
    standing = contest.standing(aim, pages)
    verdict = "stock" if aim is STOCK else "tried"
    if finalist:
        verdict = "proven" if aim is contest.winner else "confirmed" if contest.beats(aim) else "overturned"
    return Point(
        aim.name,
        dict(aim.recipe),
        sum(len(contest.pages[page]) for page in pages),
        standing.figures["speed"],
        {name: value for name, value in standing.figures.items() if name != "speed" and not math.isnan(value)},
        standing.slack if aim is STOCK else min(standing.gain, standing.slack),
        verdict,
        gain=None if aim is STOCK else contest.interval(aim) if finalist else (standing.gain, math.nan, math.nan),
        holm=contest.holm.get(aim.name),
    )


def _why(contest: Contest) -> str:
    """The result in a sentence."""
    found = points(contest)
    stock = found.pop(STOCK.name)
    name, held = contest.objective, sum(len(contest.pages[page]) for page in contest.proof)
    value = f"{stock.worst.get(name, math.nan):.3f}"
    if contest.winner is not None:
        point = found[contest.winner.name]
        beside = f"{name} {point.worst[name]:.3f}, stock {value}, on {held} questions held out"
        return f"{point.name}: {beside} ({_gained(point)}), at {point.speedup:.2f}x the speed"
    if contest.seen[0].picture is None:
        return (
            "Stay stock: every patch for language models moves attention to pictures, and these questions show none. "
            f"Stock: {name} {value} on {stock.runs} questions."
        )
    if not found:
        page_s = contest.sheets[STOCK.name][0].seconds
        enough = math.ceil(2 * (1 + FINALISTS) * page_s / SEARCH_SHARE)
        return (
            f"Stay stock: {contest.time_budget_s:.0f} s are too few to try a patch, {PAGE_SIZE} questions take {page_s:.1f} s. "
            f"Give {worded('time_budget_s', '--time')} of at least {enough}."
        )
    if contest.finalists:
        said = "; ".join(f"{aim.name}: {_gained(found[aim.name])}" for aim in contest.finalists)
        return f"Stay stock: what did better in the search is not proven on {held} questions held out. {said}."
    best = max(found.values(), key=lambda point: (point.margin, point.runs))
    return (
        f"Stay stock: of {len(found)} candidates none did better within the budget. Stock: {name} {value} on {stock.runs} questions; "
        f"nearest: {best.name}, gain {_gain(best)} on {best.runs}."
    )


def untried(contest: Contest) -> tuple[str, ...]:
    """What was not tried, and why; and what the stock model itself misses."""
    stock = points(contest)[STOCK.name]
    notes = [f"Not tried: {name}: {reason}" for name, reason in contest.refused.items()]
    if left := contest.untouched:
        enough = (
            ""
            if contest.enough_s is None
            else f" About {contest.enough_s:.0f} s are enough: {worded('time_budget_s', '--time')}."
        )
        notes.append(f"Not tried for want of time: {left} of {len(contest.all_candidates)} candidates.{enough}")
    own = {**stock.worst, "speed": 1.0}
    missed = [bound for bound in contest.bounds if bound.name in own and bound.margin(own[bound.name], own[bound.name]) < 0]
    if missed:
        notes.append(f"The stock model itself misses {', '.join(map(str, missed))}.")
    return tuple(notes)


def _notes(contest: Contest) -> tuple[str, ...]:
    """What was not tried, what the stock model itself misses, and whether a shifted threshold does as well as the recipe."""
    notes = list(untried(contest))
    if contest.winner and not math.isnan(shifted := shifted_accuracy(*contest.answered(contest.winner))):
        notes.append(f"The stock model with its threshold moved to as many yes: accuracy {shifted:.3f}.")
    return tuple(notes)


def _gain(point: Point) -> str:
    gain, low, high = point.gain or (math.nan,) * 3
    return f"{gain:+.3f}" + ("" if math.isnan(low) else f" ({low:+.3f} to {high:+.3f})")


def _gained(point: Point) -> str:
    return f"gain {_gain(point)}, 95 % by pictures, corrected p {point.holm:.2g}"


def _measured(contest: Contest, aim: Aim, seed: int, inputs: Mapping[str, Any]) -> Measured:
    """The proof as a row of a recipe file: figures beside stock's, milliseconds a question."""
    asked, stock, own = contest.answered(aim)
    before, found = contest.worth(asked, stock), contest.worth(asked, own)
    facts = environment(contest.asker.model)
    ms = {
        variant.name: Quantiles.of(
            [1e3 * s.seconds / len(s.replies) for s in (contest.sheets[variant.name][p] for p in contest.proof)]
        )
        for variant in (STOCK, aim)
    }
    speed = Quantiles.of(contest.speeds(aim, contest.proof))
    return Measured.model_validate(
        {
            **{
                key: facts[key]
                for key in ("date", "device", "versions", "git", "dtype", "baseline")
                if facts.get(key) is not None
            },
            "inputs": {"questions": len(asked), "questions_sha256": digest(asked), **inputs},
            "seeds": [seed],
            "dense_ms": asdict(ms[STOCK.name]),
            "ms": asdict(ms[aim.name]),
            "speedup": asdict(speed),
            "objective": contest.objective,
            "task": {
                name: {"dense": before[name], "value": found[name]}
                for name in found
                if not math.isnan(before[name] + found[name])
            },
        }
    )
