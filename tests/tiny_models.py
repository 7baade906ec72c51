"""Tiny models and pipelines with random weights, in the real classes: milliseconds a forward, nothing downloaded.

Every visual grid has at least 48 tokens (six blocks of eight) and T != H != W, so that no order of axes looks like another.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import FunctionType, SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models import embeddings

from accelplug.testing.models import (
    TIMESTEP,
    WAN_CONFIG,
    Arguments,
    Built,
    build_denoiser,
    cogvideox,
    flux,
    hunyuan_video,
    noise,
    raster_ids,
    sd3,
    unet_sd15,
    valid_first,
    wan,
)
from tests.tiny_images import IMAGES

diffusers.utils.logging.set_verbosity_error()


# -------------------------------------------------------------------------------------------------------------- video


def wan_5b() -> Built:
    """A timestep per token, as Wan 2.2 TI2V-5B has them: the first frame is given."""
    model, inputs = wan()
    timestep = torch.full((1, 3 * 4 * 6), 500)
    timestep[:, : 4 * 6] = 0
    return model, inputs | {"timestep": timestep}


def wan_i2v() -> Built:
    model, inputs = wan(in_channels=9, image_dim=4, added_kv_proj_dim=24)
    images = {"hidden_states": noise(1, 9, 3, 8, 12), "encoder_hidden_states_image": noise(1, 5, 4)}
    return model, inputs | images | {"encoder_hidden_states": noise(1, 512, 16)}


def wan_vace() -> Built:
    model = diffusers.WanVACETransformer3DModel(
        **WAN_CONFIG, num_layers=3, in_channels=4, out_channels=4, vace_layers=[0, 2], vace_in_channels=8
    )
    _, inputs = wan()
    return model, inputs | {"control_hidden_states": noise(1, 8, 3, 8, 12)}


def skyreels() -> Built:
    model = diffusers.SkyReelsV2Transformer3DModel(**WAN_CONFIG, num_layers=2, in_channels=4, out_channels=4)
    return model, wan()[1]


def chronoedit() -> Built:
    """As long as it reasons over the way from the old image to the new one; then there are two frames."""
    model = diffusers.ChronoEditTransformer3DModel(**WAN_CONFIG, num_layers=2, in_channels=4, out_channels=4)
    return model, wan()[1]


def anyflow() -> Built:
    model = diffusers.AnyFlowTransformer3DModel(**WAN_CONFIG, num_layers=2, in_channels=4, out_channels=4)
    times = {"timestep": torch.full((1, 3), 500.0), "r_timestep": torch.full((1, 3), 250.0)}
    return model, {"hidden_states": noise(1, 3, 4, 8, 12), "encoder_hidden_states": noise(1, 12, 16), **times}


def consisid() -> Built:
    _, inputs = cogvideox()
    model = diffusers.ConsisIDTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=8,
        num_layers=2,
        sample_width=12,
        sample_height=8,
        sample_frames=9,
        max_text_seq_length=8,
        use_rotary_positional_embeddings=True,
        cross_attn_interval=1,
    )
    return model, inputs


def easyanimate() -> Built:
    """A block with weights of its own for the text, and one that shares them; a second text."""
    model = diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        num_layers=2,
        mmdit_layers=1,
        time_embed_dim=8,
        text_embed_dim=16,
        text_embed_dim_t5=8,
    )
    return model, {
        "hidden_states": noise(1, 4, 3, 8, 12),
        "timestep": TIMESTEP,
        "encoder_hidden_states": noise(1, 7, 16),
        "encoder_hidden_states_t5": noise(1, 5, 8),
    }


def motif_video() -> Built:
    """Of image to video: an image's tokens stand ahead of the padded text."""
    model = diffusers.MotifVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=2,
        mlp_ratio=2.0,
        text_embed_dim=16,
        image_embed_dim=12,
        rope_axes_dim=(2, 2, 4),
        enable_text_cross_attention_dual=True,
    )
    return model, {
        "hidden_states": noise(1, 4, 3, 8, 12),
        "timestep": TIMESTEP,
        "encoder_hidden_states": noise(1, 9, 16),
        "encoder_attention_mask": valid_first(9, 6),
        "image_embeds": noise(1, 3, 12),
    }


