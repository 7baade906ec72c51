"""Tiny language and vision-language models with random weights, and inputs for them: rows of text and images."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import repeat
from typing import Any

import torch
import transformers as hf

import accelplug
from accelplug import compat
from accelplug.inspection.looking import VlmInspection
from accelplug.testing.language_models import (
    CLOSE,
    IMAGE,
    MROPE,
    OPEN,
    QWEN_IDS,
    TEXT_CONFIG,
    TOWER_CONFIG,
    VIDEO,
    TokenRows,
    image_tokens,
    llava_model,
    padded_rows,
    qwen2_5_vl_model,
)
from accelplug.testing.models import Built

PINPOINTS = [[32, 64], [64, 32], [64, 64]]


def _llama() -> Any:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT_CONFIG))


def _mistral() -> Any:
    return hf.MistralForCausalLM(hf.MistralConfig(**TEXT_CONFIG, sliding_window=16))


def _qwen3() -> Any:
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**TEXT_CONFIG, head_dim=16))


def _gpt_oss() -> Any:
    config = hf.GptOssConfig(
        **TEXT_CONFIG,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=16,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    model = hf.GptOssForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "sinks" in name:
            torch.nn.init.normal_(parameter)
    return model


def _deepseek_v3() -> Any:
    config = hf.DeepseekV3Config(
        **{**TEXT_CONFIG, "num_key_value_heads": 4},
        q_lora_rank=32,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=2,
        moe_intermediate_size=32,
        n_shared_experts=1,
    )
    return hf.DeepseekV3ForCausalLM(config)


def _qwen3_next() -> Any:
    config = hf.Qwen3NextConfig(
        **TEXT_CONFIG,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
    )
    return hf.Qwen3NextForCausalLM(config)


def _qwen3_5() -> Any:
    config = hf.Qwen3_5TextConfig(
        **TEXT_CONFIG,
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
    )
    return hf.Qwen3_5ForCausalLM(config)


def _lfm2() -> Any:
    return hf.Lfm2ForCausalLM(hf.Lfm2Config(**TEXT_CONFIG, full_attn_idxs=[1, 3]))


def _gemma3_text() -> Any:
    types = ["sliding_attention", "full_attention"] * 2
    text = {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16, "layer_types": types}
    return hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**TEXT_CONFIG, **text))


def _llava_next() -> Any:
    config = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**TOWER_CONFIG, projection_dim=32),
        text_config=hf.LlamaConfig(**TEXT_CONFIG),
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        image_grid_pinpoints=PINPOINTS,
    )
    return hf.LlavaNextForConditionalGeneration(config)


def _llava_onevision() -> Any:
    config = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**TOWER_CONFIG, vision_use_head=False),
        text_config=hf.Qwen2Config(**TEXT_CONFIG),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio="anyres_max_9",
    )
    return hf.LlavaOnevisionForConditionalGeneration(config)


def _qwen2_vl() -> Any:
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 8, "mlp_ratio": 2}
    config = hf.Qwen2VLConfig(
        text_config={**TEXT_CONFIG, "rope_parameters": MROPE}, vision_config={**vision, "spatial_merge_size": 2}, **QWEN_IDS
    )
    return hf.Qwen2VLForConditionalGeneration(config)


def _qwen3_vl() -> Any:
    vision = {"depth": 3, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2, "patch_size": 8, "intermediate_size": 64}
    config = hf.Qwen3VLConfig(
        text_config={**TEXT_CONFIG, "head_dim": 16, "rope_parameters": {**MROPE, "mrope_interleaved": True}},
        vision_config={**vision, "spatial_merge_size": 2, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
        **QWEN_IDS,
    )
    return hf.Qwen3VLForConditionalGeneration(config)


def _internvl() -> Any:
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = hf.InternVLConfig(
        vision_config={**vision, "image_size": [32, 32], "patch_size": [4, 4]},
        text_config={"model_type": "qwen2", **TEXT_CONFIG},
        image_token_id=IMAGE,
        image_seq_length=16,
        downsample_ratio=0.5,
    )
    return hf.InternVLForConditionalGeneration(config)


def _gemma3() -> Any:
    text = {**TEXT_CONFIG, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = hf.Gemma3Config(
        text_config={**text, "layer_types": ["sliding_attention", "full_attention"] * 2},
        vision_config={**vision, "image_size": 32, "patch_size": 8},
        image_token_index=IMAGE,
        mm_tokens_per_image=4,
        boi_token_index=OPEN,
        eoi_token_index=CLOSE,
    )
    return hf.Gemma3ForConditionalGeneration(config)


def _smolvlm() -> Any:
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = hf.SmolVLMConfig(
        vision_config={**vision, "image_size": 32, "patch_size": 8},
        text_config={"model_type": "llama", **TEXT_CONFIG},
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=0,
    )
    return hf.SmolVLMForConditionalGeneration(config)


VLM: dict[str, Callable[..., Any]] = {
    "llava": llava_model,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl_model,
    "qwen3_vl": _qwen3_vl,
    "internvl": _internvl,
    "gemma3": _gemma3,
    "smolvlm": _smolvlm,
}
LLM: dict[str, Callable[..., Any]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen3": _qwen3,
    "gpt_oss": _gpt_oss,
    "deepseek_v3": _deepseek_v3,
    "qwen3_next": _qwen3_next,
    "qwen3_5": _qwen3_5,
    "lfm2": _lfm2,
    "gemma3_text": _gemma3_text,
}
PER_IMAGE = {"llava": 16, "internvl": 16, "gemma3": 4, "smolvlm": 4, "llava_next": 52, "llava_onevision": 52}
GRIDS = ((1, 4, 6), (1, 8, 4), (1, 4, 4))
FRAMES = (2, 4, 4)
"""Frames, patch rows and patch columns of every video; four patches make a token."""
VIDEOS = ("llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
TWO_ROWS: TokenRows = ((3, "I", 6), (4, "I", 5, "I", 7))


def build(name: str, **text: Any) -> Any:
    """A tiny model, always with the same weights; a LLaVA also with other settings of its language model."""
    torch.manual_seed(0)
    return {**VLM, **LLM}[name](**text).eval().requires_grad_(False)


def _built(name: str) -> Built:
    return VLM[name](), inputs(name)


BUILT: dict[str, Callable[[], Built]] = {name: partial(_built, name) for name in VLM}
"""What makes each vision-language model, and what it is given."""


def _video_ids(name: str) -> list[int]:
    frames, tokens = FRAMES[0], FRAMES[1] * FRAMES[2] // 4
    if name == "qwen3_vl":  # a time stamp ahead of every frame, and marks around it
        return [x for frame in range(frames) for x in (20 + frame, OPEN, *[VIDEO] * tokens, CLOSE)]
    newline = name == "llava_onevision"
    return [OPEN, *[VIDEO] * (frames * tokens + newline), CLOSE]


def _videos(name: str, number: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    if name == "llava_onevision":
        return {"pixel_values_videos": torch.randn(number, FRAMES[0], 3, 32, 32, generator=generator)}
    patches = torch.randn(number * FRAMES[0] * FRAMES[1] * FRAMES[2], 3 * 2 * 8 * 8, generator=generator)
    return {"pixel_values_videos": patches, "video_grid_thw": torch.tensor([FRAMES] * number)}


def inputs(name: str, rows: TokenRows = TWO_ROWS) -> dict[str, torch.Tensor]:
    """Left-padded inputs of a tiny model."""
    generator = torch.Generator().manual_seed(3)
    images = sum(part == "I" for row in rows for part in row)
    extra: dict[str, torch.Tensor] = {}
    if name.startswith("qwen") and name in VLM:
        grids = [GRIDS[i % len(GRIDS)] for i in range(images)]
        tokens = [t * h * w // 4 for t, h, w in grids]
        if images:
            extra["image_grid_thw"] = torch.tensor(grids)
            extra["pixel_values"] = torch.randn(4 * sum(tokens), 3 * 2 * 8 * 8, generator=generator)
    else:
        tokens = [PER_IMAGE.get(name, 5)] * images
        if not images:
            pass
        elif name in ("llava_next", "llava_onevision"):
            extra["image_sizes"] = torch.tensor([[32, 64]] * images)
            extra["pixel_values"] = torch.randn(images, 3, 3, 32, 32, generator=generator)
        elif name == "smolvlm":
            most = max(sum(part == "I" for part in row) for row in rows)
            extra["pixel_values"] = torch.randn(len(rows), most, 3, 32, 32, generator=generator)
            for i, row in enumerate(rows):  # rows with fewer images are filled up with zeros, which the model leaves out
                extra["pixel_values"][i, sum(part == "I" for part in row) :] = 0
        elif name in VLM:
            extra["pixel_values"] = torch.randn(images, 3, 32, 32, generator=generator)
    shown = {"I": map(image_tokens, tokens), "V": repeat(_video_ids(name))}
    given = padded_rows(rows, shown, generator)
    ids = given["input_ids"]
    if videos := sum(part == "V" for row in rows for part in row):
        extra |= _videos(name, videos)
    if name.startswith("qwen") and name in VLM:
        extra["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    if name == "gemma3":
        extra["token_type_ids"] = (ids == IMAGE).int()
    return {**given, **extra}


def right_padded(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Left-padded inputs with their padding on the right."""
    mask = given["attention_mask"].bool()
    names = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids", "labels")
    last = {name: given[name] for name in names if name in given}
    empty = {name: torch.full_like(x, -100 if name == "labels" else 0) for name, x in last.items()}
    moved = {name: x.masked_scatter(mask.flip(-1), last[name][mask]) for name, x in empty.items()}
    return {**given, **moved}


def held(cache: Any) -> dict[str, Any]:
    """The argument by which a model is given a cache, whatever this version of transformers calls it."""
    return {compat.transformers.cache_keyword(hf.LlamaForCausalLM.forward): cache}


def looked(model: Any, inputs: dict[str, torch.Tensor]) -> VlmInspection:
    """What an inspection finds that looks at images."""
    found = accelplug.inspect(model, inputs)
    assert isinstance(found, VlmInspection)
    return found
