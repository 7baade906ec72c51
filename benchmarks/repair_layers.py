"""What repair does to DINOv2: its attention outputs by layer, and its features when every layer is sparse.

usage: python -m benchmarks.repair_layers PICTURE... [--pixels 672] [--only layers|whole|picture]

Needs `accelplug fetch dinov2-small`. The middle square of each picture is scaled to `--pixels`, a multiple of 112, so that 14 x 14 patches
fill tiles of 8 x 8. By layer: relative L2 error of the output on dense q, k, v of the patches, for each selector, rest and repair, and the
share of pairs that is read, a mean counted as one key. Whole: key blocks picked by `rows`, the mean cosine of each patch's last features to
those of the model with dense attention. A part that is not run stays as the file has it, with the commit it was run at. The picture is
drawn of what the file has (extra `bench`): error over density, mean over layers and pictures.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
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

from accelplug import registry, zoo
from accelplug.call import AttentionCall, Clock, Layout, Site
from accelplug.comparison.environment import environment, revision
from benchmarks.common import RESULTS, write_json
from benchmarks.rest_layers import Random

PATCH = 14
PICTURE = Path(__file__).parents[1] / "docs" / "repair_layers.png"
LAYERS = 12
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
REPAIRS: list[dict[str, Any]] = [
    {},
    *({"repair": kind, "probes": probes} for kind, probes in product(("output_query", "output"), (64, 128, 256, 512))),
]
FEW = [{}, *({"repair": "output_query", "probes": probes} for probes in (128, 256))]
"""5.6 and 11 % of 2,304 rows."""


def curve(knob: str, *values: Any, **others: Any) -> list[dict[str, Any]]:
    """Configs along a knob."""
    return [{knob: value, "rest": "pool", **others} for value in values]


MEANS = {"tau": 1e9, "band": 0}
"""Of `sol`, so that `least` alone reads: the key blocks whose mean scores highest, 36 tiles at 672 pixels."""
SELECTED: dict[str, tuple[str, list[dict[str, Any]], list[dict[str, Any]]]] = {  # selector: (patch, configs, repairs)
    "rows": ("rows", curve("density", 0.05, 0.1, 0.2, 0.4), REPAIRS),
    "rows, dropped": ("rows", curve("density", 0.05, 0.1, 0.2, 0.4, rest="drop"), REPAIRS),
    "rows, linear by mass": ("rows", curve("density", 0.05, 0.1, 0.2, 0.4, rest="linear"), FEW),
    "rows, linear by keys": ("rows", curve("density", 0.05, 0.1, 0.2, 0.4, rest="linear", slope="keys"), FEW),
    "means": ("sol", curve("least", 2, 4, 7, 14, **MEANS), FEW),
    "sol": ("sol", curve("tau", 2.0, 1.5, 1.0, 0.5, band=0), FEW),
    "svg_ear": ("svg_ear", curve("density", 0.05, 0.1, 0.2, 0.4, block_k=64), FEW),
    "psa": (
        "psa",
        curve("bounds", (0.2, 0.3, 0.4, 0.6), (0.4, 0.5, 0.6, 0.8), (0.5, 0.7, 0.8, 0.9), block_k=32, rest="drop"),
        FEW,
    ),
    "rectified": ("rectified", curve("drop_rate", 0.9, 0.8, 0.6, rest="rectified", adjacent=False), FEW),
    "random": ("random by head", curve("density", 0.05, 0.1, 0.2, 0.4), FEW),
}
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


def patch_of(config: dict[str, Any], name: str = "rows") -> Any:
    """Return a patch, tokens in tiles."""
    kind = Random if name == "random by head" else registry.patch_class(name)
    return kind({"block": 64, "order": "tile", "tile_thw": (1, 8, 8), **config})


def prepared(patch: Any, layer: int, side: int) -> Any:
    """Return the params of a patch; the class token is read by all."""
    return patch.prepare(Site("", "encoder", "self", layer, LAYERS), Layout((1, side, side), text_before=1), Clock(), {})


def sparse(config: dict[str, Any], side: int) -> Answer:
    """Answer calls by `rows`."""
    patch = patch_of(config)
    return lambda layer, call: patch.attend(call, prepared(patch, layer, side))


def squared(path: Path, pixels: int) -> Tensor:
    """Return the middle square of a picture as the model takes it, (1, 3, pixels, pixels)."""
    picture = Image.open(path).convert("RGB")
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    scaled = picture.crop((left, top, left + side, top + side)).resize((pixels, pixels), Image.Resampling.BICUBIC)
    values = torch.from_numpy(np.array(scaled)).permute(2, 0, 1).float() / 255
    return ((values - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(DEVIATION).view(3, 1, 1))[None]


def by_layer(model: Model, pixels: Tensor, side: int) -> list[dict[str, Any]]:
    """One row a setting: density and relative error of the output in each layer, on q, k, v of the dense model."""
    settings = [(name, patch, config, repairs) for name, (patch, configs, repairs) in SELECTED.items() for config in configs]
    rows: list[dict[str, Any]] = [
        {"selector": name, "config": config, **mended, "densities": [], "errors": []}
        for name, _, config, repairs in settings
        for mended in repairs
    ]

    def measure(layer: int, call: AttentionCall) -> Tensor:
        exact, place = call.dense(), iter(rows)
        for _, name, config, repairs in settings:
            patch = patch_of(config, name)
            params = prepared(patch, layer, side)
            out, (density, _) = patch.attend(call, params), patch.inspect(call, params)
            for mended in repairs:
                wrong = (patch_of({**config, **mended}, name).repaired(out.clone(), call, params.tiles) - exact)[:, :, 1:]
                row = next(place)
                row["errors"].append(round(float(wrong.norm() / exact[:, :, 1:].norm()), 4))
                row["densities"].append(round(density, 4))
        return exact

    model.features(pixels, measure)
    return rows


def means(pictures: list[dict[str, Any]]) -> dict[tuple[str, str], dict[Any, float]]:
    """By selector and config: mean density, and error by number of exact rows, over layers and pictures; on output and query."""
    found: dict[tuple[str, str], dict[Any, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in (row for picture in pictures for row in picture["by_layer"] if row.get("repair") != "output"):
        cell = found[row["selector"], json.dumps(row["config"])]
        cell["density"] += row["densities"]
        cell[row.get("probes", 0)] += row["errors"]
    return {setting: {key: statistics.fmean(values) for key, values in cell.items()} for setting, cell in found.items()}


def show(pictures: list[dict[str, Any]]) -> None:
    """Print the means in Markdown, and draw error over density: dashed as it is, in full repaired by 128 rows."""
    import matplotlib.pyplot as plt  # the bench extra

    found = means(pictures)
    print("| selector | setting | density | error | 128 rows | 256 rows |", "|---" * 6 + "|", sep="\n")
    for (name, config), cell in found.items():
        print(f"| {name} | {config} | {cell['density']:.3f} | {cell[0]:.3f} | {cell[128]:.3f} | {cell[256]:.3f} |")
    figure, axis = plt.subplots(figsize=(9, 5.5), layout="constrained")
    for number, name in enumerate(SELECTED):
        cells = [cell for (selector, _), cell in found.items() if selector == name]
        for probes, line in ((0, "--"), (128, "-")):
            colour = "k" if name == "random" else f"C{number}"
            look = {"color": colour, "mfc": colour if probes else "w", "label": name if probes else None}
            axis.plot([cell["density"] for cell in cells], [cell[probes] for cell in cells], "o" + line, **look)
    axis.set(xlabel="density: pairs read, means counted", ylabel="relative error of the output", yscale="log")
    axis.grid(color="#ececec", which="both")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, title="dashed: as it is; in full: repaired, 128 rows", fontsize=8)
    figure.savefig(PICTURE, dpi=110)


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
    parser.add_argument("pictures", nargs="*", type=Path, help="image files")
    parser.add_argument("--pixels", type=int, default=672, help="side of the square, a multiple of 112 (default 672)")
    parser.add_argument("--only", choices=("layers", "whole", "picture"))
    options = parser.parse_args()
    if options.pixels % 112:
        parser.error(f"--pixels must be a multiple of 112, got {options.pixels}")
    name = f"repair_layers_{options.pixels}"
    file = RESULTS / f"{name}.json"
    kept = json.loads(file.read_text())["pictures"] if file.exists() else []
    found: dict[str, dict[str, Any]] = {row["picture"]: row for row in kept}
    if options.only != "picture":
        model, side = Model(), options.pixels // PATCH
        facts, git = {**environment(), "pixels": options.pixels}, revision()
        with torch.no_grad():
            for path in options.pictures:
                pixels, rows = squared(path, options.pixels), found.setdefault(path.name, {"picture": path.name})
                if options.only != "whole":
                    rows |= {"by_layer_git": git, "by_layer": by_layer(model, pixels, side)}
                if options.only != "layers":
                    rows |= {"whole_git": git, "whole": list(whole(model, pixels, side))}
                write_json(name, {**facts, "pictures": list(found.values())})
    show(list(found.values()))


if __name__ == "__main__":
    main()
