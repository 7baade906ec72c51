"""inspect() of denoisers: what can be patched, and what there is to gain at most."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from accelplug.call import Clock, Layout, Site
from accelplug.errors import AccelplugError
from accelplug.families import family_of
from accelplug.families.base import site_kinds
from accelplug.hosts.forecast import amdahl
from accelplug.hosts.host import model_facts
from accelplug.hosts.models import PATCHABLE, denoisers, processor_owners
from accelplug.recipe import ModelFacts, Recipe, matching_files, recipes_for
from accelplug.show import Shown

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
    """

    name: str
    cls: str
    family: str | None
    status: str
    sites: tuple[Site, ...]
    kinds: dict[str, int]
    width: int
    linear_weights: int

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
    """By recipe, at each of `TOKENS`: gain of denoising if the attention it patches took no time, its dense steps and layers counted."""
    summaries: dict[str, str] = field(default_factory=dict)
    """By recipe: what it does, in a sentence."""

    def __rich__(self) -> Group:
        from rich.console import Group
        from rich.table import Table

        shown: list[RenderableType] = []
        for part in self.denoisers:
            table = Table("", "", title=f"{part.name}: {part.cls}", title_justify="left", show_header=False)
            table.add_row("family", f"{part.family or 'unknown'} ({part.status})")
            table.add_row("attention", ", ".join(f"{n} {kind}" for kind, n in part.kinds.items()) or "none")
            table.add_row("layers", str(part.sites[0].layers if part.sites else 0))
            for tokens in TOKENS:
                share, ceiling = part.attention_share(tokens), part.ceiling(tokens)
                table.add_row(f"at {tokens:,} tokens", f"self-attention is {share:.0%} of the work: at most {ceiling:.1f}x")
            shown.append(table)
        recipes = Table(title="recipes that match this model", title_justify="left")
        recipes.add_column("recipe", no_wrap=True)
        for column in ("touches", f"at most, {TOKENS[0]:,} to {TOKENS[-1]:,} tokens", "what it does"):
            recipes.add_column(column)
        recipes.caption = (
            "at most: were its attention free, dense steps and layers counted; plug.report() predicts it from timings"
        )
        for name, touches in self.recipes.items():
            gains = self.ceilings.get(name, ())
            recipes.add_row(
                name, touches, f"{min(gains):.1f}x to {max(gains):.1f}x" if gains else "", self.summaries.get(name, "")
            )
        none = "No shipped recipe matches this model; apply() takes a mapping or a file of your own."
        return Group(*shown, recipes if self.recipes else none)


def inspect_denoiser(model: Any) -> Inspection:
    """Say what accelplug sees in a diffusers pipeline or a bare denoiser; nothing is run.

    Raises
    ------
    NoMatchError
        If it has no denoiser.
    """
    parts = tuple(_facts(name, denoiser) for name, denoiser in denoisers(model).items())
    sites = [site for part in parts for site in part.sites]
    facts = model_facts(model)
    summaries = {
        f"{file.model}/{name}": recipe.summary for file in matching_files(facts) for name, recipe in file.recipes.items()
    }
    return Inspection(type(model).__name__, parts, recipes_for(facts, sites), _ceilings(facts, parts), summaries)


def _ceilings(facts: ModelFacts, parts: Sequence[DenoiserFacts]) -> dict[str, list[float]]:
    """Of the denoiser with most to gain, by full name of the recipe."""
    return {
        f"{file.model}/{name}": [max(_ceiling(recipe, part, tokens) for part in parts) for tokens in TOKENS]
        for file in matching_files(facts)
        for name, recipe in file.recipes.items()
    }


def _ceiling(recipe: Recipe, part: DenoiserFacts, tokens: int) -> float:
    clocks = [Clock(step, STEPS, "cond") for step in range(STEPS)]
    # Rules that ask for a grid are decided on one of so many tokens in a row: only their number is known.
    layout = Layout((1, 1, tokens))
    patched = [recipe.decide(site, layout, clock).patch is not None for clock in clocks for site in part.sites]
    return amdahl(part.attention_share(tokens) * sum(patched) / max(len(patched), 1), math.inf)


def _facts(name: str, denoiser: Any) -> DenoiserFacts:
    import torch

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
    status = "unknown" if family is None else family.refuse or family.status
    return DenoiserFacts(
        name, type(denoiser).__name__, family.name if family else None, status, sites, dict(+count), width, linear
    )


def _width(attention: Any) -> int:
    projection = next((getattr(attention, name) for name in ("to_q", "to_qkv") if hasattr(attention, name)), None)
    if projection is None or not hasattr(projection, "out_features"):
        raise AccelplugError(f"{type(attention).__name__} has neither to_q nor to_qkv to read its width from.")
    return projection.out_features // (1 if hasattr(attention, "to_q") else 3)
