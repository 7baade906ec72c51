"""Published protocols of hallucination, stated in full: what papers ask, of which pictures, how it is counted, and what they report.

Their figures are citations: printed beside, never taken for ours. Papers disagree about baselines by more than most methods gain (a
greedy LLaVA-1.5-7B has a CHAIR_S of 46.4 to 50.2 in the tables below), so hold a figure against the baseline of its own table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from accelplug.comparison.arguments import require_whole
from accelplug.comparison.evaluators import coco, pope_files
from accelplug.comparison.evaluators.mme import HALLUCINATION, Mme
from accelplug.comparison.evaluators.pope import PopeFigures
from accelplug.comparison.evaluators.vocabulary import Vocabulary
from accelplug.comparison.exam import DESCRIBE, POPE_SPLITS, Exam, picture_file
from accelplug.comparison.outcome import Outcome
from accelplug.errors import AccelplugError, worded
from accelplug.files import lines, path_of

if TYPE_CHECKING:
    from rich.table import Table

SENTENCE_TOKENS = 16
"""Tokens of an answer that is read as a release does: up to the first full stop, which may come late."""


@dataclass(frozen=True)
class Published:
    """A row of somebody's table.

    Attributes
    ----------
    figures : as many as the protocol has columns, NaN for what was not reported.
    source : whose table it is. A name in brackets: found there in a paper that cites it, not in the original.
    """

    model: str
    method: str
    figures: tuple[float, ...]
    source: str


@dataclass(frozen=True)
class Protocol:
    """What a benchmark asks, and how.

    Attributes
    ----------
    facts : what is asked and counted, and where releases differ.
    columns : of its figures, in the units of papers.
    build : the exam, of the folder, so many pictures (0: all of them), a seed and a list of words.
    figures : of what a row answered, as `columns` have them.
    pictures : how many papers take; 0 for all.
    """

    name: str
    cite: str
    facts: str
    columns: tuple[str, ...]
    build: Callable[[Path, int, int, Path | None], Exam]
    figures: Callable[[Outcome], tuple[float, ...]]
    pictures: int
    published: tuple[Published, ...]

    def exam(self, folder: str | Path, pictures: int | None = None, seed: int = 0, words: str | Path | None = None) -> Exam:
        """Return the exam on a folder of the benchmark.

        Parameters
        ----------
        folder : of COCO for chair and pope, AMBER's or MME's own.
        pictures : how many; as many as in papers if left out.
        seed : of the draw of pictures.
        words : CHAIR's list of words, a class a line; ours if left out, and figures are CHAIR-like.

        Raises
        ------
        AccelplugError
            If something is not there.
        """
        folder = path_of(folder, f"The folder of protocol {self.name}")
        if pictures is not None:
            require_whole(pictures, f"Pictures of protocol {self.name}", 1)
        made = self.build(folder, pictures or self.pictures, seed, None if words is None else Path(words))
        return replace(made, protocol=self.name)

    def table(self, rows: Sequence[Outcome], model: str) -> Table:
        """Return what was measured here, and below it what papers report."""
        from rich.box import SIMPLE_HEAD

        from accelplug import show

        table = show.table(
            f"protocol {self.name}, {self.cite}: here, and as published",
            "model",
            "method",
            *self.columns,
            "source",
            box=SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            caption=f"{self.facts} Rows with a source are citations, not measured here.",
        )
        for column in table.columns[2:-1]:
            column.justify = "right"
        for row in rows:
            table.add_row(model, row.name, *map(_written, self.figures(row)), "measured here")
        for cited in self.published:
            table.add_row(cited.model, cited.method, *map(_written, cited.figures), cited.source, style="dim")
        return table

    def to_dict(self, rows: Sequence[Outcome]) -> dict[str, Any]:
        """Return the same as plain data."""

        def named(figures: Sequence[float]) -> dict[str, float]:
            return dict(zip(self.columns, figures, strict=True))

        cited = [{"model": x.model, "method": x.method, **named(x.figures), "source": x.source} for x in self.published]
        here = {row.name: named(self.figures(row)) for row in rows}
        return {"name": self.name, "cite": self.cite, "facts": self.facts, "measured": here, "published": cited}


def protocol(name: str) -> Protocol:
    """Return a protocol by its name.

    Raises
    ------
    AccelplugError
        If there is none of that name.
    """
    if name not in PROTOCOLS:
        raise AccelplugError(f"There is no protocol {name!r}: expected one of {', '.join(PROTOCOLS)}.")
    return PROTOCOLS[name]


def _written(figure: float) -> str:
    return "" if math.isnan(figure) else f"{figure:.1f}"


# --------------------------------------------------------------------------------------------------------------- CHAIR


def _chair(folder: Path, pictures: int, seed: int, words: Path | None) -> Exam:
    """Pictures drawn of all that are annotated, described, and no question."""
    held = coco.read_annotations(folder)
    if len(held.files) < pictures:
        raise AccelplugError(
            f"{folder}: {pictures} pictures were asked for, {len(held.files)} are annotated; "
            + worded("ask for fewer.", "ask for fewer: --pictures.")
        )
    everything = sorted(held.files)
    keys = sorted(everything[i] for i in np.random.default_rng(seed).permutation(len(everything))[:pictures])
    vocabulary = Vocabulary.read(words) if words else Vocabulary.coco()
    listed = f"words of {words.name}" if words else "our list of words, so that figures are CHAIR-like"
    truth = held.truth(vocabulary, keys)
    return Exam(
        name=f"CHAIR, {pictures} of {len(everything)} pictures of COCO, seed {seed}",
        pictures={key: picture_file(folder, held.files[key]) for key in keys},
        truth={key: frozenset(truth[key]) for key in keys},
        questions=(),
        vocabulary=vocabulary,
        source=f"{held.source}; {listed}; singulars by {vocabulary.singulariser}",
        annotated={key: frozenset(held.things[key]) for key in keys},
    )


def _chair_figures(row: Outcome) -> tuple[float, ...]:
    found = row.figures["chair"]
    return (100 * found.chair_s, 100 * found.chair_i, 100 * found.recall, 100 * found.f1, found.mean_words)


# ---------------------------------------------------------------------------------------------------------------- POPE


def _pope(folder: Path, pictures: int, seed: int, words: Path | None) -> Exam:
    """The published questions where their files lie in the folder, or in ``pope/`` in it; else ours after the same rules."""
    names = [f"coco_pope_{split}.json" for split in POPE_SPLITS]
    place = next((at for at in (folder, folder / "pope") if all((at / name).is_file() for name in names)), None)
    if place is None:
        made = Exam.coco(folder, pictures, seed, words, parse="official")
        note = "built after the release's rules: expected coco_pope_*.json of github.com/RUCAIBox/POPE in the folder for its own"
        return replace(made, pairs=(), described=False, answer_tokens=SENTENCE_TOKENS, source=f"{made.source}; {note}")
    asked = [question for name in names for question in pope_files.read_pope(place / name)]
    images = list(dict.fromkeys(question.image for question in asked))[:pictures]
    shown = set(images)
    return Exam(
        name=f"POPE's published questions, {len(images)} pictures",
        pictures={image: picture_file(folder, str(image)) for image in images},
        truth={},
        questions=tuple(question for question in asked if question.image in shown),
        vocabulary=Vocabulary({}, None),
        source="the question files",
        parse="official",
        described=False,
        answer_tokens=SENTENCE_TOKENS,
    )


def _pope_figures(row: Outcome) -> tuple[float, ...]:
    found: PopeFigures = row.figures["pope"]
    splits = [found.splits[split] for split in POPE_SPLITS]
    mean = [100 * float(np.mean([getattr(split, what) for split in splits])) for what in ("accuracy", "f1", "yes_ratio")]
    return (mean[0], mean[1], 100 * splits[-1].accuracy, 100 * splits[-1].f1, mean[2])


# ------------------------------------------------------------------------------------------------------- AMBER and MME


def _amber(folder: Path, pictures: int, seed: int, words: Path | None) -> Exam:
    return Exam.amber(folder, pictures or None, seed, parse="official")


def _amber_figures(row: Outcome) -> tuple[float, ...]:
    shares: Mapping[str, float] = row.figures["amber"].shares
    counted = [100 * shares.get(name, math.nan) for name in ("chair", "cover", "hal", "cog", "f1")]
    return (*counted, shares.get("score", math.nan))


def _mme(folder: Path, pictures: int, seed: int, words: Path | None) -> Exam:
    """The tasks of objects, of a folder of MME's release: a folder a task, with ``NAME.txt`` beside or near each picture."""
    pairs, files = [], {}
    for task in HALLUCINATION:
        base = folder / task
        texts = sorted(base.glob("*.txt")) or sorted((base / "questions_answers_YN").glob("*.txt"))
        if not texts:
            raise AccelplugError(
                f"{base}: expected MME's questions, NAME.txt or questions_answers_YN/NAME.txt, got none; give the folder of its release."
            )
        for path in texts:
            asked = dict(line.rsplit("\t", 1)[::-1] for line in lines(path, "MME's questions") if "\t" in line)
            if set(asked) != {"Yes", "No"}:
                raise AccelplugError(f"{path}: expected two questions, each with a tab and Yes or No, got {sorted(asked)}.")
            near = [found for at in (base, base / "images") for found in sorted(at.glob(f"{path.stem}.*")) if found != path]
            key = f"{task}/{path.stem}"
            files[key] = near[0] if near else base / f"{path.stem}.jpg"
            pairs.append((task, key, asked["Yes"], asked["No"]))
    return Exam(
        name=f"MME, {', '.join(HALLUCINATION)}: {len(pairs)} pictures",
        pictures=files,
        truth={},
        questions=(),
        vocabulary=Vocabulary({}, None),
        pairs=tuple(pairs),
        source="MME's own",
        described=False,
    )