def hunyuan_video_15() -> Built:
    model = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=16,
        text_embed_2_dim=8,
        image_embed_dim=12,
        rope_axes_dim=(2, 2, 4),
        target_size=16,
        task_type="t2v",
    )
    return model, {
        "hidden_states": noise(1, 4, 3, 4, 6),
        "timestep": torch.tensor([1.0]),
        "encoder_hidden_states": noise(1, 6, 16),
        "encoder_hidden_states_2": noise(1, 4, 8),
        "encoder_attention_mask": valid_first(6, 4),
        "encoder_attention_mask_2": valid_first(4, 3),
        "image_embeds": torch.zeros(1, 3, 12),
    }


def framepack() -> Built:
    """A history at three resolutions ahead of the frames; an image's tokens and the valid text behind them."""
    model = diffusers.HunyuanVideoFramepackTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=2,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
        image_condition_type=None,
        has_image_proj=True,
        image_proj_dim=12,
        has_clean_x_embedder=True,
    )
    _, inputs = hunyuan_video()
    return model, inputs | {
        "image_embeds": noise(1, 3, 12),
        "indices_latents": torch.arange(3) + 20,
        "latents_clean": noise(1, 4, 2, 8, 12, seed=1),
        "indices_latents_clean": torch.arange(2),
        "latents_history_2x": noise(1, 4, 2, 8, 12, seed=2),
        "indices_latents_history_2x": torch.arange(2) + 17,
        "latents_history_4x": noise(1, 4, 16, 8, 12, seed=3),
        "indices_latents_history_4x": torch.arange(16) + 1,
    }


def helios() -> Built:
    """The second chunk of a video."""
    model = diffusers.HeliosTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        rope_dim=(4, 4, 4),
    )
    history = {"short": (2, 6), "mid": (2, 4), "long": (4, 0)}  # frames, and where they begin
    inputs: Arguments = {
        "hidden_states": noise(1, 4, 3, 8, 12),
        "timestep": TIMESTEP,
        "encoder_hidden_states": noise(1, 12, 16),
        "indices_hidden_states": torch.arange(3)[None] + 8,
    }
    for seed, (name, (frames, first)) in enumerate(history.items()):
        inputs[f"latents_history_{name}"] = noise(1, 4, frames, 8, 12, seed=seed)
        inputs[f"indices_latents_history_{name}"] = torch.arange(frames)[None] + first
    return model, inputs


def kandinsky6() -> Built:
    """With sound, and with a frame of reference behind the others, at the place of the first."""
    model = diffusers.Kandinsky6Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=16,
        in_text_dim2=8,
        time_dim=16,
        model_dim=24,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 4, 4),
        in_audio_dim=4,
        out_audio_dim=4,
        ca_rope=True,
        cross_gates=True,
        fix_modulation=True,
        visual_token_type_num_embeddings=2,
    )
    return model, {
        "hidden_states": noise(1, 4, 8, 12, 9),
        "encoder_hidden_states": noise(1, 7, 16),
        "pooled_projections": noise(1, 8),
        "timestep": torch.tensor([500.0]),
        "audio_hidden_states": noise(1, 9, 4),
        "visual_rope_pos": (torch.tensor([0, 1, 2, 0]), torch.arange(4), torch.arange(6)),
        "encoder_attention_mask": valid_first(7, 5).bool(),
        "visual_token_type_ids": torch.tensor([[0, 0, 0, 1]]),
    }


