"""The rectified rest: reallocation and gain stated a second time in float64, and the identities that follow."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from accelplug.kernels.plan import BlockPlan
from accelplug.kernels.rectify import rectify

BLOCK, SCALE = 8, 0.3


def a_plan(lengths: list[int], seed: int = 0, heads: int = 1, text_blocks: int = 0, share: float = 0.4) -> BlockPlan:
    """Random blocks beside each query block's own; text, in the last blocks, is read by all and reads all."""
    generator = torch.Generator().manual_seed(seed)
    members = torch.rand(1, heads, len(lengths), len(lengths), generator=generator) < share
    text = torch.arange(len(lengths)) >= len(lengths) - text_blocks
    members = members | torch.eye(len(lengths), dtype=torch.bool) | text | text[:, None]
    numbers = torch.tensor(lengths, dtype=torch.int32)
    return BlockPlan.from_members(members, numbers, numbers, BLOCK, BLOCK)


def slots_of(block: int, plan: BlockPlan, key_mask: Tensor | None = None) -> list[int]:
    slots = range(block * BLOCK, block * BLOCK + int(plan.k_len[block]))
    return [slot for slot in slots if key_mask is None or key_mask[slot]]


def by_hand(
    q: Tensor, k: Tensor, plan: BlockPlan, text_blocks: int, key_mask: Tensor | None = None, gain: bool = True
) -> tuple[Tensor, Tensor]:
    """One head, q and k (P, D): the paper's two steps, probabilities first and block sizes after; float64."""
    q, k, blocks = q.double(), k.double(), len(plan.k_len)
    visual = range(blocks - text_blocks)
    share, weights = torch.zeros(blocks, dtype=torch.float64), torch.zeros(blocks, blocks, dtype=torch.float64)
    for m in range(blocks):
        rows = q[m * BLOCK : m * BLOCK + int(plan.q_len[m])]
        query, query_spread = rows.mean(0), (rows - rows.mean(0)).abs().mean(0)
        held = {j: k[slots_of(j, plan, key_mask)] for j in range(blocks)}
        raw = {j: math.exp(SCALE * query @ held[j].mean(0)) for j in visual if len(held[j])}
        text = sum(float((SCALE * held[j] @ query).exp().sum()) for j in range(blocks) if j not in visual)
        total = sum(raw.values()) + text
        probability = {j: p / total for j, p in raw.items()}
        z = sum(len(held[j]) * p for j, p in probability.items()) + text / total
        share[m] = text / total / z
        for j, p in probability.items():
            reallocated = len(held[j]) * p / z
            key, key_spread = held[j].mean(0), (held[j] - held[j].mean(0)).abs().mean(0)
            worth = abs(query @ key) > abs(query_spread @ key) + abs(query @ key_spread)
            if plan.members[0, 0, m, j] or (gain and not worth):
                share[m] += reallocated
            else:
                weights[m, j] = reallocated
    return share, weights


