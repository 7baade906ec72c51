"""Families against the models themselves: the number of tokens at each site, and where a piece of the input lands among them."""

from __future__ import annotations

import copy
import inspect
import math
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import accelplug
from accelplug import compat, families
from accelplug.call import Kind, Layout
from accelplug.errors import UnsupportedError
from accelplug.families import FAMILIES, family_of
from accelplug.families.base import Family, Geometry, site_kinds
from accelplug.families.rasters import full_raster, once, rows_and_columns
from accelplug.families.unsupported import UNSUPPORTED
from accelplug.inspection.denoiser import inspect_denoiser
from accelplug.testing.models import batch_of_two, noise, raster_ids
from tests import tiny_models
from tests.patch_rows import ROWS

NEWEST = compat.versions.installed("diffusers").startswith(compat.versions.TESTED["diffusers"])
REFUSED = ("sana",)
SOUND = ("stable_audio", "stable_audio_3", "minimax_music_3", "ace_step", "longcat_audio")
MODELS = tuple(name for name in tiny_models.MODELS if name not in REFUSED + SOUND)

MASKS = {
    "hunyuan_video": (torch.bool, (1, 1, 1, 72 + 12)),
    "hunyuan_video_15": (torch.bool, (1, 1, 72 + 13, 72 + 13)),
    "qwen_image": (torch.bool, (1, 1, 1, 8 + 48)),
    "motif_video": (torch.bool, (1, 1, 1, 72 + 12)),
    "krea2": (torch.bool, (1, 1, 1, 7 + 48)),
    "qwen_image_21": (torch.bool, (1, 1, 1, 7 + 48)),
    "qwen_image_21_edit": (torch.bool, (1, 1, 1, 7 + 24 + 48)),
    "hunyuan_image": (torch.bool, (1, 1, 1, 48 + 10)),
    "ideogram4": (torch.bool, (1, 1, 7 + 48, 7 + 48)),
    "ernie_image": (torch.bool, (1, 1, 1, 48 + 7)),
    "joyimage_plus": (torch.bool, (1, 1, 1, 48 + 24 + 3 + 7)),
    "fibo": (torch.bool, (1, 1, 1, 7 + 48)),
    "lumina_next": (torch.bool, (1, 2, 48, 48)),
    "nucleus_image": (torch.bool, (1, 48 + 7)),
    "prx": (torch.bool, (1, 1, 1, 7 + 48)),
}
"""Dtype and shape of the mask that reaches self- and joint attention; the other models pass none."""


# ------------------------------------------------------------------------------------------- hearing what really runs


@dataclass
class Heard:
    """One attention call: queries (B, S, H, D), number of keys, mask."""

    path: str
    q: Tensor
    keys: int
    mask: Any