def _mme_figures(row: Outcome) -> tuple[float, ...]:
    found: Mme = row.figures["mme"]
    return (*(found.total([name]) for name in HALLUCINATION), found.hallucination)


# ------------------------------------------------------------------------------------------------------------ citations

VHR, GIFT, ILVAD = "arXiv 2412.13949", "arXiv 2510.22067 (second hand)", "ILVAD, ICML 2026 (second hand)"
SADT, LOCORE, PTI = "SADT, CVPR 2026 (second hand)", "LocoRE, ICLR 2026 (second hand)", "PTI, CVPR 2026 (second hand)"
ONLY, MEMVR = "ONLY, ICCV 2025 (second hand)", "MemVR, ICML 2025 (second hand)"
_ = math.nan


def _cited(model: str, source: str, rows: Mapping[str, tuple[float, ...]]) -> tuple[Published, ...]:
    """Rows of one table about one model."""
    return tuple(Published(model, method, figures, source) for method, figures in rows.items())


CHAIR_PUBLISHED = (
    *_cited(
        "LLaVA-1.5-7B",
        VHR,
        {
            "greedy": (49.68, 14.32, _, _, 83),
            "vcd": (51.92, 15.42, _, _, _),
            "opera": (44.28, 13.36, _, _, _),
            "eah": (38.76, 11.05, _, _, _),
            "vhr": (33.32, 9.71, _, _, 81),
        },
    ),
    *_cited("InstructBLIP-7B", VHR, {"greedy": (45.32, 12.98, _, _, 91), "vhr": (37.76, 9.75, _, _, 106)}),
    *_cited("LLaVA-NeXT-7B", VHR, {"greedy": (29.08, 8.08, _, _, 157), "vhr": (24.96, 6.80, _, _, 157)}),
    *_cited(
        "LLaVA-1.5-7B", GIFT, {"greedy": (50.2, 15.4, _, _, _), "vaf": (49.6, 14.3, _, _, _), "gift": (39.8, 10.6, _, _, _)}
    ),
    *_cited("Qwen2-VL-7B", GIFT, {"greedy": (24.8, 9.1, _, _, _), "gift": (21.2, 7.7, _, _, _)}),
    *_cited(
        "LLaVA-1.5-7B",
        ILVAD,
        {
            "greedy": (48.6, 13.52, _, _, _),
            "var": (52.5, 14.17, _, _, _),
            "vhr": (34.5, 9.86, _, _, _),
            "agla": (46.4, 13.27, _, _, _),
            "ilvad": (32.6, 9.42, _, _, _),
        },
    ),
    *_cited("Qwen2-VL-7B", ILVAD, {"greedy": (20.8, 7.58, _, _, _), "ilvad": (17.8, 5.14, _, _, _)}),
)
POPE_PUBLISHED = (
    *_cited(
        "LLaVA-1.5-7B",
        VHR,
        {
            "greedy": (_, 84.98, _, _, _),
            "vcd": (_, 84.41, _, _, _),
            "opera": (_, 85.45, _, _, _),
            "eah": (_, 85.03, _, _, _),
            "vhr": (_, 85.47, _, _, _),
        },
    ),
    *_cited("InstructBLIP-7B", VHR, {"greedy": (_, 85.36, _, _, _), "vhr": (_, 85.52, _, _, _)}),
    *_cited("LLaVA-NeXT-7B", VHR, {"greedy": (_, 88.51, _, _, _), "vhr": (_, 88.87, _, _, _)}),
    *_cited(
        "LLaVA-1.5-7B",
        ILVAD,
        {
            "greedy": (84.50, 85.22, _, _, _),
            "var": (84.82, 85.87, _, _, _),
            "vhr": (84.74, 85.45, _, _, _),
            "agla": (85.63, 86.38, _, _, _),
            "ilvad": (85.76, 86.12, _, _, _),
        },
    ),
    *_cited("LLaVA-1.5-7B", GIFT, {"greedy": (79.5, 82.4, _, _, _), "gift": (81.9, 83.8, _, _, _)}),
)
AMBER_PUBLISHED = _cited(
    "LLaVA-1.5-7B",
    SADT,
    {
        "greedy": (6.9, 51.0, 32.0, 3.3, _, _),
        "pai": (4.2, 50.7, 18.4, 1.6, _, _),
        "hgai": (3.5, 50.2, 19.9, 1.3, _, _),
        "sadt": (2.8, 51.2, 14.7, 1.2, _, _),
    },
)
MME_PUBLISHED = (
    *_cited("LLaVA-1.5-7B", ILVAD, {"greedy": (_, _, _, _, 631.7), "ilvad": (_, _, _, _, 641.7)}),
    *_cited("LLaVA-1.5-7B", PTI, {"greedy": (_, _, _, _, 611.6), "pti": (_, _, _, _, 651.6)}),
    *_cited("LLaVA-1.5-7B", LOCORE, {"eah": (_, _, _, _, 604.0), "locore": (_, _, _, _, 656.7)}),
    *_cited("LLaVA-1.5-7B", MEMVR, {"memvr": (_, _, _, _, 648.3)}),
    *_cited("LLaVA-1.5-7B", ONLY, {"only": (_, _, _, _, 635.6)}),
)

