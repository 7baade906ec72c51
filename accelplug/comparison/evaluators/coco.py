"""A local COCO folder: what is in its images, for POPE and CHAIR."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelplug.comparison.evaluators.vocabulary import Vocabulary
from accelplug.errors import AccelplugError


@dataclass(frozen=True)
class Coco:
    """Annotated images by their numbers, in the order of the annotation files.

    Attributes
    ----------
    files : image -> file name.
    things : image -> names of the categories in it, in the order of the annotations, each once.
    captions : image -> what people said of it; empty without files of captions.
    """

    files: dict[int, str] = field(repr=False)
    things: dict[int, list[str]] = field(repr=False)
    captions: dict[int, list[str]] = field(repr=False)

    @property
    def source(self) -> str:
        """What the truth is made of: ``instances+captions`` as CHAIR has it, or ``instances`` if an image has no caption.

        With instances alone CHAIR is stricter.
        """
        return "instances+captions" if self.files and self.files.keys() <= self.captions.keys() else "instances"

    def truth(self, vocabulary: Vocabulary, images: Iterable[int] | None = None) -> dict[int, set[str]]:
        """Return image -> classes in it: its instances, and what its captions mention if `source` says so.

        Raises
        ------
        AccelplugError
            There is no such image.
        """
        said = self.captions if self.source == "instances+captions" else {}
        wanted = self.files if images is None else list(images)
        if missing := [image for image in wanted if image not in self.files]:
            raise AccelplugError(
                f"COCO: expected images of the {len(self.files)} that were read, got {missing[0]!r} besides."
            )
        return {
            image: {*self.things[image], *(name for text in said.get(image, ()) for name in vocabulary.mentions(text))}
            for image in wanted
        }


def read_annotations(folder: str | Path, split: str = "*") -> Coco:
    """Read the annotations of a COCO folder.

    Parameters
    ----------
    folder : has ``annotations/instances_*.json`` and perhaps ``captions_*.json`` beside them.
    split : which of them, such as ``val2014``; all of them together if not given.

    Raises
    ------
    AccelplugError
        There are no instances, or a file is not of COCO's form.
    """
    annotations = Path(folder) / "annotations"
    files: dict[int, str] = {}
    things: dict[int, list[str]] = {}
    for path in _instances(annotations, split):
        _read_instances(path, files, things)
    captions: defaultdict[int, list[str]] = defaultdict(list)
    for path in sorted(annotations.glob(f"captions_{split}.json")):
        (pairs,) = _tables(path, annotations=("image_id", "caption"))
        for image, caption in pairs:
            captions[image].append(caption)
    return Coco(files, {image: list(dict.fromkeys(names)) for image, names in things.items()}, dict(captions))


def _instances(annotations: Path, split: str) -> list[Path]:
    wanted = f"instances_{split}.json"
    if found := sorted(annotations.glob(wanted)):
        return found
    there = sorted(path.name for path in annotations.glob("*")) if annotations.is_dir() else "no such folder"
    raise AccelplugError(
        f"COCO: expected {annotations / wanted}, got {there}; unpack the annotations of cocodataset.org into the folder."
    )


def _read_instances(path: Path, files: dict[int, str], things: dict[int, list[str]]) -> None:
    names, images, instances = _tables(
        path, categories=("id", "name"), images=("id", "file_name"), annotations=("image_id", "category_id")
    )
    name_of = dict(names)
    for image, file in images:
        files[image] = file
        things.setdefault(image, [])
    for image, category in instances:
        if image not in things or category not in name_of:
            raise AccelplugError(
                f"{path}: expected annotations of its own images and categories, got image {image} with category {category}; "
                "is the file complete?"
            )
        things[image].append(name_of[category])


def _tables(path: Path, **columns: tuple[str, str]) -> list[list[tuple[Any, Any]]]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return [[(row[first], row[second]) for row in data[table]] for table, (first, second) in columns.items()]
    except (ValueError, KeyError, TypeError) as error:
        raise AccelplugError(
            f"{path}: expected COCO's JSON with {columns}, got {type(error).__name__}: {error}; download the file again."
        ) from error
