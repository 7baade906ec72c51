"""Measurements by key, kept in a file, so that a search can go on after it was stopped; and what they depend on: the fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from accelplug import compat, files
from accelplug.comparison.environment import device_name
from accelplug.errors import AccelplugError
from accelplug.hosts.host import model_facts
from accelplug.hosts.models import denoisers, runs_compiled


class Journal:
    """A line of JSON for each measurement, the fingerprint of what was measured first.

    A line counts once it is whole: what an interrupt left half-written at the end is cut off, and measured again.

    Parameters
    ----------
    path : the file; None keeps measurements for this time only.
    fingerprint : of what was measured: a text, or facts by name, those that differ being told.
    what : what the file holds.

    Raises
    ------
    AccelplugError
        If the file has another fingerprint, is not a journal, or cannot be read or written.
    """

    def __init__(self, path: str | Path | None, fingerprint: Any, what: str = "a search") -> None:
        self.path = None if path is None else files.output(path, "A journal")
        self.entries: dict[str, Any] = {}
        if self.path is None:
            return
        begun = json.loads(json.dumps({"fingerprint": fingerprint}))
        whole, _, half = (files.read(self.path, "A journal") if self.path.exists() else "").rpartition("\n")
        try:
            first, *others = [json.loads(line) for line in whole.split("\n") if line] or [begun]
            self.entries = {line["key"]: line["value"] for line in others}
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise AccelplugError(
                f"{self.path} is not the journal of {what}: {error}. Give another file, or delete it."
            ) from error
        if first != begun:
            raise AccelplugError(
                f"{self.path} holds {what} {_differing(first, fingerprint)}. Give another file, or delete it."
            )
        if half:
            files.cut(self.path, len(f"{whole}\n".encode()) if whole else 0)
        if not whole:
            files.append(self.path, json.dumps(first) + "\n")

    def get(self, key: str, make: Callable[[], Any], read: Callable[[Any], Any] = lambda value: value) -> Any:
        """Return what is known under `key`, as `read` makes it of plain data; where it is not known, make it and keep it.

        Raises
        ------
        AccelplugError
            If the file holds something else there, or cannot be written.
        """
        if key not in self.entries:
            self.entries[key] = made = make()
            if self.path is not None:
                files.append(self.path, json.dumps({"key": key, "value": made}) + "\n")
            return read(made)
        try:
            return read(self.entries[key])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise AccelplugError(f"{self.path} holds no measurement under {key!r}: {error!r}. Delete that line.") from error


def _differing(first: Any, now: Any) -> str:
    """Say in what a journal differs from what is asked of it."""
    before = first.get("fingerprint") if isinstance(first, Mapping) else None
    if not isinstance(before, Mapping) or not isinstance(now, Mapping):
        return "for another model, adapters, prompts, seeds or device"
    changed = [name for name in {**before, **now} if before.get(name) != json.loads(json.dumps(now.get(name)))]
    told = (f"{name}, {before.get(name)} there and {now.get(name)} here" for name in changed)
    return f"that differs in {'; '.join(told)}"


def fingerprint_of(model: Any, *facts: Any) -> str:
    """Return 16 hex digits that change with facts, with a language model's config, and with samples of its weights."""
    config = sorted(
        (key, str(value)) for key, value in model_facts(model).config.items() if compat.transformers.ORIGIN not in key
    )
    sha = hashlib.sha256(repr((config, facts, device_name())).encode())
    for name, weight in model.named_parameters():
        sha.update(f"{name} {weight.device} {weight.dtype} {'' if weight.is_meta else few_numbers(weight)}".encode())
    return sha.hexdigest()[:16]


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
        digest.update(call_digest(prompt).encode())
    for part in denoisers(pipe).values():
        for name, weight in part.named_parameters():
            plain = type(weight) in (nn.Parameter, torch.Tensor) and not weight.is_meta
            digest.update(f"{name} {weight.dtype} {few_numbers(weight) if plain else ''}".encode())
    return digest.hexdigest()[:16]


def call_digest(call: Mapping[str, Any]) -> str:
    """Return 16 hex digits that change with the arguments of a pipeline's call; functions count by their names."""
    return hashlib.sha256(repr(placeless(call)).encode()).hexdigest()[:16]


def placeless(value: Any) -> Any:
    """What a value is, without the place where it lies."""
    if isinstance(value, Mapping):
        return [(str(key), placeless(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return [placeless(item) for item in value]
    if isinstance(value, torch.Tensor):
        return list(value.shape), few_numbers(value)
    if hasattr(value, "tobytes"):  # pictures and arrays
        return hashlib.sha256(value.tobytes()).hexdigest()
    return getattr(value, "__qualname__", value)


def adapters(pipe: Any) -> dict[str, str]:
    """Return the LoRA adapters of a pipeline by name: ``fused``, or the factors on their update, alpha / rank x weight."""
    factors: dict[str, set[float]] = {}
    parts = [part for part in getattr(pipe, "components", {}).values() if isinstance(part, nn.Module)]
    for layer in (layer for part in parts for layer in compat.diffusers.lora_layers(part)):
        for name in () if layer.disable_adapters else layer.active_adapters:
            if name in getattr(layer, "scaling", {}):
                factors.setdefault(name, set()).add(layer.scaling[name])
    found = {name: ", ".join(f"{factor:.4g}" for factor in sorted(known)) for name, known in sorted(factors.items())}
    return found | dict.fromkeys(sorted(getattr(pipe, "fused_loras", ())), "fused")


def few_numbers(tensor: torch.Tensor) -> list[float]:
    """A few numbers of a tensor, evenly spaced."""
    flat = tensor.detach().reshape(-1)
    return flat[:: max(flat.numel() // SAMPLES, 1)][:SAMPLES].double().tolist()
