"""Which models a recipe file is for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from accelplug.recipe.conditions import as_list


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
    llm: bool = False
    """Whether it is any other model with a decoder."""
    denoiser: bool = False
    """Whether it is a pipeline that denoises, or a denoiser."""
    encoder: bool = False
    """Whether it is an image encoder of a family that is known."""
    tower: ModelFacts | None = None
    """What recipes match its vision tower by, where it has one of such a family beside a decoder."""

    def value(self, key: str) -> Any:
        """Return what stands for `key` of a match."""
        own = {"class": self.class_names[0], **{kind: getattr(self, kind) for kind in MODEL_KINDS}}
        return own.get(key, self.config.get(key, "<none>"))


MATCHED = (
    *("num_layers", "num_attention_heads", "attention_head_dim", "num_single_layers", "in_channels"),
    *("text_config.num_hidden_layers", "text_config.hidden_size", "num_hidden_layers", "hidden_size"),
)
"""Config keys that tell a model from others of its class: of denoisers, and of language models."""


def match_for(facts: ModelFacts) -> dict[str, Any]:
    """Return what a recipe made for a model matches by, as it stands in a file: its class, and `MATCHED` as far as it has them."""
    return {"class": facts.class_names[0], **{key: facts.config[key] for key in MATCHED if key in facts.config}}


MODEL_KINDS = ("vlm", "llm", "denoiser", "encoder")
"""Keys that stand for all models of a kind: any vision-language model that is known, any other model with a decoder, any denoiser, any
image encoder."""


@dataclass(frozen=True)
class Match:
    """Which models a file is for. A value may be a list: any of. ``vlm: true``, ``llm: true``, ``denoiser: true``, ``encoder: true``: all
    of a kind."""

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
            return any(name in facts.class_names for name in as_list(wanted))
        if key in MODEL_KINDS:
            return getattr(facts, key) is wanted
        if key not in facts.config:
            return False
        value = facts.config[key]
        if isinstance(value, list | tuple):
            return list(value) == as_list(wanted)
        return any(value == item and isinstance(value, bool) == isinstance(item, bool) for item in as_list(wanted))

    def weight(self, facts: ModelFacts) -> int:
        """Number of keys that fitted, but for `MODEL_KINDS`: the file with most wins, and one for a class over one for all."""
        return len(self.keys.keys() - set(MODEL_KINDS)) + (len(self.pipeline) if facts.components else 0)

    def to_mapping(self) -> dict[str, Any]:
        """Return it as it stands in a file."""
        return {**self.keys, **({"pipeline": {"has": list(self.pipeline)}} if self.pipeline else {})}

    def __str__(self) -> str:
        pipeline = f", a pipeline with {', '.join(self.pipeline)}" if self.pipeline else ""
        return ", ".join(f"{key}: {value}" for key, value in self.keys.items()) + pipeline
