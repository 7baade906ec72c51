"""Tiny modular pipelines, whole but for their text encoders: the real blocks, schedulers, guiders and decoders, small weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask

from accelplug.testing.models import Arguments, Built, noise, settle, valid_first, wan_pipeline
from tests import tiny_models


def assembled(blocks: Any, *absent: str, **parts: Any) -> Any:
    """A modular pipeline of these blocks, without those of the names `absent`, and with these parts."""
    blocks = copy.deepcopy(blocks)  # a library's blocks share theirs
    for name in absent:
        *path, last = name.split(".")
        owner = blocks
        for step in path:
            owner = owner.sub_blocks[step]
        owner.sub_blocks.pop(last)
    pipe = blocks.init_pipeline()
    pipe.update_components(**parts)
    return pipe


def pixels(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)


def picture(height: int, width: int, seed: int = 0) -> PIL.Image.Image:
    return PIL.Image.fromarray(pixels(height, width, seed))


# ------------------------------------------------------------------------------------------------------------ MiniMax-H3


def minimax_h3(**given: Any) -> Built:
    """Five seconds, the shortest that it makes, on a canvas of 2 x 3 patches."""
    from diffusers.modular_pipelines.minimax_h3 import MiniMaxH3Blocks

    transformer, _ = tiny_models.minimax_h3()
    vae = diffusers.AutoencoderKLMiniMaxH3(
        latent_channels=4,
        block_out_channels=(4,) * 6,
        layers_per_block=1,
        spatial_downsample_factors=(1, 2, 2, 1, 1, 1),
        norm_num_groups=2,
        decoder_num_layers=1,
        decoder_num_attention_heads=1,
        decoder_attention_head_dim=16,
        decoder_ffn_mult=1,
        latents_mean=(0.0,) * 4,
        latents_std=(1.0,) * 4,
    )
    audio_vae = diffusers.AutoencoderKLMiniMaxH3Audio(
        encoder_dim=4,
        encoder_rates=(2,),
        latent_dim=6,
        latent_channels=3,
        num_attention_heads=1,
        decoder_dim=4,
        decoder_rates=(2,),
        decoder_kernel_sizes=(4,),
        resblock_kernel_sizes=(3,),
        resblock_dilation_sizes=((1,),),
        latents_mean=[0.0] * 3,
        latents_std=[1.0] * 3,
    )
    name = "transformer_ref" if "references" in given else "transformer"
    parts = {
        name: transformer,
        "vae": vae,
        "audio_vae": audio_vae,
        "scheduler": diffusers.MiniMaxH3Scheduler(shift=12.0),
        "audio_scheduler": diffusers.MiniMaxH3Scheduler(shift=3.0),
    }
    pipe = assembled(MiniMaxH3Blocks(), "text_encoder", **parts)
    pipe.update_components(reference_image_short_edge=16, canvas_short_edge=16, canvas_max_pixels=16 * 24)
    text = {"prompt_embeds": noise(1, 7, 8), "text_token_tags": torch.ones(7)}
    return pipe, {**text, "height": 16, "width": 24, "num_frames": 124, **given}


def minimax_h3_first_last() -> Built:
    return minimax_h3(image=picture(16, 24), last_image=picture(20, 24, seed=1))


def minimax_h3_references() -> Built:
    """A picture, a video with its sound, and a voice."""
    from diffusers.modular_pipelines.minimax_h3 import (
        MiniMaxH3AudioReference,
        MiniMaxH3ImageReference,
        MiniMaxH3VideoReference,
    )

    frames = np.stack([pixels(16, 24, seed) for seed in range(22)])
    references = [
        MiniMaxH3ImageReference(picture(16, 16)),
        MiniMaxH3VideoReference(frames, audio=noise(2, 40)),
        MiniMaxH3AudioReference(noise(1, 20)),
    ]
    return minimax_h3(references=references)


# ---------------------------------------------------------------------------------------------------------------- others


def flux3(**given: Any) -> Built:
    from diffusers.modular_pipelines.flux3 import Flux3AutoBlocks

    transformer, _ = tiny_models.flux3()
    vae = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=1,
        norm_num_groups=1,
    )
    pipe = assembled(Flux3AutoBlocks(), "prompt_upsampler", "text_encoder", transformer=transformer, vae=vae)
    texts = {"prompt_embeds": noise(1, 7, 8), "negative_prompt_embeds": noise(1, 5, 8, seed=1)}
    return pipe, {**texts, "height": 12, "width": 16, **given}


def flux3_reference() -> Built:
    """The reference keeps a size of its own."""
    return flux3(image_cond_latents=[noise(1, 4, 4, 5)])


def krea2() -> Built:
    from diffusers.modular_pipelines.krea2 import Krea2AutoBlocks

    transformer, _ = tiny_models.krea2()
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=1,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0],
        latents_std=[1.0],
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = assembled(Krea2AutoBlocks(), "text_encoder", transformer=transformer, vae=vae, scheduler=scheduler)
    return pipe, {
        "prompt_embeds": noise(1, 7, 3, 8),
        "prompt_embeds_mask": valid_first(7, 5).bool(),
        "negative_prompt_embeds": noise(1, 7, 3, 8, seed=1),
        "negative_prompt_embeds_mask": valid_first(7, 4).bool(),
        "height": 24,
        "width": 32,
    }


def block_mask(self: Any, frames: int, hw: int, device: Any) -> Any:
    """The model's own, made without a compiler: all tokens of the steps, and of the video's those of the same frame."""

    def logic(b: Any, h: Any, q: Any, k: Any) -> Tensor:
        slots = -(-(frames + 1) * hw // 128) * 128
        own, same_frame = k < (frames + 1) * hw, (k >= slots) & (q // hw == (k - slots) // hw + 1)
        return (q < (frames + 1) * hw) & (own | (same_frame & (k - slots < frames * hw)))

    sizes = [-(-length * hw // 128) * 128 for length in (frames + 1, frames)]
    return create_block_mask(logic, None, None, sizes[0], sum(sizes), device)


def wan_animate_2() -> Built:
    """Two segments of a driving video; every step but the reading of the video goes by the model's own block mask."""
    from diffusers.modular_pipelines.wan_animate_2 import WanAnimate2Blocks

    small, _ = tiny_models.wan_animate_2()
    interpreted: Any = type("Interpreted", (diffusers.WanAnimate2Transformer3DModel,), {"create_mask": block_mask})
    transformer = interpreted.from_config({**small.config, "in_dim": 36, "out_dim": 16})
    pipe = assembled(
        WanAnimate2Blocks(),
        *("text_encoder", "image_encoder.encode", "video_encoder.encode"),
        transformer=transformer,
        vae=wan_pipeline()[0].vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
    )
    texts = {name: noise(1, 5, 8, seed=seed) for seed, name in enumerate(("prompt", "negative_prompt", "prompt_ref"))}
    return pipe, {
        **{f"{name}_embeds": text for name, text in texts.items()},
        "condition_clip_context": torch.zeros(1, 1, 4),
        "image": picture(64, 96),
        "driving_video": [picture(64, 96, seed) for seed in range(17)],
        "segment_frame_length": 9,
        "height": 64,
        "width": 96,
    }


