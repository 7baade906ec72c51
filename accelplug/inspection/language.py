"""inspect() of language models, ahead of any run: what can be entered, and which recipes match."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from accelplug import compat
from accelplug.call import Site
from accelplug.families.vlm import vlm_of
from accelplug.hosts.host import model_facts
from accelplug.hosts.models import attention_modules, decoder_of
from accelplug.hosts.transformers import LanguageHost
from accelplug.inspection.told import recipes_told
from accelplug.recipe import recipes_for, recipes_of
from accelplug.show import Shown, table

if TYPE_CHECKING:
    from rich.console import Group


@dataclass(frozen=True, repr=False)
class LanguageInspection(Shown):
    """What `inspect` sees in a language model before it runs. Prints as tables.

    Attributes
    ----------
    family : the vision-language family, None for a text model or an unknown one.
    layers, heads, kv_heads : of the decoder, from its config.
    attention : name of the attention implementation in use.
    modules : attention modules of the decoder, and why one cannot be entered; empty where it can.
    recipes, summaries : recipes that match, with what each would touch, and what it does.
    """

    model: str
    family: str | None
    layers: int
    heads: int
    kv_heads: int
    attention: str
    modules: dict[str, str]
    recipes: dict[str, str]
    summaries: dict[str, str] = field(default_factory=dict)

    @property
    def heading(self) -> str:
        return f"What accelplug sees in {self.model}"

    def __rich__(self) -> Group:
        from rich.console import Group

        told = table(self.model, "", "", names=False, show_header=False)
        told.add_row("family", self.family or "no known vision-language family")
        told.add_row("decoder", f"{self.layers} layers of {self.heads} heads, {self.kv_heads} key-value heads")
        told.add_row("attention", self.attention)
        open_to_us = sum(not why for why in self.modules.values())
        told.add_row("can be entered", f"{open_to_us} of {len(self.modules)} attention modules")
        for path, why in self.modules.items():
            if why:
                told.add_row(path, why)
        return Group(told, recipes_told(self.recipes, self.summaries))


def inspect_language(model: Any) -> LanguageInspection:
    """Say what accelplug sees in a language model; nothing is run."""
    decoder, config = decoder_of(model), model.config.get_text_config()
    family, layers = vlm_of(model), compat.transformers.number_of_layers(decoder)
    modules, sites = {}, []
    for path, module in attention_modules(decoder):
        asks = compat.transformers.looks_kernel_up(type(module))
        modules[path] = "" if asks else f"{type(module).__name__} does not ask transformers for its attention function"
        if asks:
            kind = compat.transformers.layer_type(module)
            sites.append(Site(path, LanguageHost.name, "self", module.layer_idx, layers, layer_type=kind))
    facts = model_facts(model)
    return LanguageInspection(
        model=type(model).__name__,
        family=family.name if family else None,
        layers=layers,
        heads=config.num_attention_heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        attention=compat.transformers.attention_name(config),
        modules=modules,
        recipes=recipes_for(facts, sites),
        summaries={name: recipe.summary for name, recipe in recipes_of(facts).items()},
    )
