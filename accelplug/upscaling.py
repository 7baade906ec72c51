"""Pictures larger than their model was trained for: crops of the trained size, denoised together (C-Upscale).

C-Upscale (arXiv 2505.16976) enlarges a picture, noises it again, and denoises overlapping crops of the size that the model knows. Crops
alone each draw the whole prompt again; three things hold them together:

* where crops overlap, their latents are averaged after every step (MultiDiffusion, arXiv 2302.08113; here weighed by the distance to the
  crop's border, where that gives equal weights);
* structure prior: low frequencies of the latents z_t are drawn to those of the enlarged picture, noised to the same step, z^L_t,

    ``z_t <- z_t + c_t G (z^L_t - z_t),   c_t = ((1 + cos(pi done)) / 2)^3``

  with ``G`` a Gaussian low pass and ``done`` from 0 at the first step to 1 at the last. The paper's own G and c_t are not known to us:
  c_t is DemoFusion's (arXiv 2311.16973), G is ours;
* words: each crop reads the prompt and one of its own (`regions`), and not those words that do not look there (`patches.guidance.screen`).

The loop is a callback of the pipeline's own call: crops are the rows of a batch, and nothing of the model is touched but for words, by a
plug that is removed behind the call. The pipeline draws noise for each row; crops must share theirs, so what its first step made is
replaced by the enlarged picture as it is one step on. Solvers that remember steps remember that one.

From descriptions of the paper: no code was found. Experimental, and nothing was measured.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from accelplug import compat
from accelplug.errors import AccelplugError, UnsupportedError, nearest
from accelplug.hosts.texts import SEPARATOR, WORDED
from accelplug.patches.guidance.screen import Screen
from accelplug.plug import apply

Regional = Sequence[str] | Callable[[Image.Image], str]
"""A prompt for each crop, row by row, or what describes a crop of the enlarged picture: a vision-language model."""

_OURS = (
    *("image", "strength", "height", "width", "generator", "output_type", "return_dict", "num_images_per_prompt"),
    *("callback_on_step_end", "callback_on_step_end_tensor_inputs"),
)
"""Arguments of the pipeline that `upscale` gives itself."""


def upscale(
    pipe: Any,
    image: Image.Image,
    prompt: str,
    scale: float = 2.0,
    *,
    regional: Regional | None = None,
    screen: float | None = None,
    strength: float = 0.6,
    overlap: float = 0.5,
    cutoff: float = 0.25,
    seed: int = 0,
    **inputs: Any,
) -> Image.Image:
    """Draw a picture anew at a size that its model was not trained for, crop by crop.

    The crops are one batch: 9 at twice the size, 49 at four times. ``pipe.vae.enable_slicing()`` has them decoded one by one.

    Parameters
    ----------
    pipe : an image-to-image pipeline of diffusers (SD, SDXL, SD3, FLUX): ``AutoPipelineForImage2Image.from_pipe(pipe)`` makes one.
    image : what to enlarge, of a size that the model was trained for, in pixels a multiple of twice the VAE's factor.
    prompt : what all of it shows.
    scale : how much larger, above 1.
    regional : a prompt for each crop, row by row, or a function that describes a crop; read beside `prompt`.
    screen : words of `prompt` are not read in a crop where the whole picture looks at them less than so many times as much as
        everywhere, above 0, at most 1; the whole picture is then one more row of the batch. None: all are read. For cross-attention
        (SD, SDXL). 0.5 is a beginning: ours, not measured.
    strength : share of the steps that are run, as the pipeline has it. Ours, not measured.
    overlap : share of a crop that the next one has too, from 0 to below 1. Ours, not measured; a half is usual.
    cutoff : standard deviation of the structure prior's low pass, as a share of the highest frequency of the latents. Ours, not measured.
    seed : of all noise.
    inputs : all else that the pipeline takes: ``num_inference_steps``, ``guidance_scale``, ``negative_prompt`` ...

    Returns
    -------
    The picture, `scale` times as large, to the next size that the model can have.

    Raises
    ------
    AccelplugError
        If an argument cannot be as it is, or there are not as many regional prompts as crops.
    AlreadyAppliedError
        If `regional` or `screen` is given, and a recipe is on the pipeline.
    NoMatchError
        If `screen` is given, and the model has no cross-attention.
    UnsupportedError
        If the pipeline is not an image-to-image pipeline whose latents are known, or its scheduler calls the model twice a step.
    """
    known = _arguments(pipe)
    _require_sound(image, prompt, seed, inputs, known)
    _require_within(scale=scale, strength=strength, overlap=overlap, cutoff=cutoff)
    image = image.convert("RGB")
    crops = _crops(pipe, image, scale, overlap)
    pixels = crops.times(pipe.vae_scale_factor)
    height, width = pixels.canvas
    pictures = pixels.pictures(image.resize((width, height)))  # bicubic
    with _read_by_crops(pipe, crops, regional is not None, screen):
        prompts = _prompts_of_crops(prompt, regional, pictures)
        if screen is not None:
            pictures, prompts = [image, *pictures], [prompt if regional is None else _with_bars(prompt, prompt), *prompts]
        loop = Loop(crops, _encoded(pipe, pictures), cutoff, seed)
        for name, text in inputs.items():
            if name in WORDED and isinstance(text, str):
                inputs[name] = [text] * len(prompts)
        if "height" in known:
            inputs["height"], inputs["width"] = pixels.size
        parts = pipe(
            prompt=prompts,
            image=pictures,
            strength=strength,
            generator=torch.Generator("cpu").manual_seed(seed),
            output_type="pt",
            callback_on_step_end=loop,
            **inputs,
        ).images
    processor = pipe.image_processor
    return processor.numpy_to_pil(processor.pt_to_numpy(pixels.join(parts[-len(crops) :].float())))[0]


@dataclass(frozen=True)
class Crops:
    """Windows of one size that cover a canvas, row by row.

    Attributes
    ----------
    size, canvas : rows and columns of each window, and of the canvas.
    corners : first row and column of each window.
    """

    size: tuple[int, int]
    canvas: tuple[int, int]
    corners: tuple[tuple[int, int], ...]

    @classmethod
    def over(cls, size: tuple[int, int], canvas: tuple[int, int], overlap: float) -> Crops:
        """Return windows that are evenly apart, and share at least `overlap` of their size with the next one."""
        rows, columns = (_starts(*each, overlap) for each in zip(size, canvas, strict=True))
        return cls(size, canvas, tuple(product(rows, columns)))

    def __len__(self) -> int:
        return len(self.corners)

    def times(self, factor: int) -> Crops:
        """Return the same windows where all is so many times as large."""
        size, canvas, *corners = ((y * factor, x * factor) for y, x in (self.size, self.canvas, *self.corners))
        return Crops(size, canvas, tuple(corners))

    @property
    def boxes(self) -> tuple[tuple[float, float, float, float], ...]:
        """Top, left, bottom and right of each window, in shares of the canvas."""
        (h, w), (height, width) = self.size, self.canvas
        return tuple((y / height, x / width, (y + h) / height, (x + w) / width) for y, x in self.corners)

    def pictures(self, canvas: Image.Image) -> list[Image.Image]:
        """Cut a picture."""
        h, w = self.size
        return [canvas.crop((x, y, x + w, y + h)) for y, x in self.corners]

    def cut(self, canvas: Tensor) -> Tensor:
        """(1, C, H, W) -> (n, C, h, w)."""
        h, w = self.size
        return torch.cat([canvas[..., y : y + h, x : x + w] for y, x in self.corners])

    def join(self, parts: Tensor) -> Tensor:
        """(n, C, h, w) -> (1, C, H, W), the mean where windows overlap, weighed by the distance to their borders."""
        h, w = self.size
        down, across = (torch.minimum(n, n.flip(0)).to(parts) for n in (torch.arange(1, h + 1), torch.arange(1, w + 1)))
        weight = down[:, None] * across
        total = parts.new_zeros(1, parts.shape[1] + 1, *self.canvas)
        for (y, x), part in zip(self.corners, parts, strict=True):
            total[0, :, y : y + h, x : x + w] += torch.cat([part * weight, weight[None]])
        return total[:, :-1] / total[:, -1:]


class Loop:
    """What stands behind each step of the pipeline: crops are made to agree, and to have the structure of the enlarged picture.

    Parameters
    ----------
    crops : in latents.
    clean : latents of the enlarged picture's crops, float32 (n, C, h, w). A row ahead of them, the picture itself, is the first of
        the batch, and is always as it is noised.
    cutoff, seed : as in `upscale`.
    """

    def __init__(self, crops: Crops, clean: Tensor, cutoff: float, seed: int) -> None:
        self.crops, self.cutoff = crops, cutoff
        generator = torch.Generator("cpu").manual_seed(seed)
        canvas, ahead = crops.join(clean[-len(crops) :]), clean[: -len(crops)]
        self._clean = [(x, torch.randn(x.shape, generator=generator).to(x.device)) for x in (canvas, ahead)]

    def __call__(self, pipe: Any, step: int, timestep: Any, given: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the latents that the next step begins from."""
        steps = pipe.num_timesteps
        if steps < 2:
            raise AccelplugError(f"upscale: expected 2 steps or more, got {steps}; raise strength or num_inference_steps.")
        old = given["latents"]
        parts = _from_cells(old, self.crops.size)[-len(self.crops) :].float()
        after = _next_timestep(pipe.scheduler, timestep)
        canvas, ahead = (x if after is None else _noised(pipe.scheduler, x, noise, after) for x, noise in self._clean)
        if step > 0:
            own = self.crops.join(parts)
            weight = ((1 + math.cos(math.pi * step / (steps - 1))) / 2) ** 3
            canvas = own + weight * low_pass(canvas - own, self.cutoff)
        rows = torch.cat([ahead, self.crops.cut(canvas)]).to(old.dtype)
        return {"latents": rows if old.ndim == rows.ndim else _to_cells(rows)}


