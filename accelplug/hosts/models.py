"""What a model is: a pipeline with denoisers, a language model or an image encoder inside of its wrappers; and whether it is compiled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from accelplug import compat
from accelplug.families.encoders import Encoder, encoder_of

DENOISERS = ("transformer", "transformer_2", "transformer_ref", "unconditional_transformer", "unet", "prior")
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
    return _is_of_transformers(model) and not is_image_encoder(model)


def _is_of_transformers(model: Any) -> bool:
    return isinstance(model, nn.Module) and hasattr(model, "get_decoder") and hasattr(model, "base_model")


def decoder_of(model: Any) -> Any:
    """Return the part of a language model that has its layers: what it calls its decoder may have a head of its own (Llama 4)."""
    decoder = model.get_decoder()
    inner = getattr(decoder, "model", None)
    return inner if not hasattr(decoder, "layers") and hasattr(inner, "layers") else decoder


def is_image_encoder(model: Any) -> bool:
    """Whether `model` is given pictures and has no decoder: a model of timm, or of transformers, of whatever family."""
    if not _is_of_transformers(model):
        return is_of_timm(model)
    sees = getattr(model, "main_input_name", "") == "pixel_values" or bool(towers_of(model))
    return sees and next(attention_modules(model.get_decoder()), None) is None


def is_of_timm(model: Any) -> bool:
    """Whether a module is of a class of timm's."""
    return isinstance(model, nn.Module) and any(cls.__module__.startswith("timm.") for cls in type(model).__mro__)


def towers_of(model: nn.Module) -> dict[str, tuple[nn.Module, Encoder]]:
    """Return the image encoders of known families in a model, by the names that rules have for them: ``vision``, ``vision_2`` ..."""
    found: list[tuple[str, nn.Module, Encoder]] = []
    for path, module in model.named_modules():
        inside = any(outer == "" or path.startswith(f"{outer}.") for outer, *_ in found)
        if not inside and (family := encoder_of(module)) is not None:
            found.append((path, module, family))
    names = (f"vision_{number}" if number > 1 else "vision" for number in range(1, len(found) + 1))
    return {name: (module, family) for name, (_, module, family) in zip(names, found, strict=True)}


def model_in(model: Any) -> Any:
    """Return the model of transformers inside of its wrappers: compiled, with adapters, parallel, a pipeline; any other as it is."""
    inside = model
    while (held := compat.transformers.held_by(inside)) is not None:
        inside = held
    return inside if _is_of_transformers(inside) else model


def unwrapped(model: Any, processor: Any = None) -> tuple[Any, Any]:
    """Return what `model_in` says, and the processor that was given or that a wrapper holds."""
    return model_in(model), processor or compat.transformers.processor_of(model)


def attends(module: Any) -> bool:
    """Whether a module is a bidirectional attention that looks its kernel up at every call."""
    return hasattr(module, "config") and hasattr(module, "is_causal") and compat.transformers.looks_kernel_up(type(module))


def flat_config(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested configs by dotted keys: ``text_config.num_hidden_layers``."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flat_config(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def attention_modules(decoder: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield (path, module) of a decoder's attention modules that look their kernel up at every call."""
    for path, module in decoder.named_modules():
        if hasattr(module, "layer_idx") and hasattr(module, "config") and hasattr(module, "num_key_value_groups"):
            yield path, module