def wan_of(blocks: Any, experts: int) -> Built:
    """Denoisers that take turns, each with a guider."""
    classic, given = wan_pipeline(experts)
    numbers = ("", "_2")[:experts]
    parts = {name: getattr(classic, name) for name in ("scheduler", "vae", *(f"transformer{number}" for number in numbers))}
    scale = given.pop("guidance_scale")
    guiders = {f"guider{number}": diffusers.ClassifierFreeGuidance(guidance_scale=scale) for number in numbers}
    return assembled(blocks, "text_encoder", **parts, **guiders), given


def wan() -> Built:
    from diffusers.modular_pipelines.wan.modular_blocks_wan import WanBlocks

    return wan_of(WanBlocks(), 1)


def wan_22() -> Built:
    from diffusers.modular_pipelines.wan.modular_blocks_wan22 import Wan22Blocks

    return wan_of(Wan22Blocks(), 2)


PIPELINES: dict[str, Callable[[], Built]] = {
    builder.__name__: builder
    for builder in (
        minimax_h3,
        minimax_h3_first_last,
        minimax_h3_references,
        flux3,
        flux3_reference,
        krea2,
        wan_animate_2,
        wan,
        wan_22,
    )
    if tiny_models.is_there(getattr(tiny_models, builder.__name__.removesuffix("_reference").removesuffix("_22")))
}


def pipeline(name: str, seed: int = 0) -> Built:
    """Return (pipe, keyword arguments of its call): four steps from given embeddings, tensors out, no progress bars."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipe, given = PIPELINES[name]()
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            settle(part, seed)
    return pipe, {**given, "num_inference_steps": 5 if "h3" in name else 4, "output_type": "pt"}


def run(pipe: Any, given: Arguments, seed: int = 0, **more: Any) -> Any:
    """Return the state that a pipeline leaves at a seed."""
    from accelplug import compat

    with compat.diffusers.quiet(pipe):
        return pipe(**{**given, **more}, generator=torch.Generator().manual_seed(seed))
