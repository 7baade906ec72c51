"""Tiny denoisers of images, as in `tests.tiny_models`: random weights in the real classes, on grids of 6 x 8 patches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers.models import embeddings
from torch import Tensor

from accelplug.testing.models import TIMESTEP, Arguments, Built, noise, raster_ids, valid_first

HALF = torch.tensor([0.5])
"""A timestep on the scale of 0 to 1."""
PATCHES = {"patch_size": 2, "in_channels": 4, "out_channels": 4}
HEADS = {"attention_head_dim": 8, "num_attention_heads": 2}
WIDE_HEADS = {"attention_head_dim": 16, "num_attention_heads": 2}


def latents() -> Tensor:
    return noise(1, 4, 12, 16)


def packed(text: int = 32, tokens: int = 7) -> Arguments:
    """Packed latents, their text, and ids as Flux has them."""
    ids = {"img_ids": raster_ids(1, 6, 8).float(), "txt_ids": torch.zeros(tokens, 3)}
    return {"hidden_states": noise(1, 6 * 8, 4), "encoder_hidden_states": noise(1, tokens, text), **ids}


QWEN_21 = {
    "patch_size": 1,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    **WIDE_HEADS,
    "context_in_dim": 16,
    "axes_dims_rope": (4, 6, 6),
}


def qwen_image_21() -> Built:
    return diffusers.QwenImage21Transformer2DModel(**QWEN_21), {
        "hidden_states": noise(1, 6 * 8, 4),
        "encoder_hidden_states": noise(1, 7, 16),
        "encoder_hidden_states_mask": valid_first(7, 5).bool(),
        "timestep": HALF,
        "img_shapes": [[(1, 6, 8)]],
        "img_mask": torch.arange(7 + 12)[None] >= 7,
    }


def qwen_image_21_edit() -> Built:
    """A reference of 4 x 6 in the middle of the text."""
    slots = [False] * 3 + [True] * 6 + [False] * 4 + [True] * 12
    return diffusers.QwenImage21Transformer2DModel(**QWEN_21), {
        "hidden_states": noise(1, 24 + 48, 4),
        "encoder_hidden_states": noise(1, 13, 16),
        "encoder_hidden_states_mask": valid_first(13, 11).bool(),
        "timestep": HALF,
        "img_shapes": [[(1, 4, 6), (1, 6, 8)]],
        "img_mask": torch.tensor([slots]),
    }


def hunyuan_image() -> Built:
    model = diffusers.HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        **WIDE_HEADS,
        num_layers=1,
        num_single_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        patch_size=(2, 2),
        text_embed_dim=16,
        text_embed_2_dim=8,
        rope_axes_dim=(8, 8),
    )
    return model, {
        "hidden_states": latents(),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": noise(1, 6, 16),
        "encoder_attention_mask": valid_first(6, 4),
        "encoder_hidden_states_2": noise(1, 4, 8),
        "encoder_attention_mask_2": valid_first(4, 3),
    }


def hunyuan_dit() -> Built:
    model = diffusers.HunyuanDiT2DModel(
        **HEADS,
        in_channels=4,
        patch_size=2,
        sample_size=16,
        hidden_size=16,
        num_layers=2,
        mlp_ratio=2.0,
        learn_sigma=False,
        cross_attention_dim=16,
        cross_attention_dim_t5=16,
        pooled_projection_dim=8,
        text_len=4,
        text_len_t5=3,
        use_style_cond_and_image_meta_size=False,
    )
    return model, {
        "hidden_states": latents(),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": noise(1, 4, 16),
        "text_embedding_mask": valid_first(4, 3),
        "encoder_hidden_states_t5": noise(1, 3, 16),
        "text_embedding_mask_t5": valid_first(3, 2),
        "image_rotary_emb": embeddings.get_2d_rotary_pos_embed(8, ((0, 0), (6, 8)), (6, 8), output_type="pt"),
    }


def ideogram4() -> Built:
    model = diffusers.Ideogram4Transformer2DModel(
        in_channels=4,
        num_layers=2,
        attention_head_dim=12,
        num_attention_heads=2,
        intermediate_size=32,
        adaln_dim=8,
        llm_features_dim=16,
        mrope_section=(2, 2, 2),
    )
    ids, segments, roles = diffusers.Ideogram4Pipeline._prepare_ids([7], 6, 8, 7, "cpu")
    return model, {
        "hidden_states": noise(1, 7 + 48, 4),
        "timestep": HALF,
        "encoder_hidden_states": noise(1, 7 + 48, 16),
        "position_ids": ids,
        "segment_ids": segments,
        "indicator": roles,
    }


def auraflow() -> Built:
    model = diffusers.AuraFlowTransformer2DModel(
        sample_size=16,
        **PATCHES,
        num_mmdit_layers=1,
        num_single_dit_layers=2,
        **HEADS,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pos_embed_max_size=256,
    )
    return model, {"hidden_states": latents(), "encoder_hidden_states": noise(1, 7, 16), "timestep": HALF}


SIZES = {
    "original_size": torch.tensor([[96.0, 128.0]]),
    "target_size": torch.tensor([[96.0, 128.0]]),
    "crop_coords": torch.zeros(1, 2),
}


def cogview3plus() -> Built:
    model = diffusers.CogView3PlusTransformer2DModel(
        **PATCHES,
        num_layers=2,
        **HEADS,
        text_embed_dim=16,
        time_embed_dim=8,
        condition_dim=4,
        pos_embed_max_size=16,
        sample_size=16,
    )
    return model, {"hidden_states": latents(), "encoder_hidden_states": noise(1, 7, 16), "timestep": TIMESTEP, **SIZES}


def cogview4() -> Built:
    model = diffusers.CogView4Transformer2DModel(
        **PATCHES,
        num_layers=2,
        **HEADS,
        text_embed_dim=16,
        time_embed_dim=8,
        condition_dim=4,
        pos_embed_max_size=16,
        sample_size=16,
        rope_axes_dim=(16, 16),
    )
    return model, {"hidden_states": latents(), "encoder_hidden_states": noise(1, 7, 16), "timestep": TIMESTEP, **SIZES}


def glm_image() -> Built:
    model = diffusers.GlmImageTransformer2DModel(
        **PATCHES,
        num_layers=2,
        **HEADS,
        text_embed_dim=16,
        time_embed_dim=8,
        condition_dim=4,
        prior_vq_quantizer_codebook_size=16,
    )
    sizes = {name: SIZES[name] for name in ("target_size", "crop_coords")}
    prior = {"prior_token_id": torch.arange(48)[None] % 16, "prior_token_drop": torch.zeros(1, 48, dtype=torch.bool)}
    text = noise(1, 7, 16)
    return model, {"hidden_states": latents(), "encoder_hidden_states": text, **prior, "timestep": TIMESTEP, **sizes}


def hidream() -> Built:
    """48 tokens of a picture that is not square, filled up to the 64 of the largest."""
    model = diffusers.HiDreamImageTransformer2DModel(
        **PATCHES,
        num_layers=1,
        num_single_layers=1,
        **WIDE_HEADS,
        caption_channels=[16, 12],
        text_emb_dim=8,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(8, 4, 4),
        max_resolution=(16, 16),
        llama_layers=[0, 1],
    )
    return model, {
        "hidden_states": latents(),
        "timesteps": TIMESTEP,
        "encoder_hidden_states_t5": noise(1, 5, 16),
        "encoder_hidden_states_llama3": noise(2, 1, 4, 12),
        "pooled_embeds": noise(1, 8),
    }


def ernie_image() -> Built:
    model = diffusers.ErnieImageTransformer2DModel(
        hidden_size=24,
        num_attention_heads=2,
        num_layers=2,
        ffn_hidden_size=32,
        **PATCHES,
        text_in_dim=16,
        rope_axes_dim=(4, 4, 4),
    )
    text = {"text_bth": noise(1, 7, 16), "text_lens": torch.tensor([5])}
    return model, {"hidden_states": latents(), "timestep": torch.tensor([500.0]), **text}


JOY = {
    "patch_size": [1, 2, 2],
    "in_channels": 4,
    "out_channels": 4,
    "hidden_size": 24,
    "num_attention_heads": 2,
    "text_dim": 16,
    "mlp_width_ratio": 2.0,
    "num_layers": 2,
    "rope_dim_list": [4, 4, 4],
}


def joyimage() -> Built:
    """Two items: a reference, then the picture."""
    model = diffusers.JoyImageEditTransformer3DModel(**JOY)
    return model, {
        "hidden_states": noise(1, 2, 4, 1, 12, 16),
        "timestep": TIMESTEP,
        "encoder_hidden_states": noise(1, 7, 16),
    }


def joyimage_plus() -> Built:
    """A picture of 6 x 8, a reference of 4 x 6, and three patches of padding."""
    model = diffusers.JoyImageEditPlusTransformer3DModel(**JOY)
    return model, {
        "hidden_states": noise(1, 48 + 24 + 3, 4, 1, 2, 2),
        "timestep": TIMESTEP,
        "encoder_hidden_states": noise(1, 7, 16),
        "encoder_hidden_states_mask": valid_first(7, 5).float(),
        "shape_list": [[(1, 6, 8), (1, 4, 6)]],
    }


FLUX_LIKE = {"in_channels": 4, "num_layers": 1, "num_single_layers": 2, **WIDE_HEADS, "joint_attention_dim": 32}


def bria() -> Built:
    model = diffusers.BriaTransformer2DModel(**FLUX_LIKE, axes_dims_rope=[4, 6, 6])
    return model, {**packed(), "timestep": TIMESTEP}


def fibo() -> Built:
    model = diffusers.BriaFiboTransformer2DModel(**FLUX_LIKE, axes_dims_rope=[4, 6, 6], text_encoder_dim=12)
    return model, {
        **packed(),
        "timestep": TIMESTEP,
        "text_encoder_layers": [noise(1, 7, 12, seed=seed) for seed in range(3)],
        "joint_attention_kwargs": {"attention_mask": (torch.arange(7 + 48) != 6)[None, None, None]},
    }


def fibo2() -> Built:
    """Nine words make six gist tokens; one image of 4 x 4 to edit."""
    model = diffusers.BriaFibo2Transformer2DModel(
        in_channels=4,
        patch_size=2,
        dim=24,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        cap_feat_dim=16,
        injection_layer_ids=(1,),
        perceiver_num_layers=1,
        min_num_gist_tokens=4,
        max_num_gist_tokens=8,
        gist_step=2,
        gist_min_text_len=4,
        gist_max_text_len=16,
        axes_dims=(4, 4, 4),
        axes_lens=(32, 32, 32),
    )
    edited = {"context_latents": [noise(1, 4, 8, 8)]}
    return model, {"hidden_states": latents(), "timestep": HALF, "encoder_hidden_states": noise(1, 2, 9, 16), **edited}


def longcat_image() -> Built:
    model = diffusers.LongCatImageTransformer2DModel(**FLUX_LIKE, pooled_projection_dim=8, axes_dims_rope=[4, 6, 6])
    ids = {"img_ids": raster_ids(1, 6, 8).float() + torch.tensor([1.0, 7.0, 7.0])}
    return model, {**packed(), **ids, "timestep": HALF}


def ovis_image() -> Built:
    model = diffusers.OvisImageTransformer2DModel(**FLUX_LIKE, out_channels=4, axes_dims_rope=(4, 6, 6))
    return model, {**packed(), "timestep": HALF}


def lumina_next() -> Built:
    model = diffusers.LuminaNextDiT2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        learn_sigma=False,
        cross_attention_dim=16,
    )
    torch.nn.init.zeros_(model.pad_token)  # is made of what memory held
    return model, {
        "hidden_states": latents(),
        "timestep": HALF,
        "encoder_hidden_states": noise(1, 7, 16),
        "encoder_mask": valid_first(7, 5),
        "image_rotary_emb": embeddings.get_2d_rotary_pos_embed_lumina(12, 32, 32),
        "cross_attention_kwargs": {},
    }


def lumina2() -> Built:
    model = diffusers.Lumina2Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(32, 32, 32),
        cap_feat_dim=16,
    )
    text = {"encoder_hidden_states": noise(1, 9, 16), "encoder_attention_mask": valid_first(9, 7)}
    return model, {"hidden_states": latents(), "timestep": HALF, **text}


def nucleus_image() -> Built:
    model = diffusers.NucleusMoEImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=12,
        num_attention_heads=2,
        num_key_value_heads=1,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 4),
        dense_moe_strategy="all_moe",
        num_experts=2,
        moe_intermediate_dim=8,
        capacity_factors=1.0,
    )
    for name, parameter in model.named_parameters():
        if "experts." in name:
            torch.nn.init.normal_(parameter, std=0.1)  # are made of what memory held
    return model, {
        "hidden_states": noise(1, 6 * 8, 16),
        "img_shapes": [(1, 6, 8)],
        "encoder_hidden_states": noise(1, 7, 16),
        "encoder_hidden_states_mask": valid_first(7, 5).bool(),
        "timestep": HALF,
    }


def omnigen() -> Built:
    """Five words, one token of the time, and the image; words read those ahead of them."""
    model = diffusers.OmniGenTransformer2DModel(
        in_channels=4,
        patch_size=2,
        hidden_size=24,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=32,
        num_layers=2,
        pad_token_id=0,
        vocab_size=32,
        rope_scaling={"short_factor": [1.0] * 6, "long_factor": [1.0] * 6},
        pos_embed_max_size=16,
        time_step_dim=8,
    )
    mask = torch.ones(1, 54, 54)
    mask[:, :5] = mask[:, :5].tril()
    words = {"input_ids": torch.arange(1, 6)[None], "input_img_latents": [], "input_image_sizes": {}}
    places = {"attention_mask": mask, "position_ids": torch.arange(54)[None]}
    return model, {"hidden_states": latents(), "timestep": TIMESTEP, **words, **places}


def prx() -> Built:
    model = diffusers.PRXTransformer2DModel(
        in_channels=4, patch_size=2, context_in_dim=16, hidden_size=24, mlp_ratio=2.0, num_heads=2, depth=2, axes_dim=[6, 6]
    )
    text = {"encoder_hidden_states": noise(1, 7, 16), "attention_mask": valid_first(7, 5)}
    return model, {"hidden_states": latents(), "timestep": HALF, **text}


def dit() -> Built:
    """Its pictures are square."""
    model = diffusers.DiTTransformer2DModel(
        **HEADS, **PATCHES, num_layers=2, norm_num_groups=4, sample_size=16, num_embeds_ada_norm=1000
    )
    return model, {"hidden_states": noise(1, 4, 16, 16), "timestep": TIMESTEP, "class_labels": torch.tensor([1])}


IMAGES: dict[str, Callable[[], Built]] = {
    builder.__name__: builder
    for builder in (
        qwen_image_21,
        qwen_image_21_edit,
        hunyuan_image,
        hunyuan_dit,
        ideogram4,
        auraflow,
        cogview3plus,
        cogview4,
        glm_image,
        hidream,
        ernie_image,
        joyimage,
        joyimage_plus,
        bria,
        fibo,
        fibo2,
        longcat_image,
        ovis_image,
        lumina_next,
        lumina2,
        nucleus_image,
        prx,
        dit,
    )
}
"""Those with a grid."""


SECOND_AXIS = {"encoder_hidden_states_llama3"}
"""Arguments whose samples lie along the second dimension."""
OF_ALL = {"img_ids", "txt_ids", "image_rotary_emb", "cross_attention_kwargs"}
"""Arguments that all samples share."""


def two_of(inputs: Arguments) -> Arguments:
    """Return inputs of batch 2: a sample, and another with other latents and text."""
    return {
        name: given if name in OF_ALL else _twice(given, 1 if name in SECOND_AXIS else 0) for name, given in inputs.items()
    }


def _twice(given: Any, axis: int) -> Any:
    if isinstance(given, Tensor):
        other = given.flip(-1) * 0.9 if given.is_floating_point() and given.ndim > 2 else given
        return torch.cat([given, other], axis)
    if isinstance(given, dict):
        return {name: _twice(item, axis) for name, item in given.items()}
    if isinstance(given, list) and given and isinstance(given[0], Tensor):
        return [_twice(item, axis) for item in given]
    return given * 2 if isinstance(given, list) else given
