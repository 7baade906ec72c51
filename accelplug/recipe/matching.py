"""Which models a recipe file is for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from accelplug.recipe.conditions import listed


@dataclass(frozen=True)
class ModelFacts:
    """What recipes match a model by."""

    class_names: tuple[str, ...]
    """The denoiser's class, then its bases."""
    config: Mapping[str, Any]
    """The denoiser's config."""
    components: frozenset[str] = frozenset()
    """Components of the pipeline that are loaded; empty for a bare denoiser."""
    vlm: bool = False
    """Whether it is a vision-language model of a family that is known."""

    def value(self, key: str) -> Any:
        """Return what stands for `key` of a match."""
        own = {"class": self.class_names[0], "vlm": self.vlm}
        return own.get(key, self.config.get(key, "<none>"))


@dataclass(frozen=True)
class Match:
    """Which models a file is for. A value may be a list: any of. ``vlm: true`` is any vision-language model that is known."""

    keys: Mapping[str, Any]
    pipeline: tuple[str, ...] = ()

    def fits(self, facts: ModelFacts) -> bool:
        """Whether a model is meant. A bare denoiser cannot show its pipeline, so that part is not asked of it."""
        if facts.components and not facts.components.issuperset(self.pipeline):
            return False
        return all(self._has(facts, key, wanted) for key, wanted in self.keys.items())

    @staticmethod
    def _has(facts: ModelFacts, key: str, wanted: Any) -> bool:
        if key == "class":
            return any(name in facts.class_names for name in listed(wanted))
        if key == "vlm":
            return facts.vlm is wanted
        if key not in facts.config:
            return False
        value = facts.config[key]
        if isinstance(value, list | tuple):
            return list(value) == listed(wanted)
        return any(value == item and isinstance(value, bool) == isinstance(item, bool) for item in listed(wanted))

    def weight(self, facts: ModelFacts) -> int:
        """Number of keys that fitted, but for ``vlm``: the file with most wins, and one for a class over one for all."""
        return len(self.keys.keys() - {"vlm"}) + (len(self.pipeline) if facts.components else 0)

    def __str__(self) -> str:
        pipeline = f", a pipeline with {', '.join(self.pipeline)}" if self.pipeline else ""
        return ", ".join(f"{key}: {value}" for key, value in self.keys.items()) + pipeline
