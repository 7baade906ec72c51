"""Audits: the share of attention that a prompt's plan or a step keeps, and heads that read everything where that is too little."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

import accelplug
from accelplug import compat
from accelplug.kernels.past import kept_mass
from accelplug.kernels.plan import BlockPlan
from accelplug.registry import list_patches, patch_class
from accelplug.testing.language_models import TEXT_CONFIG
from tests.patch_rows import ROWS as SUBJECTS

BLOCK, ROWS = 8, 5


def llama() -> Any:
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT_CONFIG)).eval().requires_grad_(False)


def prompt(tokens: int, rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 490, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def plan_of(members: torch.Tensor, queries: int, keys: int, causal: int) -> BlockPlan:
    q_len, k_len = ((n - torch.arange(0, n, BLOCK)).clamp(max=BLOCK).int() for n in (queries, keys))
    return BlockPlan.from_members(members, q_len, k_len, BLOCK, BLOCK, causal=causal)


@pytest.mark.parametrize("causal", [0, 16])
@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_is_the_share_of_true_attention(causal: int, heads: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    queries, keys = 45, 45 + causal
    q, k = torch.randn(2, 4, queries, 16, generator=g).to(dtype), torch.randn(2, 2, keys, 16, generator=g).to(dtype)
    members = torch.rand(2, heads, -(-queries // BLOCK), -(-keys // BLOCK), generator=g) < 0.5
    plan = plan_of(members, queries, keys, causal)
    held = torch.ones(2, queries, dtype=torch.bool)
    held[1, :7] = False  # padding stands in front
    reads = torch.cat([torch.ones(2, causal, dtype=torch.bool), held], 1)
    kept = kept_mass(q, k, plan, ROWS, 0.5, held, reads)
    mask = plan.dense_mask()[..., :queries, :keys]
    mask = mask.repeat_interleave(4 // mask.shape[1], 1).expand(2, -1, -1, -1)
    future = torch.arange(keys) > causal + torch.arange(queries)[:, None]
    logits = 0.5 * q.double() @ k.double().repeat_interleave(2, 1).mT
    p = logits.masked_fill(future | ~reads[:, None, None], -torch.inf).softmax(-1)
    for row in range(2):
        number, first = int(held[row].sum()), int(held[row].int().argmax())
        slots = [first + -(-(i + 1) * number // ROWS) - 1 for i in range(ROWS)]
        assert slots[-1] == queries - 1
        expected = (p[row] * mask[row]).sum(-1)[:, slots].mean(-1)
        torch.testing.assert_close(kept[row].double(), expected, rtol=1e-4, atol=1e-5)


def test_a_plan_that_reads_everything_keeps_everything() -> None:
    q = torch.randn(1, 2, 30, 8)
    plan = plan_of(torch.ones(4, 4, dtype=torch.bool), 30, 30, 0)
    torch.testing.assert_close(kept_mass(q, q, plan, 16, 1.0, torch.ones(1, 30, dtype=torch.bool)), torch.ones(1, 2))


def applied(model: Any, **settings: Any) -> accelplug.Plug:
    given = {"block": BLOCK, "sink": 8, "local": 8, "min_tokens": 0, "backend": "blocked", **settings}
    return accelplug.apply(model, {"rules": [{"patch": "stream", "with": given}]}, strict=True)


def test_heads_that_keep_too_little_read_everything_and_are_counted() -> None:
    model, ids = llama(), prompt(90)
    stock = model(ids).logits
    with applied(model, min_mass=1.0) as plug:
        torch.testing.assert_close(model(ids).logits, stock, rtol=1e-4, atol=1e-4)
        layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
        assert f"{layers * heads} of {layers * heads} heads read everything" in plug.report().kept["stream"]
        assert len(plug.report(by_layer=True).kept) == layers
        assert "attention kept by stream" in str(plug.report())
    with applied(model) as plug:
        plain = model(ids).logits
        assert not plug.report().kept, "nobody looked"
    with applied(model, min_mass=1e-6) as plug:
        assert torch.equal(model(ids).logits, plain)
        assert "0 of" in plug.report().kept["stream"]
    assert not torch.allclose(plain, stock, atol=1e-4)


def test_each_row_of_a_batch_is_audited_alone() -> None:
    model, ids = llama(), torch.cat([prompt(60, seed=1), prompt(60, seed=2)])
    with applied(model) as plug, plug.trace() as events:
        model(ids)
    bound = sorted(event.kept for event in events)[len(events) // 2]
    with applied(model, min_mass=bound) as plug:
        together = model(ids).logits
        kept = plug.report().kept["stream"]
        assert not kept.endswith(("; 0 of 32 heads read everything", "; 32 of 32 heads read everything"))
        for row in range(2):
            torch.testing.assert_close(model(ids[row : row + 1]).logits[0], together[row], rtol=1e-4, atol=1e-5)


def test_a_trace_tells_what_each_layer_keeps() -> None:
    model = llama()
    with applied(model) as plug, plug.trace() as events:
        model(prompt(90))
    assert len(events) == model.config.num_hidden_layers
    assert all(0 < event.kept < 1 for event in events)


# -------------------------------------------------------------------------------------------------------------------- steps

decoding = pytest.mark.parametrize("patch", [entry.name for entry in list_patches() if entry.family == "decode"])


def stepping(model: Any, patch: str, **settings: Any) -> accelplug.Plug:
    rule = {"patch": patch, "with": {**SUBJECTS[patch].working, **settings}}
    return accelplug.apply(model, {"rules": [rule]}, strict=True)


def steps(model: Any, ids: torch.Tensor, said: torch.Tensor, **more: Any) -> torch.Tensor:
    """Logits (B, n, V) of steps over tokens (B, n) behind a prompt."""
    given = {compat.transformers.cache_keyword(type(model).forward): hf.DynamicCache(config=model.config)}
    with torch.no_grad():
        model(ids, **given, **more)
        return torch.cat([model(token, **given).logits for token in said.split(1, 1)], 1)


@decoding
def test_steps_whose_heads_keep_too_little_read_everything_and_are_counted(patch: str) -> None:
    model, ids, said = llama(), prompt(50, 2), prompt(20, 2, seed=1)
    stock = steps(model, ids, said)
    with stepping(model, patch, min_mass=1.0) as plug:
        torch.testing.assert_close(steps(model, ids, said), stock, rtol=1e-4, atol=1e-4)
        heads = 2 * model.config.num_hidden_layers * model.config.num_attention_heads
        audits = 1 + sum(tokens % 16 == 0 for tokens in range(52, 71))  # the first step, and one in 16
        assert f"of {audits * heads} heads read everything" in plug.report().kept[patch]
    with stepping(model, patch) as plug:
        plain = steps(model, ids, said)
        assert not plug.report().kept, "nobody looked"
    with stepping(model, patch, min_mass=1e-6) as plug:
        assert torch.equal(steps(model, ids, said), plain)
        assert "; 0 of" in plug.report().kept[patch]
    assert not torch.allclose(plain, stock, atol=1e-4)


@decoding
@pytest.mark.parametrize("heads", [4, 2])
def test_what_a_step_keeps_is_the_share_of_true_attention(patch: str, heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the tokens that it reads, and probabilities of all of them."""
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**{**TEXT_CONFIG, "num_key_value_heads": heads})).eval().requires_grad_(False)
    found: list[tuple[Any, Any, torch.Tensor]] = []
    cls: Any = patch_class(patch)
    real = cls._share

    def seen(self: Any, step: Any, choice: Any, mask: Any) -> torch.Tensor:
        found.append((step, choice, real(self, step, choice, mask)))
        logits = step.q @ step.kept.keys.float().mT
        read = torch.zeros(len(step.q), heads, step.kept.length, dtype=torch.bool)
        ranks, held = self._static_ranks(step)
        for place in range(heads):
            read[0, place, ranks[0][held[0]]] = True
            read[0, place, choice.ranks[0, place][choice.held[0, place]]] = True
        expected = (logits.softmax(-1) * read[:, :, None]).sum(-1)
        torch.testing.assert_close(found[-1][2], expected, rtol=1e-4, atol=1e-5)
        return found[-1][2]

    monkeypatch.setattr(cls, "_share", seen)
    with stepping(model, patch) as plug, plug.trace() as events:
        steps(model, prompt(50), prompt(3, seed=1))
    told = [event for event in events if event.patch == patch]
    assert len(found) == len(told) == 3 * 4
    assert all(0 < event.kept < 1 for event in told)


