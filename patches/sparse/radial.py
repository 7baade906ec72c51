"""Radial attention: a static mask whose spatial window halves as the distance in time doubles.

Radial attention (arXiv 2506.19852, equation 4), with windows as released or as published.

Attention between two frames fades with their distance d in time, so query token k of a frame reads key token l of
another iff ``|k - l| <= w(d)``, tokens in raster order inside their frames of s tokens, and w halves when d doubles:

* ``code``, with ``L(d) = 2^bit_length(s) / 2^bit_length(d)``: w is s for d <= 1, else ``max(decay * L, block)``. Where
  ``L < block``, only every ``floor(block / L)``-th distance is read. A block is kept iff more than 0.6 of the columns
  that the window touches in it are read by more than 1/3 of its rows.
* ``paper``, with ``r(d) = 2^floor(log2 d)``: w is ``s / r - 1``; where ``r > s``, w is 0 and only every ``ceil(r / s)``-th
  distance is read. A block is kept iff the window touches it, so that no pair of equation 4 is lost.

Both judge the part of a block that lies in one pair of frames by itself, and keep the block if any part says so. That
is the released rule where s is a multiple of the block, and every frame keeps its share of a block where it is not
(the release drops part of the last blocks there). The release thins distances at 128 tokens whatever the block.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from accelplug.call import Layout
from accelplug.kernels.orders import Tiles
from accelplug.kernels.plan import BlockPlan
from accelplug.patches.sparse.template import BlockConfig, BlockSparse


class Radial(BlockSparse):
    """Read windows that narrow as frames lie further apart in time."""

    class Config(BlockConfig):
        """The released script uses decay 0.2 for Wan 2.1, 0.8 for Wan 2.2, 0.95 for HunyuanVideo (sink off)."""

        decay: float = Field(
            0.2, gt=0.0, le=1.0, description="Factor on the windows of frames two or more apart (variant: code)."
        )
        variant: Literal["code", "paper"] = Field(
            "code", description="The mask of the released code, or equation 4 of the paper."
        )
        window: Literal["radial", "full"] = Field("radial", description="full reads every key: the call runs dense.")
        sink: bool = Field(True, description="Every query reads the whole first frame.")

    config: Config

    def neutral(self, layout: Layout) -> bool:
        return self.config.window == "full" or layout.grid_thw[0] <= 2  # frames next to each other read each other whole

    def select(self, tiles: Tiles) -> BlockPlan:
        block = self.config.unit
        frames, rows, columns = tiles.layout.grid_thw
        per_frame = rows * columns
        windows = torch.tensor([self.window_tokens(distance, per_frame) for distance in range(frames)])
        # Pieces: the longest runs of tokens that lie in one block and in one frame.
        visual = frames * per_frame
        edges = torch.cat([torch.arange(0, visual, block), torch.arange(0, visual + 1, per_frame)]).unique()
        piece_block, piece_frame = edges[:-1] // block, edges[:-1] // per_frame
        start, end = edges[:-1] - piece_frame * per_frame, edges[1:] - piece_frame * per_frame
        window = windows[(piece_frame[:, None] - piece_frame).abs()]  # [P, P]
        if self.config.sink:
            window[:, piece_frame == 0] = per_frame
        keep = self.keeps(start, end, window)

        members = torch.zeros(2 * (tiles.slots // block,), dtype=torch.bool)
        query_piece, key_piece = keep.nonzero(as_tuple=True)
        members[piece_block[query_piece], piece_block[key_piece]] = True
        return self.plan(members, tiles)

    def window_tokens(self, distance: int, per_frame: int) -> int:
        """Return w for frames `distance` apart, in tokens; -1 where they do not read each other."""
        if distance <= 1 or self.config.window == "full":
            return per_frame
        if self.config.variant == "paper":
            halvings = 1 << (distance.bit_length() - 1)
            every = -(-halvings // per_frame)
            return max(per_frame // halvings - 1, 0) if distance % every == 0 else -1
        block = self.config.unit
        length = (1 << per_frame.bit_length()) / (1 << distance.bit_length())
        if length < block and distance % int(block / length):
            return -1
        return int(max(self.config.decay * length, block))

    def keeps(self, start: Tensor, end: Tensor, window: Tensor) -> Tensor:
        """Decide for each pair of pieces whether its block is kept.

        Parameters
        ----------
        start, end : int64 (P,), first and one-past-last token of each piece inside its frame.
        window : int64 (P, P), w for each query piece and key piece.
        """
        rows = (end - start)[:, None]

        def columns_read_by(number: Tensor | int) -> Tensor:
            # Column l meets rows [l - w, l + w]: at least `number` of [start, end) iff l lies in [first, last).
            first = torch.maximum(start[:, None] + number - 1 - window, start)
            last = torch.minimum(end[:, None] - number + 1 + window, end)
            return torch.where(2 * window + 1 >= number, (last - first).clamp(min=0), 0)

        touched = columns_read_by(1)
        if self.config.variant == "paper":
            return touched > 0
        return columns_read_by(rows // 3 + 1) > 0.6 * touched
