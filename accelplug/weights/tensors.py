"""Tensors out of the files of other frameworks, and into the folders that `from_pretrained` reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from accelplug import files
from accelplug.errors import AccelplugError

if TYPE_CHECKING:
    import torch

Arrays = dict[str, np.ndarray]
Dtype = Literal["float32", "bfloat16"]


def read_onnx(source: Path) -> tuple[Any, Arrays]:
    """Read an ONNX file: its graph, and its weights by name. Weights that stand in other files are not followed.

    Raises
    ------
    AccelplugError
        If it cannot be read, or names other files.
    """
    import onnx
    from onnx import external_data_helper, numpy_helper

    try:
        graph = onnx.load(source, load_external_data=False).graph
    except Exception as error:  # protobuf's own kinds
        raise AccelplugError(f"{source.name} cannot be read as ONNX: {error}. Fetch it again.") from error
    if elsewhere := [tensor.name for tensor in graph.initializer if external_data_helper.uses_external_data(tensor)]:
        raise AccelplugError(
            f"{source.name}: expected all weights in the file, {elsewhere[0]} stands in another one. Report it."
        )
    return graph, {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}


def pick(arrays: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """Return an array by name.

    Raises
    ------
    AccelplugError
        If there is none.
    """
    if name not in arrays:
        raise AccelplugError(
            f"The weight file holds no {name}, which the conversion expects. Is it another release? Report it."
        )
    return arrays[name]


def as_tensors(arrays: Mapping[str, np.ndarray], dtype: Dtype = "float32") -> dict[str, torch.Tensor]:
    """Return arrays as tensors of their own, in `dtype`."""
    import torch

    return {name: torch.tensor(np.ascontiguousarray(array)).to(getattr(torch, dtype)) for name, array in arrays.items()}


def write_tensors(path: Path, arrays: Mapping[str, np.ndarray], dtype: Dtype = "float32") -> None:
    """Write arrays as one safetensors file, in `dtype`."""
    from safetensors.torch import save

    files.write(path, save(as_tensors(arrays, dtype), {"format": "pt"}))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a configuration."""
    files.write(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
