"""Train the denoiser: ``python -m benchmarks.zoo.train_denoiser --minutes 60``, after the autoencoder.

Flow matching: a latent clip and noise are blended, ``(1 - sigma) * clip + sigma * noise``, and the transformer predicts
``noise - clip``. Most of the time goes into small grids, where a step costs little; a part goes into grids half way, and
the last steps into the grid of the demo. A killed run goes on from its last checkpoint.
"""

import argparse
import math
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention
from torch.nn import functional as F

from benchmarks.zoo.common import Clock, load, sample_clips, save
from benchmarks.zoo.text import TOKENS, embed, make_tokenizer, trained_encoder
from benchmarks.zoo.train_vae import LATENTS, trained

CHECKPOINT = "denoiser.pt"
PADDED = 512  # tokens that the pipeline pads a caption to, unless told otherwise
CONFIG = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "in_channels": LATENTS,
    "out_channels": LATENTS,
    "text_dim": 64,
    "freq_dim": 128,
    "ffn_dim": 384,
    "num_layers": 6,
    "rope_max_seq_len": 256,
}


@dataclass(frozen=True)
class Grid:
    """Clips of one training step: how many, of which shape in pixels, and the shapes' sizes in units of the canvas.

    Shapes are smaller on larger canvases, so that in tokens they stay close to one another on all of them.
    """

    batch: int
    frames: int
    height: int
    width: int
    size: tuple[float, float]

    @property
    def shift(self) -> float:
        """How far noise levels lean towards noise: more tokens tell the same clip through more noise."""
        tokens = (self.frames + 1) // 2 * self.height * self.width // 64
        return 2.5 * math.sqrt(tokens / 400)


SMALL = (
    Grid(16, 9, 64, 80, (0.34, 0.4)),
    Grid(16, 9, 64, 80, (0.34, 0.4)),
    Grid(16, 13, 64, 64, (0.34, 0.4)),
    Grid(10, 9, 80, 96, (0.28, 0.4)),
)
MIDDLE = (Grid(6, 13, 96, 112, (0.26, 0.36)), Grid(3, 17, 112, 144, (0.25, 0.33)), Grid(16, 9, 64, 80, (0.34, 0.4)))
DEMO = (Grid(1, 33, 128, 192, (0.24, 0.32)), Grid(3, 17, 112, 144, (0.25, 0.33)), Grid(16, 9, 64, 80, (0.34, 0.4)))


def grids(done: float) -> tuple[Grid, ...]:
    """The grids to take turns with after a share of the training time."""
    return SMALL if done < 0.6 else MIDDLE if done < 0.82 else DEMO


class TrainingAttention:
    """Attention of the transformer's blocks, with the padding of captions folded into one token.

    The pipeline pads captions with hundreds of equal tokens and masks none of them. One token whose score is raised by
    the logarithm of their number has exactly their effect.
    """

    def __init__(self) -> None:
        self.padding = 1.0  # how many tokens the last text token stands for

    def __call__(self, attn: WanAttention, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(context))
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, attn.to_v(context)))
        if encoder_hidden_states is None:
            query, key, bias = _rotate(query, *rotary_emb), _rotate(key, *rotary_emb), None
        else:
            bias = torch.zeros(1, 1, 1, context.shape[1])
            bias[..., -1] = math.log(self.padding)
        mixed = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=bias
        )
        return attn.to_out[0](mixed.transpose(1, 2).flatten(2))


def _rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotary positions of neighbouring channels; x is (batch, tokens, heads, channels)."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.complex(cosine[..., ::2], sine[..., ::2]).to(pairs.dtype)).flatten(-2)


def untrained() -> WanTransformer3DModel:
    """A new transformer that predicts nothing, with blocks that have an effect from the start."""
    model = WanTransformer3DModel(**CONFIG)
    with torch.no_grad():
        model.proj_out.weight.zero_()
        for block in model.blocks:
            block.scale_shift_table[:, [2, 5]] = 0.4  # the gates of attention and feed-forward
    return model


def optimizers(model: WanTransformer3DModel) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for everything else."""
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--dropout", type=float, default=0.1, help="share of steps' captions that are left out")
    options = parser.parse_args()

    state = load(CHECKPOINT) or {"step": 0, "spent": 0.0}
    torch.manual_seed(state["step"])
    rng = np.random.default_rng(state["step"])
    vae, encoder, tokenizer = trained(), trained_encoder(), make_tokenizer()
    mean, std = (torch.tensor(values).view(-1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std))
    model, average = untrained(), untrained().requires_grad_(False)
    average.load_state_dict(model.state_dict())
    attention = TrainingAttention()
    model.set_attn_processor(attention)
    steppers = optimizers(model)
    if "model" in state:
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        for stepper, saved in zip(steppers, state["optimizers"], strict=True):
            stepper.load_state_dict(saved)

    def checkpoint() -> None:
        parts = {"model": model.state_dict(), "average": average.state_dict()}
        parts["optimizers"] = [stepper.state_dict() for stepper in steppers]
        save(dict(parts, step=step, spent=clock.spent), CHECKPOINT)

    clock, step, losses = Clock(60 * options.minutes, state["spent"]), state["step"], []
    while clock.done < 1:
        for stepper in steppers:
            for group in stepper.param_groups:
                group["lr"] = options.rate * clock.rate(step)
        # Text speaks up first, then learns to outweigh the padding that it will meet in the pipeline.
        attention.padding = (PADDED - TOKENS) ** min(1.0, clock.done / 0.4)

        turns = grids(clock.done)
        grid = turns[step % len(turns)]
        clips, captions = sample_clips(rng, grid.batch, grid.frames, grid.height, grid.width, grid.size)
        captions = ["" if rng.random() < options.dropout else text for text in captions]
        with torch.no_grad():
            latents = (vae.encode(clips).latent_dist.mode() - mean) / std
            text = embed(encoder, tokenizer, captions)
        uniform = (torch.arange(grid.batch) + torch.rand(grid.batch)) / grid.batch
        sigma = grid.shift * uniform / (1 + (grid.shift - 1) * uniform)
        noise = torch.randn_like(latents)
        blend = torch.lerp(latents, noise, sigma.view(-1, 1, 1, 1, 1))
        velocity = model(blend, 1000 * sigma, text, return_dict=False)[0]
        loss = F.mse_loss(velocity, noise - latents)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in steppers:
            stepper.step()
            stepper.zero_grad()
        step += 1
        with torch.no_grad():
            weight = 1 - min(0.998, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), weight)

        losses.append(loss.item())
        if step % 50 == 0:
            print(f"step {step} {clock.spent:.0f}s loss {np.mean(losses[-50:]):.4f}", flush=True)
        if step % 250 == 0:
            checkpoint()
    checkpoint()


if __name__ == "__main__":
    main()
