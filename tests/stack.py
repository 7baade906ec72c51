"""What else may be on a pipeline beside a sparse recipe, how it is put on a tiny one, and what then is the case: a cell for each pair.

`tests.test_stack` holds every cell, and the documentation's table is made of them.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import accelerate
import diffusers
import torch
from torch import nn

from accelplug.testing.models import WAN_CONFIG, settle
from tests import tiny_pipelines

STEPS = 4


@dataclass(frozen=True)
class Layer:
    """One thing that users put on a pipeline.

    Attributes
    ----------
    name : in the documentation.
    kind : layers of a kind exclude each other.
    put : puts it on a tiny pipeline, and says what takes off again what others would notice; None for a step cache that a recipe brings.
    cache : a recipe's `cache:`.
    library : what must be installed that the suite may lack.
    transparent : whether it leaves what a pipeline gives as it is, to rounding.
    """

    name: str
    kind: str
    put: Callable[[Any], Callable[[], Any] | None] | None = None
    cache: Mapping[str, Any] | None = None
    library: str = ""
    transparent: bool = False

    @property
    def absent(self) -> str | None:
        """Why it cannot be tried here, or None."""
        there = not self.library or importlib.util.find_spec(self.library) is not None
        return None if there else f"{self.library} is not installed"


def pipeline() -> tuple[Any, dict[str, Any]]:
    """A tiny Wan whose weights come in rows of 32, as GGUF asks: few steps with guidance, from given embeddings, to latents."""
    pipe, inputs = tiny_pipelines.decoding("wan")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {**WAN_CONFIG, "attention_head_dim": 16, "num_layers": 2, "in_channels": 16, "out_channels": 16}
        pipe.register_modules(transformer=settle(diffusers.WanTransformer3DModel(**sizes)))
    pipe.set_progress_bar_config(disable=True)
    return pipe, {**inputs, "num_inference_steps": STEPS, "output_type": "latent"}


def linears(model: Any) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Yield (owner, name, layer) for every linear layer of a model's blocks."""
    for owner in list(model.blocks.modules()):
        yield from ((owner, name, layer) for name, layer in owner.named_children() if isinstance(layer, nn.Linear))


# ------------------------------------------------------------------------------------------------------------- weights


def torchao(pipe: Any) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(pipe.transformer, Int8WeightOnlyConfig())


def gguf(pipe: Any) -> None:
    from diffusers.quantizers.gguf.utils import GGUFParameter
    from gguf import GGMLQuantizationType, quants

    kind, model = GGMLQuantizationType.Q8_0, pipe.transformer
    weights = dict(model.state_dict())
    for path, layer in model.blocks.named_modules(prefix="blocks"):
        if isinstance(layer, nn.Linear):
            packed = torch.from_numpy(quants.quantize(layer.weight.numpy(), kind))
            weights[f"{path}.weight"] = GGUFParameter(packed, quant_type=kind)
    config = diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        model.save_config(folder)
        pipe.transformer = type(model).from_single_file(weights, config=folder, quantization_config=config).eval()


def bitsandbytes(pipe: Any) -> None:
    from bitsandbytes.nn import Linear8bitLt

    for owner, name, layer in linears(pipe.transformer):
        eight = Linear8bitLt(layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False)
        eight.load_state_dict(layer.state_dict())
        setattr(owner, name, eight.to("cpu").requires_grad_(False))


def casting(pipe: Any) -> None:
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


def lora(pipe: Any) -> None:
    from peft import LoraConfig

    torch.manual_seed(1)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))


# ----------------------------------------------------------------------------------------------------------- placement


def group_offload(pipe: Any) -> None:
    cpu = torch.device("cpu")
    pipe.transformer.enable_group_offload(cpu, cpu, offload_type="block_level", num_blocks_per_group=1)


def sequential_offload(pipe: Any) -> None:
    for part in (pipe.transformer, pipe.vae):  # what the pipeline's own call does, which wants another device
        accelerate.cpu_offload(part, torch.device("cpu"))


# ------------------------------------------------------------------------------------------- compilation and step caches


