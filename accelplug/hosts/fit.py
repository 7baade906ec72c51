"""Whether a recipe fits a model: ahead of the first run by what the model has, then by what forwards came by."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from accelplug.call import Site
from accelplug.errors import FallbackError, NoMatchError, RecipeError, UnsupportedError
from accelplug.hosts.host import Host
from accelplug.patches.perturbation import Perturbation
from accelplug.recipe import Recipe
from accelplug.registry import patch_class
from accelplug.step_caches import CACHES

logger = logging.getLogger("accelplug")


def sites_of(hosts: Sequence[Host]) -> list[Site]:
    """Return the attention modules that rules can name."""
    return [record.site for host in hosts for record in host.records if record.site]


def require_fit(recipe: Recipe, hosts: Sequence[Host], elsewhere: tuple[str, ...] = ()) -> None:
    """Refuse a recipe that cannot work on a model.

    Parameters
    ----------
    hosts : those of the model's parts.
    elsewhere : names of parts that others of its kind have: a rule for such a one is not a slip.

    Raises
    ------
    UnsupportedError
        If a patch is for other models.
    NoMatchError
        If no rule fits any attention.
    RecipeError
        If a rule can never hold, or a patch stands where the step cache looks.
    """
    _require_patches_of_its_kind(recipe, hosts)
    _require_a_cache_that_fits(recipe, hosts)
    if recipe.around():
        return
    sites = sites_of(hosts)
    if any(recipe.may_touch(site) for site in sites):
        _require_rules_that_can_hold(recipe, hosts, sites, elsewhere)
        heads = {r.site: getattr(r.module, "heads", None) for host in hosts for r in host.records if r.site}
        recipe.require_tables_for(heads)
        _require_heads_to_guide_by(recipe, heads)
    elif any(recipe.may_touch(replace(site, kind="self")) for site in sites if site.kind == "cross"):
        logger.warning("%s names cross-attention alone, which is left as it is: nothing changes.", recipe.name)
    else:
        kinds = Counter(site.kind for site in sites)
        raise NoMatchError(
            f"No rule of {recipe.name} fits any attention of this model, which has "
            f"{', '.join(f'{n} of kind {kind}' for kind, n in kinds.items())} in {sites[0].layers} layers. "
            "Check the rules' where: layers, kind, module, denoiser."
        )


def _require_patches_of_its_kind(recipe: Recipe, hosts: Sequence[Host]) -> None:
    served = frozenset().union(*(host.serves for host in hosts))
    for entry in recipe.patches():
        if entry.family not in served:
            raise UnsupportedError(
                f"{recipe.name} uses {entry.name}, a patch of the family {entry.family}; {type(hosts[0].root).__name__} takes "
                f"{' and '.join(sorted(served))}. `accelplug list` shows which recipes there are for which model."
            )


def _require_heads_to_guide_by(recipe: Recipe, heads: Mapping[Site, int | None]) -> None:
    """Layers and heads that guidance names must be there; where it is not known how many there are, the first forward tells."""
    for rule in recipe.guided_by():
        fixed = {key: value for key, value in rule.settings.items() if not isinstance(value, Mapping)}  # no ramps yet
        patch = rule.instance or patch_class(rule.name)(fixed)
        known = {site.layer: number for site, number in heads.items() if site.layer is not None and rule.fits(site)}
        if isinstance(patch, Perturbation) and None not in known.values():
            patch.require_heads({layer: number for layer, number in known.items() if number is not None})


def _require_a_cache_that_fits(recipe: Recipe, hosts: Sequence[Host]) -> None:
    """The block from which a step cache predicts the others must be dense."""
    cache = recipe.cache
    if cache is None or not CACHES[cache.kind].by_first_block or not recipe.patches():
        return
    if any(recipe.may_answer(site) for site in sites_of(hosts) if site.layer == 0):
        raise RecipeError(
            f"{recipe.name}: the cache {cache.kind} predicts a step from its first block, but a rule puts a patch "
            "there, and its error would pass for change. Keep it dense: {where: {layers: 0}, patch: dense} as first rule."
        )


def _require_rules_that_can_hold(
    recipe: Recipe, hosts: Sequence[Host], sites: list[Site], elsewhere: tuple[str, ...]
) -> None:
    recipe.require_rules_for(sites, elsewhere=elsewhere)
    for host in (host for host in hosts if "step" not in host.abilities):
        gridded = "sparse" in host.serves
        for number, rule in enumerate(recipe.rules):
            named = any(rule.fits(site) for site in sites_of([host]))
            if named and (foreign := rule.of_denoisers(gridded)) is not None:
                lacks = (
                    "diffusion steps nor guidance branches"
                    if gridded
                    else "diffusion steps, guidance branches nor a token grid"
                )
                raise RecipeError(
                    f"{recipe.named(number)} asks for {foreign}, and {host.called} has neither {lacks}. Leave it out."
                )


@dataclass(frozen=True)
class Idle:
    """A rule that never held though forwards came by.

    Attributes
    ----------
    number : of the rule, from 0.
    condition : which of its conditions nothing met; None where each was met.
    why : in words.
    """

    number: int
    condition: str | None
    why: str


def idle(recipe: Recipe, hosts: Sequence[Host]) -> list[Idle]:
    """Return the rules that never held though forwards came by."""
    held = frozenset().union(*(host.held for host in hosts))
    found: dict[int, Idle] = {}
    for host in hosts:
        if (seen := host.seen) is None or not seen.branches:
            continue
        for number in recipe.chosen_among(site for site in sites_of([host])):
            rule = recipe.rules[number]
            if number not in held and not (rule.patch == "dense" and rule.where.rounds_away(seen.steps)):
                condition, why = rule.where.unmet(seen) or (None, "other rules took its calls")
                found[number] = Idle(number, condition, why)
    return list(found.values())


def require_held(recipe: Recipe, hosts: Sequence[Host], ended: bool) -> None:
    """Refuse rules that cannot hold: of steps as soon as a run's are known, of branches at the end of a run (`ended`).

    Rules for other sizes than that of a run are not an error, unless none of a recipe's patches is for this one.

    Raises
    ------
    FallbackError
        Naming the rule.
    """
    never = idle(recipe, hosts)
    patched = {number for number in recipe.chosen_among(sites_of(hosts)) if recipe.rules[number].patch != "dense"}
    none_is_for_it = patched <= {rule.number for rule in never if rule.condition in ("steps", "tokens")}
    for rule in never:
        if (
            rule.condition == "steps"
            or (rule.condition == "branch" and ended)
            or (rule.condition == "tokens" and none_is_for_it)
        ):
            raise FallbackError(
                f"{recipe.named(rule.number)} never holds: {rule.why}. strict=True asks for rules that do; mend its where:, or apply "
                "with strict=False."
            )
