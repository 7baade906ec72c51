"""FreeSwim's second path: what the text says is taken from a forward in which every token sees all others.

Windows of the training size (`freeswim`) keep details sound above it, but distant windows do not agree on the scene. FreeSwim (arXiv
2511.14712) therefore runs two paths from the same latents, in two rows of a batch: one with windows, one with full attention. In every
block the cross-attention of the second path, ``O_full``, takes the place of that of the first,

    ``h <- h + W_o O_full``   instead of   ``h <- h + W_o softmax(q k^T s) v``

and after a step the second path is dropped. The release computes the second path in every `every`-th step, for the conditional branch
alone, and takes what it kept in the steps between.

Here the second path is a forward of its own, ahead of the one that answers: the same numbers, and no second row in the steps between.
What it kept is one output of attention for each block, (B, H, S, D): 30 times 0.5 GB for Wan 2.1 1.3B at 1920x1088 in 16 bits.
In that forward all attention is dense, at the scale that `freeswim` has in its windows.

    rules: [{where: {kind: self}, patch: freeswim}, {patch: second_path}]

It goes with any patch of self-attention. A forward ahead takes a step that is known, and goes with neither compiled code nor a step cache:
there cross-attention is as ever, and counted. Of a pipeline that names no guidance branches (Wan's video to video) the first forward of a
step is the conditional one.

Experimental. It costs a full forward in every `every`-th step: it is for pictures, not for speed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field

from accelplug.patches import base
from accelplug.patches.base import Patch, Positive

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from accelplug.call import AttentionCall, Clock, Layout, Site


@dataclass(eq=False)
class FullOutput:
    """The output of one module in the second path, (B, H, S, D), and the step that it was made in."""

    out: Tensor | None = None
    step: int | None = None


@dataclass(frozen=True, eq=False)
class Taken:
    """What `SecondPath.attend` needs.

    Attributes
    ----------
    full : the module's output in the second path.
    makes : whether it is made in this forward.
    good : whether it was made lately enough.
    """

    full: FullOutput
    makes: bool
    good: bool

    def to(self, device: torch.device | str) -> Taken:
        """Return it as it is: its tensor is where it was made."""
        return self


class SecondPath(Patch):
    """Cross-attention answers what it does where all attention is dense."""

    class Config(base.Config):
        every: Positive = Field(2, description="Steps from one forward ahead to the next. Released code: 2.")

    config: Config
    speed = False
    ahead = True

    def prepare(self, site: Site, layout: Layout, clock: Clock, state: dict[str, Any]) -> Taken | None:
        if clock.branch == "uncond" or clock.turn:
            return None
        full: FullOutput = state.setdefault("second_path", FullOutput())
        if clock.phase == "ahead":
            full.step = clock.step
            return Taken(full, makes=True, good=True)
        age = None if full.step is None or clock.step is None else clock.step - full.step
        return Taken(full, makes=False, good=full.out is not None and age is not None and 0 <= age < self.config.every)

    def wants_ahead(self, params: Taken) -> bool:
        return not params.good

    def attend(self, call: AttentionCall, params: Taken) -> Tensor:
        if params.makes or params.full.out is None:
            params.full.out = call.dense()
        return params.full.out
