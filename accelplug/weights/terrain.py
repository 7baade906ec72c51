"""A consistency model of terrains in ONNX: into a `ConsistencyModelPipeline` with a `UNet2DModel`.

The network is the UNet of Dhariwal and Nichol (2021) with the consistency parametrisation of Song et al. (2023), which diffusers has as
`UNet2DModel` and `CMStochasticIterativeScheduler`. The export writes a group norm as an instance norm without weights, then a product and
a sum whose constants have no telling name: they are found by walking back from the convolution that follows. Its label is a number from 0
to 1 through two layers, of which 100 levels are in use: they become the rows of a class embedding, level 1 in row 0.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from accelplug.errors import AccelplugError
from accelplug.weights.tensors import Arrays, as_tensors, pick, read_onnx

DIFFICULTIES = 100
"""Difficulties, the class labels."""

NETWORK: dict[str, Any] = {
    "sample_size": 128,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [32, 32, 64, 96, 128],
    "layers_per_block": 4,
    "down_block_types": ["ResnetDownsampleBlock2D"] * 2 + ["AttnDownBlock2D"] * 3,
    "up_block_types": ["AttnUpBlock2D"] * 3 + ["ResnetUpsampleBlock2D"] * 2,
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "attention_head_dim": 32,
    "norm_num_groups": 32,
    "attn_norm_num_groups": 32,
    "resnet_time_scale_shift": "scale_shift",
    "num_class_embeds": DIFFICULTIES,
    "time_embedding_type": "positional",
    "flip_sin_to_cos": True,
    "freq_shift": 0,
}
SCHEDULER = {
    "num_train_timesteps": 40,
    "sigma_min": 0.002,
    "sigma_max": 80.0,
    "sigma_data": 0.5,
    "s_noise": 1.0,
    "rho": 7.0,
    "clip_denoised": True,
}
RESNET = {"in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.3": "conv2"}
RESNET_NORMS = {"in_layers.2": "norm1", "out_layers.3": "norm2"}


def write_terrain(source: Path, folder: Path, unet: Mapping[str, Any] = NETWORK) -> None:
    """Convert the ONNX file of adaptive-terrain-diffusion.

    Raises
    ------
    AccelplugError
        If it cannot be read, or holds something else.
    """
    from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline, UNet2DModel

    graph, stored = read_onnx(source)
    arrays = unet_arrays(stored, norms_before_convolutions(graph, stored), unet)
    model = UNet2DModel(**unet)
    model.load_state_dict(as_tensors(arrays))
    ConsistencyModelPipeline(model, CMStochasticIterativeScheduler(**SCHEDULER)).save_pretrained(folder)


def unet_arrays(stored: Arrays, norms: dict[str, tuple[np.ndarray, np.ndarray]], unet: Mapping[str, Any]) -> Arrays:
    """Return the weights under their names in diffusers.

    Parameters
    ----------
    stored : weights by their names in the file.
    norms : weight and bias of the group norm before a convolution, by the convolution's name.
    unet : the configuration of the `UNet2DModel`.
    """
    arrays: Arrays = {}

    def layer(theirs: str, ours: str) -> None:
        for end in ("weight", "bias"):
            arrays[f"{ours}.{end}"] = pick(stored, f"network.{theirs}.{end}")

    def norm(convolution: str, ours: str) -> None:
        if convolution not in norms:
            raise AccelplugError(
                f"The weight file has no group norm before {convolution}. Is it another release? Report it."
            )
        arrays[f"{ours}.weight"], arrays[f"{ours}.bias"] = norms[convolution]

    for theirs, ours in (("time_embed.0", "time_embedding.linear_1"), ("time_embed.2", "time_embedding.linear_2")):
        layer(theirs, ours)
    layer("input_blocks.0.0", "conv_in")
    layer("out.2", "conv_out")
    norm("out.2", "conv_norm_out")
    arrays["class_embedding.weight"] = _levels(stored)
    for theirs, ours in blocks(unet):
        if f"network.{theirs}.qkv.weight" in stored:
            norm(f"{theirs}.qkv", f"{ours}.group_norm")
            layer(f"{theirs}.proj_out", f"{ours}.to_out.0")
            layer(f"{theirs}.qkv", f"{ours}.qkv")
            for end in ("weight", "bias"):
                parts = np.split(arrays.pop(f"{ours}.qkv.{end}"), 3)
                arrays |= {f"{ours}.to_{part}.{end}": rows for part, rows in zip("qkv", parts, strict=True)}
            for part in ("to_q", "to_k", "to_v", "to_out.0"):  # convolutions of one pixel are linear layers
                arrays[f"{ours}.{part}.weight"] = arrays[f"{ours}.{part}.weight"][:, :, 0, 0]
            continue
        for part, name in RESNET.items():
            layer(f"{theirs}.{part}", f"{ours}.{name}")
        for part, name in RESNET_NORMS.items():
            norm(f"{theirs}.{part}", f"{ours}.{name}")
        if f"network.{theirs}.skip_connection.weight" in stored:
            layer(f"{theirs}.skip_connection", f"{ours}.conv_shortcut")
    return arrays


def _levels(stored: Arrays) -> np.ndarray:
    """The embedding of each level, (DIFFICULTIES, width): two layers with SiLU between, of a label from 0 to 1."""
    labels = np.linspace(0, 1, DIFFICULTIES)[:, None]
    hidden = labels @ pick(stored, "network.label_emb.0.weight").T + pick(stored, "network.label_emb.0.bias")
    hidden = hidden / (1 + np.exp(-hidden))
    return hidden @ pick(stored, "network.label_emb.2.weight").T + pick(stored, "network.label_emb.2.bias")


def blocks(unet: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Residual blocks and attentions: their names in the file and in diffusers."""
    last, layers = len(unet["block_out_channels"]) - 1, unet["layers_per_block"]
    at = 1
    for level, kind in enumerate(unet["down_block_types"]):
        for index in range(layers):
            yield f"input_blocks.{at}.0", f"down_blocks.{level}.resnets.{index}"
            if "Attn" in kind:
                yield f"input_blocks.{at}.1", f"down_blocks.{level}.attentions.{index}"
            at += 1
        if level < last:
            yield f"input_blocks.{at}.0", f"down_blocks.{level}.downsamplers.0"
            at += 1
    yield from (("middle_block.0", "mid_block.resnets.0"), ("middle_block.1", "mid_block.attentions.0"))
    yield "middle_block.2", "mid_block.resnets.1"
    at = 0
    for level, kind in enumerate(unet["up_block_types"]):
        for index in range(layers + 1):
            yield f"output_blocks.{at}.0", f"up_blocks.{level}.resnets.{index}"
            if "Attn" in kind:
                yield f"output_blocks.{at}.1", f"up_blocks.{level}.attentions.{index}"
            if index == layers and level < last:
                yield f"output_blocks.{at}.{2 if 'Attn' in kind else 1}", f"up_blocks.{level}.upsamplers.0"
            at += 1


def norms_before_convolutions(graph: Any, stored: Arrays) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return weight and bias, (channels,), of the nearest group norm before each convolution, by the convolution's name."""
    makers = {output: node for node in graph.node for output in node.output}
    found = {}
    for node in graph.node:
        if node.op_type == "Conv" and node.input[1] in stored:
            norm = _norm_before(node.input[0], makers, stored)
            if norm is not None:
                found[node.input[1].removeprefix("network.").removesuffix(".weight")] = norm
    return found


def _norm_before(value: str, makers: dict[str, Any], stored: Arrays) -> tuple[np.ndarray, np.ndarray] | None:
    """Walk back, the nearest first, to ``sum(product(instance norm, weight), bias)`` with constants of (channels, 1, 1)."""
    waiting, seen = deque([value]), {value}
    while waiting:
        node = makers.get(waiting.popleft())
        if node is None:
            continue
        if node.op_type == "Add" and node.input[1] in stored and stored[node.input[1]].ndim == 3:
            weight = stored[makers[node.input[0]].input[1]]
            return weight.reshape(-1), stored[node.input[1]].reshape(-1)
        waiting.extend(name for name in node.input if name not in seen)
        seen.update(node.input)
    return None