def cosmos3() -> Built:
    """Text, a control ahead of the video, and sound behind it, in one sequence; one head of keys for two of queries."""
    model = diffusers.Cosmos3OmniTransformer(
        head_dim=12,
        hidden_size=24,
        intermediate_size=32,
        latent_channel=4,
        num_attention_heads=4,
        num_hidden_layers=2,
        num_key_value_heads=2,
        patch_latent_dim=16,
        rope_axes_dim=(2, 2, 2),
        sound_dim=4,
        sound_gen=True,
        vocab_size=32,
    )
    text, shapes, sound = 7, [(3, 4, 6), (3, 4, 6)], 5
    visual = [math.prod(shape) for shape in shapes]
    vision = torch.arange(text, text + sum(visual))
    length = text + sum(visual) + sound
    return model, {
        "input_ids": torch.arange(text),
        "text_indexes": torch.arange(text),
        "position_ids": torch.arange(length).float().expand(3, -1),
        "und_len": text,
        "sequence_length": length,
        "vision_tokens": [noise(1, 4, frames, 8, 12) for frames, _, _ in shapes],
        "vision_token_shapes": shapes,
        "vision_sequence_indexes": vision,
        "vision_mse_loss_indexes": vision[visual[0] :],
        "vision_timesteps": torch.full((visual[1],), 500.0),
        "vision_noisy_frame_indexes": [torch.arange(0), torch.arange(3)],
        "sound_tokens": [noise(4, sound)],
        "sound_token_shapes": [(sound, 1, 1)],
        "sound_sequence_indexes": torch.arange(length - sound, length),
        "sound_mse_loss_indexes": torch.arange(length - sound, length),
        "sound_timesteps": torch.full((sound,), 500.0),
        "sound_noisy_frame_indexes": [torch.arange(sound)],
    }


def anyflow_far() -> Built:
    """The third chunk of a video: of the first there are few keys, of the second all."""
    chunks = [1, 2, 3]
    model = diffusers.AnyFlowFARTransformer3DModel(
        **WAN_CONFIG, num_layers=2, in_channels=4, out_channels=4, full_chunk_limit=2, chunk_partition=chunks
    )
    _, inputs = anyflow()
    kept = {"compressed_cache": noise(2, 1, 2, 6, 12), "full_cache": noise(2, 1, 2, 48, 12)}
    return model, inputs | {
        "chunk_partition": chunks,
        "kv_cache": [kept, kept],
        "kv_cache_flag": {"num_cached_chunks": 2, "is_cache_step": False},
    }


def cogvideox_15() -> Built:
    return cogvideox(patch_size_t=2)


def mochi() -> Built:
    model = diffusers.MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=16,
        time_embed_dim=4,
        max_sequence_length=16,
    )
    return model, {
        "hidden_states": noise(1, 4, 3, 8, 12),
        "encoder_hidden_states": noise(1, 16, 16),
        "timestep": TIMESTEP,
        "encoder_attention_mask": valid_first(16, 10).bool(),
    }


PACKED_VIDEO = {"num_frames": 3, "height": 4, "width": 6}


def ltx() -> Built:
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=2,
        caption_channels=16,
    )
    return model, {
        "hidden_states": noise(1, 3 * 4 * 6, 4),
        "encoder_hidden_states": noise(1, 16, 16),
        "timestep": TIMESTEP,
        "encoder_attention_mask": valid_first(16, 11),
        **PACKED_VIDEO,
    }


def ltx2() -> Built:
    model = diffusers.LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=2,
        caption_channels=16,
        rope_double_precision=False,
    )
    _, inputs = ltx()
    return model, inputs | {
        "timestep": torch.tensor([500.0]),
        "audio_hidden_states": noise(1, 9, 4),
        "audio_encoder_hidden_states": noise(1, 16, 16),
        "audio_num_frames": 9,
        "fps": 25.0,
    }


def cosmos() -> Built:
    model = diffusers.CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        mlp_ratio=2,
        text_embed_dim=16,
        adaln_lora_dim=4,
        max_size=(4, 32, 32),
        patch_size=(1, 2, 2),
        concat_padding_mask=False,
    )
    return model, {
        "hidden_states": noise(1, 4, 3, 8, 12),
        "timestep": TIMESTEP,
        "encoder_hidden_states": noise(1, 12, 16),
        "attention_mask": valid_first(12, 9).bool(),
        "fps": 30,
    }


