"""Tiny pipelines of every family with a known denoiser: schedulers of all kinds, late beginnings, per-frame timesteps; latents out.

What a pipeline does not reach when it gives latents back is left out or stands in.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import PIL.Image
import torch
from torch import nn

from accelplug.testing import models
from accelplug.testing.models import Arguments, Built, build_pipeline, noise, valid_first, wan_pipeline
from tests.tiny_models import build, is_there


class NoVae(nn.Module):
    """What pipelines ask a VAE for that they do not run."""

    config = SimpleNamespace(latent_channels=4, scaling_factor=1.0, block_out_channels=(4,))
    dtype, device = torch.float32, torch.device("cpu")
    spatial_compression_ratio, temporal_compression_ratio = 16, 4
    latents_mean, latents_std = torch.zeros(4), torch.ones(4)


class NoGuardrail:
    """Cosmos pipelines want somebody to ask."""

    def to(self, *_: Any) -> NoGuardrail:
        return self

    def check_text_safety(self, *_: Any) -> bool:
        return True

    def check_video_safety(self, video: Any) -> Any:
        return video


class NoSound:
    """What pipelines ask a VAE of sound for that they do not run."""

    mel_compression_ratio = temporal_compression_ratio = 4
    latent_hop_length = 1024
    latents_mean, latents_std = torch.zeros(128), torch.ones(128)

    def __init__(self, config: Any) -> None:
        self.config = config


class NoConnectors:
    """LTX-2's text goes to the video and to the sound as it is."""

    def __call__(self, embeds: torch.Tensor, mask: torch.Tensor, **_: Any) -> tuple[torch.Tensor, ...]:
        return embeds, embeds, mask


class NoEye(nn.Module):
    """An image encoder and its processor that see the same five tokens in every picture."""

    dtype, device = torch.float32, torch.device("cpu")

    def forward(self, images: Any = None, **_: Any) -> Any:
        return Seen() if images is not None else SimpleNamespace(hidden_states=[noise(1, 5, 4)] * 2)


class Seen(dict):
    """What such a processor hands to such an encoder."""

    def to(self, *_: Any) -> Seen:
        return self


class NoTokenizer:
    """Every letter is a token, of thirty."""

    eos_token_id = 31

    def convert_tokens_to_ids(self, token: str) -> int:
        return 30

    def apply_chat_template(self, turns: list[dict[str, str]], **_: Any) -> Any:
        return SimpleNamespace(input_ids=[ord(letter) % 30 for letter in turns[-1]["content"][:12]])


def euler(**config: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)


def unipc() -> Any:
    return diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0)


def piped(cls: Any, model: str, scheduler: Any, *absent: str, **given: Any) -> Any:
    """A pipeline of class `cls` around a tiny denoiser; `absent`: components that it is made without."""
    denoiser, _ = build(model)
    name = "unet" if "UNet" in type(denoiser).__name__ else "transformer"
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", *absent))
    return cls(**{**parts, name: denoiser, "scheduler": scheduler, **given})


def guided(*embeds: tuple[str, int | None, Any], height: int, width: int, **more: Any) -> Arguments:
    """Embeddings (name, dimension, tokens or mask) of a prompt and of a negative one."""
    inputs: Arguments = {"height": height, "width": width, **more}
    for name, dim, tokens in embeds:
        for seed, sign in enumerate(("", "negative_")):
            shape = (1, dim) if tokens is None else (1, tokens, dim)
            inputs[sign + name] = tokens if dim is None else noise(*shape, seed=seed)
    return inputs


def wan22_moe() -> Built:
    return wan_pipeline(experts=2)


def flux() -> Built:
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
        guidance_embeds=True,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4,),
        latent_channels=1,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
        scaling_factor=1.5,
    )
    pipe = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )
    return pipe, {
        "prompt_embeds": noise(1, 12, 32),
        "pooled_prompt_embeds": noise(1, 32),
        "height": 12,
        "width": 16,
    }