PROTOCOLS = {
    found.name: found
    for found in (
        Protocol(
            name="chair",
            cite="arXiv 1809.02156",
            facts=f"{DESCRIBE!r}, greedy, at most 512 new tokens, 500 pictures of val2014; every release draws its own 500. Mentions "
            "are counted with repetitions against instances and what people said of the picture. Releases undo plurals by three "
            "packages, and some cut the last sentence. Below a CHAIR_S of 30, look at F1 and words: saying less helps too.",
            columns=("CHAIR_S", "CHAIR_I", "recall", "F1", "words"),
            build=_chair,
            figures=_chair_figures,
            pictures=500,
            published=CHAIR_PUBLISHED,
        ),
        Protocol(
            name="pope",
            cite="arXiv 2305.10355",
            facts="'Is there a ... in the image?' without a suffix, greedy, 500 pictures of val2014, 3,000 questions a split; means of the "
            "three splits. No, no or not before the first full stop is a no, all else a yes. Papers differ in the suffix, in sampling, "
            "and in copies of the questions: greedy baselines of one model are 79.5 to 85.9.",
            columns=("accuracy", "F1", "adversarial accuracy", "adversarial F1", "yes"),
            build=_pope,
            figures=_pope_figures,
            pictures=500,
            published=POPE_PUBLISHED,
        ),
        Protocol(
            name="amber",
            cite="arXiv 2311.07397",
            facts="AMBER's own pictures, questions and prompt, greedy, at most 512 new tokens; 'Yes' and 'No' alone are answers. Nouns are "
            "found by its list, without spaCy's similarity, so that CHAIR and Hal tend to be higher than published.",
            columns=("CHAIR", "Cover", "Hal", "Cog", "F1 of no", "AMBER"),
            build=_amber,
            figures=_amber_figures,
            pictures=0,
            published=AMBER_PUBLISHED,
        ),
        Protocol(
            name="mme",
            cite="arXiv 2306.13394",
            facts="The tasks of objects: existence, count, position and color, 200 points each: accuracy, and accuracy of both questions "
            "of a picture. Greedy; yes or no within the first four characters. Baselines of one model are 565 to 632.",
            columns=(*HALLUCINATION, "sum"),
            build=_mme,
            figures=_mme_figures,
            pictures=0,
            published=MME_PUBLISHED,
        ),
    )
}