def compile_blocks(pipe: Any) -> None:
    pipe.transformer.compile_repeated_blocks(backend="eager")


def compile_whole(pipe: Any) -> None:
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")


def cache_dit(pipe: Any) -> Callable[[], None]:
    import cache_dit

    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=1, residual_diff_threshold=0.5
    )
    cache_dit.enable_cache(pipe, cache_config=config)

    def take_off() -> None:  # it changes the class first of all; a model with group offload it cannot give back (1.5.3)
        with suppress(AttributeError):
            cache_dit.disable_cache(pipe)

    return take_off


LAYERS = (
    Layer("int8 by torchao", "weights", torchao, library="torchao"),
    Layer("GGUF", "weights", gguf, library="gguf"),
    Layer("int8 by bitsandbytes", "weights", bitsandbytes, library="bitsandbytes"),
    Layer("layerwise casting", "casting", casting),
    Layer("LoRA", "lora", lora, library="peft"),
    Layer("group offload", "placement", group_offload, transparent=True),
    Layer("sequential offload", "placement", sequential_offload, transparent=True),
    Layer("FirstBlockCache", "cache", cache={"kind": "first_block", "with": {"threshold": 0.5}}),
    Layer(
        "MagCache",
        "cache",
        cache={
            "kind": "mag",
            "with": {"threshold": 0.5, "num_inference_steps": STEPS, "mag_ratios": [1.0] * STEPS, "retention_ratio": 0.0},
        },
    ),
    Layer(
        "TaylorSeer",
        "cache",
        cache={"kind": "taylorseer", "with": {"cache_interval": 2, "disable_cache_before_step": 1, "use_lite_mode": True}},
    ),
    Layer("cache-dit", "cache", cache_dit, library="cache_dit"),
    Layer("compiled blocks", "compilation", compile_blocks, transparent=True),
    Layer("compiled whole", "compilation", compile_whole, transparent=True),
)
"""In the order in which they are put on; a recipe comes last."""
BY_NAME = {layer.name: layer for layer in LAYERS}


@dataclass(frozen=True)
class Cell:
    """Some layers and a sparse recipe on one pipeline.

    Attributes
    ----------
    layers : one or two.
    outcome : ``works``; ``refused``, in words that `says` is part of; or ``apart``: the layers do not go together without accelplug either.
    """

    layers: tuple[Layer, ...]
    outcome: str = "works"
    says: str = ""

    def __str__(self) -> str:
        return " + ".join(layer.name for layer in self.layers)

    @property
    def absent(self) -> str | None:
        """Why it cannot be tried here, or None."""
        return next((why for layer in self.layers if (why := layer.absent)), None)


OTHERWISE: Mapping[frozenset[str], tuple[str, str]] = {
    frozenset({"GGUF", "sequential offload"}): ("apart", "None"),  # accelerate makes such a weight without its type
}
"""Pairs that do not work: outcome, and what is said."""
WHOLE_WITH = ("LoRA",)
"""What is tried on a model that is compiled whole, which takes the tests' time: the others are tried on compiled blocks."""


def tried(a: Layer, b: Layer) -> bool:
    """Whether there is a cell for a pair."""
    whole = {a.name, b.name} - {"compiled whole"}
    return a.kind != b.kind and (len(whole) == 2 or bool(whole & set(WHOLE_WITH)))


def cells() -> list[Cell]:
    """Every layer alone, and every pair that is tried."""
    chosen: list[tuple[Layer, ...]] = [(layer,) for layer in LAYERS]
    chosen += [(a, b) for a, b in combinations(LAYERS, 2) if tried(a, b)]
    return [Cell(layers, *OTHERWISE.get(frozenset(layer.name for layer in layers), ())) for layers in chosen]


def compatibility() -> tuple[list[str], list[list[str]]]:
    """Heading and lines of the documentation's table: each layer alone, then beside each other one."""
    found = {frozenset(layer.name for layer in cell.layers): cell.outcome for cell in cells()}
    lines = [[layer.name, *(found.get(frozenset({layer.name, other.name}), "") for other in LAYERS)] for layer in LAYERS]
    return ["", *(layer.name for layer in LAYERS)], lines
