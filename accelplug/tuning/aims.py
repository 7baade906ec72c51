"""What tune() chooses from for vision-language models: patches that aim attention at the picture, where, and how strongly."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, TypeAlias

from accelplug.recipe import ModelFacts, Rule, at_depth, matching_files, named
from accelplug.registry import patch_class
from accelplug.tuning.space import require_ladders

ALL, NEARLY_ALL, MIDDLE, LATE = (0.0, 1.0), (0.06, 1.0), (0.25, 0.5), (0.5, 1.0)
"""Shares of the depth, from and to: all but the first two of 32 layers, where text reads the picture, where the answer forms."""

Ladder: TypeAlias = "Sequence[tuple[tuple[float, float] | None, Mapping[str, Any]]]"
"""Layers and settings of a patch, the likeliest first."""

AIM_LADDERS: Mapping[str, Ladder] = {
    "vhr": [(LATE, {"gain": 2.0}), (LATE, {"gain": 3.0}), (ALL, {"gain": 1.5})],
    "visual_bias": [(MIDDLE, {"image_weight": 1.5}), (NEARLY_ALL, {"image_weight": 1.15}), (MIDDLE, {"image_weight": 3.0})],
    "pai": [(NEARLY_ALL, {"alpha": 0.2}), (NEARLY_ALL, {"alpha": 0.5}), (MIDDLE, {"alpha": 0.2})],
    "gift": [((0.34, 0.72), {"alpha": 5.0}), ((0.34, 0.72), {"alpha": 2.0})],
    "var": [((0.06, 0.97), {"move_fraction": 0.6}), ((0.06, 0.97), {"move_fraction": 0.6, "min_nonsink_ratio": 0.8})],
    "imbalance": [(NEARLY_ALL, {}), (NEARLY_ALL, {"local_alpha": 0.35, "summary_alpha": 0.15})],
    "carve": [(None, {"keep_area": 0.2}), (None, {"keep_area": 0.5})],
    "agla": [(None, {"alpha": 2.0}), (None, {"alpha": 1.0})],
}
"""By patch: layers and settings, the paper's first; the layers are those of LLaVA-1.5-7B as shares of its depth. None: not by layer."""


@dataclass(frozen=True, eq=False)
class Aim:
    """A candidate: a name in words, and the recipe mapping that it is."""

    name: str
    recipe: Mapping[str, Any]

    @property
    def patches(self) -> set[str]:
        """The patches that its rules name."""
        return {rule["patch"] for rule in self.recipe["rules"]} - {"dense"}


def aims(
    facts: ModelFacts,
    depth: int,
    patches: Sequence[str] | None = None,
    ladders: Mapping[str, Ladder] | None = None,
    generic: Sequence[str] = (),
    **more: Any,
) -> list[Aim]:
    """Return candidates for a model of `depth` layers: the recipes shipped for it, then a ladder of each patch, rung by rung.

    `ladders` are `AIM_LADDERS` if left out; `generic`, full names of recipes for any model, which come behind the model's default;
    `more` are settings that every rung has beside its own, where its patch takes them.

    Raises
    ------
    AccelplugError
        If a patch has no ladder here.
    """
    ladders = AIM_LADDERS if ladders is None else ladders
    require_ladders(patches, ladders, "a language model")
    wanted = set(patches or ladders)
    files = matching_files(facts)
    its_own = files[0].recipes if len(files) == 1 else {}
    default = [name for name in its_own if name == files[0].default]
    listed = [
        *(its_own[name] for name in default),
        *map(named, generic),
        *(r for r in its_own.values() if r.name not in default),
    ]
    shipped = [Aim(r.name, r.to_mapping()) for r in listed]
    made = [list(_aims_of(name, depth, ladders[name], more)) for name in ladders if name in wanted]
    # One of each patch before the second of any: where time is short, each has been seen.
    steps = [aim for rung in zip_longest(*made) for aim in rung if aim is not None]
    return _distinct([aim for aim in shipped if aim.patches and aim.patches <= wanted] + steps, depth)


def _aims_of(name: str, depth: int, ladder: Ladder, more: Mapping[str, Any]) -> Iterator[Aim]:
    more = {key: value for key, value in more.items() if key in patch_class(name).Config.model_fields}
    for shares, settings in ladder:
        said = " ".join([name, *(f"{key}={value:g}" for key, value in settings.items())])
        if shares is None:
            yield Aim(said, {"rules": [{"patch": name, "with": {**settings, **more}}]})
            continue
        first = min(round(shares[0] * depth), depth - 1)
        stop = max(round(shares[1] * depth), first + 1)
        # gift is told which layer it reads and which it changes; its rule has both.
        told = {"saliency_layer": first, "enhance": [first + (first + 1 < stop), stop]} if name == "gift" else {}
        layers = f"{first}:{stop}"
        rule = {"where": {"layers": layers}, "patch": name, "with": {**settings, **told, **more}}
        yield Aim(f"{said}, layers {layers}", {"rules": [rule]})


def _distinct(found: Iterable[Aim], depth: int) -> list[Aim]:
    """Leave out what only has another name."""
    kept: dict[str, Aim] = {}
    for aim in found:
        rules = [rule for rule in map(Rule.model_validate, aim.recipe["rules"]) if rule.patch != "dense"]
        kept.setdefault(repr([_at(rule, depth) for rule in rules]), aim)
    return list(kept.values())


def _at(rule: Rule, depth: int) -> tuple[Any, ...]:
    """What a rule comes to in a model of `depth` layers, however its layers are written."""
    elsewise = rule.where.model_copy(update={"layers": None})
    config = patch_class(rule.patch)(at_depth(rule.settings, depth)).config
    return rule.where.layers_of(depth), elsewise, rule.patch, config
