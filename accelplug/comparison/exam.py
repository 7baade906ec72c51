"""What a vision-language model is examined on: pictures with their truth, questions about them, and a prompt to describe them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from accelplug.chat import open_picture, require_files
from accelplug.comparison.arguments import require_whole
from accelplug.comparison.evaluators import amber, coco, pope
from accelplug.comparison.evaluators.evaluator import Parse, Question
from accelplug.comparison.evaluators.vocabulary import Vocabulary
from accelplug.errors import AccelplugError, worded
from accelplug.files import path_of

POPE_SPLITS: tuple[Literal["random", "popular", "adversarial"], ...] = ("random", "popular", "adversarial")
DESCRIBE = "Please describe this image in detail."


@dataclass(frozen=True)
class Exam:
    """Pictures, their truth, and what is asked about them.

    Attributes
    ----------
    pictures : by key, PIL images or paths of files.
    truth : by key, the classes that are there.
    questions : of yes and no: POPE's in all splits, AMBER's in all dimensions.
    pairs : (task, key, question whose truth is yes, question whose truth is no), scored as MME does.
    vocabulary : words for classes, to read descriptions with.
    likely : by key, classes that are not there and that one would expect (AMBER's Cog).
    associations, safe : AMBER's words that stand for others, and those that are never hallucinated.
    source : where the truth comes from, for the report.
    max_new_tokens : of a description.
    parse : how answers of yes and no are read: ``strict``, or ``official`` as in the release; reader : what reads them so.
    annotated : by key, the classes that stand in the annotations; the rest of a truth is what people said of the picture.
    described : whether pictures are described; an exam of questions alone asks for no descriptions.
    answer_tokens : of an answer of yes or no, at most.
    protocol : which of `protocols.PROTOCOLS` it is, for the published figures.
    """

    name: str
    pictures: Mapping[Any, Any]
    truth: Mapping[Any, Collection[str]]
    questions: tuple[Question, ...]
    vocabulary: Vocabulary
    pairs: tuple[tuple[str, Any, str, str], ...] = ()
    likely: Mapping[Any, Collection[str]] = field(default_factory=dict)
    describe: str = DESCRIBE
    source: str = ""
    max_new_tokens: int = 512
    parse: Parse = "strict"
    associations: Mapping[str, Sequence[str]] = field(default_factory=dict)
    safe: frozenset[str] = frozenset()
    reader: Callable[[str, Parse], bool | None] = pope.read_yes_no
    annotated: Mapping[Any, Collection[str]] = field(default_factory=dict)
    described: bool = True
    answer_tokens: int = 4
    protocol: str = ""

    @property
    def splits(self) -> list[str]:
        """The splits of its questions, in their order."""
        return list(dict.fromkeys(question.split for question in self.questions))

    def of(self, split: str) -> list[Question]:
        """The questions of a split."""
        return [question for question in self.questions if question.split == split]

    @cached_property
    def prompts(self) -> list[tuple[Any, str]]:
        """What is asked for a yes or no, by the picture's key and the text, each once: splits and pairs share some."""
        asked = [(question.image, question.text) for question in self.questions]
        return list(dict.fromkeys([*asked, *((key, text) for _, key, *both in self.pairs for text in both)]))

    def read(self, answer: str) -> bool | None:
        """Read an answer: True for yes, False for no, None for neither; officially as the release that the questions are from."""
        return self.reader(answer, self.parse)

    def picture(self, key: Any) -> Any:
        """Return a picture as an upright RGB image of PIL's."""
        return open_picture(self.pictures[key])

    def require_pictures(self) -> None:
        """Raise AccelplugError unless all pictures that are asked about are there."""
        if missing := {key for key, _ in self.prompts} - set(self.pictures):
            raise AccelplugError(
                f"{self.name}: there are questions about {len(missing)} pictures that it has not: {min(missing)!r}."
            )
        require_files([held for held in self.pictures.values() if isinstance(held, str | Path)])

    @classmethod
    def scenes(cls, pictures: int = 200, split: str = "test") -> Exam:
        """Generated scenes of coloured shapes, for the bundled model: 6 questions a split on each picture, and a pair a task."""
        from PIL import Image

        from accelplug.zoo import scenes

        require_whole(pictures, "Exam.scenes, pictures", 1)
        if not isinstance(split, str) or split not in scenes.SPLITS:
            raise AccelplugError(f"Exam.scenes: expected a split of {', '.join(scenes.SPLITS)}, got {split!r}.")
        drawn = [scene for scene in map(scenes.sample, scenes.SPLITS[split]) if len(scene.kinds) >= 3][:pictures]
        by_key = {scene.number: scene for scene in drawn}
        things = {key: scene.kinds for key, scene in by_key.items()}
        asked = [question for name in POPE_SPLITS for question in pope.build(things, name, images=len(things))]
        pairs = _existence(asked)
        for key, scene in by_key.items():
            rng = np.random.default_rng(key)
            for task in ("colour", "count", "position"):
                if pair := scenes.attribute_pair(scene, task, rng):
                    pairs.append(("color" if task == "colour" else task, key, pair[0].text, pair[1].text))
        usual = {kind: set(kinds) for kinds in scenes.THEMES.values() for kind in kinds}
        likely = {key: frozenset().union(*(usual[kind] for kind in kinds)) - set(kinds) for key, kinds in things.items()}
        return cls(
            name=f"scenes, {split} split",
            pictures={key: Image.fromarray(scenes.render(scene)[0]) for key, scene in by_key.items()},
            truth={key: frozenset(kinds) for key, kinds in things.items()},
            questions=tuple(asked),
            vocabulary=Vocabulary({kind: [scenes.plural(kind)] for kind in scenes.KINDS}, None),
            pairs=tuple(pairs),
            likely=likely,
            source="generated",
            max_new_tokens=100,
        )

    @classmethod
    def coco(
        cls, folder: str | Path, pictures: int = 500, seed: int = 0, words: str | Path | None = None, parse: Parse = "strict"
    ) -> Exam:
        """A COCO folder on disk: POPE questions by its builder, and descriptions read with CHAIR's method.

        Parameters
        ----------
        folder : holds ``annotations/`` and the images.
        words : a list of synonyms, a class a line; without it our own is used, and figures are CHAIR-like.
        parse : how answers are read: ``strict`` or ``official``.

        Raises
        ------
        AccelplugError
            If something is not there.
        """
        require_whole(pictures, "Exam.coco, pictures", 1)
        folder = path_of(folder, "Exam.coco, folder")
        held = coco.read_annotations(folder)
        vocabulary = Vocabulary.read(words) if words else Vocabulary.coco()
        rich = sorted(key for key in held.files if len(set(held.things.get(key, ()))) >= 3)
        if len(rich) < pictures:
            raise AccelplugError(
                f"{folder}: {pictures} pictures with three things or more were asked for, there are {len(rich)}; "
                + worded("ask for fewer.", "ask for fewer: --pictures.")
            )
        keys = sorted(rich[i] for i in np.random.default_rng(seed).permutation(len(rich))[:pictures])
        things = {key: held.things[key] for key in keys}
        asked = [question for name in POPE_SPLITS for question in pope.build(things, name, images=len(keys), seed=seed)]
        truth = held.truth(vocabulary, keys)
        files = {key: picture_file(folder, held.files[key]) for key in keys}
        return cls(
            name=f"COCO, {len(keys)} images, seed {seed}",
            pictures=files,
            truth={key: frozenset(truth[key]) for key in keys},
            questions=tuple(asked),
            vocabulary=vocabulary,
            pairs=tuple(_existence(asked)),
            source=held.source,
            parse=parse,
            annotated=things,
        )

    @classmethod
    def amber(cls, folder: str | Path, pictures: int | None = None, seed: int = 0, parse: Parse = "strict") -> Exam:
        """AMBER's own pictures, questions and words: its folder ``data``, and the pictures in a folder beside it.

        Parameters
        ----------
        folder : holds ``data/`` of github.com/junyangwang0410/AMBER, and ``image/``.
        pictures : how many are drawn; all 1,004 if left out.
        parse : how answers are read: ``strict`` or ``official``.

        Raises
        ------
        AccelplugError
            If something is not there.
        """
        if pictures is not None:
            require_whole(pictures, "Exam.amber, pictures", 1)
        folder = path_of(folder, "Exam.amber, folder")
        held = amber.read_folder(folder / "data")
        names = sorted(held.truth)
        if pictures is not None:
            if pictures > len(names):
                raise AccelplugError(f"{folder}: {pictures} pictures were asked for, there are {len(names)}.")
            names = sorted(names[i] for i in np.random.default_rng(seed).permutation(len(names))[:pictures])
        shown = set(names)
        return cls(
            name=f"AMBER, {len(names)} images" + ("" if pictures is None else f", seed {seed}"),
            pictures={name: picture_file(folder, name) for name in names},
            truth={name: held.truth[name] for name in names},
            questions=tuple(question for question in held.questions if question.image in shown),
            vocabulary=amber.vocabulary(held.associations),
            likely={name: held.likely[name] for name in names},
            describe=held.describe,
            source="AMBER's annotations",
            parse=parse,
            associations=held.associations,
            safe=held.safe,
            reader=amber.read_answer,
        )


def _existence(asked: Sequence[Question]) -> list[tuple[str, Any, str, str]]:
    """MME's pair on each picture, what is there and what is not: the last two of its random split."""
    last = {(question.image, question.answer): question.text for question in asked if question.split == "random"}
    return [("existence", key, text, last[key, False]) for (key, answer), text in last.items() if answer]


def picture_file(folder: Path, name: str) -> Path:
    """Return where an image lies: in the folder, or in one of its folders."""
    direct = folder / name
    return direct if direct.is_file() else next(folder.glob(f"*/{name}"), direct)