def cogvideox() -> Built:
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=32,
        num_layers=2,
        sample_width=12,
        sample_height=8,
        sample_frames=9,
        max_text_seq_length=16,
        use_rotary_positional_embeddings=True,
    )
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    )
    pipe = diffusers.CogVideoXPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        transformer=transformer,
        scheduler=diffusers.CogVideoXDDIMScheduler(),
    )
    return pipe, {
        "prompt_embeds": noise(1, 16, 32),
        "negative_prompt_embeds": noise(1, 16, 32, seed=1),
        "height": 64,
        "width": 96,
        "num_frames": 9,
        "guidance_scale": 6.0,
        "max_sequence_length": 16,
    }


def hunyuan_video() -> Built:
    transformer, _ = models.hunyuan_video()
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )
    pipe = diffusers.HunyuanVideoPipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=None,
        tokenizer_2=None,
    )
    return pipe, {
        "prompt_embeds": noise(1, 12, 16),
        "pooled_prompt_embeds": noise(1, 8),
        "prompt_attention_mask": valid_first(12, 9).float(),
        "height": 64,
        "width": 96,
        "num_frames": 9,
    }


def sd15() -> Built:
    unet, _ = models.unet_sd15()
    vae = diffusers.AutoencoderKL(
        block_out_channels=[8, 16],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
        norm_num_groups=4,
    )
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipe, {
        "prompt_embeds": noise(1, 7, 16),
        "negative_prompt_embeds": noise(1, 7, 16, seed=1),
        "height": 24,
        "width": 32,
        "guidance_scale": 7.5,
    }


DECODING: dict[str, Callable[[], Built]] = {
    "wan": wan_pipeline,
    "wan22_moe": wan22_moe,
    "flux": flux,
    "cogvideox": cogvideox,
    "hunyuan_video": hunyuan_video,
    "sd15": sd15,
}
"""Those with all that pictures take."""


def sd3() -> Built:
    parts = ("text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    pipe = piped(diffusers.StableDiffusion3Pipeline, "sd3", euler(), *parts)
    return pipe, guided(("prompt_embeds", 32, 11), ("pooled_prompt_embeds", 64, None), height=96, width=128)


def qwen_image() -> Built:
    pipe = piped(diffusers.QwenImagePipeline, "qwen_image", euler())
    embeds = ("prompt_embeds", 16, 8), ("prompt_embeds_mask", None, valid_first(8, 8))
    return pipe, guided(*embeds, true_cfg_scale=4.0, height=96, width=128)


class NoProcessor:
    """What the pipeline of Qwen-Image 2.1 asks at once of the processor of its text encoder."""

    tokenizer = SimpleNamespace(encode=lambda text: [0])

    def apply_chat_template(self, *_: Any, **__: Any) -> list[list[int]]:
        return [[0]]


def qwen_image_21() -> Built:
    """The first step fills a cache of the text's keys."""
    transformer, _ = build("qwen_image_21")
    parts = {"vae": None, "text_encoder": None, "processor": NoProcessor()}
    pipe = diffusers.QwenImage21Pipeline(transformer=transformer, scheduler=euler(), **parts)
    embeds = ("prompt_embeds", 16, 7), ("prompt_embeds_mask", None, valid_first(7, 5).bool())
    return pipe, guided(*embeds, true_cfg_scale=4.0, height=96, width=128)


def hunyuan_image() -> Built:
    pipe = piped(diffusers.HunyuanImagePipeline, "hunyuan_image", euler(), "text_encoder_2", "tokenizer_2")
    masks = {"prompt_embeds_mask": valid_first(6, 4), "prompt_embeds_mask_2": valid_first(4, 3)}
    embeds = {"prompt_embeds": noise(1, 6, 16), "prompt_embeds_2": noise(1, 4, 8)}
    return pipe, {**embeds, **masks, "height": 384, "width": 512}


def auraflow() -> Built:
    pipe = piped(diffusers.AuraFlowPipeline, "auraflow", euler())
    embeds = ("prompt_embeds", 16, 7), ("prompt_attention_mask", None, valid_first(7, 7))
    return pipe, guided(*embeds, height=96, width=128)


def cogview4() -> Built:
    pipe = piped(diffusers.CogView4Pipeline, "cogview4", euler())
    return pipe, guided(("prompt_embeds", 16, 7), height=96, width=128)


def lumina2() -> Built:
    pipe = piped(diffusers.Lumina2Pipeline, "lumina2", euler())
    embeds = ("prompt_embeds", 16, 9), ("prompt_attention_mask", None, valid_first(9, 7))
    return pipe, guided(*embeds, height=96, width=128)


def z_image() -> Built:
    pipe = piped(diffusers.ZImagePipeline, "z_image", euler())
    texts = {"prompt_embeds": [noise(14, 16)], "negative_prompt_embeds": [noise(14, 16, seed=1)]}
    return pipe, {**texts, "height": 96, "width": 160, "guidance_scale": 4.0}


def pixart() -> Built:
    pipe = piped(diffusers.PixArtSigmaPipeline, "pixart", diffusers.DPMSolverMultistepScheduler())
    embeds = ("prompt_embeds", 16, 8), ("prompt_attention_mask", None, valid_first(8, 8))
    return pipe, guided(*embeds, negative_prompt=None, use_resolution_binning=False, height=96, width=128)


def ltx() -> Built:
    pipe = piped(diffusers.LTXPipeline, "ltx", euler())
    embeds = ("prompt_embeds", 16, 16), ("prompt_attention_mask", None, valid_first(16, 11))
    return pipe, guided(*embeds, height=128, width=192, num_frames=17)


def ltx_condition() -> Built:
    pipe = piped(diffusers.LTXConditionPipeline, "ltx", euler(), vae=NoVae())
    embeds = ("prompt_embeds", 16, 16), ("prompt_attention_mask", None, valid_first(16, 11))
    late = {"latents": noise(1, 4, 3, 4, 6), "denoise_strength": 0.6}
    return pipe, guided(*embeds, **late, height=64, width=96, num_frames=9)


def cosmos() -> Built:
    scheduler = diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80, sigma_data=0.5, final_sigmas_type="sigma_min")
    pipe = piped(diffusers.CosmosTextToWorldPipeline, "cosmos", scheduler, safety_checker=NoGuardrail())
    return pipe, guided(("prompt_embeds", 16, 12), height=64, width=96, num_frames=17)


