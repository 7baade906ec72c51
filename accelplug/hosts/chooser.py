"""From what a recipe says to the patches that do it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from accelplug.bounded import Bounded
from accelplug.call import Clock, Site
from accelplug.errors import UnsupportedError
from accelplug.hosts.record import LEFT_DENSE, Choice
from accelplug.recipe import Recipe, Rule
from accelplug.registry import Stage, patch_class

if TYPE_CHECKING:
    from accelplug.patches.base import Patch


class Chooser:
    """Makes the patches of a recipe, each once: sites that share an instance share compiled graphs and plans.

    Parameters
    ----------
    recipe : what is asked.
    backend : kernel for patches that leave the choice open.
    processor : a vision-language model's, for patches that want one.
    """

    def __init__(self, recipe: Recipe, backend: str, processor: Any) -> None:
        self.recipe, self.backend, self.processor = recipe, backend, processor
        self._patches: Bounded[tuple[str, str], Patch] = Bounded(256)

    def decide(self, site: Site, layout: Any, clock: Clock) -> Choice:
        """Return what serves a call at `site`, with tokens lying as `layout` says (None: not known), at `clock`."""
        stages = [stage for stage in self.recipe.stages if stage != "guidance"]
        found = [self._of_stage(site, layout, clock, stage) for stage in stages]
        told = [choice for choice in found if choice.chosen]
        return replace(told[0], under=told[1]) if len(told) > 1 else (*told, *found, LEFT_DENSE)[0]

    def guide(self, site: Site, layout: Any, clock: Clock) -> Choice:
        """Return what perturbs a call at `site` in a forward to be guided by; see `decide`."""
        return self._of_stage(site, layout, clock, "guidance")

    def _of_stage(self, site: Site, layout: Any, clock: Clock, stage: Stage) -> Choice:
        decision = self.recipe.decide(site, layout, clock, stage=stage)
        if decision.patch is None:
            return Choice(reason=decision.reason, rule=decision.rule)
        patch = self._patch(decision.patch, decision.config, decision.instance)
        return Choice(patch, decision.patch, rule=decision.rule)

    def around(self) -> tuple[Choice, ...]:
        """Return the patches that stand around ``generate``, the first one outermost."""
        return tuple(Choice(self._of(rule), rule.name) for rule in self.recipe.around())

    def enters(self) -> bool:
        """Whether any of its patches is given what enters attention modules."""
        for rule in self.recipe.rules:
            if rule.entry is not None and rule.entry.family == "tokens":
                fixed = {key: value for key, value in rule.values.items() if not isinstance(value, Mapping)}  # no ramps yet
                if self._patch(rule.name, fixed, rule.instance).enters:
                    return True
        return False

    def require_estimates(self) -> None:
        """Refuse patches that do not say how large their error is.

        Raises
        ------
        UnsupportedError
            Naming the first of them.
        """
        for number, rule in enumerate(self.recipe.rules):
            if rule.entry is not None and not self._of(rule).estimates:
                raise UnsupportedError(
                    f'gate="quality" goes by what patches estimate of their own error, and {self.recipe.named(number)} uses '
                    f"{rule.name} without one. Set repair: output_query in its settings, if it is block-sparse."
                )

    def _of(self, rule: Rule) -> Patch:
        return self._patch(rule.name, rule.values, rule.instance)

    def _patch(self, name: str, config: Mapping[str, Any], instance: Patch | None) -> Patch:
        if instance is not None:
            return self._patches.get((name, f"instance {id(instance)}"), lambda: self._completed(instance))

        def make() -> Patch:
            cls = patch_class(name)
            fields = cls.Config.model_fields
            chosen = {"backend": self.backend} if "backend" in fields and config.get("backend", "auto") == "auto" else {}
            patch = cls({**config, **chosen})
            patch.processor = self.processor
            return patch

        return self._patches.get((name, repr(sorted(config.items()))), make)

    def _completed(self, instance: Patch) -> Patch:
        """A patch that a rule holds; where it leaves open what `apply` was told, a copy that has it."""
        told: dict[str, Any] = {}
        if self.backend != "auto" and getattr(instance.config, "backend", None) == "auto":
            told["config"] = instance.config.model_copy(update={"backend": self.backend})
        if self.processor is not None and instance.processor is None:
            told["processor"] = self.processor
        if not told:
            return instance
        patch = copy.copy(instance)
        vars(patch).update(told)
        return patch
