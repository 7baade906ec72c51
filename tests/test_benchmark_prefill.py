"""The baselines of sparse prefill that benchmarks alone have: what they read is what the last rows look at."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

import accelplug
from accelplug.patches.base import Patch
from accelplug.patches.sparse.prefill import PromptBlocks
from accelplug.testing.language_models import TEXT_CONFIG
from benchmarks.haystack import asked_within, told_at
from benchmarks.prefill_baselines import FlexPrefill, Minference, along, diagonals, last_attention

SMALL = {"block": 8, "sink": 0, "local": 0, "min_tokens": 0}


@pytest.mark.parametrize(
    "patch",
    [Minference({**SMALL, "vertical": 999}), FlexPrefill({**SMALL, "gamma": 1.0, "least": 999})],
    ids=lambda patch: patch.name,
)
def test_what_reads_everything_is_the_model(patch: Patch) -> None:
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT_CONFIG)).eval().requires_grad_(False)
    ids = torch.randint(3, 490, (1, 45), generator=torch.Generator().manual_seed(0))
    stock = model(ids).logits
    with accelplug.apply(model, patch, strict=True) as plug:
        torch.testing.assert_close(model(ids).logits, stock, rtol=1e-4, atol=1e-4)
        assert plug.report().answered == 4


def test_blocks_hold_the_keys_and_diagonals_that_the_last_rows_look_at() -> None:
    tokens, block = 64, 8
    k = torch.zeros(1, 2, tokens, 4)
    k[:, :, 17, 0] = 9.0  # one key that all look at
    q = torch.zeros(1, 2, tokens, 4)
    q[..., 0] = 9.0
    blocks = PromptBlocks(q, k, k, torch.ones(1, tokens, dtype=torch.bool), None, 1.0, 0, block, 0, 0)
    share = last_attention(blocks, 8)
    assert float(share[..., 17].min()) > 0.99
    far = diagonals(blocks, share)
    torch.testing.assert_close(far.sum(-1), torch.full((1, 2), 8.0))
    assert bool((far[0, 0, 56 - 17 : 64 - 17] > 0.99).all()), "it is as far away as the rows say"
    plan = Minference({**SMALL, "vertical": 1, "slash": 1, "rows": 8}).route(blocks)
    assert bool(plan.members[..., 3:, 2].all())
    assert float(plan.density().mean()) < 0.7
    plan = FlexPrefill({**SMALL, "tau": 0.0, "gamma": 0.5, "least": 8}).route(blocks)
    assert bool(plan.members[..., 3:, 2].all())
    chosen = torch.zeros(1, 2, 8, dtype=torch.bool)
    chosen[..., 2] = True
    assert along(chosen, blocks)[0, 0].nonzero().tolist() == [[row, row - 2] for row in range(2, 8)]


def test_a_haystack_is_as_long_as_it_was() -> None:
    class Words:
        def __call__(self, text: str) -> Any:
            return type("Ids", (), {"input_ids": list(range(len(text.split())))})

    ids = torch.arange(1000, 1300)
    text, asked = told_at(Words(), ids)
    prompt, value = asked_within(Words(), ids, 0.5, 3)
    assert len(text) == len(prompt) == len(ids)
    assert len(asked) == 3
    assert len(value) == 7
    assert [x for x in text.tolist() if x >= 1000] == list(range(1000, 1000 + int((text >= 1000).sum())))