def cosmos_2() -> Built:
    """The denoiser is given sigma / (sigma + 1)."""
    pipe = piped(diffusers.Cosmos2TextToImagePipeline, "cosmos", euler(use_karras_sigmas=True), safety_checker=NoGuardrail())
    return pipe, guided(("prompt_embeds", 16, 12), height=128, width=192)


def allegro() -> Built:
    pipe = piped(diffusers.AllegroPipeline, "allegro", diffusers.EulerAncestralDiscreteScheduler())
    embeds = ("prompt_embeds", 8, 16), ("prompt_attention_mask", None, valid_first(16, 16))
    return pipe, guided(*embeds, negative_prompt=None, height=64, width=96, num_frames=3)


def kandinsky5() -> Built:
    pipe = piped(diffusers.Kandinsky5T2VPipeline, "kandinsky5", euler(), "text_encoder_2", "tokenizer_2")
    inputs: Arguments = {"height": 64, "width": 96, "num_frames": 9}
    for seed, sign in enumerate(("", "negative_")):
        inputs[f"{sign}prompt_embeds_qwen"] = noise(1, 7, 16, seed=seed)
        inputs[f"{sign}prompt_embeds_clip"] = noise(1, 8, seed=seed)
        inputs[f"{sign}prompt_cu_seqlens"] = torch.tensor([0, 7])
    return pipe, inputs


def mochi() -> Built:
    pipe = piped(diffusers.MochiPipeline, "mochi", euler(invert_sigmas=True))
    embeds = ("prompt_embeds", 16, 16), ("prompt_attention_mask", None, valid_first(16, 10).bool())
    return pipe, guided(*embeds, max_sequence_length=16, height=64, width=96, num_frames=13)


def chroma() -> Built:
    pipe = piped(diffusers.ChromaPipeline, "chroma", euler())
    embeds = ("prompt_embeds", 32, 7), ("prompt_attention_mask", None, valid_first(7, 7).bool())
    return pipe, guided(*embeds, height=96, width=128)


def flux2() -> Built:
    pipe = piped(diffusers.Flux2Pipeline, "flux2", euler())
    return pipe, {"prompt_embeds": noise(1, 7, 32), "height": 96, "width": 128}


