"""One row a patch: what the laws run it with. Blocks of 8 on grids of at least six blocks; the reference kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """A patch with a neutral config, one that works, and one that reads everything but through the kernel."""

    patch: str
    neutral: dict[str, Any]
    working: dict[str, Any]
    everything: dict[str, Any]
    video_only: bool = False
    """Whether it reads every key of images and of two frames."""
    blocks: bool = True
    """Whether it is block-sparse: takes the keys of all such methods, and has a plan."""
    pools: bool = False
    """Whether blocks that are not read exactly cost one key."""
    graphs: int = 1
    """Graphs that layers of one policy take at most: as many as there are ways of lining tokens up by layer."""

    def recipe(self, config: dict[str, Any] | None = None, **where: Any) -> dict[str, Any]:
        """A recipe with one rule; without settings, those that do something."""
        common = {"block": 8, "backend": "reference"} if self.blocks else {}
        rule = {"patch": self.patch, "with": {**common, **(self.working if config is None else config)}}
        return {"rules": [{"where": where, **rule} if where else rule]}


_ROWS = (
    Row("radial", {"window": "full"}, {"decay": 0.2}, {}, video_only=True),
    Row(
        "neighborhood",
        {"window": ["full", "full", "full"]},
        {"window": [1, 3, 3], "tile_thw": [1, 2, 4]},
        {},
    ),
    Row("sol", {"tau": "dense"}, {"tau": 0.5, "band": 0}, {"tau": -1e9}, pools=True),
    Row("proxy", {"halo_thw": [99, 99, 99]}, {"window_thw": [1, 2, 4], "halo_thw": [0, 0, 0]}, {}, pools=True),
    Row("rectified", {"drop_rate": 0.0}, {"drop_rate": 0.9, "adjacent": False, "order": "morton"}, {"p": 1.0}, pools=True),
    Row("psa", {"bounds": [1.0, 1.0, 1.0, 1.0]}, {"bounds": [0.2, 0.3, 0.5, 0.8]}, {"least_exact": 1.0}),
    Row("hierarchical", {"band": "full"}, {"band": 0}, {"band": 1000}, pools=True),
    Row(
        "svg_ear",
        {"top_p": 1.0},
        {"block_k": 8, "top_p": 0.5, "cluster_iterations": 5},
        {"block_k": 8, "min_ratio": 1.0},
        pools=True,
    ),
    Row("tome", {"ratio": 0.0}, {"ratio": 0.5}, {}, blocks=False),
    Row("sparse_vdit", {"modes": "full"}, {"modes": "multi_diagonal", "multi_diagonal": 0.4}, {"diagonal": 1.0}),
    Row("paro", {"masks": "all"}, {"order": "wht", "density": 0.4}, {"density": 1.0}),
    Row("sta", {"windows": [["full", "full", "full"]]}, {"windows": [["full", 3, 1]]}, {}),
    Row("freeswim", {"native_hw": [512, 512]}, {"native_hw": [2, 3], "tile_thw": [1, 2, 4]}, {}),
    Row("svg", {"density": 1.0}, {"density": 0.3, "sink": False}, {}, video_only=True),
    Row("vmoba", {"tau": 1.0}, {"tau": 0.25, "parts": [[4, 1, 1], [1, 2, 3], [2, 2, 2]]}, {}, graphs=3),
    Row("bilevel", {"p": 1.0}, {"k": 1, "halo": 0}, {}),
)
ROWS = {row.patch: row for row in _ROWS}
