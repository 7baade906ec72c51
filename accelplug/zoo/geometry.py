"""A small VGGT: the modules, shapes and names of the large one (arXiv 2503.11651), written anew, 3 million weights.

Pictures of one scene go in, at once. Blocks alternate: attention within each frame, then over the tokens of all frames. A frame has one
camera token, four registers, then its patches; the first frame has special tokens of its own, since all poses are told in its coordinates.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import interpolate, scaled_dot_product_attention

SPECIAL = 5
"""Tokens ahead of a frame's patches: the camera's, and four registers."""


class Rope2D(nn.Module):
    """Rotary positions in two dimensions: half of the channels turn by the row, half by the column."""

    def __init__(self, base: float = 100.0) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor, pos: Tensor) -> Tensor:
        """Turn queries or keys (B, H, N, D) by positions (B, N, 2)."""
        pairs = x.shape[-1] // 4
        rate = self.base ** (-torch.arange(pairs, device=x.device) / pairs)
        angle = pos[:, None, :, :, None] * rate  # [B, 1, N, 2, D / 4]
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        left, right = x.unflatten(-1, (2, 2, pairs)).unbind(-2)  # [B, H, N, 2, D / 4]
        return torch.stack([left * cos - right * sin, right * cos + left * sin], dim=-2).flatten(-3)


class Attention(nn.Module):
    """Self-attention with a norm on queries and keys."""

    def __init__(self, dim: int, num_heads: int, rope: Rope2D) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.scale, self.fused_attn = self.head_dim**-0.5, True
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm, self.k_norm = nn.LayerNorm(self.head_dim), nn.LayerNorm(self.head_dim)
        self.attn_drop, self.proj, self.proj_drop = nn.Dropout(0.0), nn.Linear(dim, dim), nn.Dropout(0.0)
        self.rope = rope

    def forward(self, x: Tensor, pos: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)  # [B, H, N, D] each
        q, k = self.q_norm(q), self.k_norm(k)
        if pos is not None:
            q, k = self.rope(q, pos), self.rope(k, pos)
        out = scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class LayerScale(nn.Module):
    def __init__(self, dim: int, init: float = 1.0) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Attention, then two linear layers, each with a norm ahead and a scale behind."""

    def __init__(self, dim: int, num_heads: int, rope: Rope2D) -> None:
        super().__init__()
        self.norm1, self.attn, self.ls1 = nn.LayerNorm(dim), Attention(dim, num_heads, rope), LayerScale(dim)
        self.norm2, self.ls2 = nn.LayerNorm(dim), LayerScale(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, pos: Tensor | None = None) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x), pos=pos))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Patches of a picture, and where they lie in it, as tokens (B, H * W, C). The large model has a whole DINOv2 here."""

    OCTAVES = 4

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(3, dim // 2, patch_size // 2, patch_size // 2), nn.GELU(), nn.Conv2d(dim // 2, dim, 2, 2)
        )
        self.place = nn.Linear(4 * self.OCTAVES, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.proj(x)
        return self.norm(patches.flatten(2).mT + self.place(self.waves(patches)))

    def waves(self, patches: Tensor) -> Tensor:
        """Waves (H * W, 4 * OCTAVES) over a picture from -1 to 1 in each direction, whatever its patches (B, C, H, W)."""
        device, dtype = patches.device, self.place.weight.dtype
        y, x = ((torch.arange(n, device=device) + 0.5) * (2 / n) - 1 for n in patches.shape[-2:])
        angle = torch.cartesian_prod(y, x)[..., None] * (math.pi / 2 * 2 ** torch.arange(self.OCTAVES, device=device))
        return torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(1).to(dtype)


class Aggregator(nn.Module):
    """The alternation: frame blocks, and global ones."""

    def __init__(self, patch_size: int, embed_dim: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.patch_size, self.depth, self.patch_start_idx = patch_size, depth, SPECIAL
        self.rope = Rope2D()
        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.frame_blocks = nn.ModuleList(Block(embed_dim, num_heads, self.rope) for _ in range(depth))
        self.global_blocks = nn.ModuleList(Block(embed_dim, num_heads, self.rope) for _ in range(depth))
        # The first of two is for the first frame, the second for all others.
        self.camera_token = nn.Parameter(0.02 * torch.randn(1, 2, 1, embed_dim))
        self.register_token = nn.Parameter(0.02 * torch.randn(1, 2, SPECIAL - 1, embed_dim))

    def forward(self, images: Tensor) -> tuple[list[Tensor], int]:
        """Return each pair of blocks' outputs side by side, (B, S, P, 2 C), and how many special tokens lead a frame.

        Parameters
        ----------
        images : (B, S, 3, H, W) in 0..1.
        """
        batch, frames, _, height, width = images.shape
        patches = self.patch_embed(((images - 0.45) / 0.25).flatten(0, 1))
        special = torch.cat([self.camera_token, self.register_token], dim=2)
        special = torch.cat([special[:, :1], special[:, 1:].expand(-1, frames - 1, -1, -1)], dim=1)
        x = torch.cat([special.expand(batch, -1, -1, -1).flatten(0, 1), patches], dim=1)  # [B S, P, C]

        rows, columns = height // self.patch_size, width // self.patch_size
        grid = torch.cartesian_prod(torch.arange(rows, device=x.device), torch.arange(columns, device=x.device)) + 1
        pos = torch.cat([grid.new_zeros(SPECIAL, 2), grid]).expand(batch * frames, -1, -1)

        outputs, tokens = [], x.shape[1]
        for frame_block, global_block in zip(self.frame_blocks, self.global_blocks, strict=True):
            x = within = frame_block(x.view(batch * frames, tokens, -1), pos=pos)
            x = global_block(x.view(batch, frames * tokens, -1), pos=pos.reshape(batch, frames * tokens, 2))
            outputs.append(torch.cat([within.view(batch, frames, tokens, -1), x.view(batch, frames, tokens, -1)], dim=-1))
        return outputs, self.patch_start_idx


class CameraHead(nn.Module):
    """A frame's pose from its camera token."""

    def __init__(self, dim_in: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.LayerNorm(dim_in), nn.Linear(dim_in, dim_in), nn.GELU(), nn.Linear(dim_in, 9))

    def forward(self, outputs: list[Tensor]) -> Tensor:
        """(B, S, 9): translation, unit quaternion (x, y, z, w), fields of view (vertical, across) in radians."""
        pose = self.branch(outputs[-1][:, :, 0])
        turn = nn.functional.normalize(pose[..., 3:7] + pose.new_tensor([0.0, 0.0, 0.0, 1.0]), dim=-1)
        return torch.cat([pose[..., :3], turn, pose[..., 7:].relu()], dim=-1)


