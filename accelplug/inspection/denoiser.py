"""inspect() of denoisers: what can be patched, and what there is to gain at most."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from accelplug import compat
from accelplug.call import Clock, Layout, Site
from accelplug.errors import AccelplugError
from accelplug.families import family_of, why_unsupported
from accelplug.families.base import Family, Grid, site_kinds, unknown
from accelplug.hosts.forecast import amdahl
from accelplug.hosts.host import model_facts
from accelplug.hosts.models import PATCHABLE, denoisers, processor_owners
from accelplug.inspection.told import NO_RECIPE
from accelplug.recipe import Recipe, recipes_for, recipes_of
from accelplug.recipe.settings import shown
from accelplug.show import Shown, table

if TYPE_CHECKING:
    from rich.console import Group, RenderableType

STEPS = 50
"""Steps of the run that ceilings of recipes are computed for."""
TOKENS = (4_096, 8_192, 16_384, 32_768, 75_600, 118_800)
"""Sequence lengths that the Amdahl ceiling is computed for: from a 1024 x 1024 image to 129 frames of 720p video."""


@dataclass(frozen=True)
class DenoiserFacts:
    """One denoiser.

    Attributes
    ----------
    sites : self- and joint-attention modules that rules can name.
    kinds : number of attention modules by kind; ``left alone`` counts those that no rule can name.
    status : how well the family is known: verified, layout or dense; or why it is refused.
    width : heads * head_dim, the model's hidden width.
    linear_weights : weights of the linear layers that every visual token passes.
    grid : latent frames, patch rows and columns of the pipeline's own size, or the one that was given; None where it is not known.
    """

    name: str
    cls: str
    family: str | None
    status: str
    sites: tuple[Site, ...]
    kinds: dict[str, int]
    width: int
    linear_weights: int
    grid: Grid | None = None

    @property
    def lengths(self) -> tuple[int, ...]:
        """Sequence lengths that are told of: the grid's, else `TOKENS`."""
        return TOKENS if self.grid is None else (math.prod(self.grid),)

    def attention_share(self, tokens: int) -> float:
        """Share of self-attention in the multiply-adds of one forward with `tokens` tokens, in [0, 1]."""
        attention = 2 * tokens * self.width * len(self.sites)  # q.k and p.v, per token
        return attention / (attention + self.linear_weights) if attention else 0.0

    def ceiling(self, tokens: int) -> float:
        """Speed-up of the denoiser if self-attention took no time at all (Amdahl), by multiply-adds."""
        return 1 / (1 - self.attention_share(tokens))


@dataclass(frozen=True, repr=False)
class Inspection(Shown):
    """What `inspect` found. Prints as tables."""

    model: str
    denoisers: tuple[DenoiserFacts, ...]
    recipes: dict[str, str] = field(default_factory=dict)
    """Recipes that match, with what each would touch."""
    ceilings: dict[str, list[float]] = field(default_factory=dict)
    """By recipe, at each of the `lengths`: gain of denoising if the attention it patches took no time; dense steps and layers count."""
    summaries: dict[str, str] = field(default_factory=dict)
    """By recipe: what it does, in a sentence."""
    differences: dict[str, str] = field(default_factory=dict)
    """By recipe: what it says that not all of them say."""
    steps: int = STEPS
    """Of the run that `ceilings` are for."""

    @property
    def heading(self) -> str:
        return f"What accelplug sees in {self.model}"

    def __rich__(self) -> Group:
        from rich.console import Group

        shown: list[RenderableType] = []
        for part in self.denoisers:
            told = table(f"{part.name}: {part.cls}", "", "", names=False, show_header=False)
            told.add_row("family", f"{part.family or 'unknown'} ({part.status})")
            told.add_row("attention", ", ".join(f"{n} {kind}" for kind, n in part.kinds.items()) or "none")
            told.add_row("layers", str(part.sites[0].layers if part.sites else 0))
            if part.grid is not None:
                told.add_row(
                    "its own grid",
                    f"{' x '.join(map(str, part.grid))} (latent frames, rows, columns), {math.prod(part.grid):,} tokens",
                )
            for tokens in part.lengths:
                share, ceiling = part.attention_share(tokens), part.ceiling(tokens)
                told.add_row(f"at {tokens:,} tokens", f"self-attention is {share:.0%} of the work: at most {ceiling:.1f}x")
            shown.append(told)
        recipes = table(
            "recipes that match this model", "recipe", f"at most, {self.steps} steps", "what it does", "what few others say"
        )
        recipes.caption = (
            "at most: were its attention free, dense steps and layers counted; plug.report() predicts it from timings"
        )
        same = len({touches.split(", ")[0] for touches in self.recipes.values()}) == 1
        for name, touches in self.recipes.items():
            low, high = min(self.ceilings[name]), max(self.ceilings[name])
            gain = "" if high == 1 else f"{low:.1f}x" if low == high else f"{low:.1f} to {high:.1f}x"
            marks = ", ".join(touches.split(", ")[same:])  # what each touches is told where they differ
            recipes.add_row(name, gain, self.summaries[name] + f" ({marks})" * bool(marks), self.differences[name])
        return Group(*shown, recipes if self.recipes else NO_RECIPE)