def allegro() -> Built:
    model = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=24,
        sample_width=12,
        sample_height=8,
        sample_frames=3,
        caption_channels=8,
    )
    *freqs, t, h, w = embeddings.get_3d_rotary_pos_embed_allegro(
        embed_dim=12,
        crops_coords=((0, 0), (4, 6)),
        grid_size=(4, 6),
        temporal_size=3,
        interpolation_scale=(1.0, 1.0, 1.0),
    )
    places = torch.cartesian_prod(*[torch.as_tensor(axis).long() for axis in (t, h, w)])
    return model, {
        "hidden_states": noise(1, 4, 3, 8, 12),
        "encoder_hidden_states": noise(1, 16, 8),
        "timestep": TIMESTEP,
        "image_rotary_emb": (tuple(freqs), tuple(places.T.reshape(3, 1, -1).contiguous())),
    }


def kandinsky5() -> Built:
    model = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        in_text_dim=16,
        in_text_dim2=8,
        time_dim=16,
        out_visual_dim=4,
        patch_size=(1, 2, 2),
        model_dim=24,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 4, 4),
        visual_cond=False,
    )
    return model, {
        "hidden_states": noise(1, 3, 8, 12, 4),
        "encoder_hidden_states": noise(1, 7, 16),
        "timestep": torch.tensor([500.0]),
        "pooled_projections": noise(1, 8),
        "visual_rope_pos": [torch.arange(3), torch.arange(4), torch.arange(6)],
        "text_rope_pos": torch.arange(7),
    }


def latte() -> Built:
    model = diffusers.LatteTransformer3DModel(
        sample_size=16,
        video_length=3,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=8,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
        attention_bias=True,
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
    )
    return model, {
        "hidden_states": noise(1, 4, 3, 12, 16),
        "encoder_hidden_states": noise(1, 8, 8),
        "timestep": torch.tensor([5]),
    }


# -------------------------------------------------------------------------------------------------------------- image


def flux2() -> Built:
    model = diffusers.Flux2Transformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        timestep_guidance_channels=32,
        axes_dims_rope=[4, 4, 4, 4],
    )
    return model, {
        "hidden_states": noise(1, 6 * 8, 4),
        "encoder_hidden_states": noise(1, 7, 32),
        "img_ids": raster_ids(1, 6, 8, 1)[None],
        "txt_ids": raster_ids(1, 1, 1, 7)[None],
        "timestep": torch.tensor([1.0]),
        "guidance": torch.tensor([1.0]),
    }


def chroma() -> Built:
    model = diffusers.ChromaTransformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    return model, {
        "hidden_states": noise(1, 6 * 8, 4),
        "encoder_hidden_states": noise(1, 7, 32),
        "img_ids": raster_ids(1, 6, 8).float(),
        "txt_ids": torch.zeros(7, 3),
        "timestep": torch.tensor([1.0]),
    }


def qwen_image() -> Built:
    model = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    return model, {
        "hidden_states": noise(1, 6 * 8, 16),
        "encoder_hidden_states": noise(1, 8, 16),
        "encoder_hidden_states_mask": valid_first(8, 6),
        "timestep": torch.tensor([1.0]),
        "img_shapes": [[(1, 6, 8)]],
    }


def z_image() -> Built:
    model = diffusers.ZImageTransformer2DModel(
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    return model, {"x": [noise(16, 1, 12, 20)], "cap_feats": [noise(14, 16)], "t": torch.tensor([0.5])}


def pixart() -> Built:
    model = diffusers.PixArtTransformer2DModel(
        sample_size=16,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        cross_attention_dim=16,
        out_channels=8,
        use_additional_conditions=False,
    )
    return model, {
        "hidden_states": noise(1, 4, 12, 16),
        "encoder_hidden_states": noise(1, 8, 16),
        "timestep": torch.tensor([5]),
        "added_cond_kwargs": {"aspect_ratio": None, "resolution": None},
    }


def sana() -> Built:
    model = diffusers.SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=8,
        sample_size=8,
    )
    return model, {"hidden_states": noise(1, 4, 6, 8), "encoder_hidden_states": noise(1, 8, 8), "timestep": TIMESTEP}


def unet_sdxl() -> Built:
    model = diffusers.UNet2DConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=80,
    )
    return model, {
        "sample": noise(1, 4, 12, 16),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": noise(1, 7, 16),
        "added_cond_kwargs": {"text_embeds": noise(1, 32), "time_ids": torch.zeros(1, 6)},
    }