def owners(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that own a processor, by path."""
    return {path: module for path, module in model.named_modules() if callable(getattr(module, "processor", None))}


@contextmanager
def hearing(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Heard]]:
    """Note every call that reaches attention from inside an attention module of `model`, by either of the two ways."""
    heard: list[Heard] = []
    inside: list[str] = []
    dispatch, sdpa = compat.diffusers.dispatch_attention_fn(), torch.nn.functional.scaled_dot_product_attention

    def dispatched(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **kwargs: Any) -> Tensor:
        heard.append(Heard(inside[-1], query.detach().clone(), key.shape[1], attn_mask))
        path = inside.pop()  # what the backend calls is not another call
        out = dispatch(query, key, value, attn_mask=attn_mask, **kwargs)
        inside.append(path)
        return out

    def direct(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        if inside:
            heard.append(Heard(inside[-1], query.detach().transpose(1, 2).clone(), key.shape[-2], attn_mask))
        return sdpa(query, key, value, attn_mask, *args, **kwargs)

    handles = []
    for path, module in owners(model).items():
        handles.append(module.register_forward_pre_hook(lambda *_, path=path: inside.append(path)))
        handles.append(module.register_forward_hook(lambda *_: inside.pop() and None))
    with monkeypatch.context() as patch:
        for name, library in list(sys.modules.items()):
            if name.startswith("diffusers.models") and vars(library).get("dispatch_attention_fn") is dispatch:
                patch.setattr(library, "dispatch_attention_fn", dispatched)
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", direct)
        yield heard
    for handle in handles:
        handle.remove()


@dataclass
class Forward:
    """What a family says of one forward, and what was heard."""

    kinds: dict[str, tuple[Kind, int | None]]
    geometry: dict[str, Geometry | None]
    heard: list[Heard]
    text_apart: bool

    def sites(self) -> Iterator[tuple[Heard, Layout]]:
        """Yield the calls of self and joint sites with the layout that the family gives them; text may ask in calls of its own."""
        for call in self.heard:
            kind = self.kinds[call.path][0] if call.path in self.kinds else None
            if kind in ("self", "joint"):
                geometry = self.geometry[call.path]
                if geometry and self.text_apart and call.keys < geometry.longest(kind):
                    assert call.keys <= geometry.longest(kind) - math.prod(geometry.grid_thw), "not the text's own call"
                    continue
                layout = geometry.layout(kind, call.keys) if geometry else None
                assert layout is not None, f"{call.path}: {call.keys} tokens do not fit {geometry}"
                yield call, layout


def forward(model: nn.Module, inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Forward:
    """Run `model` once, as the host does: geometry from the inputs of the denoiser, or of each resolution of a UNet."""
    family = family_of(model)
    assert family is not None
    kinds, _ = site_kinds(family, owners(model))
    geometry: dict[str, Geometry | None] = {}

    def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any], path: str) -> None:
        bound = inspect.signature(type(module).forward).bind_partial(module, *args, **kwargs).arguments
        found = family.geometry(getattr(module, "config", None), bound)
        geometry.update({site: found for site in kinds if site.startswith(path)})

    levels = [(path + ".", m) for path, m in model.named_modules() if type(m).__name__ in family.level] or [("", model)]
    handles = [
        module.register_forward_pre_hook(lambda m, a, k, path=path: enter(m, a, k, path), with_kwargs=True)
        for path, module in levels
    ]
    with torch.no_grad(), hearing(model, monkeypatch) as heard:
        model(**copy.deepcopy(inputs))
    for handle in handles:
        handle.remove()
    return Forward(kinds, geometry, heard, family.text_apart)


# ---------------------------------------------------------------------------------------------------- tokens and order


@pytest.mark.parametrize("name", MODELS)
def test_every_site_has_the_tokens_and_the_mask_that_its_family_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny_models.build(name)
    run = forward(model, inputs, monkeypatch)
    seen = set()
    for call, layout in run.sites():
        assert (call.q.shape[1], call.keys) == (layout.queries, layout.length)
        assert MASKS.get(name) == (None if call.mask is None else (call.mask.dtype, tuple(call.mask.shape)))
        kind = run.kinds[call.path][0]
        assert (layout.length > layout.visual) == (kind == "joint")
        low, high = run.geometry[call.path].text
        if kind == "joint" and name not in ("mochi", "framepack"):  # whose text is as long as it is valid
            others = run.geometry[call.path].ahead + run.geometry[call.path].behind
            assert low == high == layout.length - layout.visual - others
        seen.add(call.path)
    assert seen == {path for path, (kind, _) in run.kinds.items() if kind in ("self", "joint")}, "a site never attended"
    frames, rows, columns = max((layout for _, layout in run.sites()), key=lambda layout: layout.visual).grid_thw
    assert frames * rows * columns >= 48
    assert len({frames, rows, columns}) == 3 or name == "dit"  # whose pictures are square


@dataclass(frozen=True)
class Latent:
    """Where the latents of a model are: the argument, the names of its dimensions, latent frames, rows and columns a token.

    `ahead`: how many other tokens stand ahead of them where they are packed.
    """

    name: str = "hidden_states"
    axes: str = "bcthw"
    patch: tuple[int, int, int] = (1, 2, 2)
    ahead: int = 0
    parts: bool = False
    """Whether they are the last of several parts of one sample."""

    def touched(self, value: Any, grid: tuple[int, int, int], place: tuple[int, int, int]) -> Any:
        """Return `value` with the patch of one token changed; a list, one for each sample, with all of them changed."""
        if self.parts:
            return [*value[:-1], replace(self, parts=False).touched(value[-1], grid, place)]
        if isinstance(value, list):
            return [self.touched(one, grid, place) for one in value]
        value = value.clone()
        if self.axes == "bsc":  # packed: nothing but raster order can be meant
            t, h, w = place
            token = value[:, self.ahead + (t * grid[1] + h) * grid[2] + w]
            token += torch.linspace(0.5, 1.5, token[0].numel()).view(token[0].shape)
            return value
        at = dict(zip("thw", zip(place, self.patch, strict=True), strict=True))
        where = tuple(
            slice(at[a][0] * at[a][1], (at[a][0] + 1) * at[a][1])
            if a in at
            else slice(-1, None)
            if a == "n"
            else slice(None)
            for a in self.axes  # n: the last of several items
        )
        value[where] += torch.linspace(0.5, 1.5, value[where].numel()).reshape(value[where].shape)
        return value


PACKED, IMAGE = Latent(axes="bsc"), Latent(axes="bchw")
LATENTS = {name: Latent() for name in MODELS} | {
    "hunyuan_video_15": Latent(patch=(1, 1, 1)),
    "cogvideox": Latent(axes="btchw"),
    "consisid": Latent(axes="btchw"),
    "anyflow": Latent(axes="btchw"),
    "kandinsky6": Latent(axes="bthwc"),
    "anyflow_far": Latent(axes="btchw"),
    "cosmos3": Latent(name="vision_tokens", parts=True),
    "cogvideox_15": Latent(axes="btchw", patch=(2, 2, 2)),
    "kandinsky5": Latent(axes="bthwc"),
    "z_image": Latent(name="x", axes="cthw"),
    "joyimage": Latent(axes="bncthw"),
    "qwen_image_21_edit": Latent(axes="bsc", ahead=24),
    "ideogram4": Latent(axes="bsc", ahead=7),
    **dict.fromkeys(("ltx", "ltx2", "flux", "flux2", "chroma", "flux3", "krea2", "minimax_h3"), PACKED),
    **dict.fromkeys(("qwen_image", "qwen_image_21", "bria", "fibo", "longcat_image", "ovis_image"), PACKED),
    **dict.fromkeys(("nucleus_image", "joyimage_plus"), PACKED),
    "minimax_h3_first_last": Latent(axes="bsc", ahead=2 * 24),
    "minimax_h3_references": Latent(axes="bsc", ahead=6 + 72),
    "wan_animate_2": Latent(axes="cthw"),
    **dict.fromkeys(("sd3", "pixart", "dit", "hunyuan_image", "hunyuan_dit", "auraflow", "cogview3plus", "cogview4"), IMAGE),
    **dict.fromkeys(("glm_image", "hidream", "ernie_image", "lumina_next", "lumina2", "fibo2", "prx"), IMAGE),
}
OF_TEXT = {"encoder_hidden_states": noise(1, 7, 16)}
UNETS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("unet_sd15", "unet_sdxl", "animatediff", "unet_modelscope", "unet_i2vgen", "unet_dreamlite"), OF_TEXT),
    "unet_svd": {"encoder_hidden_states": noise(1, 1, 16), "image_only_indicator": torch.zeros(1, 1)},
    "kandinsky3": {"time_embed": noise(1, 16)},
}
"""What a level is given beside its latents. Convolutions spread a change over a UNet: it is followed through one level alone."""
REFINED = ("z_image", "lumina2", "fibo2")
"""Refiners ahead of the first block have mixed all tokens there; the touched one has moved furthest."""


@pytest.mark.parametrize("name", [name for name in MODELS if name not in (*UNETS, "unet2d", "latte")])
def test_a_piece_of_the_input_lands_on_its_raster_place(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny_models.build(name)
    if name.startswith("hunyuan") and "encoder_attention_mask" in inputs:  # the text is refined with what is valid only
        inputs = inputs | {"encoder_attention_mask": torch.ones_like(inputs["encoder_attention_mask"])}
    latent = LATENTS[name]
    before, layout = next(forward(model, inputs, monkeypatch).sites())
    grid = layout.grid_thw
    for place in {(0, 0, 0), (grid[0] - 1, 1, 2), (grid[0] // 2, grid[1] - 1, 3), (0, 2, grid[2] - 1)}:
        touched = latent.touched(inputs[latent.name], grid, place)
        after, _ = next(forward(model, inputs | {latent.name: touched}, monkeypatch).sites())
        assert after.path == before.path
        moved = (after.q - before.q).abs().amax((0, 2, 3)) > 1e-6
        t, h, w = place
        expected = layout.text_before + (t * grid[1] + h) * grid[2] + w - layout.unasked[0]
        if name in REFINED:
            moved = (after.q - before.q).square().sum((0, 2, 3))
            assert int(moved.argmax()) == expected
        else:
            assert moved.nonzero().flatten().tolist() == [expected]


H3_ROWS = {"minimax_h3": (0, 0), "minimax_h3_first_last": (2 * 24, 0), "minimax_h3_references": (6 + 72, 6 + 4)}
"""Rows of pictures and of sound ahead of the target's own."""


@pytest.mark.parametrize("name", H3_ROWS)
def test_of_all_that_is_packed_the_last_video_alone_is_visual(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny_models.build(name)
    seen, heard = H3_ROWS[name]
    before, layout = next(forward(model, inputs, monkeypatch).sites())
    assert layout == Layout((3, 4, 6), text_before=7 + seen + heard + 2 * 4)
    rows = {"hidden_states": "video_indices", "audio_hidden_states": "audio_indices"}  # the text is mixed by its refiner
    for argument, indices in rows.items():
        for row in range(inputs[argument].shape[1]):
            touched = inputs[argument].clone()
            touched[:, row] += 1.0
            after, _ = next(forward(model, inputs | {argument: touched}, monkeypatch).sites())
            moved = ((after.q - before.q).abs().amax((0, 2, 3)) > 1e-6).nonzero().flatten().tolist()
            assert moved == [int(inputs[indices][row])]
            is_target = argument == "hidden_states" and row >= seen
            assert (moved[0] >= layout.text_before) == is_target
            assert not is_target or moved[0] - layout.text_before == row - seen


@pytest.mark.parametrize("change", ["video_indices", "position_ids"])
def test_what_stands_behind_the_target_or_on_no_raster_is_dense(change: str) -> None:
    model, inputs = tiny_models.build("minimax_h3")
    other = inputs[change].clone()
    if change == "position_ids":
        other[-5] = other[-6]
    else:
        other = other[:-1]
    assert family_of(model).geometry(model.config, inputs) is not None
    assert family_of(model).geometry(model.config, {**inputs, change: other}) is None


def test_references_stand_behind_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """In joint attention of Flux.3: each token of the image and of a reference is traced to the first joint block."""
    model, inputs = tiny_models.build("flux3")
    model.mode_blocks = nn.ModuleDict({"image": nn.ModuleList(), "image_cond": nn.ModuleList()})
    before, layout = next(forward(model, inputs, monkeypatch).sites())
    assert layout == Layout((1, 6, 8), text_before=7, text_after=20)
    for argument, first in (("hidden_states", 7), ("image_cond_hidden_states", 7 + 48)):
        for row in range(inputs[argument].shape[1]):
            touched = inputs[argument].clone()
            touched[:, row] += 1.0
            after, _ = next(forward(model, inputs | {argument: touched}, monkeypatch).sites())
            assert ((after.q - before.q).abs().amax((0, 2, 3)) > 1e-6).nonzero().flatten().tolist() == [first + row]


@pytest.mark.parametrize("name", [name for name in UNETS if name in MODELS])
def test_a_place_of_a_resolution_lands_on_its_raster_place(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = tiny_models.build(name)
    family = family_of(model)
    levels = [m for m in model.modules() if type(m).__name__ in family.level]
    level = next(m for m in levels if any(path.endswith(("attn1", "attention")) for path in owners(m)))
    latent = "x" if name == "kandinsky3" else "hidden_states"
    norms = level.in_norm if name == "kandinsky3" else level
    channels = norms.norm.num_channels
    norms.norm = nn.Identity()  # a group norm spreads a change over its whole group
    inputs = {latent: noise(1, channels, 6, 8), **UNETS[name]}
    read = inputs["encoder_hidden_states"].shape[1] if "encoder_hidden_states" in inputs else 0
    assert family.geometry(getattr(level, "config", None), inputs) == Geometry((1, 6, 8), read=read)

    def first_queries(x: Tensor) -> Tensor:
        with torch.no_grad(), hearing(level, monkeypatch) as heard:
            level(**inputs | {latent: x})
        return next(call.q for call in heard if call.path.endswith(("attn1", "attention")))

    before = first_queries(inputs[latent])
    for row, column in ((0, 0), (2, 5), (5, 7)):
        touched = inputs[latent].clone()
        touched[:, :, row, column] += torch.linspace(0.5, 1.5, channels)
        moved = (first_queries(touched) - before).abs().amax((0, 2, 3)) > 1e-6
        assert moved.nonzero().flatten().tolist() == [row * 8 + column]


def test_pixels_of_a_unet_without_text_are_tokens_in_raster_order(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = tiny_models.build("unet2d")
    attention = model.mid_block.attentions[0]
    attention.group_norm = None  # it spreads a change over its whole group

    def queries(x: Tensor) -> Tensor:
        with torch.no_grad(), hearing(model.mid_block, monkeypatch) as heard:
            attention(x)
        return heard[0].q

    x = noise(1, 32, 6, 8)
    for row, column in ((0, 0), (2, 5), (5, 7)):
        touched = x.clone()
        touched[:, :, row, column] += torch.linspace(0.5, 1.5, 32)
        moved = (queries(touched) - queries(x)).abs().amax((0, 2, 3)) > 1e-6
        assert moved.nonzero().flatten().tolist() == [row * 8 + column]


def test_a_whole_run_of_a_unet_without_text() -> None:
    import diffusers

    model, _ = tiny_models.build("unet2d")
    model.register_to_config(sample_size=16)
    pipe = diffusers.ConsistencyModelPipeline(model, diffusers.CMStochasticIterativeScheduler())
    pipe.set_progress_bar_config(disable=True)

    def run() -> Tensor:
        return pipe(num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt").images

    stock = run()
    with accelplug.apply(pipe, ROWS["neighborhood"].recipe(steps="50%:"), gate="off", strict=True) as plug:
        assert not torch.equal(run(), stock)
        assert plug.report().served["neighborhood"] == 4, "attention on the way down, in the middle, and twice on the way up"
    assert torch.equal(run(), stock)


def test_latte_attends_frame_by_frame_and_then_over_the_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny_models.build("latte")
    run = forward(model, inputs, monkeypatch)
    spatial, layout = next(run.sites())
    assert layout.grid_thw == (1, 6, 8)
    assert spatial.q.shape[:2] == (3, 48)
    temporal = [call for call in run.heard if run.kinds.get(call.path, (None,))[0] == "temporal"]
    assert temporal
    assert {call.q.shape[:2] for call in temporal} == {(48, 3)}
    value = inputs["hidden_states"].clone()
    value[:, :, 1, 4:6, 10:12] += 1.0
    after, _ = next(forward(model, inputs | {"hidden_states": value}, monkeypatch).sites())
    moved = (after.q - spatial.q).abs().amax((2, 3)) > 1e-6
    assert moved.nonzero().tolist() == [[1, 2 * 8 + 5]]


@pytest.mark.parametrize("name", [name for name in SOUND if name in tiny_models.MODELS])
def test_sound_lies_along_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny_models.build(name)
    ahead = {"stable_audio": 1, "stable_audio_3": 5, "minimax_music_3": 1}.get(name, 0)
    calls = list(forward(model, inputs, monkeypatch).sites())
    assert calls
    assert family_of(model).patch(model.config) is None, "no pipeline says ahead how long it is"
    for call, layout in calls:
        assert layout == Layout((60, 1, 1), text_before=ahead)
        assert call.q.shape[1] == call.keys == layout.length
        assert (call.mask is None) == (name != "ace_step" or ".1." in call.path), "every other layer has a sliding window"
    time = inputs["hidden_states"].shape.index(119 if name == "ace_step" else 60)
    for frame in (0, 17, 59):
        touched = inputs["hidden_states"].clone()
        touched.select(time, frame * (2 if name == "ace_step" else 1)).add_(
            torch.linspace(0.5, 1.5, touched.shape[3 - time])
        )
        after, _ = next(forward(model, inputs | {"hidden_states": touched}, monkeypatch).sites())
        moved = (after.q - calls[0][0].q).abs().amax((0, 2, 3)) > 1e-6
        assert moved.nonzero().flatten().tolist() == [ahead + frame]


# --------------------------------------------------------------------------------------------------------------- masks


def test_an_outer_mask_is_the_outer_product_of_its_first_row(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny_models.build("hunyuan_video_15")
    assert family_of(model).outer_mask
    for call, layout in forward(model, inputs, monkeypatch).sites():
        valid = call.mask[:, 0, 0]
        assert valid[:, : layout.visual].all(), "a visual token is always valid"
        assert not valid.all(), "the example has padding"
        assert torch.equal(call.mask, valid[:, None, :, None] & valid[:, None, None, :])


def test_chroma_adds_its_mask_to_the_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pipeline makes the mask in the dtype of the text: numbers to add, which no key validity can stand for."""
    model, inputs = tiny_models.build("chroma")
    padding = (torch.arange(7 + 48) != 6)[None].float()
    for call, layout in forward(model, inputs | {"attention_mask": padding}, monkeypatch).sites():
        assert call.mask.dtype == torch.float32
        assert call.mask.shape == (1, 1, layout.length, layout.length)
    assert not family_of(model).outer_mask


# ------------------------------------------------------------------------------------------------------- pure geometry


def latents(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def packed(tokens: int, text: int, **more: Any) -> dict[str, Any]:
    return {"hidden_states": latents(1, tokens, 64), "encoder_hidden_states": latents(1, text, 64), **more}


TEXT = {"encoder_hidden_states": latents(1, 226, 64)}
PUBLISHED = [
    ("WanTransformer3DModel", (1, 2, 2), None, {"hidden_states": latents(1, 16, 21, 60, 104)}, (21, 30, 52), 32_760),
    ("WanTransformer3DModel", (1, 2, 2), None, {"hidden_states": latents(1, 16, 21, 90, 160)}, (21, 45, 80), 75_600),
    ("WanTransformer3DModel", (1, 2, 2), None, {"hidden_states": latents(1, 48, 31, 44, 80)}, (31, 22, 40), 27_280),
    (
        "HunyuanVideoTransformer3DModel",
        2,
        1,
        {"hidden_states": latents(1, 16, 33, 90, 160), "encoder_hidden_states": latents(1, 256, 64)},
        (33, 45, 80),
        118_800 + 256,
    ),
    ("CogVideoXTransformer3DModel", 2, None, TEXT | {"hidden_states": latents(2, 13, 16, 60, 90)}, (13, 30, 45), 17_776),
    ("CogVideoXTransformer3DModel", 2, 2, TEXT | {"hidden_states": latents(2, 22, 16, 96, 170)}, (11, 48, 85), 45_106),
    ("CosmosTransformer3DModel", (1, 2, 2), None, {"hidden_states": latents(1, 17, 16, 88, 160)}, (16, 44, 80), 56_320),
    ("CosmosTransformer3DModel", (1, 2, 2), None, {"hidden_states": latents(1, 17, 24, 88, 160)}, (24, 44, 80), 84_480),
    (
        "LTXVideoTransformer3DModel",
        1,
        1,
        packed(21 * 16 * 22, 128, num_frames=21, height=16, width=22),
        (21, 16, 22),
        7_392,
    ),
    (
        "LTX2VideoTransformer3DModel",
        1,
        1,
        packed(16 * 16 * 24, 128, num_frames=16, height=16, width=24),
        (16, 16, 24),
        6_144,
    ),
    (
        "FluxTransformer2DModel",
        1,
        None,
        packed(64 * 64, 512, img_ids=raster_ids(1, 64, 64).bfloat16()),
        (1, 64, 64),
        4_608,
    ),
    ("QwenImageTransformer2DModel", 2, None, packed(83 * 83, 100, img_shapes=[[(1, 83, 83)]]), (1, 83, 83), 6_989),
    (
        "SD3Transformer2DModel",
        2,
        None,
        {"hidden_states": latents(2, 16, 128, 128), "encoder_hidden_states": latents(2, 333, 64)},
        (1, 64, 64),
        4_429,
    ),
    ("PixArtTransformer2DModel", 2, None, {"hidden_states": latents(2, 4, 128, 128)}, (1, 64, 64), 4_096),
]


def family_named(class_name: str) -> Family:
    return next(family for family in FAMILIES if class_name in family.classes)


@pytest.mark.parametrize(("class_name", "patch", "patch_t", "inputs", "grid", "length"), PUBLISHED)
def test_published_sizes(
    class_name: str,
    patch: int | tuple[int, int, int],
    patch_t: int | None,
    inputs: dict[str, Any],
    grid: tuple[int, int, int],
    length: int,
) -> None:
    family = family_named(class_name)
    geometry = family.geometry(SimpleNamespace(patch_size=patch, patch_size_t=patch_t), inputs)
    assert geometry.grid_thw == grid
    layout = geometry.layout(family.sites[0][1], length)
    assert layout.visual == math.prod(grid)
    assert layout.length == length
    assert geometry.layout(family.sites[0][1], length + 1) is None


def cosmos3(noisy: int = 1, places: Tensor | None = None) -> dict[str, Any]:
    """Seven tokens of text, and two videos of 3 x 4 x 6, of which so many are denoised."""
    return {
        "vision_token_shapes": [(3, 4, 6)] * 2,
        "vision_noisy_frame_indexes": [torch.arange(0)] * (2 - noisy) + [torch.arange(3)] * noisy,
        "vision_sequence_indexes": torch.arange(7, 151) if places is None else places,
        "und_len": 7,
        "sequence_length": 151,
    }


DENSE = {
    "wan without latents": ("WanTransformer3DModel", {}),
    "wan with latents of four dimensions": ("WanTransformer3DModel", {"hidden_states": latents(1, 4, 8, 12)}),
    "hunyuan 1.5 without an image": ("HunyuanVideo15Transformer3DModel", {"hidden_states": latents(1, 4, 3, 4, 6), **TEXT}),
    "framepack without an image": (
        "HunyuanVideoFramepackTransformer3DModel",
        {"hidden_states": latents(1, 4, 3, 8, 12), **TEXT},
    ),
    "ltx with conditions ahead": ("LTXVideoTransformer3DModel", packed(72 + 24, 9, **tiny_models.PACKED_VIDEO)),
    "ltx by coordinates alone": ("LTXVideoTransformer3DModel", packed(72, 9, video_coords=latents(1, 3, 72))),
    "kandinsky with its own sparsity": (
        "Kandinsky5Transformer3DModel",
        {"hidden_states": latents(1, 3, 8, 12, 4), "sparse_params": {"to_fractal": True}},
    ),
    "flux without ids": ("FluxTransformer2DModel", packed(48, 7)),
    "flux with ids of other tokens": ("FluxTransformer2DModel", packed(48, 7, img_ids=raster_ids(1, 6, 9).float())),
    "flux with columns first": (
        "FluxTransformer2DModel",
        packed(48, 7, img_ids=raster_ids(1, 8, 6)[:, [0, 2, 1]].float()),
    ),
    "flux 2 with cached references": (
        "Flux2Transformer2DModel",
        packed(48, 7, img_ids=raster_ids(1, 6, 8, 1)[None], kv_cache_mode="cached"),
    ),
    "qwen with tokens of no image": ("QwenImageTransformer2DModel", packed(96, 7, img_shapes=[[(1, 6, 8), (1, 6, 7)]])),
    "qwen of two sizes": ("QwenImageTransformer2DModel", packed(48, 7, img_shapes=[[(1, 6, 8)], [(1, 8, 6)]])),
    "z-image of two sizes": (
        "ZImageTransformer2DModel",
        {"x": [latents(16, 1, 12, 20), latents(16, 1, 20, 12)], "cap_feats": [latents(5, 8)] * 2},
    ),
    "wan-animate 2 with the video's keys": (
        "WanAnimate2Transformer3DModel",
        {"hidden_states": [latents(4, 4, 8, 12)], "kv_cache_mode": "cached"},
    ),
    "krea 2 with ids of other tokens": (
        "Krea2Transformer2DModel",
        {
            "hidden_states": latents(1, 48, 4),
            "encoder_hidden_states": latents(1, 7, 3, 8),
            "position_ids": raster_ids(1, 6, 8).float(),
        },
    ),
    "z-image omni": ("ZImageTransformer2DModel", {"x": [[latents(16, 1, 12, 20)]], "cap_feats": [[latents(5, 8)]]}),
    "kandinsky 6 with rows in another order": (
        "Kandinsky6Transformer3DModel",
        {
            "hidden_states": latents(1, 3, 8, 12, 9),
            "visual_rope_pos": (torch.arange(3), torch.tensor([1, 0, 2, 3]), torch.arange(6)),
        },
    ),
    "anyflow far that fills its cache": (
        "AnyFlowFARTransformer3DModel",
        {
            "hidden_states": latents(1, 3, 4, 8, 12),
            "chunk_partition": [3],
            "kv_cache": [{}],
            "kv_cache_flag": {"num_cached_chunks": 0, "is_cache_step": True},
        },
    ),
    "cosmos 3 with two videos": ("Cosmos3OmniTransformer", cosmos3(noisy=2)),
    "cosmos 3 with places in another order": ("Cosmos3OmniTransformer", cosmos3(places=torch.arange(7, 151).flip(0))),
    "helios with a history of one frame": (
        "HeliosTransformer3DModel",
        {
            "hidden_states": latents(1, 4, 3, 8, 12),
            "latents_history_short": latents(1, 4, 8, 12),
            "indices_latents_history_short": torch.arange(1)[None],
        },
    ),
    "sound of four dimensions": ("StableAudioDiTModel", {"hidden_states": latents(1, 3, 16, 1)}),
    "motif with half an image": (
        "MotifVideoTransformer3DModel",
        {"hidden_states": latents(1, 4, 3, 8, 12), **TEXT, "image_embeds": latents(3, 64)},
    ),
}


@pytest.mark.parametrize("case", DENSE)
def test_what_is_not_understood_is_dense(case: str) -> None:
    class_name, inputs = DENSE[case]
    config = SimpleNamespace(patch_size=(1, 2, 2))
    assert family_named(class_name).geometry(config, inputs) is None


def test_what_stands_beside_a_video() -> None:
    """A control and no sound; a reference that takes the place of the first frame; the history of a chunk of Helios 14B."""
    config = SimpleNamespace(patch_size=(1, 2, 2))
    omni = family_named("Cosmos3OmniTransformer").geometry(config, cosmos3())
    assert omni.layout("joint", 151) == Layout((3, 4, 6), text_before=7 + 72, unasked=(7, 0))
    places = torch.tensor([*range(30), 0]), torch.arange(32), torch.arange(48)
    inputs = {"hidden_states": latents(1, 31, 64, 96, 33), "visual_rope_pos": places}
    referred = family_named("Kandinsky6Transformer3DModel").geometry(config, inputs)
    assert referred.layout("joint", 31 * 1536) == Layout((30, 32, 48), text_after=1536)
    inputs = {"hidden_states": latents(1, 16, 9, 48, 80)}
    for name, frames in (("short", 2), ("mid", 2), ("long", 16)):
        inputs |= {
            f"latents_history_{name}": latents(1, 16, frames, 48, 80),
            f"indices_latents_history_{name}": latents(1, frames),
        }
    chunk = family_named("HeliosTransformer3DModel").geometry(config, inputs)
    assert chunk.layout("joint", 8640 + 2400) == Layout((9, 24, 40), text_before=1920 + 240 + 240)


def test_raster_ids() -> None:
    assert rows_and_columns(raster_ids(1, 6, 8)) == (1, 6, 8)
    assert rows_and_columns(raster_ids(1, 6, 8, 1).expand(2, -1, -1)) == (1, 6, 8)
    assert rows_and_columns(raster_ids(1, 6, 8) + 3) == (1, 6, 8), "a raster may start elsewhere"
    assert rows_and_columns(raster_ids(1, 1, 8)) == (1, 1, 8)
    assert rows_and_columns(raster_ids(2, 6, 8)) is None
    assert rows_and_columns(raster_ids(1, 6, 8).flip(0)) is None
    swapped = raster_ids(1, 6, 8)
    swapped[[10, 11]] = swapped[[11, 10]]
    assert rows_and_columns(swapped) is None
    assert rows_and_columns(torch.cat([torch.zeros(7, 3), raster_ids(1, 6, 8)]), ahead=7) == (1, 6, 8)


def test_a_raster_has_any_distances_and_is_full() -> None:
    ids = torch.cartesian_prod(torch.tensor([3.0, 4.7, 11.3]), torch.tensor([0.0, 0.5]), torch.tensor([-2.0, 1.0, 7.0, 9.0]))
    assert full_raster(ids, (0, 1, 2)) == (3, 2, 4)
    assert full_raster(ids[:8], (0, 1, 2)) == (1, 2, 4)
    assert full_raster(ids[::4], (0, 1, 2)) == (3, 2, 1)
    assert full_raster(ids[:-1], (0, 1, 2)) is None
    assert full_raster(ids, (1, 2)) is None, "frames are not the same"
    assert full_raster(ids.roll(8, 0), (0, 1, 2)) is None, "time goes back"
    assert full_raster(ids[:0], (0, 1, 2)) is None


def test_what_ids_say_is_read_once_while_they_stay_as_they_are() -> None:
    reads = []

    def read(ids: Tensor, ahead: int = 0) -> int:
        reads.append(ahead)
        return int(ids[0]) + ahead

    ids = torch.tensor([3])
    assert [once(read, ids), once(read, ids), once(read, ids, ahead=1), once(read, ids.clone())] == [3, 3, 4, 3]
    assert reads == [0, 1, 0]
    ids += 1
    assert (once(read, ids), len(reads)) == (4, 4)
    with torch.inference_mode():
        ids = torch.tensor([5])
        assert [once(read, ids), once(read, ids)] == [5, 5]
    assert len(reads) == 6
    assert once(read, torch.empty(1, device="meta")) is None


def test_captions_of_two_lengths_share_one_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny_models.build("z_image")
    both = {"x": inputs["x"] * 2, "cap_feats": [noise(14, 16), noise(40, 16)], "t": torch.ones(2)}
    calls = list(forward(model, both, monkeypatch).sites())
    assert calls
    for call, layout in calls:
        assert (layout.visual, layout.text_after) == (60, 4 + 64)
        assert call.mask.dtype == torch.bool
        assert call.mask.shape == (2, 1, 1, layout.length)
        assert call.mask[:, 0, 0].sum(1).tolist() == [64 + 32, 64 + 64]


def test_mochi_attends_to_as_much_text_as_is_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny_models.build("mochi")
    both, _ = batch_of_two(inputs)
    calls = list(forward(model, both, monkeypatch).sites())
    assert [layout.text_after for _, layout in calls] == [10, 9] * 2
    assert {call.q.shape[0] for call, _ in calls} == {1}


# ------------------------------------------------------------------------------------------------------ sites and names


def test_layers_count_on_over_double_and_single_blocks() -> None:
    model, _ = tiny_models.build("flux")
    kinds, layers = site_kinds(family_of(model), owners(model))
    assert layers == 4
    assert kinds["transformer_blocks.1.attn"] == ("joint", 1)
    assert kinds["single_transformer_blocks.0.attn"] == ("joint", 2)


def test_two_attentions_of_a_block_share_its_layer() -> None:
    model, _ = tiny_models.build("sd3")
    kinds, layers = site_kinds(family_of(model), owners(model))
    assert layers == 3
    assert (kinds["transformer_blocks.0.attn"], kinds["transformer_blocks.0.attn2"]) == (("joint", 0), ("self", 0))
    assert "transformer_blocks.1.attn2" not in kinds


def test_unet_sites_are_numbered_from_the_way_down_to_the_way_up() -> None:
    model, _ = tiny_models.build("unet_sdxl")
    kinds, layers = site_kinds(family_of(model), owners(model))
    selves = sorted((layer, path) for path, (kind, layer) in kinds.items() if kind == "self")
    assert [layer for layer, _ in selves] == list(range(layers))
    assert [path.split("_")[0] for _, path in selves] == sorted((path.split("_")[0] for _, path in selves))  # down mid up
    assert all(layer is None for kind, layer in kinds.values() if kind == "cross")


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("hunyuan_video", "context_embedder.token_refiner.refiner_blocks.0.attn"),
        ("hunyuan_video_15", "context_embedder.token_refiner.refiner_blocks.0.attn"),
        ("z_image", "noise_refiner.0.attention"),
        ("z_image", "context_refiner.0.attention"),
        ("hunyuan_image", "context_embedder.token_refiner.refiner_blocks.0.attn"),
        ("lumina2", "noise_refiner.0.attn"),
        ("fibo2", "perceiver.layers.0.self_attention"),
        ("ltx2", "transformer_blocks.0.audio_attn1"),
        ("ltx2", "transformer_blocks.0.audio_to_video_attn"),
        ("wan_vace", "vace_blocks.0.attn1"),
        ("kandinsky5", "text_transformer_blocks.0.self_attention"),
        ("minimax_h3", "token_refiner.refiner_blocks.0.attn"),
        ("flux3", "txt_mode_blocks.0.attn"),
        ("flux3", "mode_blocks.image_cond.0.attn"),
        ("krea2", "text_fusion.refiner_blocks.0.attn"),
    ],
)
def test_refiners_sound_and_control_are_left_alone(name: str, module: str) -> None:
    model, _ = tiny_models.build(name)
    assert module in owners(model)
    assert module not in site_kinds(family_of(model), owners(model))[0]


def test_every_class_of_a_family_is_one_of_diffusers_and_belongs_to_it_alone() -> None:
    import diffusers

    classes = [name for family in FAMILIES for name in family.classes]
    assert len(set(classes)) == len(classes)
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
    if NEWEST:  # an older one lacks some
        assert [name for name in classes if not hasattr(diffusers, name)] == []


def test_every_denoiser_of_diffusers_has_a_family_or_a_reason_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models import transformers

    (check,) = dict(compat.contracts.contracts_of(families)).values()
    assert compat.contracts.why_broken(check) is None
    new = type("NewTransformer4DModel", (nn.Module,), {})
    monkeypatch.setattr(transformers, "NewTransformer4DModel", new, raising=False)
    assert "nothing is known of NewTransformer4DModel" in (compat.contracts.why_broken(check) or "")


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_unsupported_is_a_class_without_a_family_and_a_sentence(name: str) -> None:
    assert name in compat.diffusers.denoiser_classes() or not NEWEST
    assert name not in [cls for family in FAMILIES for cls in family.classes]
    assert re.fullmatch(r"[a-z][^\n]*\.", UNSUPPORTED[name])


def test_a_class_that_nobody_knows_is_told_so_ahead_of_its_recipe() -> None:
    """And a model that no recipe is for, ahead of that."""
    stranger = type("WanTransformer4DModel", (nn.Module,), {})()
    for recipe in (None, "radial", {"rules": [{"patch": "radial"}]}):
        with pytest.raises(
            UnsupportedError, match=r"^WanTransformer4DModel is not a denoiser that accelplug knows"
        ) as error:
            accelplug.apply(stranger, recipe)
        assert "nearest: WanTransformer3DModel" in str(error.value)
        assert "register_family" in str(error.value)
        assert "docs/extending.md" in str(error.value)
    pipe = type("StrangePipeline", (), {"transformer": stranger, "__call__": lambda self: pytest.fail("it was run")})()
    asks = (accelplug.compare, accelplug.tune, lambda pipe: accelplug.calibrate(pipe, "radial"))
    for ask in asks:
        with pytest.raises(UnsupportedError, match=r"^WanTransformer4DModel is not a denoiser that accelplug knows"):
            ask(pipe)


def test_a_class_that_nothing_can_be_done_for_is_told_why() -> None:
    model, _ = tiny_models.build("sana")
    with pytest.raises(UnsupportedError, match=r"^SanaTransformer2DModel cannot be patched: its self-attention is linear"):
        accelplug.apply(model)
    mine = type("MyUNet", (type("UNet1DModel", (nn.Module,), {}),), {})()
    with pytest.raises(UnsupportedError, match=r"^MyUNet cannot be patched: its attention has no processor"):
        accelplug.apply(mine)
    (facts,) = inspect_denoiser(model, {}).denoisers
    assert "linear" in facts.status


def test_a_class_that_derives_from_a_known_one_is_known() -> None:
    base: Any = type(tiny_models.build("wan")[0])

    class Mine(base):
        pass

    assert family_of(Mine.__new__(Mine)).name == "wan"
    assert family_of(nn.Linear(2, 2)) is None
