"""What tune() chooses from for language models on long prompts: sparse prefill, where, and how much of a prompt it reads; sparse steps."""

from __future__ import annotations

from collections.abc import Mapping

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


def reads_prompts(aim: Aim) -> bool:
    """Whether a candidate changes how a prompt is read, and nothing else; if not, it changes what is kept of it, or what a step reads."""
    return all(patch_entry(name).family == "prefill" for name in aim.patches)


def both(prompt: Aim, steps: Aim) -> Aim:
    """A candidate that reads prompts like one and makes tokens like another: rules of either kind are a stage of their own."""
    return Aim(f"{prompt.name} with {steps.name}", {"rules": [*prompt.recipe["rules"], *steps.recipe["rules"]]})