def animatediff() -> Built:
    model = diffusers.UNetMotionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        cross_attention_dim=16,
        num_attention_heads=2,
        motion_num_attention_heads=2,
    )
    return model, {
        "sample": noise(1, 4, 3, 12, 16),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": noise(3, 7, 16),
    }


UNET_OF_FRAMES = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "cross_attention_dim": 16,
    "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
}


def unet_modelscope() -> Built:
    model = diffusers.UNet3DConditionModel(**UNET_OF_FRAMES, attention_head_dim=8)
    return model, {
        "sample": noise(1, 4, 3, 12, 16),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": noise(1, 7, 16),
    }


def unet_i2vgen() -> Built:
    model = diffusers.I2VGenXLUNet(**UNET_OF_FRAMES, attention_head_dim=8)
    _, inputs = unet_modelscope()
    return model, inputs | {
        "fps": torch.tensor([16]),
        "image_latents": noise(1, 4, 3, 12, 16),
        "image_embeddings": noise(1, 1, 16),
    }


def unet_svd() -> Built:
    """Stable Video Diffusion."""
    model = diffusers.UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        num_attention_heads=(2, 4),
    )
    return model, {
        "sample": noise(1, 3, 8, 12, 16),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": noise(1, 1, 16),
        "added_time_ids": torch.tensor([[6.0, 127.0, 0.02]]),
    }


def unet2d() -> Built:
    """Without text, attention at its lower resolution."""
    model = diffusers.UNet2DModel(
        in_channels=3,
        out_channels=3,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
    )
    return model, {"sample": noise(1, 3, 12, 16), "timestep": torch.tensor(500)}