@pytest.mark.parametrize("gain", [True, False])
@pytest.mark.parametrize(("lengths", "text_blocks"), [([8] * 6, 0), ([8, 8, 8, 8, 1, 8, 5], 2), ([8, 3, 8, 7, 8, 1], 1)])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_two_steps_stated_block_by_block(lengths: list[int], text_blocks: int, gain: bool, masked: bool) -> None:
    plan = a_plan(lengths, text_blocks=text_blocks)
    slots = len(lengths) * BLOCK
    q, k = torch.randn(2, slots, 16) + torch.randn(2, 1, 16) * 2  # means that stand out of the spread, here and there
    key_mask = None
    if masked:
        key_mask = torch.rand(slots, generator=torch.Generator().manual_seed(3)) < 0.7
        key_mask[:8] = False  # a whole block that may not be read
    share, weights = rectify(
        q[None, None],
        k[None, None],
        plan,
        visual_slots=slots - text_blocks * BLOCK,
        scale=SCALE,
        key_mask=None if key_mask is None else key_mask[None],
        gain=gain,
    )
    expected_share, expected_weights = by_hand(q, k, plan, text_blocks, key_mask, gain)
    torch.testing.assert_close(share[0, 0].double(), expected_share, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(weights[0, 0].double(), expected_weights, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(share + weights.sum(-1), torch.ones_like(share))  # sum p' = 1
    assert (weights > 0).any()
    if gain and not masked:
        assert (weights == 0).sum() > plan.members.sum(), "no block was rejected: the rule was not tried"


def exact_part(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> Tensor:
    """Softmax over what the plan reads, slot by slot."""
    logits = (q @ k.transpose(-1, -2) * SCALE).masked_fill(~plan.dense_mask(), -torch.inf)
    return logits.softmax(-1).nan_to_num(nan=0.0) @ v


@pytest.mark.parametrize(("lengths", "text_blocks"), [([8] * 6, 0), ([8, 8, 8, 8, 1, 8, 5], 2)])
def test_blocks_of_equal_queries_keys_and_values_give_dense_attention(lengths: list[int], text_blocks: int) -> None:
    """Means say all there is, so every block not read is replaced without loss; the text behind them may be anything."""
    slots, blocks = len(lengths) * BLOCK, len(lengths)
    q, k, v = torch.randn(3, 1, 2, blocks, 16, dtype=torch.float64).repeat_interleave(BLOCK, -2)
    text = slice(slots - text_blocks * BLOCK, None)
    k[..., text, :], v[..., text, :] = torch.randn(2, 1, 2, text_blocks * BLOCK, 16, dtype=torch.float64)
    plan = a_plan(lengths, heads=2, text_blocks=text_blocks, share=0.2)
    share, weights = rectify(q, k, plan, visual_slots=slots - text_blocks * BLOCK, scale=SCALE, gain=False)
    v_pool = torch.stack([v[..., slots_of(j, plan), :].mean(-2) for j in range(blocks)], -2)
    out = exact_part(q, k, v, plan) * share.repeat_interleave(BLOCK, -1)[..., None]
    out = out + (weights.double() @ v_pool).repeat_interleave(BLOCK, -2)
    everything = BlockPlan.from_members(torch.ones(blocks, blocks, dtype=torch.bool), plan.q_len, plan.k_len, BLOCK, BLOCK)
    held = everything.dense_mask().any(-1)[0, 0]
    assert not plan.members.all()
    torch.testing.assert_close(out[..., held, :], exact_part(q, k, v, everything)[..., held, :], rtol=1e-5, atol=1e-6)


def test_blocks_of_equal_keys_and_queries_are_always_worth_it_and_noise_is_not() -> None:
    plan = a_plan([8] * 16, share=0.1)
    equal_q, equal_k = torch.randn(2, 1, 1, 16, 16).repeat_interleave(BLOCK, -2)
    _, weights = rectify(equal_q, equal_k, plan, visual_slots=128, scale=SCALE)
    assert torch.equal(weights > 0, ~plan.members)
    _, weights = rectify(torch.randn(1, 1, 128, 16), torch.randn(1, 1, 128, 16), plan, visual_slots=128, scale=SCALE)
    assert (weights > 0).float().mean() < 0.1


def test_text_rows_and_full_rows_keep_everything() -> None:
    plan = a_plan([8] * 6, text_blocks=2)
    q, k = torch.randn(2, 1, 1, 48, 16)
    share, weights = rectify(q, k, plan, visual_slots=32, scale=SCALE, gain=False)
    assert torch.equal(share[..., 4:], torch.ones(1, 1, 2))
    assert not weights[..., 4:, :].any()
    assert not weights[..., 4:].any()


def test_grouped_queries_and_batches_do_not_mix() -> None:
    plan = a_plan([8] * 6, heads=4, text_blocks=1)
    q, k = torch.randn(3, 4, 48, 16), torch.randn(3, 2, 48, 16)
    settings: dict[str, Any] = {"visual_slots": 40, "scale": SCALE}
    grouped = rectify(q, k, plan, **settings)
    repeated = rectify(q, k.repeat_interleave(2, 1), plan, **settings)
    single = [rectify(q[b : b + 1], k[b : b + 1], plan, **settings) for b in range(3)]
    for mine, theirs, alone in zip(grouped, repeated, zip(*single, strict=True), strict=True):
        torch.testing.assert_close(mine, theirs)
        torch.testing.assert_close(mine, torch.cat(alone))


def test_is_traced_without_a_graph_break() -> None:
    plan = a_plan([8, 8, 8, 3], text_blocks=1)
    q, k = torch.randn(2, 1, 1, 27, 16)  # slots end with the last token

    def share(q: Tensor, k: Tensor) -> Tensor:
        return rectify(q, k, plan, visual_slots=24, scale=SCALE)[0]

    torch.testing.assert_close(torch.compile(share, backend="eager", fullgraph=True)(q, k), share(q, k))
