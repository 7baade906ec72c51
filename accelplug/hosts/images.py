"""How many tokens each image takes, and on which grid: told by the model's own image encoder, which generate() calls ahead."""

from __future__ import annotations

import functools
import inspect
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from accelplug import compat
from accelplug.errors import UnsupportedError
from accelplug.hosts.models import attends
from accelplug.hosts.undo import Undo

METHODS = {"image": "get_image_features", "video": "get_video_features"}
"""What a base model encodes images and videos with."""

_SIZES: ContextVar[dict[str, list[int]]] = ContextVar("accelplug_sizes")
"""Tokens of each image and of each video that were encoded last in this thread."""


class ImageEncoder:
    """Stands in for a base model's ``get_image_features`` and ``get_video_features`` on the instance and listens: nothing else can.

    generate() encodes images before the first forward, and passes on neither pixels nor grids.
    """

    def __init__(self, base: Any) -> None:
        self._base = base

    def install(self, undo: Undo) -> None:
        """Begin to listen."""
        for kind, method in METHODS.items():
            if hasattr(self._base, method) and method not in vars(self._base):
                undo.put(self._base, method, _Listener(self._base, kind, getattr(self._base, method)))

    @staticmethod
    def take(kind: str) -> list[int]:
        """Return the tokens of each image, or of each video, that was encoded last in this thread, in order of rows; once."""
        sizes = dict(_SIZES.get({}))
        found = sizes.pop(kind, [])
        _SIZES.set(sizes)
        return found


class _Listener:
    """Calls an encoder and notes how many tokens came of each image."""

    def __init__(self, base: Any, kind: str, own: Any) -> None:
        functools.update_wrapper(self, own)
        self.__signature__ = inspect.signature(own)
        self._base, self._kind, self._own = base, kind, own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before = _SIZES.get({})  # of images, where a video is encoded as images are
        out = self._own(*args, **kwargs)
        features = getattr(out, "pooler_output", out)
        if isinstance(features, (list, tuple)) and all(isinstance(x, Tensor) for x in features):
            sizes = [len(x) for x in features]
        elif isinstance(features, Tensor):
            sizes = [features.shape[-2]] * (features.shape[0] if features.ndim > 2 else 1)
        else:
            sizes = []
        _SIZES.set({**before, self._kind: sizes})
        return out


CLASS_TOKENS = ("class_embedding", "cls_token")
"""Parameters that a class token is: of CLIP, and of DINOv2 and ViT."""

_MAPS: ContextVar[dict[str, Tensor]] = ContextVar("accelplug_vision")


class VisionTower:
    """Reads what a vision tower's class token attends to, in its first layer and in the last but one.

    Raises
    ------
    UnsupportedError
        If the model has no vision tower with a class token whose attention can be entered.
    """

    def __init__(self, base: Any) -> None:
        tower = getattr(base, "vision_tower", None)
        parts = tower if isinstance(tower, nn.Module) else nn.Module()
        modules = [module for module in parts.modules() if attends(module)]
        if len(modules) < 3 or not any(name.endswith(CLASS_TOKENS) for name, _ in parts.named_parameters()):
            raise UnsupportedError(
                f"{type(base).__name__} has no vision tower with a class token and at least three layers, which this recipe reads "
                "(LLaVA-1.5 has). Take var, vhr or visual_bias."
            )
        self._records = [_VisionRecord("first", modules[0]), _VisionRecord("late", modules[-2])]

    def install(self, undo: Undo) -> None:
        """Enter both layers."""
        for record in self._records:
            undo.put(record.module, "_accelplug", record)
            undo.put(record.module, "config", compat.transformers.config_view(record.config, compat.transformers.ATTENTION))

    @staticmethod
    def take(visual: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return both maps of the images encoded last, (B, S) float32, laid on image tokens `visual` (B, S) bool; once."""
        maps = _MAPS.get({})
        _MAPS.set({})
        if set(maps) != {"first", "late"}:
            return None
        return scatter(maps["first"], visual), scatter(maps["late"], visual)


def scatter(values: Tensor, visual: Tensor) -> Tensor:
    """Lay values (N, tokens) of a batch's images on its image tokens, (B, S); rows repeated for beams repeat their images.

    Raises
    ------
    UnsupportedError
        If there are not as many values as image tokens.
    """
    flat, counts = values.flatten(), visual.sum(-1).tolist()
    times = sum(counts) // len(flat) if len(flat) else 0
    if not times or times * len(flat) != sum(counts):
        raise UnsupportedError(
            f"{sum(counts)} image tokens for {len(flat)} patches of the vision tower: they must be one to one. Take a model that has "
            "one for each (LLaVA-1.5), and leave out prefill_chunk_size, which takes images apart."
        )
    out = torch.zeros(visual.shape, device=visual.device)
    start = 0
    for row, count in enumerate(counts):
        out[row, visual[row]] = flat[start : start + count].to(out)
        start += count if (row + 1) % times == 0 else 0
    return out


class _VisionRecord:
    """Stands at one attention module of the tower."""

    def __init__(self, key: str, module: Any) -> None:
        self.key, self.module, self.config = key, module, module.config

    def attend(self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, forward: Any, kwargs: dict[str, Any]) -> Any:
        """Run the tower's own attention, and note where the class token looks: (N, tokens), summed over heads."""
        name = compat.transformers.attention_name(self.config)
        if not torch.compiler.is_compiling():
            with torch.autocast(q.device.type, enabled=False):
                scores = q[:, :, :1].float() @ k.float().mT * (kwargs.get("scaling") or q.shape[-1] ** -0.5)
            _MAPS.set({**_MAPS.get({}), self.key: scores.softmax(-1)[:, :, 0, 1:].sum(1)})
        base = compat.transformers.attention_function(name, type(module))
        return base(compat.transformers.seen_by(name, module, self.config), q, k, v, mask, **kwargs)
