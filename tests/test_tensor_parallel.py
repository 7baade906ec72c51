"""Heads are numbered over all ranks: two processes on the CPU answer as one does."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.multiprocessing as mp

import accelplug
from tests.tiny_language_models import build, forward, inputs

RECIPES = (
    {"patch": "visual_bias", "with": {"image_weight": 6.0, "heads": [1, 3]}},
    {"patch": "vhr", "with": {"gain": 2.0}},
)


def work(rank: int, folder: str, port: int) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    from transformers import LlavaForConditionalGeneration
    from transformers.distributed import DistributedConfig

    torch.distributed.init_process_group("gloo")
    model = LlavaForConditionalGeneration.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2)).eval()
    given = inputs("llava")
    found = [forward(model, given)]
    for recipe in RECIPES:
        with accelplug.apply(model, recipe) as plug:
            host = plug._hosts[0]
            assert host.tensor_parallel is not None
            assert host.tensor_parallel.rank == rank
            found.append(forward(model, given))
    found.append(forward(model, given))
    torch.save(found, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this build of torch has no distributed package")
def test_two_ranks_answer_as_one(tmp_path):
    model, given = build("llava"), inputs("llava")
    expected = [forward(model, given)]
    for recipe in RECIPES:
        with accelplug.apply(model, recipe):
            expected.append(forward(model, given))
    model.save_pretrained(tmp_path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(work, (str(tmp_path), port), nprocs=2)
    valid = given["attention_mask"].bool()
    for rank in range(2):
        plain, *changed, after = torch.load(tmp_path / f"rank{rank}.pt")
        assert torch.equal(plain, after)
        for found, wanted in zip((plain, *changed), expected, strict=True):
            torch.testing.assert_close(found[valid], wanted[valid], atol=2e-5, rtol=1e-4)
