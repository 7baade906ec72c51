"""Train the denoiser: ``python -m benchmarks.zoo.train_denoiser --minutes 15 --batches 4``, after the autoencoder.

Flow matching: a latent clip and noise are blended, ``(1 - sigma) * clip + sigma * noise``, and the transformer predicts
``noise - clip``. The first third of the time goes into small grids, where a step costs little, a part into grids half
way, and the rest into the grid of the demo. A killed run goes on from its last checkpoint. It takes a GPU where there is
one; two CPU cores need hours for what a GPU does in minutes.
"""

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice

import numpy as np
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from benchmarks.zoo.common import Clock, load, sample_clips, save, to_model
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
DEMO = (Grid(2, 33, 128, 192, (0.24, 0.32)), Grid(2, 33, 128, 192, (0.24, 0.32)), *MIDDLE[1:])


PHASES = ((0.35, SMALL), (0.6, MIDDLE), (1.0, DEMO))  # share of the time at which each ends


class Scenes(IterableDataset):
    """Random batches of clips for some grids in turn: (grid, uint8 clips, captions)."""

    def __init__(self, grids: tuple[Grid, ...], batches: int, dropout: float, seed: int) -> None:
        self.grids, self.batches, self.dropout, self.seed = grids, batches, dropout, seed

    def __iter__(self) -> Iterator[tuple[Grid, torch.Tensor, list[str]]]:
        worker = info.id if (info := get_worker_info()) else 0
        rng = np.random.default_rng((self.seed, worker))
        for grid in islice(cycle(self.grids), worker, None):  # workers answer in turns: neighbours bring different grids
            clips, captions = sample_clips(rng, grid.batch * self.batches, grid.frames, grid.height, grid.width, grid.size)
            yield grid, clips, ["" if rng.random() < self.dropout else text for text in captions]


class TrainingAttention:
    """Attention of the transformer's blocks, with the padding of captions folded into one token.

    The pipeline pads captions with hundreds of equal tokens and masks none of them. One token whose score is raised by
    the logarithm of their number has exactly their effect.
    """

    def __init__(self) -> None:
        self.padding = 1.0  # how many tokens the last text token stands for

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(context))
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, attn.to_v(context)))
        if encoder_hidden_states is None:
            query, key, bias = _rotate(query, *rotary_emb), _rotate(key, *rotary_emb), None
        else:
            bias = query.new_zeros(1, 1, 1, context.shape[1])
            bias[..., -1] = math.log(self.padding)
        mixed = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=bias
        )
        return attn.to_out[0](mixed.transpose(1, 2).flatten(2))


def _rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotary positions of neighbouring channels; x is (batch, tokens, heads, channels)."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
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
    parser.add_argument("--dropout", type=float, default=0.1, help="share of captions that are left out")
    parser.add_argument("--batches", type=int, default=1, help="factor on every grid's batch; 4 keeps a GPU busy")
    parser.add_argument("--workers", type=int, default=0, help="processes that draw clips")
    options = parser.parse_args()

    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    state = load(CHECKPOINT) or {"step": 0, "spent": 0.0}
    torch.manual_seed(state["step"])
    vae, encoder, tokenizer = trained().to(device), trained_encoder().to(device), make_tokenizer()
    mean, std = (
        torch.tensor(values, device=device).view(-1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    model, average = untrained().to(device), untrained().to(device).requires_grad_(False)
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
    for end, grids in PHASES:
        scenes = Scenes(grids, options.batches, options.dropout, seed=step)
        batches = iter(DataLoader(scenes, batch_size=None, num_workers=options.workers, pin_memory=device.type == "cuda"))
        while clock.done < end:
            grid, clips, captions = next(batches)
            for stepper in steppers:
                for group in stepper.param_groups:
                    group["lr"] = options.rate * clock.rate(step)
            # Text speaks up first, then learns to outweigh the padding that it will meet in the pipeline.
            attention.padding = (PADDED - TOKENS) ** min(1.0, clock.done / 0.3)

            with torch.no_grad():
                latents = (vae.encode(to_model(clips.to(device))).latent_dist.mode() - mean) / std
                text = embed(encoder, tokenizer, captions)
            uniform = (torch.arange(len(clips)) + torch.rand(len(clips))) / len(clips)
            sigma = (grid.shift * uniform / (1 + (grid.shift - 1) * uniform)).to(device)
            noise = torch.randn_like(latents)
            blend = torch.lerp(latents, noise, sigma.view(-1, 1, 1, 1, 1))
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                velocity = model(blend, 1000 * sigma, text, return_dict=False)[0]
            loss = F.mse_loss(velocity.float(), noise - latents)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for stepper in steppers:
                stepper.step()
                stepper.zero_grad()
            step += 1
            with torch.no_grad():
                weight = 1 - min(0.998, (1 + step) / (10 + step))
                torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), weight)

            losses.append(loss.detach())
            if step % 50 == 0:
                print(f"step {step} {clock.spent:.0f}s loss {torch.stack(losses[-50:]).mean():.4f}", flush=True)
            if step % 250 == 0:
                checkpoint()
    checkpoint()


if __name__ == "__main__":
    main()
