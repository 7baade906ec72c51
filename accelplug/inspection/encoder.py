"""inspect() of image encoders, ahead of any run: what can be entered, what there is to gain, which recipes match."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from accelplug.families.encoders import Encoder, patch_hw
from accelplug.hosts.encoders import EncoderHost
from accelplug.hosts.forecast import amdahl
from accelplug.hosts.host import Setup, model_facts
from accelplug.hosts.models import towers_of
from accelplug.inspection.told import recipes_told
from accelplug.recipe import matching_files, recipes_for
from accelplug.show import Shown, table

if TYPE_CHECKING:
    from rich.console import Group

PIXELS_A_SIDE = (518, 1008, 1512)
"""Pixels a side of the square pictures that shares are told of."""


@dataclass(frozen=True, repr=False)
class EncoderInspection(Shown):
    """What `inspect` sees in an image encoder before it runs. Prints as tables.

    Attributes
    ----------
    family : of the first tower.
    pixels : how pictures come, see `Encoder`.
    layers, entered : attention modules in all, and those that rules can name.
    skipped : why others cannot be, by path.
    patch : rows and columns of pixels of a patch.
    ahead : class and register tokens.
    shares : by pixels a side: tokens, and the share of the named attention in the multiply-adds of a forward, in [0, 1].
    recipes, summaries : recipes that match, with what each would touch, and what it does.
    """

    model: str
    tower: str
    family: str
    pixels: str
    layers: int
    entered: int
    skipped: dict[str, str]
    patch: tuple[int, int]
    ahead: int
    shares: dict[int, tuple[int, float]]
    recipes: dict[str, str]
    summaries: dict[str, str] = field(default_factory=dict)

    @property
    def heading(self) -> str:
        return f"What accelplug sees in {self.model}"

    def __rich__(self) -> Group:
        from rich.console import Group

        told = table(f"vision: {self.tower}", "", "", names=False, show_header=False)
        told.add_row("family", f"{self.family} ({self.pixels})")
        told.add_row("attention", f"{self.entered} of {self.layers} layers can be entered")
        for why in dict.fromkeys(self.skipped.values()):
            told.add_row("left alone", f"{list(self.skipped.values()).count(why)} layers: {why}")
        told.add_row("patches", f"{self.patch[0]} x {self.patch[1]} pixels, behind {self.ahead} other tokens")
        for size, (tokens, share) in self.shares.items():
            most = amdahl(share, float("inf"))
            told.add_row(f"at {size} px", f"{tokens:,} tokens: attention is {share:.0%} of the work: at most {most:.1f}x")
        return Group(told, recipes_told(self.recipes, self.summaries))


def inspect_encoder(model: Any) -> EncoderInspection:
    """Say what accelplug sees in an image encoder; nothing is run."""
    host = EncoderHost.of(model, EncoderHost.parts(model), Setup())[0]
    found: tuple[Any, Encoder] = next(iter(towers_of(model).values()))
    tower, family = found
    facts, sites = model_facts(model), [record.site for record in host.records]
    patch, ahead = patch_hw(tower.config), family.ahead(tower.config)
    weights = sum(module.weight.numel() for module in tower.modules() if isinstance(module, nn.Linear))
    width: int = getattr(tower.config, "embed_dim", tower.config.hidden_size)

    def share(size: int) -> tuple[int, float]:
        tokens = (size // patch[0]) * (size // patch[1]) + ahead
        attention = 2 * tokens * width * len(sites)
        return tokens, attention / (attention + weights)

    return EncoderInspection(
        type(model).__name__,
        type(tower).__name__,
        family.name,
        family.pixels,
        len(sites) + len(host.skipped),
        len(sites),
        dict(host.skipped),
        patch,
        ahead,
        {size: share(size) for size in PIXELS_A_SIDE},
        recipes_for(facts, sites),
        {f"{file.model}/{name}": r.summary for file in matching_files(facts) for name, r in file.recipes.items()},
    )