def flux_img2img() -> Built:
    pipe, inputs = flux()
    return diffusers.FluxImg2ImgPipeline(**pipe.components), {**inputs, "image": torch.rand(1, 3, 12, 16), "strength": 0.6}


def wan_video2video() -> Built:
    """Its scheduler is not told where it begins, and its two branches have no names."""
    pipe, inputs = wan_pipeline()
    parts = {name: part for name, part in pipe.components.items() if name != "transformer_2"}
    inputs.pop("num_frames")
    return diffusers.WanVideoToVideoPipeline(**parts), {**inputs, "video": [torch.rand(9, 3, 64, 96)], "strength": 0.6}


def cogvideox_video2video() -> Built:
    pipe, inputs = cogvideox()
    inputs = {name: given for name, given in inputs.items() if name not in ("num_frames", "max_sequence_length")}
    late = {"video": torch.rand(1, 9, 3, 64, 96), "strength": 0.6}
    return diffusers.CogVideoXVideoToVideoPipeline(**pipe.components), {**inputs, **late}


def wan_5b() -> Built:
    """A timestep for each token."""
    pipe, inputs = wan_pipeline()
    pipe.register_to_config(expand_timesteps=True)
    return pipe, inputs


def hunyuan_video_15() -> Built:
    """Its guider names the branches, and counts the steps."""
    pipe = diffusers.HunyuanVideo15Pipeline(
        transformer=widened("hunyuan_video_15", in_channels=9),
        vae=NoVae(),
        scheduler=euler(),
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=4.0),
        **dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")),
    )
    embeds = (
        ("prompt_embeds", 16, 6),
        ("prompt_embeds_mask", None, valid_first(6, 4)),
        ("prompt_embeds_2", 8, 4),
        ("prompt_embeds_mask_2", None, valid_first(4, 3)),
    )
    return pipe, guided(*embeds, height=64, width=96, num_frames=9)


def skyreels() -> Built:
    pipe = piped(diffusers.SkyReelsV2Pipeline, "skyreels", unipc())
    return pipe, guided(("prompt_embeds", 16, 12), height=64, width=96, num_frames=9)


def skyreels_forcing() -> Built:
    """Frames are at steps of their own, and have schedulers of their own."""
    pipe = piped(diffusers.SkyReelsV2DiffusionForcingPipeline, "skyreels", unipc())
    more = {"prompt": None, "base_num_frames": 9, "ar_step": 1, "causal_block_size": 1}
    return pipe, guided(("prompt_embeds", 16, 12), **more, height=64, width=96, num_frames=9)


def latte() -> Built:
    pipe = piped(diffusers.LattePipeline, "latte", diffusers.DDIMScheduler(clip_sample=False))
    more = {"negative_prompt": None, "video_length": 3, "mask_feature": False}
    return pipe, guided(("prompt_embeds", 8, 8), **more, height=96, width=128)


def sdxl() -> Built:
    pipe = piped(
        diffusers.StableDiffusionXLPipeline,
        "unet_sdxl",
        diffusers.EulerDiscreteScheduler(),
        "text_encoder_2",
        "tokenizer_2",
        add_watermarker=False,
    )
    return pipe, guided(("prompt_embeds", 16, 7), ("pooled_prompt_embeds", 32, None), height=96, width=128)


def animatediff() -> Built:
    pipe = piped(
        diffusers.AnimateDiffPipeline, "animatediff", diffusers.DDIMScheduler(clip_sample=False), motion_adapter=None
    )
    return pipe, guided(("prompt_embeds", 16, 7), height=96, width=128, num_frames=3)


def animatediff_video2video() -> Built:
    pipe, inputs = animatediff()
    parts = {name: part for name, part in pipe.components.items() if name not in ("feature_extractor", "image_encoder")}
    parts["vae"] = sd15()[0].vae
    inputs.pop("num_frames")
    late = {"video": [PIL.Image.new("RGB", (32, 24))] * 3, "strength": 0.6}
    return diffusers.AnimateDiffVideoToVideoPipeline(**parts), {**inputs, **late, "height": 24, "width": 32}


def wan_vae() -> Any:
    return wan_pipeline()[0].vae


