"""One row a patch: what the laws try it with."""

from __future__ import annotations

from accelplug.testing.laws import Subject

_ROWS = (
    Subject("radial", {"window": "full"}, {"decay": 0.2}, {}, video_only=True),
    Subject(
        "neighborhood",
        {"window": ["full", "full", "full"]},
        {"window": [1, 3, 3], "tile_thw": [1, 2, 4]},
        {},
    ),
    Subject("sol", {"tau": "dense"}, {"tau": 0.5, "band": 0}, {"tau": -1e9}, pools=True),
    Subject("rows", {"density": 1.0}, {"density": 0.3, "rows": 2}, {"density": None, "top_p": 1.0 - 1e-9}, pools=True),
    Subject("proxy", {"halo_thw": [99, 99, 99]}, {"window_thw": [1, 2, 4], "halo_thw": [0, 0, 0]}, {}, pools=True),
    Subject(
        "rectified", {"drop_rate": 0.0}, {"drop_rate": 0.9, "adjacent": False, "order": "morton"}, {"p": 1.0}, pools=True
    ),
    Subject("psa", {"bounds": [1.0, 1.0, 1.0, 1.0]}, {"bounds": [0.2, 0.3, 0.5, 0.8]}, {"least_exact": 1.0}),
    Subject("hierarchical", {"band": "full"}, {"band": 0}, {"band": 1000}, pools=True),
    Subject(
        "svg_ear",
        {"top_p": 1.0},
        {"block_k": 8, "top_p": 0.5, "cluster_iterations": 5},
        {"block_k": 8, "min_ratio": 1.0},
        pools=True,
    ),
    Subject("tome", {"ratio": 0.0}, {"ratio": 0.5}, {}),
    Subject("sparse_vdit", {"modes": "full"}, {"modes": "multi_diagonal", "multi_diagonal": 0.4}, {"diagonal": 1.0}),
    Subject("paro", {"masks": "all"}, {"order": "wht", "density": 0.4}, {"density": 1.0}),
    Subject("sta", {"windows": [["full", "full", "full"]]}, {"windows": [["full", 1, 1]]}, {}),
    Subject("freeswim", {"native_hw": [512, 512]}, {"native_hw": [2, 3], "tile_thw": [1, 2, 4], "entropy": False}, {}),
    Subject("svg", {"density": 1.0}, {"density": 0.3, "sink": False}, {}, video_only=True),
    Subject("vmoba", {"tau": 1.0}, {"tau": 0.25, "parts": [[4, 1, 1], [1, 2, 3], [2, 2, 2]]}, {}, graphs=3),
    Subject("bilevel", {"p": 1.0}, {"k": 1, "halo": 0}, {}),
)
ROWS = {row.patch: row for row in _ROWS}
