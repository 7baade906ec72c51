"""CogVideoX and 1.5, and ConsisID: joint attention, all of the padded text ahead of the video, no mask.

Latents are (B, T, C, H, W). 1.5 joins two latent frames in a token (``patch_size_t``); its pipeline pads their number to even. ConsisID
adds what it reads of a face to the video between blocks.
"""

from accelplug.families.base import Family, Rotary, latents

COGVIDEOX = Family(
    name="cogvideox",
    classes=("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel"),
    sites=(("transformer_blocks.*.attn1", "joint"),),
    geometry=latents("btchw", text=("encoder_hidden_states",), text_first=True),
    rotary=Rotary(
        channels=lambda config: config.attention_head_dim // 4,
        base=lambda config: 10_000.0,
        argument="image_rotary_emb",
        turns=lambda config: config.use_rotary_positional_embeddings,  # the 2B model has positions of another kind
    ),
    chained=True,
    status="verified",
)