def inspect_denoiser(model: Any, sizes: Mapping[str, Any] | None = None) -> Inspection:
    """Say what accelplug sees in a diffusers pipeline or a bare denoiser; nothing is run.

    Parameters
    ----------
    sizes : arguments of the pipeline's call: num_frames, height, width, num_inference_steps; its own where they are left out.

    Raises
    ------
    NoMatchError
        If it has no denoiser.
    AccelplugError
        If sizes is not a mapping, or its call has no argument of such a name.
    """
    if not isinstance(sizes, Mapping | None):
        raise AccelplugError(
            f"inspect: expected a mapping of arguments of the call of {type(model).__name__}, such as height, got {sizes!r}."
        )
    given = dict(sizes or {})
    taken = {} if isinstance(model, torch.nn.Module) else compat.diffusers.arguments_of(model)
    if strange := [name for name in given if taken is not None and name not in taken]:
        raise AccelplugError(
            f"inspect: expected arguments of the call of {type(model).__name__}, such as height, got {strange[0]!r}. Leave it out."
        )
    parts = tuple(_facts(name, denoiser, model, given) for name, denoiser in denoisers(model).items())
    sites = [site for part in parts for site in part.sites]
    facts = model_facts(model)
    recipes = recipes_of(facts)
    steps = given.get("num_inference_steps") or STEPS
    return Inspection(
        type(model).__name__,
        parts,
        recipes_for(facts, sites),
        {name: _ceilings(recipe, parts, steps) for name, recipe in recipes.items()},
        {name: recipe.summary for name, recipe in recipes.items()},
        _differences(recipes),
        steps,
    )


def _ceilings(recipe: Recipe, parts: Sequence[DenoiserFacts], steps: int) -> list[float]:
    """Of the denoiser with most to gain, at each length."""
    return [
        max(gains)
        for gains in zip(*([_ceiling(recipe, part, n, steps) for n in part.lengths] for part in parts), strict=True)
    ]


def _ceiling(recipe: Recipe, part: DenoiserFacts, tokens: int, steps: int) -> float:
    clocks = [Clock(step, steps, "cond") for step in range(steps)]
    layout = Layout(
        part.grid or (1, 1, tokens)
    )  # where the grid is not known, the number of tokens is all that rules can ask for
    patched = [recipe.decide(site, layout, clock).patch is not None for clock in clocks for site in part.sites]
    return amdahl(part.attention_share(tokens) * sum(patched) / max(len(patched), 1), math.inf)


def _differences(recipes: Mapping[str, Recipe]) -> dict[str, str]:
    """By recipe: patches, conditions and settings that fewer than half of the recipes have."""
    said = {name: _pieces_of(recipe) for name, recipe in recipes.items()}
    times = Counter(piece for pieces in said.values() for piece in dict.fromkeys(pieces))
    return {name: ", ".join(one for one in pieces if 2 * times[one] < max(len(said), 3)) for name, pieces in said.items()}


def _pieces_of(recipe: Recipe) -> list[str]:
    """What a recipe says, piece by piece."""
    pieces = []
    for rule in recipe.rules:
        if rule.patch == "dense":
            pieces.append(f"dense at {rule.where}")
        else:
            pieces += [rule.name, f"at {rule.where}", *(f"{key} {shown(value)}" for key, value in rule.values.items())]
    pieces += [] if recipe.positions is None else [f"positions {recipe.positions.kind}"]
    return pieces + ([] if recipe.cache is None else [f"step cache {recipe.cache.kind}"])


def _facts(name: str, denoiser: Any, model: Any, sizes: Mapping[str, Any]) -> DenoiserFacts:
    family = family_of(denoiser)
    owners = dict(processor_owners(denoiser))
    kinds, layers = site_kinds(family, list(owners)) if family else ({}, 0)
    sites = tuple(Site(path, name, kind, layer, layers) for path, (kind, layer) in kinds.items() if kind in PATCHABLE)
    blocks = {site.module.split(".")[0] for site in sites}
    linear = sum(
        module.weight.numel()
        for path, module in denoiser.named_modules()
        if isinstance(module, torch.nn.Linear)
        and path.split(".")[0] in blocks
        and "add_" not in path
        and "context" not in path
    )
    width = max((_width(owners[site.module]) for site in sites), default=0)
    count: Counter[str] = Counter(kind for kind, _ in kinds.values())
    count["left alone"] = len(owners) - sum(count.values())
    status = (why_unsupported(denoiser) or "unknown") if family is None else family.status
    cls, named = type(denoiser).__name__, family.name if family else None
    grid = own_grid(model, denoiser, family, sizes) if family else None
    return DenoiserFacts(name, cls, named, status, sites, dict(+count), width, linear, grid)


def own_grid(model: Any, denoiser: Any, family: Family, sizes: Mapping[str, Any]) -> Grid | None:
    """Return the grid of tokens at some sizes of a pipeline's call, or at its own; None where it is not known ahead of a run."""
    config = getattr(denoiser, "config", None)
    unknown_ahead = isinstance(model, torch.nn.Module) or family.level or family.geometry is unknown
    if unknown_ahead or (patch := family.patch(config)) is None:
        return None
    latents = compat.diffusers.latent_size(model, config, sizes)
    return None if latents is None else (latents[0] // patch[0], latents[1] // patch[1], latents[2] // patch[2])


def _width(attention: Any) -> int:
    """Channels of all its queries."""
    for name, parts in (("to_q", 1), ("to_query", 1), ("to_qkv", 3)):
        if (width := getattr(getattr(attention, name, None), "out_features", None)) is not None:
            return width // parts
    heads, dim = getattr(attention, "heads", None), getattr(attention, "head_dim", None)
    if heads and dim:
        return heads * dim
    if (width := getattr(attention, "inner_dim", None)) is None:
        raise AccelplugError(f"{type(attention).__name__} has neither to_q nor to_qkv to read its width from.")
    return width