def unet_dreamlite() -> Built:
    """Self-attention on the lower resolutions alone, with one head of keys for all."""
    model = diffusers.DreamLiteUNetModel(
        block_out_channels=(16, 32),
        down_block_types=("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
        up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        ff_mult=2,
    )
    return model, {
        "sample": noise(1, 4, 12, 16),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": noise(1, 7, 16),
    }


def kandinsky3() -> Built:
    """Four resolutions, as its constructor has them; all but the first attend."""
    model = diffusers.Kandinsky3UNet(
        time_embedding_dim=16,
        groups=4,
        attention_head_dim=8,
        layers_per_block=2,
        block_out_channels=(16, 16, 16, 16),
        cross_attention_dim=16,
        encoder_hid_dim=12,
    )
    return model, {
        "sample": noise(1, 4, 48, 64),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": noise(1, 7, 12),
        "encoder_attention_mask": valid_first(7, 5),
    }


# -------------------------------------------------------------------------------------------------------------- sound


def stable_audio() -> Built:
    model = diffusers.StableAudioDiTModel(
        sample_size=16,
        in_channels=3,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_attention_heads=1,
        out_channels=3,
        cross_attention_dim=16,
        time_proj_dim=8,
        global_states_input_dim=8,
        cross_attention_input_dim=4,
    )
    return model, {
        "hidden_states": noise(1, 3, 60),
        "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": noise(1, 5, 4),
        "global_hidden_states": noise(1, 1, 8),
        "rotary_embedding": embeddings.get_1d_rotary_pos_embed(8, 61, use_real=True, repeat_interleave_real=False),
    }


def stable_audio_3() -> Built:
    """Differential attention, with learned tokens ahead of the sound."""
    model = diffusers.StableAudio3DiTModel(
        io_channels=4,
        embed_dim=32,
        depth=2,
        num_heads=2,
        cond_token_dim=8,
        global_cond_dim=8,
        local_add_cond_dim=4,
        timestep_features_dim=8,
        ff_mult=2.0,
        num_memory_tokens=5,
    )
    return model, {
        "hidden_states": noise(1, 4, 60),
        "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": noise(1, 7, 8),
        "global_hidden_states": noise(1, 8),
    }


def minimax_music_3() -> Built:
    model = diffusers.MiniMaxMusic3Transformer1DModel(
        in_channels=4,
        condition_dim=8,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        ff_inner_dim=32,
        rotary_dim=8,
        fourier_embedding_dim=16,
    )
    return model, {
        "hidden_states": noise(1, 4, 60),
        "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": noise(1, 60, 8),
    }


def ace_step() -> Built:
    """Its first layer has a sliding window; two latents make a token, and the last token is half padding."""
    model = diffusers.AceStepTransformer1DModel(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        in_channels=12,
        audio_acoustic_hidden_dim=4,
        sliding_window=8,
    )
    return model, {
        "hidden_states": noise(1, 119, 4),
        "timestep": torch.tensor([0.5]),
        "timestep_r": torch.tensor([0.5]),
        "encoder_hidden_states": noise(1, 7, 32),
        "context_latents": noise(1, 119, 8),
    }


def longcat_audio() -> Built:
    model = diffusers.LongCatAudioDiTTransformer(
        dit_dim=32, dit_depth=2, dit_heads=2, dit_text_dim=8, latent_dim=4, ff_mult=2.0
    )
    return model, {
        "hidden_states": noise(1, 60, 4),
        "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": noise(1, 7, 8),
        "encoder_attention_mask": valid_first(7, 5).bool(),
        "latent_cond": noise(1, 60, 4),
    }


def is_there(builder: Callable[[], Built]) -> bool:
    """Whether the installed diffusers has the class that a builder is for: the oldest that is supported lacks some."""
    names = builder.__code__.co_names
    ends = ("Model", "UNet", "Pipeline", "Scheduler")
    classes = [name for name in names if "Transformer" in name or name.endswith(ends)]
    callees = [made for name in names if isinstance(made := globals().get(name), FunctionType)]
    return all(hasattr(diffusers, name) for name in classes) and all(map(is_there, callees))


# -------------------------------------------------------------------------------------------- of modular pipelines alone


def minimax_h3(*anchors: str, references: tuple[Any, ...] = ()) -> Built:
    """One packed sequence; `anchors`: key frames at its first or last frame, `references`: (kind, latents, rows of sound) ahead of it."""
    from diffusers.modular_pipelines.minimax_h3 import before_denoise as h3

    model = diffusers.MiniMaxH3Transformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        ffn_dim=32,
        in_channels=4,
        audio_in_channels=3,
        text_dim=8,
        freq_dim=8,
        time_embed_hidden_dim=16,
        time_embed_dim=8,
        rope_freq_dim=2,
    )
    target = {"num_latent_frames": 3, "latent_height": 8, "latent_width": 12, "num_audio_latents": 4}
    tags = {"text_token_tags": torch.ones(7), "audio_channels": 2, "audio_tag": 2, "video_tag": 0, "patch_size": (1, 2, 2)}
    if references:
        kinds, seen, heard = zip(*references, strict=True)
        packed = h3.MiniMaxH3Ref2VAPrepareLayoutStep.build_ref2va_packed_sequence(
            references=[SimpleNamespace(kind=kind, has_audio=rows > 0) for kind, rows in zip(kinds, heard, strict=True)],
            condition_latents=[noise(1, 4, *shape) for shape in seen if shape],
            audio_condition_latents=[noise(rows, 3) for rows in heard if rows],
            **target,
            **tags,
        )
    else:
        packed = h3.MiniMaxH3PrepareLayoutStep.build_packed_sequence(keyframe_anchors=anchors, **target, **tags)
    *layout, seen_rows, heard_rows = packed
    names = ("position_ids", "token_tags", "video_indices", "audio_indices", "text_indices")
    given = dict(zip(names, layout, strict=True))
    timestep, indices = h3.MiniMaxH3SetTimestepsStep.build_row_timesteps(
        given["video_indices"], given["audio_indices"], seen_rows, heard_rows, 7, 0.25, 0.5, 0.999, 1.0
    )
    return model, {
        "hidden_states": noise(1, len(given["video_indices"]), 16),
        "audio_hidden_states": noise(1, len(given["audio_indices"]), 3),
        "encoder_hidden_states": noise(1, 7, 8),
        "timestep": timestep,
        "timestep_indices": indices,
        **given,
    }


def minimax_h3_first_last() -> Built:
    return minimax_h3("first", "last")