def widened(model: str, **config: Any) -> Any:
    """A tiny denoiser with other settings."""
    denoiser, _ = build(model)
    return type(denoiser)(**{**{name: kept for name, kept in denoiser.config.items() if name[0] != "_"}, **config})


def ltx_2() -> Built:
    """With sound; one forward for both prompts, one with a block perturbed, one without the other modality."""
    sound = SimpleNamespace(mel_bins=64, latent_channels=8, sample_rate=16_000, mel_hop_length=160)
    pipe = diffusers.LTX2Pipeline(
        transformer=widened("ltx2", audio_in_channels=128, audio_out_channels=128),
        scheduler=euler(),
        vae=NoVae(),
        audio_vae=NoSound(sound),
        connectors=NoConnectors(),
        **dict.fromkeys(("text_encoder", "tokenizer", "vocoder")),
    )
    embeds = ("prompt_embeds", 16, 16), ("prompt_attention_mask", None, valid_first(16, 11))
    return pipe, guided(*embeds, spatio_temporal_guidance_blocks=[1], height=64, width=96, num_frames=9)


def helios() -> Built:
    """Two chunks, the second behind the history of the first."""
    pipe = diffusers.HeliosPipeline(
        transformer=widened("helios", in_channels=16, out_channels=16),
        scheduler=diffusers.HeliosScheduler(stages=1),
        vae=wan_vae(),
        **dict.fromkeys(("text_encoder", "tokenizer")),
    )
    chunks = {"num_frames": 18, "history_sizes": [4, 2, 1], "num_latent_frames_per_chunk": 3}
    return pipe, guided(("prompt_embeds", 16, 12), **chunks, height=64, width=96)


def kandinsky6() -> Built:
    """With sound, which goes by a scheduler of its own."""
    sound = NoSound(SimpleNamespace(sample_rate=44_100))
    absent = "text_encoder_2", "tokenizer_2"
    pipe = piped(diffusers.Kandinsky6TI2VAPipeline, "kandinsky6", euler(), *absent, audio_vae=sound, vocoder=sound)
    embeds = ("prompt_embeds", 16, 7), ("pooled_prompt_embeds", 8, None)
    return pipe, guided(*embeds, height=64, width=96, num_frames=9)


def chronoedit() -> Built:
    """Two steps over the way from the old image to the new one, and two over its ends."""
    pipe = diffusers.ChronoEditPipeline(
        transformer=widened("chronoedit", in_channels=36, out_channels=16, image_dim=4, added_kv_proj_dim=24),
        scheduler=unipc(),
        vae=wan_vae(),
        image_encoder=NoEye(),
        image_processor=NoEye(),
        **dict.fromkeys(("text_encoder", "tokenizer")),
    )
    reasoning = {"enable_temporal_reasoning": True, "num_temporal_reasoning_steps": 2}
    image = {"image": torch.rand(1, 3, 64, 96)}
    return pipe, guided(("prompt_embeds", 16, 512), **reasoning, **image, height=64, width=96, num_frames=9)


def cosmos3() -> Built:
    """It takes words, and makes one sample."""
    pipe = diffusers.Cosmos3OmniPipeline(
        transformer=widened("cosmos3", latent_channel=16, patch_latent_dim=64),
        text_tokenizer=NoTokenizer(),
        vae=wan_vae(),
        scheduler=unipc(),
        enable_safety_checker=False,
    )
    return pipe, {"prompt": "a red square", "negative_prompt": "", "height": 64, "width": 96, "num_frames": 9}


def anyflow() -> Built:
    pipe = diffusers.AnyFlowPipeline(
        transformer=widened("anyflow", in_channels=16, out_channels=16),
        scheduler=diffusers.FlowMapEulerDiscreteScheduler(),
        vae=wan_vae(),
        **dict.fromkeys(("text_encoder", "tokenizer")),
    )
    return pipe, guided(("prompt_embeds", 16, 12), height=64, width=96, num_frames=9)


