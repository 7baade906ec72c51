"""Tiny geometry transformers with random weights: stand-ins with the attributes, arguments and ways of calling attention of the real ones,
which are in no library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from accelplug.testing.models import Built, noise
from accelplug.zoo.geometry import VGGT, Attention, PatchEmbed, Rope2D

PATCH, WIDTH, HEADS = 14, 32, 2


def grid_positions(height: int, width: int, special: int) -> Tensor:
    """Row and column of a frame's tokens from 1, special ones at 0: (P, 2)."""
    grid = torch.cartesian_prod(torch.arange(height // PATCH), torch.arange(width // PATCH)) + 1
    return torch.cat([grid.new_zeros(special, 2), grid])


class XposAttention(Attention):
    """pi3's: the argument is `xpos`, and the kernel is chosen around the call."""

    def forward(self, x: Tensor, attn_bias: Any = None, xpos: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        q, k = self.rope(self.q_norm(q), xpos), self.rope(self.k_norm(k), xpos)
        with sdpa_kernel([SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION]):
            out = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(x.shape))


class MaskedAttention(Attention):
    """Depth-Anything 3's: takes a mask, and says its scale."""

    def forward(self, x: Tensor, pos: Tensor | None = None, attn_mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, scale=self.scale)
        return self.proj(out.transpose(1, 2).reshape(x.shape))


class TorchAttention(Attention):
    """VGGT-Omega's: attention stands in another method, and is reached by ``torch.nn.functional``."""

    def forward(self, x: Tensor, attn_bias: Any = None, rope: Any = None) -> Tensor:
        return self.proj(self.compute_attention(self.qkv(x)))

    def compute_attention(self, qkv: Tensor) -> Tensor:
        """(B, N, 3 C) -> (B, N, C)."""
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        out = torch.nn.functional.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return out.transpose(1, 2).flatten(2)


class PlainBlock(nn.Module):
    """Attention and one linear layer; hands all arguments on."""

    def __init__(self, attention: type[Attention]) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(WIDTH), attention(WIDTH, HEADS, Rope2D())
        self.mlp = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x = x + self.attn(self.norm1(x), *args, **kwargs)
        return x + self.mlp(x)


class Pi3(nn.Module):
    """One decoder whose even blocks read a frame and whose odd ones read all; five registers, no camera token, no reference."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.patch_size = PATCH
        self.encoder = PatchEmbed(PATCH, WIDTH)
        self.position_getter = None
        self.decoder = nn.ModuleList(PlainBlock(XposAttention) for _ in range(depth))
        self.patch_start_idx = 5
        self.register_token = nn.Parameter(0.1 * torch.randn(1, 1, 5, WIDTH))

    def forward(self, imgs: Tensor) -> Tensor:
        batch, frames, _, height, width = imgs.shape
        hidden = self.encoder(imgs.flatten(0, 1))
        hidden = torch.cat([self.register_token[0].expand(len(hidden), -1, -1), hidden], 1)
        pos = grid_positions(height, width, 5).expand(batch * frames, -1, -1)
        tokens = hidden.shape[1]
        for number, block in enumerate(self.decoder):
            rows = batch if number % 2 else batch * frames
            hidden = block(hidden.reshape(rows, -1, WIDTH), xpos=pos.reshape(rows, -1, 2))
        return hidden.reshape(batch, frames, tokens, WIDTH)


class DepthAnything3(nn.Module):
    """A backbone whose own forward nobody calls; from `alt_start` on every second block reads all frames."""

    def __init__(self, depth: int = 6) -> None:
        super().__init__()
        self.pretrained = nn.Module()
        inner: Any = self.pretrained
        inner.patch_size, inner.patch_start_idx, inner.alt_start = PATCH, 1, 2
        inner.patch_embed = PatchEmbed(PATCH, WIDTH)
        inner.camera_token = nn.Parameter(0.1 * torch.randn(1, 2, WIDTH))
        inner.blocks = nn.ModuleList(PlainBlock(MaskedAttention) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        batch, frames = x.shape[:2]
        inner: Any = self.pretrained
        tokens = inner.patch_embed(x.flatten(0, 1)).unflatten(0, (batch, frames))
        camera = torch.cat([inner.camera_token[:, :1], inner.camera_token[:, 1:].expand(-1, frames - 1, -1)], 1)
        tokens = torch.cat([camera.expand(batch, -1, -1)[:, :, None], tokens], 2)
        shape = tokens.shape
        for number, block in enumerate(inner.blocks):
            of_all = number >= inner.alt_start and number % 2 == 1
            tokens = tokens.reshape(batch, -1, WIDTH) if of_all else tokens.reshape(batch * frames, -1, WIDTH)
            tokens = block(tokens, pos=None, attn_mask=None).reshape(shape)
        return tokens


class VGGTOmega(nn.Module):
    """Some of the blocks between frames read special tokens alone."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.aggregator = OmegaAggregator(depth)

    def forward(self, images: Tensor) -> Tensor:
        return self.aggregator(images)[0][-1]


class OmegaAggregator(nn.Module):
    """Of `VGGTOmega`."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.patch_size, self.patch_token_start = PATCH, 3
        self.patch_embed = PatchEmbed(PATCH, WIDTH)
        self.special = nn.Parameter(0.1 * torch.randn(3, WIDTH))
        self.frame_blocks = nn.ModuleList(PlainBlock(TorchAttention) for _ in range(depth))
        self.inter_frame_blocks = nn.ModuleList(PlainBlock(TorchAttention) for _ in range(depth))
        self.inter_frame_attention_types = ["global", "register"] * (depth // 2)

    def forward(self, images: Tensor) -> tuple[list[Tensor], int]:
        batch, frames = images.shape[:2]
        patches = self.patch_embed(images.flatten(0, 1))
        x = torch.cat([self.special.expand(len(patches), -1, -1), patches], 1)
        tokens, start, outputs = x.shape[1], self.patch_token_start, []
        for frame, between, kind in zip(
            self.frame_blocks, self.inter_frame_blocks, self.inter_frame_attention_types, strict=True
        ):
            within = frame(x, None).view(batch, frames, tokens, WIDTH)
            if kind == "global":
                x = between(within.reshape(batch, frames * tokens, WIDTH), None).view(batch, frames, tokens, WIDTH)
            else:
                special = between(within[:, :, :start].reshape(batch, frames * start, WIDTH), None)
                x = torch.cat([special.view(batch, frames, start, WIDTH), within[:, :, start:]], 2)
            outputs.append(torch.cat([within, x], dim=-1))
            x = x.view(batch * frames, tokens, WIDTH)
        return outputs, start


def vggt(layers: int = 4) -> Built:
    """Five special tokens ahead of 3 x 5 patches of each of three frames."""
    model = VGGT(embed_dim=WIDTH, depth=layers, num_heads=HEADS, layers=(0, layers - 1))
    return model, {"images": noise(1, 3, 3, 42, 70)}


def pi3() -> Built:
    """As many tokens, and no reference."""
    return Pi3(), {"imgs": noise(1, 3, 3, 42, 70)}


def depth_anything_3() -> Built:
    """A camera token ahead of the patches."""
    return DepthAnything3(), {"x": noise(1, 3, 3, 42, 70)}


def vggt_omega() -> Built:
    """Three special tokens ahead of the patches."""
    return VGGTOmega(), {"images": noise(1, 3, 3, 42, 70)}


GEOMETRY_TRIED: dict[str, Callable[[], Built]] = {
    "vggt": vggt,
    "pi3": pi3,
    "depth-anything-3": depth_anything_3,
    "vggt-omega": vggt_omega,
}
"""A stand-in of each family that is known."""