def minimax_h3_references() -> Built:
    """A picture, a video of the very size of the target with its sound, and a voice."""
    return minimax_h3(references=(("image", (1, 4, 6), 0), ("video", (3, 8, 12), 6), ("audio", None, 4)))


def flux3() -> Built:
    """Self-attention over the image, then joint attention with the text ahead and a reference behind; ids half a step apart."""
    model = diffusers.Flux3Transformer2DModel(
        in_channels=4,
        cond_in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        timestep_channels=8,
        axes_dims_rope=(4, 4, 4, 4),
    )
    scale = torch.tensor([1, 0.5, 0.5, 1])
    return model, {
        "hidden_states": noise(1, 6 * 8, 4),
        "encoder_hidden_states": noise(1, 7, 8),
        "timestep": torch.tensor([0.5]),
        "img_ids": raster_ids(1, 6, 8, 1) * scale,
        "txt_ids": torch.zeros(7, 4),
        "image_cond_hidden_states": noise(1, 4 * 5, 4),
        "image_cond_ids": raster_ids(1, 4, 5, 1) * scale - torch.tensor([0, 0, 0, 1]),
    }


def krea2() -> Built:
    model = diffusers.Krea2Transformer2DModel(
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        timestep_embed_dim=8,
        text_hidden_dim=8,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )
    return model, {
        "hidden_states": noise(1, 6 * 8, 4),
        "encoder_hidden_states": noise(1, 7, 3, 8),
        "timestep": torch.tensor([0.5]),
        "position_ids": torch.cat([torch.zeros(7, 3), raster_ids(1, 6, 8).float()]),
        "encoder_attention_mask": valid_first(7, 5).bool(),
    }


def wan_animate_2() -> Built:
    """The pass that reads a driving video and keeps its keys."""
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    model = diffusers.WanAnimate2Transformer3DModel(
        text_len=6,
        in_dim=9,
        dim=24,
        ffn_dim=32,
        freq_dim=8,
        text_dim=8,
        out_dim=4,
        num_heads=2,
        num_layers=2,
        use_img_emb=False,
    )
    return model, {
        "hidden_states": [noise(4, 3, 8, 12)],
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": [noise(5, 8)],
        "condition_latents": [noise(5, 3, 8, 12)],
        "kv_cache": WanAnimate2KVCache(2),
        "kv_cache_mode": "extract",
        "seq_len": 3 * 4 * 6,
        "offset_grid_sizes": torch.tensor([[3, 4, 6]]),
    }


BUILDERS: dict[str, Callable[[], Built]] = IMAGES | {
    builder.__name__: builder
    for builder in (
        wan,
        wan_5b,
        wan_i2v,
        wan_vace,
        skyreels,
        hunyuan_video,
        hunyuan_video_15,
        cogvideox,
        cogvideox_15,
        mochi,
        ltx,
        ltx2,
        cosmos,
        allegro,
        kandinsky5,
        latte,
        flux,
        flux2,
        chroma,
        sd3,
        qwen_image,
        z_image,
        pixart,
        sana,
        unet_sd15,
        unet_sdxl,
        animatediff,
        stable_audio,
        chronoedit,
        anyflow,
        consisid,
        easyanimate,
        motif_video,
        unet_modelscope,
        unet_i2vgen,
        unet_svd,
        unet_dreamlite,
        unet2d,
        kandinsky3,
        stable_audio_3,
        minimax_music_3,
        ace_step,
        longcat_audio,
        minimax_h3,
        minimax_h3_first_last,
        minimax_h3_references,
        flux3,
        krea2,
        wan_animate_2,
        framepack,
        helios,
        kandinsky6,
        cosmos3,
        anyflow_far,
    )
}
MODELS = {name: builder for name, builder in BUILDERS.items() if is_there(builder)}


def build(name: str, seed: int = 0) -> Built:
    """Return (model, keyword arguments of its forward): the same weights for the same seed, ready for inference."""
    if name not in MODELS and name in BUILDERS:
        pytest.skip(f"diffusers {diffusers.__version__} has no such class")
    return build_denoiser(MODELS[name], seed)