@decoding
def test_padding_and_rows_that_change_places_are_audited_as_alone(patch: str) -> None:
    model, long, short = llama(), prompt(50, seed=1), prompt(37, seed=2)
    said = prompt(18, 2, seed=3)
    ids, mask = torch.zeros(2, 50, dtype=torch.int64), torch.ones(2, 50, dtype=torch.int64)
    ids[0], ids[1, 13:], mask[1, :13] = long[0], short[0], 0
    with stepping(model, patch) as plug, plug.trace() as events:
        steps(model, long, said[:1])
    bound = sorted(event.kept for event in events if event.kept is not None)[len(events) // 3]
    with stepping(model, patch, min_mass=bound) as plug, torch.no_grad():
        cache = hf.DynamicCache(config=model.config)
        given = {compat.transformers.cache_keyword(type(model).forward): cache}
        model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), **given)
        together = []
        for place, token in enumerate(said.split(1, 1)):
            if place == 5:
                cache.reorder_cache(torch.tensor([1, 0]))
            mask = torch.cat([mask, torch.ones_like(token)], 1)
            order = [0, 1] if place < 5 else [1, 0]
            at = mask[order].sum(-1, keepdim=True) - 1
            out = model(token[order], attention_mask=mask[order], position_ids=at, **given).logits
            together.append(out[order])
        for row, alone in enumerate((long, short)):
            torch.testing.assert_close(
                torch.cat(together, 1)[row], steps(model, alone, said[row : row + 1])[0], rtol=1e-4, atol=1e-4
            )
        assert not plug.report().kept[patch].startswith("1.000")