def low_pass(x: Tensor, cutoff: float) -> Tensor:
    """Return the low frequencies of (..., H, W), by a Gaussian with this standard deviation, as a share of the highest frequency."""
    height, width = x.shape[-2:]
    down, across = 2 * torch.fft.fftfreq(height, device=x.device), 2 * torch.fft.rfftfreq(width, device=x.device)
    passes = torch.exp(-(down[:, None] ** 2 + across**2) / (2 * cutoff**2))
    return torch.fft.irfft2(torch.fft.rfft2(x) * passes, s=(height, width))


def _starts(size: int, canvas: int, overlap: float) -> list[int]:
    times = math.ceil((canvas - size) / max(int(size * (1 - overlap)), 1))
    return [round(i * (canvas - size) / times) for i in range(times + 1)] if times else [0]


# --------------------------------------------------------------------------------------------------------- arguments


def _arguments(pipe: Any) -> Mapping[str, Any]:
    """The arguments of an image-to-image pipeline's call."""
    known = inspect.signature(type(pipe).__call__).parameters if callable(pipe) else {}
    needed = ("prompt", "image", "strength", "callback_on_step_end")
    if lacking := [name for name in needed if name not in known]:
        raise UnsupportedError(
            f"upscale: expected an image-to-image pipeline, and {type(pipe).__name__} takes no {lacking[0]}. "
            "AutoPipelineForImage2Image.from_pipe(pipe) makes one of a text-to-image pipeline."
        )
    if "mask_image" in known or getattr(getattr(getattr(pipe, "vae", None), "config", None), "scaling_factor", None) is None:
        raise UnsupportedError(
            f"upscale: {type(pipe).__name__} is not an image-to-image pipeline whose latents are known: expected none for masks, and a VAE "
            "with a scaling_factor. SD, SDXL, SD3 and FLUX have them."
        )
    return known


