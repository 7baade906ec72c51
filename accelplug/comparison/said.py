"""All that a model said in an exam, line by line, and how each word and answer was counted: what a figure can be checked by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from accelplug.comparison.evaluators import amber, mme
from accelplug.comparison.evaluators.evaluator import Question
from accelplug.comparison.evaluators.pope import questions_sha256
from accelplug.comparison.evaluators.vocabulary import Mention
from accelplug.comparison.exam import Exam
from accelplug.comparison.outcome import Outcome


def records(model: str, exam: Exam, rows: Sequence[Outcome]) -> Iterator[dict[str, Any]]:
    """Return one record for the exam, then one for each description, each answer and each pair of answers of every row.

    A description's has ``mentions``: where the words stand, the term and the class that they were taken for, and how it was counted.
    Classes of the picture that nothing mentions are ``missed``.
    """
    yield {
        "record": "exam",
        "model": model,
        "exam": exam.name,
        "protocol": exam.protocol or None,
        "truth": exam.source,
        "prompt": exam.describe if exam.described else None,
        "max_new_tokens": exam.max_new_tokens,
        "answer_tokens": exam.answer_tokens,
        "decoding": "greedy",
        "parse": exam.parse,
        "singulars": exam.vocabulary.singulariser,
        "questions_sha256": questions_sha256(exam.questions) if exam.questions else None,
        "pictures": [{"picture": key, "file": _file(exam, key)} for key in exam.pictures],
    }
    for row in rows:
        for key, text in row.said.descriptions.items():
            yield {"record": "description", "row": row.name, "picture": key, **_description_of(exam, key, text)}
        for split, replies in row.said.replies.items():
            for question, said, margin in zip(exam.of(split), replies, row.said.margins[split], strict=True):
                yield {"record": "answer", "row": row.name, **_answer_of(exam, question, said), "margin": round(margin, 4)}
        for (task, key, *asked), both in zip(exam.pairs, row.said.pairs, strict=bool(row.said.pairs)):
            right = mme.TwoAnswers(task, key, *both).right
            told = {"task": task, "picture": key, "questions": asked, "said": list(both), "right": list(right)}
            yield {"record": "pair", "row": row.name, **told}


def _file(exam: Exam, key: Any) -> str | None:
    """The name of a picture's file; of one that was drawn there is none."""
    held = exam.pictures[key]
    return None if hasattr(held, "convert") else str(held)


def _description_of(exam: Exam, key: Any, text: str) -> dict[str, Any]:
    found = exam.vocabulary.found(text)
    named = {mention.name for mention in found}
    mentions = [{**asdict(mention), "counted": _counted(exam, key, mention)} for mention in found]
    missed = sorted({name for name in exam.truth[key] if name not in named})
    return {
        "text": text,
        "words": len(text.split()),
        "mentions": mentions,
        "truth": sorted(exam.truth[key]),
        "missed": missed,
    }


def _counted(exam: Exam, key: Any, mention: Mention) -> str:
    """How a mention was counted, in words."""
    if mention.name is None:
        return "not counted: the words together mean something else"
    if exam.associations:
        return amber.how_counted(mention.name, exam.truth[key], exam.likely.get(key, ()), exam.associations, exam.safe)
    if mention.name not in exam.truth[key]:
        return "hallucinated"
    if not exam.annotated:
        return "in the picture"
    return "in the picture: annotated" if mention.name in exam.annotated[key] else "in the picture: people said so"


def _answer_of(exam: Exam, question: Question, said: str) -> dict[str, Any]:
    read = exam.read(said)
    words = {True: "yes", False: "no", None: "neither"}
    return {
        "split": question.split,
        "picture": question.image,
        "question": question.text,
        "truth": words[question.answer],
        "said": said,
        "read": words[read],
        "right": read is question.answer,
    }