def anyflow_far() -> Built:
    """Three chunks. Between them its denoiser fills a cache of keys, at a timestep of no schedule."""
    pipe = diffusers.AnyFlowFARPipeline(
        transformer=widened("anyflow_far", in_channels=16, out_channels=16),
        scheduler=diffusers.FlowMapEulerDiscreteScheduler(),
        vae=wan_vae(),
        **dict.fromkeys(("text_encoder", "tokenizer")),
    )
    chunks = {"num_frames": 21, "chunk_partition": [1, 2, 3], "guidance_scale": 5.0}
    return pipe, guided(("prompt_embeds", 16, 12), **chunks, height=64, width=96)


def motif_video() -> Built:
    """Its guider names the branches, and counts the steps."""
    pipe = diffusers.MotifVideoPipeline(
        transformer=widened("motif_video", in_channels=33, out_channels=16, image_embed_dim=None),
        scheduler=euler(),
        vae=wan_vae(),
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=4.0),
        **dict.fromkeys(("text_encoder", "tokenizer")),
    )
    embeds = ("prompt_embeds", 16, 9), ("prompt_attention_mask", None, valid_first(9, 6))
    return pipe, guided(*embeds, height=64, width=96, num_frames=9)


def easyanimate() -> Built:
    pipe = piped(diffusers.EasyAnimatePipeline, "easyanimate", euler(), vae=NoVae())
    embeds = ("prompt_embeds", 16, 7), ("prompt_attention_mask", None, valid_first(7, 7))
    return pipe, guided(*embeds, height=128, width=192, num_frames=9)


def modelscope() -> Built:
    """A UNet of frames."""
    pipe = piped(diffusers.TextToVideoSDPipeline, "unet_modelscope", diffusers.DDIMScheduler(clip_sample=False))
    return pipe, guided(("prompt_embeds", 16, 7), height=96, width=128, num_frames=3)


def sd15_by(scheduler: Any) -> Built:
    pipe, inputs = sd15()
    pipe.scheduler = scheduler
    return pipe, inputs


PIPELINES: dict[str, Callable[[], Built]] = {
    **DECODING,
    **{
        builder.__name__: builder
        for builder in (
            sd3,
            qwen_image,
            qwen_image_21,
            hunyuan_image,
            auraflow,
            cogview4,
            lumina2,
            z_image,
            pixart,
            ltx,
            ltx_condition,
            cosmos,
            cosmos_2,
            allegro,
            kandinsky5,
            mochi,
            chroma,
            flux2,
            flux_img2img,
            wan_video2video,
            cogvideox_video2video,
            wan_5b,
            hunyuan_video_15,
            skyreels,
            skyreels_forcing,
            latte,
            sdxl,
            animatediff,
            animatediff_video2video,
            ltx_2,
            chronoedit,
            anyflow,
            motif_video,
            easyanimate,
            helios,
            kandinsky6,
            cosmos3,
            modelscope,
        )
        if is_there(builder)
    },
    "sd15_heun": lambda: sd15_by(diffusers.HeunDiscreteScheduler()),
    "sd15_kdpm2": lambda: sd15_by(diffusers.KDPM2DiscreteScheduler()),
    "sd15_pndm": lambda: sd15_by(diffusers.PNDMScheduler(skip_prk_steps=True)),
    "sd15_lcm": lambda: sd15_by(diffusers.LCMScheduler()),
}


def modular_wan(classic: Any) -> Any:
    """A modular pipeline on the parts of a classic one, from given embeddings; it names no branches and opens no context."""
    from diffusers.modular_pipelines.wan.modular_blocks_wan import WanBlocks

    blocks = WanBlocks()
    for name in ("text_encoder", "decode"):
        blocks.sub_blocks.pop(name)
    modular = blocks.init_pipeline()
    modular.set_progress_bar_config(disable=True)
    modular.update_components(**{name: getattr(classic, name) for name in ("transformer", "scheduler", "vae")})
    return modular


def decoding(name: str, seed: int = 0) -> Built:
    """Return (pipe, keyword arguments of its call): four steps from given embeddings, tensors out."""
    return build_pipeline(DECODING[name], seed)


def pipeline(name: str, seed: int = 0) -> Built:
    """Return (pipe, keyword arguments of its call): four steps from given embeddings, latents out, no progress bar."""
    pipe, inputs = build_pipeline(PIPELINES[name], seed)
    pipe.set_progress_bar_config(disable=True)
    return pipe, {**inputs, "output_type": "latent"}
