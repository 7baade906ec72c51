"""Train the video autoencoder: ``python -m benchmarks.zoo.train_vae --minutes 6``.

It compresses 4 x 4 pixels and 2 frames into one latent of 8 channels. The first factor of 2 in height and width is the
autoencoder's own pixel shuffle, which keeps its convolutions off full resolution: decoding is quick without a GPU.
"""

import argparse

import numpy as np
import torch
from diffusers import AutoencoderKLWan

from benchmarks.zoo.common import Clock, load, sample_clips, save, to_model

CHECKPOINT = "vae.pt"
LATENTS = 8
CONFIG = {
    "base_dim": 12,
    "decoder_base_dim": 16,
    "z_dim": LATENTS,
    "dim_mult": [1, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [True],
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_temporal": 2,
    "scale_factor_spatial": 4,
    "latents_mean": [0.0] * LATENTS,
    "latents_std": [1.0] * LATENTS,
}
GRIDS = ((3, 5, 48, 48), (2, 5, 48, 64), (2, 9, 40, 48), (1, 5, 80, 96))  # batch, frames, height, width


def untrained() -> AutoencoderKLWan:
    """A new autoencoder that starts with nearly no noise on its latents and with faint colours.

    Decoding clamps its output, and a clamped value has no gradient.
    """
    vae = AutoencoderKLWan(**CONFIG)
    with torch.no_grad():
        vae.quant_conv.weight[LATENTS:] = 0
        vae.quant_conv.bias[LATENTS:] = -5  # logarithm of the variance
        vae.decoder.conv_out.weight.mul_(0.1)
    return vae


def trained() -> AutoencoderKLWan:
    """The autoencoder of the last checkpoint, with its latent statistics, for use."""
    state = load(CHECKPOINT)
    vae = AutoencoderKLWan(**{**CONFIG, "latents_mean": state["mean"], "latents_std": state["std"]})
    vae.load_state_dict(state["model"])
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def statistics(vae: AutoencoderKLWan, rng: np.random.Generator) -> tuple[list[float], list[float], float]:
    """Mean and deviation of every latent channel, and the reconstruction's PSNR in dB, over fresh clips."""
    modes, error = [], []
    for _ in range(12):
        clips = to_model(sample_clips(rng, 4, 9, 80, 96, (0.24, 0.4))[0])
        mode = vae.encode(clips).latent_dist.mode()
        modes.append(mode.transpose(0, 1).flatten(1))
        error.append((vae.decode(mode).sample - clips).div(2).square().mean())
    latents = torch.cat(modes, dim=1)
    return latents.mean(1).tolist(), latents.std(1).tolist(), -10 * torch.stack(error).mean().log10().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    options = parser.parse_args()

    state = load(CHECKPOINT) or {"step": 0, "spent": 0.0}
    torch.manual_seed(state["step"])
    rng = np.random.default_rng(state["step"])
    vae = untrained()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=options.rate, betas=(0.9, 0.98), weight_decay=0.0)
    if "model" in state:
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    def checkpoint() -> None:
        mean, std, psnr = statistics(vae, np.random.default_rng(1))
        print(f"step {step} {clock.spent:.0f}s psnr {psnr:.2f} std {min(std):.2f}..{max(std):.2f}", flush=True)
        parts = {"model": vae.state_dict(), "optimizer": optimizer.state_dict(), "mean": mean, "std": std}
        save(dict(parts, step=step, spent=clock.spent, psnr=psnr), CHECKPOINT)

    clock, step = Clock(60 * options.minutes, state["spent"]), state["step"]
    while clock.done < 1:
        for group in optimizer.param_groups:
            group["lr"] = options.rate * clock.rate(step)
        clips = to_model(sample_clips(rng, *GRIDS[step % len(GRIDS)], (0.24, 0.4))[0])
        posterior = vae.encode(clips).latent_dist
        # The decoder sees noisy latents, so that it forgives what a denoiser leaves behind.
        error = vae.decode(posterior.sample()).sample - clips
        loss = error.abs().mean() + 2 * error.square().mean() + 3e-4 * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            print(f"step {step} {clock.spent:.0f}s loss {loss.item():.4f}", flush=True)
        if step % 500 == 0:
            checkpoint()
    checkpoint()


if __name__ == "__main__":
    main()
