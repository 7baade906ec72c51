"""What measurements hang on: the model, some of its weights, its adapters, prompts, seeds and the device."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from accelplug.comparison.environment import device_name
from accelplug.hosts.models import denoisers, runs_compiled
from accelplug.plug import model_facts

SAMPLES = 16
"""Numbers of each tensor that are looked at."""


def fingerprint(pipe: Any, prompts: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> str:
    """Return 16 hex digits that change with what a measurement depends on.

    Weights count in samples of every tensor, so that a LoRA that was fused into them shows as one that is loaded does.
    """
    facts = (
        sorted(model_facts(pipe).config.items(), key=str),
        adapters(pipe),
        list(seeds),
        device_name(),
        runs_compiled(pipe),
    )
    digest = hashlib.sha256(repr(facts).encode())
    for prompt in prompts:
        digest.update(repr([(k, _sample(v) if isinstance(v, torch.Tensor) else v) for k, v in prompt.items()]).encode())
    for part in denoisers(pipe).values():
        for name, weight in part.named_parameters():
            plain = type(weight) in (nn.Parameter, torch.Tensor) and not weight.is_meta
            digest.update(f"{name} {weight.dtype} {_sample(weight) if plain else ''}".encode())
    return digest.hexdigest()[:16]


def adapters(pipe: Any) -> dict[str, str]:
    """Return the LoRA adapters of a pipeline by name: ``fused``, or the factors on their update, alpha / rank x weight."""
    factors: dict[str, set[float]] = {}
    parts = [part for part in getattr(pipe, "components", {}).values() if isinstance(part, nn.Module)]
    layers: list[Any] = [module for part in parts for module in part.modules() if hasattr(module, "active_adapters")]
    for layer in layers:  # of peft
        for name in () if layer.disable_adapters else layer.active_adapters:
            if name in getattr(layer, "scaling", {}):
                factors.setdefault(name, set()).add(layer.scaling[name])
    found = {name: ", ".join(f"{factor:.4g}" for factor in sorted(known)) for name, known in sorted(factors.items())}
    return found | dict.fromkeys(sorted(getattr(pipe, "fused_loras", ())), "fused")


def _sample(tensor: torch.Tensor) -> list[float]:
    """A few numbers of a tensor, evenly spaced."""
    flat = tensor.detach().reshape(-1)
    return flat[:: max(flat.numel() // SAMPLES, 1)][:SAMPLES].double().tolist()
