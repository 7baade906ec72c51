"""FreeSwim: windows of the size a model was trained on, for images and frames larger than that.

FreeSwim's inward windows (arXiv 2511.14712): training-free video at several times the training size.

On an axis whose native length is n, with ``d = n // 2``, position i of L reads

    ``[i - d - max(0, d + i - L + 1), i + d + max(0, d - i)]``

cut to the axis: always 2d + 1 positions, moved inward at the borders, so that every query has the field of view that the
model was trained on; all frames are read. Scores are scaled by ``sqrt(log_n0(2 n0))`` more, n0 the native tokens of a
frame: 1.046 at 30 x 52 (`entropy`). A grid no larger than the window runs dense, at the model's own scale.

This is one of the paper's two paths. The other one, `second_path`, has distant windows agree on the scene: without it expect repeated
objects where the prompt alone does not place them.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Self

from pydantic import Field, model_validator
from torch import Tensor

from accelplug.bounded import Bounded
from accelplug.call import AttentionCall, Clock, Layout, Site
from accelplug.patches.sparse.neighborhood import Positive
from accelplug.patches.sparse.template import BlockParams
from accelplug.patches.sparse.windows import Axis, WindowConfig, Windowed


class FreeSwim(Windowed):
    """Every query reads a window of the training size, moved inward at the borders, in all frames."""

    class Config(WindowConfig):
        native_hw: tuple[Positive, Positive] = Field(
            (30, 52), description="Rows and columns of tokens of the training size. Released code: Wan 2.1 at 480x832."
        )
        entropy: bool = Field(True, description="Sharpen the scores, for windows that hold more keys than training had.")

        @model_validator(mode="after")
        def _has_an_entropy(self) -> Self:
            if math.prod(self.native_hw) < 2:
                raise ValueError(
                    f"native_hw {self.native_hw} must hold at least 2 tokens: the scale is a logarithm to their number"
                )
            return self

    config: Config
    ahead = True

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self._whole: Bounded[Layout, BlockParams] = Bounded(16)

    def prepare(self, site: Site, layout: Layout, clock: Clock, state: dict[str, Any]) -> BlockParams | None:
        params = super().prepare(site, layout, clock, state)
        if params is None or clock.phase != "ahead":
            return params
        return self._whole.get(layout, lambda: replace(params, where={"whole": True}))

    def attend(self, call: AttentionCall, params: BlockParams) -> Tensor:
        if params.where.get("whole"):
            return call.dense(q=call.q * self.sharpening)
        return super().attend(call, params)

    def axes(self, layout: Layout) -> tuple[Axis, ...]:
        frames, *lengths = layout.grid_thw
        windows = [2 * (native // 2) + 1 for native in self.config.native_hw]
        return (Axis.fit(frames, "full"), *map(Axis.fit, lengths, windows))

    @property
    def sharpening(self) -> float:
        """Factor on the scale."""
        native = math.prod(self.config.native_hw)
        return math.sqrt(math.log(2 * native, native)) if self.config.entropy else 1.0

    def laid_out(self, call: AttentionCall, params: BlockParams) -> Any:
        return super().laid_out(replace(call, scale=call.scale * self.sharpening), params)
