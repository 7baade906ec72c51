"""One row a patch: what the laws try it with."""

from __future__ import annotations

import torch

from accelplug.table import Table
from accelplug.testing.laws import Subject

_SHORT = {"block": 8, "sink": 0, "local": 0, "min_tokens": 0}
"""Of sparse prefill, on prompts of some 25 tokens."""
_STEP = {"sink": 1, "local": 2, "min_tokens": 0, "dense_layers": 0}
"""Of sparse decoding, in caches of as many."""
_TWO = _CAUSAL = ("llava", "qwen2_5_vl")
"""Of both too, which do not look at images: two models that read them causally. Of head patches whose sisters are tried on all."""
_FEW = ("wan", "unet_sd15", "dinov2")
"""Of what attends among fewer tokens, as `tome` does, which is tried on all: a video, a UNet, an encoder; one with text beside it is added.
A whole run is for what remembers something between steps."""
_VIDEO = ("wan", "hunyuan_video", "cogvideox", "ltx")
"""Of methods that go by frames: video models with text apart, behind, ahead, and without any order of theirs."""
_GUIDED = ("wan", "wan pipeline", "cogvideox", "hunyuan_video", "flux", "sd3", "unet_sd15", "unet_sdxl", "z_image", "mochi")
"""Of guidance, which no image encoder takes: one denoiser a way of holding text and grid."""
_NEAR = {"sink": 2, "window": 4, "slack": 2, "prompt": "stream"}
"""Of a sequence whose heads all stream."""
_ADDED = Table(torch.tensor([[0.5, 0.1], [0.4, 0.3], [0.2, 0.6], [0.7, 0.8]]), ("layers", "heads"))
"""How much the key heads of the tiny models add."""
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
    Subject("toma", {"ratio": 0.0}, {"tile_thw": [1, 4, 4]}, only=(*_FEW, "flux", "wan pipeline")),
    Subject("todo", {"cell_thw": [1, 1, 1]}, {"cell_thw": [1, 2, 2]}, only=(*_FEW, "sd3")),
    Subject("agent", {"cell_thw": [1, 1, 1]}, {"cell_thw": [1, 2, 3]}, only=(*_FEW, "hunyuan_video")),
    Subject("ptdit", {"window_thw": [99, 99, 99]}, {"window_thw": [1, 2, 4]}, only=("wan", "cogvideox")),
    Subject("sparse_vdit", {"modes": "full"}, {"modes": "multi_diagonal", "multi_diagonal": 0.4}, {"diagonal": 1.0}),
    Subject("paro", {"masks": "all"}, {"order": "wht", "density": 0.4}, {"density": 1.0}),
    Subject("sta", {"windows": [["full", "full", "full"]]}, {"windows": [["full", 1, 1]]}, {}),
    Subject("freeswim", {"native_hw": [512, 512]}, {"native_hw": [2, 3], "tile_thw": [1, 2, 4], "entropy": False}, {}),
    Subject("lvsa", {"native": 999}, {"native": 1, "window": 0}, {"native": 2, "window": 99}, only=_VIDEO),
    Subject("freelong", {"native": 999}, {"native": 2, "block": 8, "backend": "reference"}, signed=True, only=_VIDEO),
    Subject("svg", {"density": 1.0}, {"density": 0.3, "sink": False}, {}, video_only=True),
    Subject("vmoba", {"tau": 1.0}, {"tau": 0.25, "parts": [[4, 1, 1], [1, 2, 3], [2, 2, 2]]}, {}, graphs=3),
    Subject("bilevel", {"p": 1.0}, {"k": 1, "halo": 0}, {}),
    Subject("bias", {"strength": 0.0}, {"strength": 0.5}),
    Subject(
        "regions",
        {"boxes": [[0, 0, 1, 0.5]], "tokens": 99},
        {"boxes": [[0, 0, 1, 0.5]], "tokens": 6},
        only=("wan", "hunyuan_video"),
    ),
    Subject("segments", {"tokens": 99}, {"tokens": 4}, only=("wan", "cogvideox", "hunyuan_video")),
    Subject(
        "headhunter",
        {"heads": "all", "u": 0.0},
        {"heads": [[0, 1], [1, 0]], "u": 0.5, "rows": "image"},
        only=_GUIDED,
    ),
    Subject(
        "prefill_rows",
        {"top_p": 1.0},
        {**_SHORT, "density": 0.3, "rows": 2, "last": 0},
        faint={**_SHORT, "top_p": 1 - 1e-12},
        only=_CAUSAL,
    ),
    Subject(
        "flashprefill", {"alpha": 0.0}, {**_SHORT, "alpha": 0.9, "last": 0}, faint={**_SHORT, "alpha": 1e-30}, only=_CAUSAL
    ),
    Subject(
        "xattention",
        {"tau": 1.0},
        {**_SHORT, "tau": 0.1, "stride": 4},
        faint={**_SHORT, "stride": 4, "tau": 1 - 1e-12},
        only=_CAUSAL,
    ),
    Subject("triangle", {"min_tokens": 9999}, {**_SHORT, "last": 1}, faint={**_SHORT, "local": 999}, only=_CAUSAL),
    Subject("power", {"min_tokens": 9999}, {**_SHORT, "block": 8}, faint={**_SHORT, "local": 999}, only=_CAUSAL),
    Subject("superlinear", {"min_tokens": 9999}, {**_SHORT, "spans": 1}, faint={**_SHORT, "local": 999}, only=_CAUSAL),
    Subject("landmark", {"min_tokens": 9999}, {**_SHORT, "k": 1}, faint={**_SHORT, "k": 999}, only=_CAUSAL),
    Subject("dynamic_mask", {"min_tokens": 9999}, {**_SHORT, "keys": 8}, faint={**_SHORT, "keys": 9999}, only=_CAUSAL),
    Subject("stream", {"min_tokens": 9999}, _SHORT, faint={**_SHORT, "local": 999}, only=_CAUSAL),
    Subject("pages", {"min_tokens": 9999}, {**_STEP, "page": 2, "budget": 2}, faint={**_STEP, "page": 2}, only=_CAUSAL),
    Subject(
        "clusters",
        {"min_tokens": 9999},
        {**_STEP, "cluster": 2, "exact": 0.1, "estimate": 0.3},
        faint={**_STEP, "cluster": 2, "exact": 1.0},
        only=_CAUSAL,
    ),
    Subject(
        "retrieval",
        {"min_tokens": 9999},
        {**_STEP, "cluster": 2, "probe": 0.3, "tokens": 2},
        faint={**_STEP, "cluster": 2, "probe": 1.0, "tokens": 999},
        only=_CAUSAL,
    ),
    Subject("duo", {"keep": 1.0}, _NEAR, faint={"window": 999, "prompt": "stream"}, only=_CAUSAL),
    Subject("snapkv", {"share": 1.0}, {"capacity": 10, "window": 4}, faint={"share": 0.999999}, only=_CAUSAL),
    Subject("moh", {"skip": 0.0}, {"outputs": _ADDED, "skip": 0.25}, only=_CAUSAL),
    Subject(
        "visual_bias",
        {"image_weight": 1.0, "system_weight": 1.0},
        {"image_weight": 6.0, "system_weight": 0.3},
        faint={"image_weight": 1 + 1e-7, "system_weight": 1 - 1e-7},
    ),
    Subject(
        "var",
        {"move_fraction": 0.0},
        {"sink_dims": [3, 7], "sink_threshold": 1.5, "min_visual_mass": 0.01, "min_nonsink_ratio": 0.0},
        faint={
            "move_fraction": 1e-9,
            "sink_dims": [5, 9],
            "sink_threshold": 0.5,
            "min_visual_mass": 0.0,
            "min_nonsink_ratio": 0.0,
        },
    ),
    Subject("vhr", {"gain": 1.0}, {"gain": 2.0}, faint={"gain": 1 + 1e-7}),
    Subject(
        "gift",
        {"alpha": 0.0},
        {"saliency_layer": 1, "enhance": [1, 4]},
        faint={"saliency_layer": 2, "enhance": [0, 4], "alpha": 1e-9},
    ),
    Subject("pai", {"alpha": 0.0}, {"alpha": 4.0}, faint={"alpha": 1e-9}),
    Subject(
        "imbalance",
        {"local_alpha": 0.0, "summary_alpha": 0.0},
        {"local_alpha": 4.0},
        only=("llava",),  # whose tower has a class token, and an image token a patch
        faint={"local_alpha": 1e-9, "summary_alpha": 1e-9},
    ),
    Subject(
        "adaptive_boost",
        {"image_boost": 1.0},
        {"image_boost": 4.0, "text_divisor": 4.0},
        faint={"image_boost": 1 + 1e-7, "text_divisor": 1 + 1e-7},
        only=_TWO,
    ),
    Subject(
        "ilvad",
        {"enhance": [0, 4], "alpha": 0.0, "words": 0.0, "beta": 1.0},
        {"enhance": [0, 4], "tau": 1.0, "alpha": 3.0},
        faint={"enhance": [0, 4], "tau": 1.0, "alpha": 1e-7, "words": 1e-7, "beta": 1.0},
        only=_TWO,
    ),
    Subject(
        "adhh",
        {"heads": [[0, 1]], "keep": 1.0},
        {"heads": [[layer, head] for layer in range(4) for head in (0, 1, 3)], "threshold": 0.0},
        faint={"heads": [[layer, head] for layer in range(4) for head in (1, 2)], "threshold": 0.0, "keep": 1 - 1e-7},
        only=_TWO,
    ),
    Subject("spin", {"gain": 1.0}, {"keep_share": 0.5, "gain": 0.1}, faint={"keep_share": 0.5, "gain": 1 + 1e-7}, only=_TWO),
    Subject("farsight", {"strength": 0.0}, {"sigma": 0.3, "strength": 20.0}, faint={"strength": 1e-7}, only=_TWO),
    Subject("carve", {"keep_area": 1}, {"keep_area": 0.3, "regions": 1, "max_tokens": 3, "layers": (0.5, 1.0)}),
    Subject("agla", {"alpha": 0, "beta": 0}, {"layers": (0.5, 1.0)}),
    Subject("avggt", {"frame_layers": 0.0, "window_hw": [1, 1]}, {}),
    Subject("fastvggt", {"ratio": 0.0}, {"reuse_layers": 2}),
    Subject("spark3r", {"query_ratio": 0.0, "windows": [[1, 1]]}, {"windows": [[2, 2], [1, 2]]}),
    Subject("flashvggt", {"factor": 1}, {"factor": 2, "every": 3}),
    Subject("contrast", {"gamma": 1, "cutoff": 0}, {"gamma": 3.0}),
)
ROWS = {row.patch: row for row in _ROWS}
DENOISING = {name: row for name, row in ROWS.items() if not row.of_language_models and not row.of_geometry}
"""Rows of the patches of denoisers."""
