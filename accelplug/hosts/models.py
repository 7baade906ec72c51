"""What a model is: a pipeline with denoisers, or a language model inside of its wrappers; and whether it is compiled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from accelplug import compat

DENOISERS = ("transformer", "transformer_2", "transformer_ref", "unet", "prior")
"""Names of the components that denoise, in every pipeline of diffusers."""

PATCHABLE = frozenset({"self", "joint", "temporal"})
"""Kinds of attention that a rule can name; cross-attention is left alone."""


def denoisers(model: Any) -> dict[str, nn.Module]:
    """Return the denoisers of a pipeline by component name, or a bare denoiser by the name it would have there."""
    if isinstance(model, nn.Module):
        inner = compat.torch.unwrap_compiled(model)
        return {"unet" if "UNet" in type(inner).__name__ else "transformer": inner}
    found = {name: getattr(model, name, None) for name in DENOISERS}
    return {name: compat.torch.unwrap_compiled(module) for name, module in found.items() if isinstance(module, nn.Module)}


def processor_owners(denoiser: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield (path, module) for every module of `denoiser` that owns a callable processor."""
    for path, module in denoiser.named_modules():
        processor = compat.torch.held(module, "processor")
        if callable(processor):
            yield path, module


def runs_compiled(pipe: Any) -> bool:
    """Whether a denoiser, or blocks of it, go through torch.compile."""
    return any(compat.torch.is_compiled(getattr(pipe, name)) for name in denoisers(pipe))


def is_language_model(model: Any) -> bool:
    """Whether `model` is a transformers model with a decoder that this host can enter."""
    return isinstance(model, nn.Module) and hasattr(model, "get_decoder") and hasattr(model, "base_model")


def model_in(model: Any) -> Any:
    """Return the language model inside of its wrappers: compiled, with adapters, parallel, a pipeline; any other model as it is."""
    inside = model
    while (held := compat.transformers.held_by(inside)) is not None:
        inside = held
    return inside if is_language_model(inside) else model


def unwrapped(model: Any, processor: Any = None) -> tuple[Any, Any]:
    """Return what `model_in` says, and the processor that was given or that a wrapper holds."""
    return model_in(model), processor or compat.transformers.processor_of(model)


def attention_modules(decoder: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield (path, module) of a decoder's attention modules that look their kernel up at every call."""
    for path, module in decoder.named_modules():
        if hasattr(module, "layer_idx") and hasattr(module, "config") and hasattr(module, "num_key_value_groups"):
            yield path, module