class DenseHead(nn.Module):
    """Numbers for every pixel, from what a few pairs of blocks made of the patches."""

    def __init__(self, dim_in: int, patch_size: int, layers: tuple[int, ...], channels: int) -> None:
        super().__init__()
        self.layers, self.side, self.channels = layers, patch_size // 2, channels
        self.norms = nn.ModuleList(nn.LayerNorm(dim_in) for _ in layers)
        self.inner, self.outer = nn.Linear(dim_in * len(layers), dim_in), nn.Linear(dim_in, channels * self.side**2)

    def forward(self, outputs: list[Tensor], height: int, width: int, patch_start_idx: int) -> Tensor:
        """(B, S, H, W, channels)."""
        read = [norm(outputs[layer][:, :, patch_start_idx:]) for norm, layer in zip(self.norms, self.layers, strict=True)]
        fine = self.outer(nn.functional.gelu(self.inner(torch.cat(read, dim=-1))))  # [B, S, P, channels * side^2]
        rows = height // (2 * self.side)
        fine = fine.unflatten(-1, (self.channels, self.side, self.side)).unflatten(2, (rows, -1))
        fine = fine.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)  # [B, S, channels, rows * side, columns * side]
        return interpolate(fine.flatten(0, 1), (height, width), mode="bilinear").unflatten(0, fine.shape[:2]).movedim(2, -1)


class VGGT(nn.Module):
    """Poses of the frames of a scene, and depth and place of their pixels.

    Parameters
    ----------
    patch_size, embed_dim, depth, num_heads : of the aggregator; `depth` counts pairs of blocks.
    layers : pairs of blocks whose outputs the heads of depth and points read.
    """

    def __init__(
        self,
        patch_size: int = 14,
        embed_dim: int = 128,
        depth: int = 6,
        num_heads: int = 4,
        layers: tuple[int, ...] = (1, 3, 4, 5),
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "patch_size": patch_size,
            "embed_dim": embed_dim,
            "depth": depth,
            "num_heads": num_heads,
            "layers": list(layers),
        }
        self.aggregator = Aggregator(patch_size, embed_dim, depth, num_heads)
        self.camera_head = CameraHead(2 * embed_dim)
        self.depth_head = DenseHead(2 * embed_dim, patch_size, tuple(layers), channels=1)
        self.point_head = DenseHead(2 * embed_dim, patch_size, tuple(layers), channels=3)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return what is seen in pictures (B, S, 3, H, W), or (S, 3, H, W), in 0..1.

        `pose_enc` (B, S, 9), `depth` (B, S, H, W, 1) and `world_points` (B, S, H, W, 3), in the first frame's coordinates.
        """
        images = images[None] if images.ndim == 4 else images
        outputs, start = self.aggregator(images)
        return {
            "pose_enc": self.camera_head(outputs),
            "depth": self.depth_head(outputs, *images.shape[-2:], start).exp(),
            "world_points": self.point_head(outputs, *images.shape[-2:], start),
            "images": images,
        }

    def save_pretrained(self, folder: Path) -> None:
        """Write the weights in half precision, and what the model is made of."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: weight.half().contiguous() for name, weight in self.state_dict().items()}, folder / "model.safetensors"
        )
        (folder / "config.json").write_text(json.dumps({"architectures": ["VGGT"], **self.config}, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> VGGT:
        """Load a model that `save_pretrained` wrote, in float32, for inference."""
        config = json.loads((Path(folder) / "config.json").read_text())
        model = cls(**{name: value for name, value in config.items() if name != "architectures"})
        model.load_state_dict(
            {name: weight.float() for name, weight in load_file(Path(folder) / "model.safetensors").items()}
        )
        return model.eval().requires_grad_(False)
