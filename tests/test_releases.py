"""Recipes "as released" are held against the releases: which layers and steps are sparse, and with which settings."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from accelplug.call import Clock, Kind, Layout, Site
from accelplug.families.vlm import list_vlms
from accelplug.recipe import named, read_file, shipped_files
from accelplug.recipe.conditions import as_list
from accelplug.registry import patch_class


@dataclass(frozen=True)
class Release:
    """What a release does. Layers count over double, then single blocks; steps are those of its own script.

    Attributes
    ----------
    layers, steps : how many there are.
    sparse_layers, sparse_steps : those whose attention is not dense.
    grid_thw : latent frames, patch rows, patch columns of its script.
    settings : of the method.
    """

    layers: int
    sparse_layers: Iterable[int]
    steps: int
    sparse_steps: Iterable[int]
    grid_thw: tuple[int, int, int]
    settings: dict[str, Any] = field(default_factory=dict)


WAN_14B, WAN_1B, HUNYUAN, COG, FLUX_4K = (18, 48, 80), (21, 45, 80), (30, 48, 80), (11, 48, 85), (1, 256, 256)
PSA = {"block": 128, "tile": 32}
SVG_EAR = {"top_p": 0.9, "min_ratio": 0.1, "cluster_iterations": 50, "cluster_iterations_warm": 2, "order": "kmeans"}
RECTIFIED = {"p": 0.3, "block": 128, "order": "gilbert", "adjacent": True, "rest": "rectified"}
LONG, LVSA = (41, 30, 52), {"native": 21, "window": 4, "first": 1, "rotate": True, "budget": 1.0, "rest": "drop"}
TOMA = {"ratio": 0.5, "interval": 3}

RELEASES = {
    # mit-han-lab/radial-attention, inference scripts
    "wan2.1-t2v-14b/radial": Release(
        40, range(1, 40), 50, range(12, 50), WAN_14B, {"decay": 0.2, "block": 128, "sink": True}
    ),
    "wan2.2-t2v-a14b/radial": Release(
        40, range(1, 40), 40, range(11, 40), (20, 48, 80), {"decay": 0.8, "block": 64, "sink": True}
    ),
    "hunyuanvideo/radial": Release(60, range(60), 50, range(12, 50), HUNYUAN, {"decay": 0.95, "block": 128, "sink": False}),
    # BienLuky/Rectified-SpaAttn, attention processors and main scripts
    "flux.1-dev/rectified": Release(57, range(37), 50, range(50), FLUX_4K, {**RECTIFIED, "drop_rate": 0.9}),
    "hunyuanvideo/rectified": Release(60, range(60), 50, range(50), HUNYUAN, {**RECTIFIED, "drop_rate": 0.8}),
    "cogvideox1.5-5b/rectified": Release(42, range(42), 50, range(5, 50), COG, {**RECTIFIED, "drop_rate": 0.85}),
    "wan2.1-t2v-14b/rectified": Release(
        40, range(2, 40), 50, range(5, 50), WAN_1B, {**RECTIFIED, "drop_rate": 0.75, "first_frame": True}
    ),
    "wan2.2-t2v-a14b/rectified": Release(  # of the expert for high noise; the other one's own first step is sparse here
        40, range(2, 40), 40, range(3, 40), WAN_1B, {**RECTIFIED, "drop_rate": 0.85, "first_frame": True}
    ),
    # ziplab/Pyramid-Sparse-Attention, attention_config.yaml
    "wan2.1-t2v-14b/psa": Release(
        40,
        range(40),
        50,
        range(15, 50),
        WAN_14B,
        {**PSA, "bounds": (0.4, 0.5, 0.6, 0.8), "block_k": 128, "similarity": None},
    ),
    "wan2.1-t2v-1.3b/psa": Release(
        30,
        range(30),
        50,
        range(15, 50),
        WAN_14B,
        {**PSA, "bounds": (0.5, 0.6, 0.7, 0.8), "block_k": 128, "similarity": (0.7, 0.65, 0.6), "rule": "thresholdbound"},
    ),
    "wan2.1-t2v-1.3b/psa-topk": Release(
        30,
        range(30),
        50,
        range(15, 50),
        WAN_14B,
        {**PSA, "bounds": (0.05, 0.1, 0.15, 0.25), "block_k": 32, "similarity": None, "rule": "topk"},
    ),
    "wan2.2-t2v-a14b/psa": Release(
        40, range(40), 40, range(12, 40), WAN_14B, {**PSA, "bounds": (0.5, 0.6, 0.6, 0.8), "block_k": 32, "similarity": None}
    ),
    "cogvideox-5b/psa": Release(
        42, range(42), 50, range(15, 50), (13, 30, 45), {**PSA, "bounds": (0.1, 0.15, 0.15, 0.35), "order": "raster"}
    ),
    "cogvideox-5b/psa-4-steps": Release(
        42, range(42), 4, range(4), (13, 30, 45), {**PSA, "bounds": (0.05, 0.15, 0.25, 0.5), "order": "raster"}
    ),
    "cogvideox1.5-5b/psa": Release(
        42, range(42), 50, range(15, 50), COG, {**PSA, "bounds": (0.1, 0.15, 0.15, 0.35), "block_k": 32, "order": "gilbert"}
    ),
    # svg-project/Sparse-VideoGen, inference scripts; shares of layers and steps are rounded down, but for CogVideoX
    "wan2.1-t2v-14b/svg": Release(40, range(1, 40), 50, range(10, 50), WAN_1B, {"density": 0.3, "sink": True, "rows": 64}),
    "hunyuanvideo/svg": Release(
        60, range(1, 60), 50, range(5, 50), (33, 45, 80), {"density": 0.25, "sink": False, "rows": 64}
    ),
    "cogvideox1.5-5b/svg": Release(42, range(2, 42), 50, range(10, 50), COG, {"density": 0.25, "sink": False, "rows": 32}),
    "wan2.1-t2v-14b/svg_ear": Release(40, range(1, 40), 50, range(10, 50), WAN_1B, SVG_EAR),
    "wan2.2-t2v-a14b/svg_ear": Release(40, range(1, 40), 40, range(8, 40), WAN_1B, SVG_EAR),
    "hunyuanvideo/svg_ear": Release(60, range(1, 60), 50, range(5, 50), (33, 45, 80), {**SVG_EAR, "query_clusters": 400}),
    # hao-ai-lab/FastVideo, branch sta_do_not_delete; its windows by step, layer and head are not shipped
    "wan2.1-t2v-14b/sta": Release(40, range(40), 50, range(12, 50), WAN_14B, {"block": 384}),
    # JiusiServe/LongVideoSparseAttention and arXiv 2605.31057, at twice the length: 40 steps, no layer or step dense
    "wan2.1-t2v-1.3b/lvsa": Release(30, range(30), 40, range(40), LONG, LVSA),
    "wan2.1-t2v-14b/lvsa": Release(40, range(40), 40, range(40), LONG, LVSA),
    "wan2.2-t2v-a14b/lvsa": Release(40, range(40), 40, range(40), LONG, LVSA),
    # WenboLuu/ToMA, for FLUX: 256 tiles at either size
    "flux.1-dev/tome": Release(
        57, [*range(5, 19), *range(24, 57)], 28, range(28), FLUX_4K, {**TOMA, "tile_thw": (1, 16, 16)}
    ),
    # SHI-Labs/NATTEN and arXiv 2504.16922, table of end-to-end settings
    "hunyuanvideo/neighborhood": Release(
        60, range(60), 50, range(15, 50), HUNYUAN, {"window": (18, 24, 24), "stride": (16, 8, 8)}
    ),
    "hunyuanvideo/neighborhood-wide": Release(
        60, range(60), 50, range(15, 50), HUNYUAN, {"window": ("full", 40, 40), "stride": (1, 32, 8)}
    ),
    "flux.1-dev/neighborhood": Release(
        57, range(57), 28, range(9, 28), FLUX_4K, {"window": ("full", 80, 80), "stride": (1, 16, 16)}
    ),
    # WillWu111/FreeSwim and KwaiVGI/VMoBA
    "wan2.1-t2v-1.3b/freeswim": Release(30, range(30), 50, range(50), (21, 68, 120), {"native_hw": (30, 52)}),
    "wan2.1-t2v-1.3b/vmoba": Release(30, range(30), 50, range(12, 50), WAN_1B, {"tau": 0.25, "gates": "token"}),
    # dbolya/tomesd: the finest level alone, every step
    "stable-diffusion-1.5/tome-qkv": Release(
        16, range(16), 50, range(50), (1, 64, 64), {"ratio": 0.5, "mode": "qkv", "proportional": False}
    ),
    # arXiv 2402.13573, at 1024 x 1024
    "stable-diffusion-1.5/todo": Release(16, range(16), 50, range(50), (1, 128, 128), {"cell_thw": (1, 2, 2)}),
}

NOT_RELEASED: dict[str, dict[str, tuple[str, ...]]] = {
    "derived from another size or model": {
        "wan2.1-t2v-1.3b": ("radial", "neighborhood", "rectified"),
        "wan2.1-t2v-14b": ("neighborhood",),
        "wan2.2-t2v-a14b": ("neighborhood",),
        "cogvideox-5b": ("radial", "neighborhood"),
        "cogvideox1.5-5b": ("radial", "neighborhood"),
    },
    "published without settings of its own for the model": {
        "flux.1-dev": ("sol", "proxy"),
        "hunyuanvideo": ("sol",),
        "wan2.1-t2v-1.3b": ("sol", "proxy"),
        "wan2.1-t2v-14b": ("sol", "proxy"),
        "wan2.2-t2v-a14b": ("sol",),
        "cogvideox-5b": ("sol",),
        "cogvideox1.5-5b": ("sol",),
    },
    "of code that was not released": {"wan2.1-t2v-1.3b": ("freelong",)},
    "positions alone": dict.fromkeys(
        ("wan2.1-t2v-1.3b", "wan2.1-t2v-14b", "wan2.2-t2v-a14b", "hunyuanvideo", "cogvideox-5b"), ("riflex",)
    ),
    "one of the two paths": {"wan2.1-t2v-1.3b": ("freeswim-windows",)},
    "changed on purpose": {"stable-diffusion-1.5": ("tome", "agent"), "sdxl": ("tome",)},
}


@dataclass(frozen=True)
class Steering:
    """What a release does to a vision-language model of so many layers: those that it changes, by one patch, with these settings."""

    layers: int
    changed: Iterable[int]
    patch: str
    settings: dict[str, Any]


VAF = {"weigh": "scores", "image_weight": 1.15, "system_weight": 0.95, "heads": None}
STEERED = {
    # ustc-hyin/ClearSight, visaug/inference: layers over 8 and below 15 of any model
    "llava-1.5-7b/vaf": Steering(32, range(9, 15), "visual_bias", VAF),
    "llava-1.5-13b/vaf": Steering(40, range(9, 15), "visual_bias", VAF),
    # LALBJ/PAI
    "llava-1.5-7b/pai": Steering(32, range(2, 32), "pai", {"alpha": 0.2, "sizes": "head"}),
    # ZhangqiJiang07/middle_layers_indicating_hallucinations: --guide-range 5,18, the last of which counts
    "llava-1.5-7b/hgai": Steering(32, range(5, 19), "pai", {"alpha": 0.5, "sizes": "mean"}),
    # YUECHE77/SPIN: its commands for captions, and for MMHal-Bench with the 13B
    "llava-1.5-7b/spin": Steering(32, range(32), "spin", {"keep_share": 0.95, "gain": 0.08}),
    "llava-1.5-13b/spin": Steering(40, range(20), "spin", {"keep_share": 0.9, "gain": 0.0}),
    # ytx-ML/ILVAD, scripts/infer_llava1_5.sh: captions, and POPE
    "llava-1.5-7b/ilvad": Steering(
        32, range(32), "ilvad", {"enhance": (5, 26), "alpha": 5.0, "words": 1.0, "beta": 0.3, "tau": 5.0, "tokens": 10}
    ),
    "llava-1.5-7b/ilvad_pope": Steering(
        32, range(32), "ilvad", {"enhance": (0, 31), "alpha": 5.0, "words": 1.0, "beta": 1.0, "tau": 5.0, "tokens": 10}
    ),
    # FeilongTangmonash/FarSight, Shell/farsight_patch.py
    "llava-1.5-7b/farsight": Steering(32, range(32), "farsight", {"sigma": 0.8, "fade": 0.25, "slopes": True}),
    # JiachengZ01/SAVVA, configs/ours.yaml: LLaVA-NeXT-7B, Qwen3-VL-8B
    "vlm/adaptive_boost": Steering(
        32, range(15), "adaptive_boost", {"alpha": 0.5, "scale": 0.5, "image_boost": 1.1, "text_divisor": 1.7}
    ),
    "vlm-qwen/adaptive_boost": Steering(
        36, range(4, 15), "adaptive_boost", {"alpha": 0.6, "scale": 0.6, "image_boost": 1.3, "text_divisor": 1.3}
    ),
    # TianyunYoung/Hallucination-Attribution, decoding.sh and eval_caption_adhh.py
    "llava-1.5-7b/adhh": Steering(32, range(32), "adhh", {"threshold": 0.4, "keep": 0.0}),
    "llava-1.5-13b/adhh": Steering(40, range(40), "adhh", {"threshold": 0.4, "keep": 0.0}),
}


@pytest.mark.parametrize("name", STEERED)
def test_vision_language_models_are_changed_where_their_releases_change_them(name: str) -> None:
    recipe, release = named(name), STEERED[name]
    for layer in range(release.layers):
        place = Site(f"layers.{layer}.self_attn", "decoder", "self", layer, release.layers)
        decision = recipe.decide(place, None, Clock(phase="decode"))
        assert decision.patch == (release.patch if layer in release.changed else None)
        if decision.patch is not None:
            found = patch_class(decision.patch)(decision.config).config.model_dump()
            assert found.items() >= release.settings.items()
            if decision.patch == "adhh":
                assert len(set(found["heads"])) == {32: 20, 40: 35}[release.layers]
                assert all(head[0] < release.layers and head[1] < release.layers for head in found["heads"])


def site(layer: int, layers: int, kind: Kind, module: str | None = None) -> Site:
    return Site(module or f"blocks.{layer}.attn1", "transformer", kind, layer, layers)


@pytest.mark.parametrize("name", RELEASES)
def test_recipes_are_sparse_where_their_releases_are(name: str) -> None:
    recipe, release = named(name), RELEASES[name]
    model, _, _ = name.partition("/")
    kind: Kind = "joint" if model.startswith(("flux", "hunyuan", "cog")) else "self"
    module = "down_blocks.0.attentions.0.transformer_blocks.0.attn1" if model.startswith("stable") else None
    layout = Layout(release.grid_thw, text_after=226 if kind == "joint" else 0)
    found: dict[str, Any] = {}
    for step in range(release.steps):
        for layer in range(release.layers):
            decision = recipe.decide(site(layer, release.layers, kind, module), layout, Clock(step, release.steps))
            wanted = layer in release.sparse_layers and step in release.sparse_steps
            assert (decision.patch is not None) == wanted, (
                f"layer {layer} of {release.layers}, step {step} of {release.steps}"
            )
            if decision.patch is not None:
                found = patch_class(decision.patch)(decision.config).config.model_dump()
    assert found.items() >= release.settings.items()


def test_freeswim_takes_what_the_text_says_from_its_second_path() -> None:
    """WillWu111/FreeSwim: in all layers, made anew in every second step."""
    recipe = named("wan2.1-t2v-1.3b/freeswim")
    for layer in range(30):
        decision = recipe.decide(site(layer, 30, "cross"), None, Clock(7, 50))
        assert decision.patch == "second_path"
        assert patch_class("second_path")(decision.config).config.model_dump() == {"every": 2}


def test_the_table_has_every_recipe_of_a_denoiser() -> None:
    """A recipe is in the table of releases, or it is named beside, with why it is not."""
    language = {path.stem for path in shipped_files().values() if _is_for_language(path)} | {
        "wan-shapes",
        "denoiser",
        "vggt",
        "vggt-boxes",
    }
    shipped = {f"{path.stem}/{name}" for path in shipped_files().values() for name in read_file(path).recipes}
    shipped = {name for name in shipped if name.partition("/")[0] not in language}
    named_beside = [f"{m}/{r}" for models in NOT_RELEASED.values() for m, recipes in models.items() for r in recipes]
    assert len(set(named_beside)) == len(named_beside)
    assert shipped == RELEASES.keys() | set(named_beside)
    assert not RELEASES.keys() & set(named_beside)


def _is_for_language(path: Path) -> bool:
    keys = read_file(path).match.keys
    named_classes = as_list(keys.get("class", "ForCausalLM"))
    vlms = {cls for family in list_vlms() for cls in family.classes}
    return "denoiser" not in keys and (
        "vlm" in keys or all(cls in vlms or cls.endswith("ForCausalLM") for cls in named_classes)
    )
