"""What tune() chooses from for language models on long prompts: sparse prefill, where, and how much of a prompt it reads; sparse steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from accelplug.registry import list_patches, patch_entry
from accelplug.tuning.aims import Aim, Ladder

GENERIC = ("llm/long",)
"""Recipes for any decoder, the likeliest after a model's own."""
REST, DEEPER, HALF, LAST = (0.07, 1.0), (0.25, 1.0), (0.5, 1.0), (0.75, 1.0)
"""Shares of the depth: early layers need most of what they read, and stay dense."""

_LADDERS: Mapping[str, Ladder] = {
    "prefill_rows": [
        (DEEPER, {"top_p": 0.95}),
        (HALF, {"top_p": 0.9}),
        (DEEPER, {"density": 0.5}),
        (REST, {"top_p": 0.9}),
        (DEEPER, {"density": 0.35}),
        (REST, {"density": 0.25}),
    ],
    "triangle": [(HALF, {}), (LAST, {}), (DEEPER, {})],
    "flashprefill": [(DEEPER, {"alpha": 0.05}), (HALF, {"alpha": 0.1}), (REST, {"alpha": 0.1})],
    "xattention": [(DEEPER, {"tau": 0.95}), (REST, {"tau": 0.9})],
    "stream": [(LAST, {}), (HALF, {})],
    "pages": [(REST, {})],
    "clusters": [(REST, {})],
    "retrieval": [(REST, {})],
    "snapkv": [(None, {})],
}


def prefill_ladders() -> Mapping[str, Ladder]:
    """Return ladders by patch, of the patches that there are."""
    known = {entry.name for entry in list_patches()}
    return {name: ladder for name, ladder in _LADDERS.items() if name in known}


def one_of_each(found: Sequence[Aim]) -> list[Aim]:
    """Put candidates in an order that has one of each choice of patches before the second of any: where time is short, each was seen."""
    seen: Counter[frozenset[str]] = Counter()
    turns = []
    for aim in found:
        turns.append(seen[frozenset(aim.patches)])
        seen[frozenset(aim.patches)] += 1
    return [aim for _, aim in sorted(zip(turns, found, strict=True), key=lambda pair: pair[0])]


def reads_prompts(aim: Aim) -> bool:
    """Whether a candidate changes how a prompt is read, and nothing else; if not, it changes what is kept of it, or what a step reads."""
    return all(patch_entry(name).family == "prefill" for name in aim.patches)


def both(prompt: Aim, steps: Aim) -> Aim:
    """A candidate that reads prompts like one and makes tokens like another: rules of either kind are a stage of their own."""
    return Aim(f"{prompt.name} with {steps.name}", {"rules": [*prompt.recipe["rules"], *steps.recipe["rules"]]})
