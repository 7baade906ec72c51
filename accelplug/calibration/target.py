"""What is calibrated: a method, or a setting of the selectors of a recipe."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from accelplug.bounded import Bounded
from accelplug.call import Clock, Layout, Site
from accelplug.errors import NoMatchError, UnsupportedError, worded
from accelplug.patches.base import Patch
from accelplug.patches.calibration import Calibration
from accelplug.patches.sparse.budgets import Budgets
from accelplug.patches.sparse.rest_weights import RestWeights
from accelplug.patches.sparse.template import BlockSparse
from accelplug.recipe import DENSE, ModelFacts, Recipe
from accelplug.registry import list_patches, patch_class

OF_RECIPES: dict[str, type[RestWeights | Budgets]] = {"rest": RestWeights, "budget": Budgets}
"""What is calibrated for the selectors of a recipe, whichever they are."""


@dataclass(frozen=True)
class Target:
    """What is calibrated: a method, or, of `OF_RECIPES`, a setting of the selectors of a recipe."""

    patch: str
    config: dict[str, Any]
    options: dict[str, Any]
    base: Recipe | None
    selectors: Bounded[tuple[str, str], Any] = field(default_factory=lambda: Bounded(64))

    def make(self) -> Calibration:
        """Return a fresh calibration.

        Raises
        ------
        NoMatchError, AccelplugError
            If there is none, or a knob is unknown or out of range.
        UnsupportedError
            If the recipe does not have one selector that takes budgets.
        """
        if self.patch == "rest":
            return RestWeights(self.selector, self.options)
        if self.patch == "budget":
            return Budgets(self.selector, self._budgeted(), self.options)
        cls = patch_class(self.patch)
        return calibration_of(self.patch)(cls(self.config), self.options)

    def _budgeted(self) -> type[BlockSparse]:
        """The class of the one selector of the recipe that takes budgets."""
        used = {} if self.base is None else {entry.name: patch_class(entry.name) for entry in self.base.patches()}
        found = [cls for cls in used.values() if issubclass(cls, BlockSparse) and cls.knob]
        if len(found) != 1:
            known = ", ".join(name for name, cls in _sparse().items() if issubclass(cls, BlockSparse) and cls.knob)
            raise UnsupportedError(
                f"Budgets are shared out within one selector, and the recipe has {', '.join(used) or 'none'}. Give one with one "
                f"of {known}{worded('', ': --recipe')}."
            )
        return found[0]

    def selector(self, site: Site, layout: Layout, clock: Clock) -> Any:
        """Return the block-sparse patch that the base recipe has answer there and then, or None."""
        decision = self.base.decide(site, layout, clock) if self.base is not None else DENSE
        if decision.patch is None:
            return None
        name, config = decision.patch, decision.config
        patch = self.selectors.get((name, repr(sorted(config.items()))), lambda: patch_class(name)(config))
        return patch if isinstance(patch, BlockSparse) else None

    @staticmethod
    def model(facts: ModelFacts) -> dict[str, Any]:
        """What the tables are for, as JSON gives it back."""
        plain = json.loads(json.dumps({k: v for k, v in facts.config.items() if not k.startswith("_")}, default=str))
        return {"class": facts.class_names[0], **plain}


def calibration_of(patch: str) -> type[Calibration]:
    """Return what is calibrated under a name: a method's own, or of `OF_RECIPES`.

    Raises
    ------
    NoMatchError
        If there is nothing.
    """
    of_recipes = (
        OF_RECIPES.get(patch) if isinstance(patch, str) else None
    )  # the registry refuses in words what is not a name
    if (found := of_recipes or patch_class(patch).Calibration) is not None:
        return found
    known = [*OF_RECIPES, *(name for name, cls in _sparse().items() if cls.Calibration)]
    raise NoMatchError(f"{patch} has nothing to calibrate. These have: {', '.join(known)}.")


def _sparse() -> dict[str, type[Patch]]:
    """Classes of all sparse patches, by name."""
    return {entry.name: patch_class(entry.name) for entry in list_patches() if entry.family == "sparse"}
