"""ToDo: queries of all tokens read the keys and values of one token a cell.

Token downsampling (arXiv 2402.13573). The grid is cut into cells of `cell_thw` tokens, and the keys and values of the token nearest to
the cell's centre (of two, the later one, as ``nearest-exact`` has it) stand for all of them; queries stay. The paper down-samples what
the projections are given, which is the same but for their cost: they work token by token, as norms of q and k do.

Ours: every key counts as often as its cell has tokens, so that keys at a ragged border, and of text, weigh what they should:

    ``out_i = sum_c n_c exp(s q_i.k_c) v_c / sum_c n_c exp(s q_i.k_c)``,   text keys with n = 1.

Where all cells are of one size and there is no text this is the paper's. `representative: mean` averages instead, which was worse on
both models it was tried on (`benchmarks.token_layers`, `benchmarks.encoders`). Text queries read every key.
The paper takes cells of 2 x 2 at 1,024 pixels, 3 x 3 at 1,536 and 4 x 4 at 2,048, in the finest attention of Stable Diffusion 1.5
alone: a recipe gives each its own by `where`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from accelplug.call import AttentionCall, Clock, Layout, Site
from accelplug.kernels.merge import Cells, cells, merge, slot_sizes
from accelplug.kernels.plan import BlockPlan
from accelplug.patches.base import Config, Patch, Positive
from accelplug.patches.tokens.counted import attend_counted, between_text


@dataclass(frozen=True, eq=False)
class Params:
    """What `Todo.attend` needs.

    Attributes
    ----------
    cells : of the visual tokens; `cut` are the arguments they were made with.
    before : text tokens ahead of these.
    counted : whether sizes change anything: they do not where all are equal, nothing else is read, and nothing is masked.
    """

    cells: Cells
    cut: tuple
    before: int
    counted: bool

    def to(self, device: torch.device | str) -> Params:
        """Return the params with their tensors on `device`."""
        return replace(self, cells=cells(*self.cut, device=device))


class Todo(Patch):
    """Read the keys and values of one token a cell, with queries of all."""

    class Config(Config):
        """The triple is frames, rows, columns, in tokens."""

        cell_thw: tuple[Positive, Positive, Positive] = Field(
            (1, 2, 2),
            description="Tokens of a cell on each axis, for which one stands; at the far borders it may hold fewer.",
        )
        representative: Literal["centre", "mean"] = Field(
            "centre",
            description="What stands for a cell: the token nearest to its centre, or the mean of its keys and values.",
        )
        proportional: bool = Field(
            True, description="Whether a key counts as often as its cell has tokens: log(size) is added."
        )

    config: Config

    def prepare(self, site: Site, layout: Layout, clock: Clock, state: dict[str, Any]) -> Params | None:
        cut = (layout.grid_thw, self.config.cell_thw)
        found = cells(*cut)
        if found.size.shape[-1] == layout.visual:
            return None
        alone = layout.length == layout.visual
        return Params(found, cut, layout.text_before, self.config.proportional and not (found.even and alone))

    def attend(self, call: AttentionCall, params: Params) -> Tensor:
        found, before = params.cells, params.before
        behind = before + found.slot.shape[-1]
        valid = None if call.mask is None else call.mask.float().expand(len(call.k), -1)  # [B, S]
        weight = None if valid is None else valid[:, before:behind]

        def fewer(x: Tensor) -> Tensor:
            visual = x[..., before:behind, :]
            return torch.cat([x[..., :before, :], self._reduced(visual, found, weight), x[..., behind:, :]], -2)

        number = None  # [B, S_k], tokens that each key stands for
        if params.counted or valid is not None:
            size = self._sizes(found, weight).expand(len(call.k), -1)
            ones = call.k.new_ones(call.k.shape[0], call.k.shape[2], dtype=torch.float32) if valid is None else valid
            number = torch.cat([ones[:, :before], size, ones[:, behind:]], -1)
            number = number if self.config.proportional else (number > 0).float()
        out = attend_counted(call, call.q[..., before:behind, :], fewer(call.k), fewer(call.v), number)
        return between_text(call, out, before)

    def _reduced(self, x: Tensor, found: Cells, weight: Tensor | None) -> Tensor:
        """Keys or values of tokens (B, H, N, D) -> of cells (B, H, n, D)."""
        if self.config.representative == "centre":
            return x.index_select(-2, found.centre)
        return merge(x, found.slot.expand(len(x), -1), found.size.shape[-1], weight)

    def _sizes(self, found: Cells, weight: Tensor | None) -> Tensor:
        """Tokens that may be read and that a cell stands for, float32 (1|B, n): none where the one that stands for them may not."""
        if weight is None:
            return found.size
        size = slot_sizes(found.slot.expand(len(weight), -1), found.size.shape[-1], weight)
        return size * weight.index_select(-1, found.centre) if self.config.representative == "centre" else size

    def inspect(self, call: AttentionCall, params: Params) -> tuple[float, BlockPlan | None]:
        tokens, (visual, keys) = call.q.shape[-2], (params.cells.slot.shape[-1], params.cells.size.shape[-1])
        pairs = visual * (tokens - visual + keys) + (tokens - visual) * tokens
        return pairs / tokens**2, None
