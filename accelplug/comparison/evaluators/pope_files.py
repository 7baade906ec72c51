"""Question files of RUCAIBox/POPE, as they are published: what `protocols` asks, and our own questions are held against."""

from __future__ import annotations

import json
import re
from pathlib import Path

from accelplug.comparison.evaluators.evaluator import Question
from accelplug.errors import AccelplugError

# Copies of the data set misspell "image" and continue after the question mark.
_QUESTION = re.compile(r"is there an? (?P<thing>.+?) in the im\w+\?", re.IGNORECASE)


def read_pope(path: str | Path) -> list[Question]:
    """Read a question file of RUCAIBox/POPE: JSON lines with image, text and label.

    The split is the last word of the file's name, as in ``coco_pope_random.json``.

    Raises
    ------
    AccelplugError
        There is no such file, or a line of it is something else.
    """
    path = Path(path)
    if not path.is_file():
        raise AccelplugError(
            f"POPE questions: expected a file of JSON lines, {path} is none; github.com/RUCAIBox/POPE has them."
        )
    split = path.stem.rsplit("_", 1)[-1]
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    return [_read_line(line, split, f"{path}, line {number}") for number, line in lines if line.strip()]


def _read_line(line: str, split: str, where: str) -> Question:
    try:
        entry = json.loads(line)
        image, text, label = entry["image"], entry["text"], entry["label"]
        thing = _QUESTION.match(text)
    except (ValueError, KeyError, TypeError) as error:
        raise AccelplugError(f"{where}: expected a JSON object with image, text and label, got {line[:80]!r}.") from error
    if thing is None or label not in ("yes", "no"):
        raise AccelplugError(
            f'{where}: expected "Is there a ... in the image?" with label yes or no, got {text!r}, {label!r}.'
        )
    return Question(image, text, label == "yes", thing["thing"], split)
