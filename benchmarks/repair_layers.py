"""What repair does to DINOv2: its attention outputs by layer, and its features when every layer is sparse.

usage: python -m benchmarks.repair_layers PICTURE... [--pixels 672]

Needs `accelplug fetch dinov2-small`. The middle square of each picture is scaled to `--pixels`, a multiple of 112, so that 14 x 14 patches
fill tiles of 8 x 8. Key blocks are picked by `rows`. By layer: relative L2 error of the output on dense q, k, v of the patches. Whole: the
mean cosine of each patch's last features to those of the model with dense attention.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, scaled_dot_product_attention
from transformers import AttentionInterface, Dinov2Model

from accelplug import zoo
from accelplug.call import AttentionCall, Clock, Layout, Site
from accelplug.comparison.environment import environment
from accelplug.patches.sparse.rows import SampledRows
from benchmarks.common import write_json

PATCH = 14
LAYERS = 12
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SELECTED: list[dict[str, Any]] = [
    {"density": density, "rest": rest} for density, rest in product((0.05, 0.1, 0.2), ("pool", "drop"))
]
REPAIRS: list[dict[str, Any]] = [
    {},
    *({"repair": kind, "probes": probes} for kind, probes in product(("output", "output_query"), (64, 128, 256, 512))),
]
WHOLE: list[dict[str, Any]] = [
    {"density": density, "rest": rest, **repair}
    for density, rest in ((0.05, "pool"), (0.1, "pool"), (0.2, "pool"), (0.2, "drop"))
    for repair in [{}, *({"repair": "output_query", "probes": probes} for probes in (128, 256))]
] + [{"density": 0.2, "rest": "pool", "repair": "output", "probes": probes} for probes in (128, 256)]

Answer = Callable[[int, AttentionCall], Tensor]
"""(layer, call) -> output (B, H, S, D)."""


class Model:
    """DINOv2-small whose attention is answered by a function."""

    def __init__(self) -> None:
        self.model = Dinov2Model.from_pretrained(zoo.path("dinov2-small")).eval()
        self.answer: Answer = dense
        self.layer = 0
        AttentionInterface.register("benchmark", self._attend)
        self.model.set_attn_implementation("benchmark")
        for number, layer in enumerate(self.model.encoder.layer):
            layer.register_forward_pre_hook(lambda module, given, number=number: setattr(self, "layer", number))

    def _attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: None, scaling: float, **_: Any) -> Any:
        def attention(q: Tensor = q, k: Tensor = k, v: Tensor = v, attn_mask: Tensor | None = None) -> Tensor:
            return scaled_dot_product_attention(q, k, v, scale=scaling)

        return self.answer(self.layer, AttentionCall(q, k, v, None, scaling, attention)).transpose(1, 2), None

    def features(self, pixels: Tensor, answer: Answer) -> Tensor:
        """Return the last features of all patches, (1, S - 1, C)."""
        self.answer = answer
        return self.model(pixels).last_hidden_state[:, 1:]


def dense(layer: int, call: AttentionCall) -> Tensor:
    """Answer a call by dense attention."""
    return call.dense()


def patch_of(config: dict[str, Any]) -> SampledRows:
    """Return `rows`, tokens in tiles."""
    return SampledRows({"block": 64, "order": "tile", "tile_thw": (1, 8, 8), **config})


def sparse(config: dict[str, Any], side: int) -> Answer:
    """Answer calls by `rows`; the class token is read by all."""
    patch, layout = patch_of(config), Layout((1, side, side), text_before=1)

    def answer(layer: int, call: AttentionCall) -> Tensor:
        return patch.attend(call, patch.prepare(Site("", "encoder", "self", layer, LAYERS), layout, Clock(), {}))

    return answer


def squared(path: Path, pixels: int) -> Tensor:
    """Return the middle square of a picture as the model takes it, (1, 3, pixels, pixels)."""
    picture = Image.open(path).convert("RGB")
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    scaled = picture.crop((left, top, left + side, top + side)).resize((pixels, pixels), Image.Resampling.BICUBIC)
    values = torch.from_numpy(np.array(scaled)).permute(2, 0, 1).float() / 255
    return ((values - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(DEVIATION).view(3, 1, 1))[None]


def by_layer(model: Model, pixels: Tensor, side: int) -> list[dict[str, Any]]:
    """One row a setting: relative error of the output in each layer, on q, k, v of the dense model."""
    rows: list[dict[str, Any]] = [{**selected, **mended, "errors": []} for selected, mended in product(SELECTED, REPAIRS)]
    order = patch_of({}).order(Layout((1, side, side), text_before=1))

    def measure(layer: int, call: AttentionCall) -> Tensor:
        exact, place = call.dense(), iter(rows)
        for selected in SELECTED:
            out = sparse(selected, side)(layer, call)
            for mended in REPAIRS:
                wrong = (patch_of({**selected, **mended}).repaired(out, call, order) - exact)[:, :, 1:]
                next(place)["errors"].append(round(float(wrong.norm() / exact[:, :, 1:].norm()), 4))
        return exact

    model.features(pixels, measure)
    return rows


def whole(model: Model, pixels: Tensor, side: int) -> Iterator[dict[str, Any]]:
    """One row a setting: cosine of features to the dense model's, the mean and the patch at one percent."""
    expected = model.features(pixels, dense)
    for config in WHOLE:
        cosine = cosine_similarity(model.features(pixels, sparse(config, side)), expected, dim=-1).flatten()
        yield {
            **config,
            "cosine": round(float(cosine.mean()), 4),
            "cosine_1_percent": round(float(cosine.quantile(0.01)), 4),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pictures", nargs="+", type=Path, help="image files")
    parser.add_argument("--pixels", type=int, default=672, help="side of the square, a multiple of 112 (default 672)")
    options = parser.parse_args()
    if options.pixels % 112:
        parser.error(f"--pixels must be a multiple of 112, got {options.pixels}")
    torch.set_num_threads(2)
    model, side = Model(), options.pixels // PATCH
    facts, found = {**environment(), "pixels": options.pixels}, []
    with torch.no_grad():
        for path in options.pictures:
            pixels = squared(path, options.pixels)
            rows: dict[str, Any] = {"picture": path.name, "by_layer": by_layer(model, pixels, side), "whole": []}
            found.append(rows)
            for row in whole(model, pixels, side):
                rows["whole"].append(row)
                print(path.name, *row.values(), flush=True)
                write_json(f"repair_layers_{options.pixels}", {**facts, "pictures": found})


if __name__ == "__main__":
    main()
