"""HunyuanVideo on two GPUs: each holds half of the tokens, and attends sparsely with half of the heads.

    torchrun --nproc-per-node 2 examples/hunyuan_two_gpus.py

diffusers' context parallelism exchanges tokens for heads around attention (Ulysses), and a patch answers in between, where it sees all
tokens. Writes `hunyuan.webp`, which a browser plays. The weights take 42 GB on each GPU.

Not run on GPUs yet. `tests/test_examples.py` runs it in two processes on a tiny HunyuanVideo, and finds what one process finds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import ContextParallelConfig, HunyuanVideoPipeline
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

import accelplug

MODEL = "hunyuanvideo-community/HunyuanVideo"
PROMPT = "A paper boat sails down a rainy street, close to the ground, evening light."
SETTINGS = {"height": 720, "width": 1280, "num_frames": 129, "num_inference_steps": 50}

TOKENS = ContextParallelInput(split_dim=1, expected_dims=3)
ROTARY = ContextParallelInput(split_dim=0, expected_dims=2, split_output=True)
PLAN = {  # diffusers has none for this model
    "rope": {0: ROTARY, 1: ROTARY},
    "transformer_blocks.0": {"hidden_states": TOKENS, "encoder_hidden_states": TOKENS},
    "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
}


def without_padding(pipe: Any, prompt: str, ranks: int) -> dict[str, torch.Tensor]:
    """Return the prompt's embeddings, cut where padding begins: ranks are given equal shares, and would take some for text."""
    embeds, pooled, mask = pipe.encode_prompt(prompt)
    length = -(-int(mask.sum()) // ranks) * ranks
    return {"prompt_embeds": embeds[:, :length], "prompt_attention_mask": mask[:, :length], "pooled_prompt_embeds": pooled}


@torch.no_grad()
def main(
    model: str | Path = MODEL,
    recipe: Any = "sol",
    settings: dict[str, Any] = SETTINGS,
    device: str = "cuda",
    gate: str = "auto",
    out: Path = Path("hunyuan.webp"),
) -> accelplug.Plug:
    """Run once, with the recipe, in as many processes as torchrun has started."""
    torch.distributed.init_process_group()
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    if device == "cuda":
        torch.cuda.set_device(rank)
    pipe = HunyuanVideoPipeline.from_pretrained(model, dtype=torch.bfloat16).to(device)
    pipe.vae.enable_tiling()
    pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=ranks), cp_plan=PLAN)

    with accelplug.apply(pipe, recipe, gate=gate) as plug:
        inputs = {**without_padding(pipe, PROMPT, ranks), **settings}
        frames = pipe(**inputs, generator=torch.Generator("cpu").manual_seed(0)).frames[0]  # the same noise on both
    if rank == 0:
        print(plug.report())
        frames[0].save(out, save_all=True, append_images=frames[1:], duration=1000 // 24)
    return plug


if __name__ == "__main__":
    main()
    torch.distributed.destroy_process_group()
