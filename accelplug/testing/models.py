"""Tiny models with random weights, in the real classes of diffusers: milliseconds a forward, nothing downloaded.

Every visual grid has at least 48 tokens (six blocks of eight) and T != H != W, so that no order of axes looks like another.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import torch
from diffusers.models import embeddings
from torch import Tensor, nn

from accelplug.hosts.guiding import ONCE_A_BATCH

Arguments = dict[str, Any]
"""Of a forward or a call, by name."""
Built = tuple[Any, Arguments]
"""A model of diffusers, and what its forward is given."""


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Return standard normal numbers, the same for the same shape and seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def valid_first(length: int, valid: int) -> Tensor:
    """Return int (1, length): ones for the first `valid` tokens."""
    return (torch.arange(length) < valid)[None].long()


def raster_ids(*sizes: int) -> Tensor:
    """Return the coordinates (N, axes) of a grid in raster order."""
    return torch.cartesian_prod(*[torch.arange(size) for size in sizes])


TIMESTEP = torch.tensor([500])
"""A timestep."""


WAN_CONFIG = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 32,
    "rope_max_seq_len": 32,
}


def wan(**config: Any) -> Built:
    """Self-attention over three frames, cross-attention to the text."""
    model = diffusers.WanTransformer3DModel(**{**WAN_CONFIG, "num_layers": 3, "in_channels": 4, "out_channels": 4, **config})
    return model, {"hidden_states": noise(1, 4, 3, 8, 12), "timestep": TIMESTEP, "encoder_hidden_states": noise(1, 12, 16)}


def hunyuan_video() -> Built:
    """Joint attention in double and single blocks, the video ahead of a text that is masked."""
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=2,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )
    return model, {
        "hidden_states": noise(1, 4, 3, 8, 12),
        "timestep": TIMESTEP,
        "encoder_hidden_states": noise(1, 12, 16),
        "encoder_attention_mask": valid_first(12, 8),
        "pooled_projections": noise(1, 8),
        "guidance": torch.tensor([6000.0]),
    }


def cogvideox(patch_size_t: int | None = None) -> Built:
    """Joint attention, the text ahead of the video."""
    frames = 3 * (patch_size_t or 1)
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=8,
        num_layers=2,
        sample_width=12,
        sample_height=8,
        sample_frames=4 * frames - 3,
        patch_size=2,
        patch_size_t=patch_size_t,
        max_text_seq_length=8,
        use_rotary_positional_embeddings=True,
    )
    return model, {
        "hidden_states": noise(1, frames, 4, 8, 12),
        "encoder_hidden_states": noise(1, 8, 8),
        "timestep": TIMESTEP,
        "image_rotary_emb": embeddings.get_3d_rotary_pos_embed(16, ((0, 0), (4, 6)), (4, 6), 3),
    }


def flux() -> Built:
    """Joint attention in double and single blocks, the text ahead of the image."""
    model = diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    )
    return model, {
        "hidden_states": noise(1, 6 * 8, 4),
        "encoder_hidden_states": noise(1, 7, 32),
        "pooled_projections": noise(1, 32),
        "img_ids": raster_ids(1, 6, 8).float(),
        "txt_ids": torch.zeros(7, 3),
        "timestep": torch.tensor([1.0]),
    }


def sd3() -> Built:
    """Joint attention, and in one block self-attention beside it; the image ahead of the text."""
    model = diffusers.SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return model, {
        "hidden_states": noise(1, 4, 12, 16),
        "encoder_hidden_states": noise(1, 11, 32),
        "pooled_projections": noise(1, 64),
        "timestep": TIMESTEP,
    }


def unet_sd15() -> Built:
    """Self-attention over an image at two resolutions."""
    model = diffusers.UNet2DConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
    )
    return model, {"sample": noise(1, 4, 12, 16), "timestep": torch.tensor(500), "encoder_hidden_states": noise(1, 7, 16)}


def settle(model: nn.Module, seed: int = 0) -> nn.Module:
    """Make a fresh model ready for inference. A little noise on each weight lets no zero initialisation hide a path."""
    generator = torch.Generator().manual_seed(seed + 1)
    model.eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model


def sample_of(result: Any) -> Tensor:
    """Return the main tensor of what a denoiser, an image encoder or a geometry transformer returned."""
    if isinstance(result, Tensor):
        return result
    if isinstance(result, dict) and "pose_enc" in result:  # a geometry transformer's: (B, S, ...)
        return torch.cat([result["pose_enc"], result["depth"].flatten(2)], -1)
    if hasattr(result, "last_hidden_state"):
        return result.last_hidden_state
    sample = result[0] if isinstance(result, tuple) else result.sample
    return torch.stack(list(sample)) if isinstance(sample, list) else sample


def batch_of_two(inputs: Arguments) -> tuple[Arguments, list[Arguments]]:
    """Return inputs of batch 2, and its two samples as inputs of batch 1: `inputs`, and others of the same shapes."""
    other = {key: _another(key, value) for key, value in inputs.items()}
    both = {key: _batched(key, value, other[key]) for key, value in inputs.items()}
    return both, [inputs, other]


def _is_shared(key: str, value: Any) -> bool:
    return key in ONCE_A_BATCH or (key == "img_ids" and value.ndim == 2)


def _another(key: str, value: Any) -> Any:
    """Return another sample's value: other latents and text, and one valid text token fewer."""
    if _is_shared(key, value) or key in {"img_ids", "timestep", "t", "guidance"}:
        return value
    if isinstance(value, Tensor) and "mask" in key:
        last = int(value[0].nonzero()[-1])
        shorter = value.clone()
        shorter[:, last if key.startswith("encoder") else 0] = 0
        return shorter
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.flip(-1) * 0.9
    if isinstance(value, list):
        return [_another(key, item) for item in value]
    if isinstance(value, dict):
        return {inner: _another(inner, item) for inner, item in value.items()}
    return value


