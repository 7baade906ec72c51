"""Positions of frames, changed for long videos: a hook on one instance that has it turn queries and keys by other angles."""

from __future__ import annotations

import inspect
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from accelplug.errors import AccelplugError, RecipeError, UnsupportedError
from accelplug.families.base import patch_thw
from accelplug.hosts.undo import Undo

if TYPE_CHECKING:
    from accelplug.families.base import Family, Grid
    from accelplug.recipe import Positions

Angles = tuple[Tensor, Tensor]
"""Cosines and sines, each (S, D) or (1, S, 1, D)."""


class FrameAngles:
    """Hooks by which frames are turned by other angles, as `Positions` says. Nothing of the modules changes.

    Raises
    ------
    UnsupportedError
        If it is not known where the denoiser's family turns frames into angles, or this denoiser does not.
    RecipeError
        If there is no such frequency.
    """

    def __init__(self, denoiser: nn.Module, family: Family, positions: Positions) -> None:
        config: Any = getattr(denoiser, "config", None)
        if family.rotary is None or not family.rotary.turns(config):
            raise UnsupportedError(
                f"{type(denoiser).__name__} takes no positions from a recipe: it is not one whose frames are known to be told apart by "
                "rotary embeddings that can be reached. Leave positions: out."
            )
        self.denoiser, self.config, self.geometry = denoiser, config, family.geometry
        self.positions, self.argument = positions, family.rotary.argument
        self.channels, self.base = family.rotary.channels(config), family.rotary.base(config)
        self.module = None if self.argument else denoiser.get_submodule(family.rotary.module)
        self.names = list(inspect.signature(type(denoiser).forward).parameters)[1:]
        try:
            positions.changed(self.channels, self.base, positions.native + 1)
        except ValueError as error:
            raise RecipeError(f"positions: {error}.") from error

    def install(self, undo: Undo) -> None:
        """Put the hook in place."""
        if self.module is not None:
            undo.hook(self.module, "register_forward_hook", self.of_module)
        else:
            undo.hook(self.denoiser, "register_forward_pre_hook", self.of_argument, with_kwargs=True)

    def of_module(self, module: nn.Module, args: tuple[Tensor, ...], output: Angles) -> Angles | None:
        """Forward hook of a rotary embedding, which is given the latents (B, C, T, H, W)."""
        if module is not self.module:  # a deep copy of it
            return None
        frames, rows, columns = (
            size // patch for size, patch in zip(args[0].shape[2:], patch_thw(self.config), strict=True)
        )
        return self.turned(output, (frames, rows, columns))

    def of_argument(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Forward pre-hook of a denoiser that is given angles."""
        if module is not self.denoiser:
            return None
        geometry = self.geometry(self.config, {**dict(zip(self.names, args, strict=False)), **kwargs})
        if geometry is None or kwargs.get(self.argument) is None:
            raise AccelplugError(
                f"positions: expected latents and {self.argument}=(cosines, sines), as pipelines give them."
            )
        turned = self.turned(kwargs[self.argument], geometry.grid_thw)
        return None if turned is None else (args, {**kwargs, self.argument: turned})

    def turned(self, angles: Angles, grid_thw: Grid) -> Angles | None:
        """Return angles with those of the changed frequencies anew; None where none changes.

        Raises
        ------
        AccelplugError
            If there are not as many as tokens.
        """
        frames, tokens = grid_thw[0], math.prod(grid_thw)
        changed = self.positions.changed(self.channels, self.base, frames)
        if not changed:
            return None
        cosines, sines = angles
        if cosines.numel() != tokens * cosines.shape[-1]:
            raise AccelplugError(
                f"positions: expected angles of {tokens} tokens, got {cosines.numel() // cosines.shape[-1]}. Context parallelism shares "
                "them out before they can be changed: leave positions: out, or run on one device."
            )
        precise = torch.float32 if cosines.device.type == "mps" else torch.float64
        number = torch.arange(frames, device=cosines.device, dtype=precise).repeat_interleave(tokens // frames)
        cosines, sines = cosines.clone(), sines.clone()
        for j, frequency in changed.items():
            angle = (number * frequency).view(cosines.shape[:-1])[..., None]
            cosines[..., 2 * j : 2 * j + 2], sines[..., 2 * j : 2 * j + 2] = angle.cos(), angle.sin()
        return cosines, sines