_BOUNDS: Mapping[str, tuple[Callable[[float], bool], str]] = {
    "scale": (lambda x: x > 1, "above 1"),
    "strength": (lambda x: 0 < x <= 1, "above 0, at most 1"),
    "overlap": (lambda x: 0 <= x < 1, "from 0 to below 1"),
    "cutoff": (lambda x: x > 0, "above 0"),
}


def _require_within(**given: Any) -> None:
    for name, value in given.items():
        holds, wanted = _BOUNDS[name]
        if not (isinstance(value, int | float) and math.isfinite(value) and holds(value)):
            raise AccelplugError(f"upscale: {name} must be {wanted}, got {value!r}.")


def _require_sound(image: Any, prompt: Any, seed: Any, inputs: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    kinds = (
        ("image", image, Image.Image, "a PIL image"),
        ("prompt", prompt, str, "a string"),
        ("seed", seed, int, "a whole number"),
    )
    for name, value, kind, wanted in kinds:
        if not isinstance(value, kind):
            raise AccelplugError(f"upscale: {name} must be {wanted}, got {value!r}.")
    for name in inputs:
        if name in _OURS:
            raise AccelplugError(f"upscale gives the pipeline its {name} itself; leave it out.")
        if name not in known:
            raise AccelplugError(f"upscale: neither it nor the pipeline takes {name}{nearest(name, known)}.")


def _crops(pipe: Any, image: Image.Image, scale: float, overlap: float) -> Crops:
    """The crops of an enlarged picture, in latents."""
    factor = pipe.vae_scale_factor
    if wrong := [n for n in (image.height, image.width) if n % (2 * factor)]:
        raise AccelplugError(f"upscale: expected a picture of multiples of {2 * factor} pixels, got one of {wrong[0]}.")
    size = (image.height // factor, image.width // factor)
    rows, columns = (2 * round(n * scale / 2) for n in size)
    return Crops.over(size, (rows, columns), overlap)


def _with_bars(*prompts: str) -> str:
    return f" {SEPARATOR} ".join(prompts)


def _prompts_of_crops(prompt: str, regional: Regional | None, pictures: Sequence[Image.Image]) -> list[str]:
    """What each crop reads."""
    if regional is None:
        own = []
    else:
        own = [regional(picture) for picture in pictures] if callable(regional) else list(regional)
        if len(own) != len(pictures):
            raise AccelplugError(f"upscale: expected a regional prompt for each of {len(pictures)} crops, got {len(own)}.")
    if wrong := [text for text in (prompt, *own) if SEPARATOR in text]:
        raise AccelplugError(f"upscale: expected prompts without {SEPARATOR!r}, which begins another one, got {wrong[0]!r}.")
    return [prompt] * len(pictures) if regional is None else [_with_bars(prompt, text) for text in own]


def _read_by_crops(pipe: Any, crops: Crops, regional: bool, screen: float | None) -> AbstractContextManager[Any]:
    """What has crops read their words: a plug, on while the pipeline runs; nothing where all read one prompt."""
    if screen is not None:
        rule: dict[str, Any] = {"where": {"kind": "cross"}, "patch": Screen({"boxes": crops.boxes, "least": screen})}
    elif regional:
        rule = {"patch": "regions", "with": {"boxes": [(0, 0, 1, 1)]}}
    else:
        return nullcontext()
    return apply(pipe, {"rules": [rule]}, strict=True)


# ----------------------------------------------------------------------------------------------------------- latents


@torch.no_grad()
def _encoded(pipe: Any, pictures: Sequence[Image.Image]) -> Tensor:
    """Latents of pictures of one size as the denoiser has them, float32 (n, C, h, w), one by one."""
    vae, config, dtype = pipe.vae, pipe.vae.config, pipe.vae.dtype
    device = compat.diffusers.execution_device(pipe, vae.device)
    overflows = dtype == torch.float16 and getattr(config, "force_upcast", False)  # as SDXL's pipelines do
    if overflows:
        vae.to(dtype=torch.float32)
    try:
        pixels = (pipe.image_processor.preprocess(picture).to(device, vae.dtype) for picture in pictures)
        found = torch.cat([vae.encode(x).latent_dist.mode() for x in pixels]).float()
    finally:
        if overflows:
            vae.to(dtype=dtype)
    mean = getattr(config, "latents_mean", None) or getattr(config, "shift_factor", None) or 0.0
    spread = getattr(config, "latents_std", None) or 1.0
    mean, spread = (torch.tensor(x, device=found.device).reshape(-1, 1, 1) for x in (mean, spread))
    return (found - mean) * config.scaling_factor / spread


def _next_timestep(scheduler: Any, timestep: Any) -> Tensor | None:
    """The timestep behind this one, (1,); None behind the last one."""
    schedule = scheduler.timesteps
    if len(schedule.unique()) < len(schedule):
        raise UnsupportedError(
            f"upscale: expected a scheduler that calls the model once a step, and {type(scheduler).__name__} repeats timesteps. "
            "Take Euler, DDIM or DPM-Solver: pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)."
        )
    place = int((schedule == timestep).nonzero()[0]) + 1
    return schedule[place : place + 1] if place < len(schedule) else None


def _noised(scheduler: Any, clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    """Latents as they are at a timestep: flow matching calls it scale_noise, with other places."""
    if hasattr(scheduler, "scale_noise"):
        return scheduler.scale_noise(clean, timestep, noise)
    return scheduler.add_noise(clean, noise, timestep)


def _from_cells(latents: Tensor, size: tuple[int, int]) -> Tensor:
    """(n, C, h, w) of what may be packed, as FLUX has it: (n, h / 2 x w / 2, 4 C)."""
    rows, columns = size[0] // 2, size[1] // 2
    if latents.ndim == 3 and latents.shape[1] == rows * columns:
        cells = latents.unflatten(1, (rows, columns)).unflatten(-1, (-1, 2, 2))  # [n, h / 2, w / 2, C, 2, 2]
        return cells.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    if latents.ndim != 4 or latents.shape[-2:] != size:
        raise UnsupportedError(f"upscale: expected latents of {size[0]} x {size[1]}, got {tuple(latents.shape)}.")
    return latents


def _to_cells(latents: Tensor) -> Tensor:
    """(n, C, h, w) -> (n, h / 2 x w / 2, 4 C)."""
    cells = latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # [n, C, h / 2, 2, w / 2, 2]
    return cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