def _batched(key: str, value: Any, other: Any) -> Any:
    if _is_shared(key, value):
        return value
    if isinstance(value, Tensor) and value.ndim:
        return torch.cat([value, other])
    if isinstance(value, list):
        return [*value, *other]
    if isinstance(value, dict):
        return {inner: _batched(inner, item, other[inner]) for inner, item in value.items()}
    return value


def wan_pipeline(experts: int = 1) -> tuple[Any, Arguments]:
    """A pipeline of one denoiser, or of two that share the steps, which is given embeddings."""

    def transformer() -> nn.Module:
        return diffusers.WanTransformer3DModel(**WAN_CONFIG, num_layers=2, in_channels=16, out_channels=16)

    pipe = diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=diffusers.AutoencoderKLWan(
            base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        transformer=transformer(),
        transformer_2=transformer() if experts == 2 else None,
        boundary_ratio=0.875 if experts == 2 else None,
    )
    return pipe, {
        "prompt_embeds": noise(1, 16, 16),
        "negative_prompt_embeds": noise(1, 16, 16, seed=1),
        "height": 64,
        "width": 96,
        "num_frames": 9,
        "guidance_scale": 5.0,
    }


def wan_of(frames: int, rows: int, columns: int) -> Built:
    """Wan on a grid of so many latent frames, patch rows and patch columns."""
    model, inputs = wan()
    return model, {**inputs, "hidden_states": noise(1, 4, frames, 2 * rows, 2 * columns)}


DENOISERS_TRIED: dict[str, Callable[[], Built]] = {
    "wan": wan,
    "wan, one slot filled": partial(wan_of, 3, 5, 7),  # 105 tokens: one in the last block of 8
    "wan, one slot free": partial(wan_of, 3, 3, 7),  # 63 tokens
    "cogvideox": cogvideox,
    "hunyuan_video": hunyuan_video,
    "flux": flux,
    "sd3": sd3,
    "unet_sd15": unet_sd15,
}
"""A denoiser of each sort: self- and joint attention, text ahead and behind, masked text, frames and images, several resolutions."""


def build_denoiser(make: Callable[[], Built], seed: int = 0) -> Built:
    """Return (model, keyword arguments of its forward): the same weights for the same seed, ready for inference."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, inputs = make()
        settle(model, seed)
    return model, inputs


def build_pipeline(make: Callable[[], tuple[Any, Arguments]], seed: int = 0) -> tuple[Any, Arguments]:
    """Return (pipe, keyword arguments of its call): four steps from given embeddings, tensors out."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipe, inputs = make()
        for component in pipe.components.values():
            if isinstance(component, nn.Module):
                settle(component, seed)
    return pipe, {**inputs, "num_inference_steps": 4, "output_type": "pt"}
