"""Positions of frames, changed for long videos: a hook on one instance's rotary embedding that answers with other angles."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from accelplug.errors import AccelplugError, RecipeError, UnsupportedError
from accelplug.families.base import patch_thw
from accelplug.hosts.undo import Undo

if TYPE_CHECKING:
    from accelplug.families.base import Family
    from accelplug.recipe import Positions


class FrameAngles:
    """Forward hook of a rotary embedding: it turns frames by other angles, as `Positions` says. Nothing of the module changes.

    Raises
    ------
    UnsupportedError
        If it is not known where the denoiser's family turns frames into angles.
    RecipeError
        If there is no such frequency.
    """

    def __init__(self, denoiser: nn.Module, family: Family, positions: Positions) -> None:
        if family.rotary is None:
            raise UnsupportedError(
                f"{type(denoiser).__name__} takes no positions from a recipe: it is known only of families whose rotary embedding is a "
                "module that is given the latents. Leave positions: out."
            )
        config: Any = denoiser.config
        self.positions = positions
        self.patch_thw = patch_thw(config)
        self.channels, self.base = family.rotary.channels(config), family.rotary.base(config)
        self.module = denoiser.get_submodule(family.rotary.module)
        try:
            positions.changed(self.channels, self.base, positions.native + 1)
        except ValueError as error:
            raise RecipeError(f"positions: {error}.") from error

    def install(self, undo: Undo) -> None:
        """Put the hook in place."""
        undo.hook(self.module, "register_forward_hook", self)

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> Any:
        """Return the cosines and sines, each (S, D) or (1, S, 1, D), with those of the changed frequencies anew."""
        if module is not self.module:  # a deep copy of it
            return None
        frames, *rest = (size // patch for size, patch in zip(args[0].shape[2:], self.patch_thw, strict=True))
        changed = self.positions.changed(self.channels, self.base, frames)
        if not changed:
            return None
        cosines, sines = output
        tokens = cosines.numel() // cosines.shape[-1]
        if tokens != frames * math.prod(rest):
            raise AccelplugError(
                f"positions: expected angles of {frames * math.prod(rest)} tokens, got {tokens}. Context parallelism shares them out "
                "before they can be changed: leave positions: out, or run on one device."
            )
        precise = torch.float32 if cosines.device.type == "mps" else torch.float64
        number = torch.arange(frames, device=cosines.device, dtype=precise).repeat_interleave(tokens // frames)
        cosines, sines = cosines.clone(), sines.clone()
        for j, frequency in changed.items():
            angle = (number * frequency).view(cosines.shape[:-1])[..., None]
            cosines[..., 2 * j : 2 * j + 2], sines[..., 2 * j : 2 * j + 2] = angle.cos(), angle.sin()
        return cosines, sines
