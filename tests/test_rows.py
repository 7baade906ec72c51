"""Row rules: each stated a second time, entry by entry, and what they promise about ties, candidates and rounding."""

from __future__ import annotations

import pytest
import torch

from accelplug.kernels.rows import top_k, top_p


def by_hand(row: list[float], allowed: list[bool], p: float, k_min: int) -> list[bool]:
    """One row, one entry at a time, on exact binary fractions."""
    ranked = sorted((j for j in range(len(row)) if allowed[j]), key=lambda j: (-row[j], j))
    kept = [False] * len(row)
    for rank, j in enumerate(ranked):
        before = sum(row[i] for i in ranked[:rank])
        kept[j] = before < p or rank < k_min or p >= 1
    return kept


@pytest.mark.parametrize("k_min", [0, 1, 4])
def test_top_p_equals_the_rule_stated_entry_by_entry(k_min: int) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = torch.randint(0, 9, (2, 3, 5, 12), generator=generator).double()  # many ties
    allowed = torch.rand(2, 1, 5, 12, generator=generator) < 0.8
    # Multiples of 1/256 that sum to 1 over the candidates: sums are exact, so that equality is equality.
    parts = torch.where(allowed, parts, 0)
    first = allowed.int().argmax(-1, keepdim=True).expand(*parts.shape[:-1], 1)
    probability = (parts.scatter_add(-1, first, 256 - parts.sum(-1, keepdim=True))) / 256
    probability = torch.where(allowed, probability, 0.5)  # what is no candidate must not count
    for p in (0.0, 0.03125, 0.25, 0.9375, 0.99609375, 1.0):
        members = top_p(probability, p, k_min, candidates=allowed)
        expected = [
            by_hand(row.tolist(), mask.tolist(), p, k_min)
            for row, mask in zip(probability.flatten(0, 2), allowed.expand_as(probability).flatten(0, 2), strict=True)
        ]
        assert members.flatten(0, 2).tolist() == expected


def test_the_entry_that_crosses_is_kept() -> None:
    probability = torch.tensor([0.5, 0.25, 0.125, 0.125])
    assert top_p(probability, 0.6).tolist() == [True, True, False, False]
    assert top_p(probability, 0.75).tolist() == [True, True, False, False]


def test_every_row_keeps_an_entry_at_any_p() -> None:
    probability = torch.full((4, 64), 1 / 64)
    assert top_p(probability, 0.0).sum(-1).tolist() == [1] * 4
    assert top_p(probability, 0.0)[0].nonzero().tolist() == [[0]]  # of equals, the first


def test_a_mass_of_one_keeps_every_candidate_despite_rounding() -> None:
    """Softmax rows of float32 may sum past 1 before the last entry, and hold zeros."""
    logits = torch.randn(8, 1000, generator=torch.Generator().manual_seed(1)) * 30
    candidates = torch.arange(1000) % 3 > 0
    probability = logits.masked_fill(~candidates, -torch.inf).softmax(-1)
    assert (probability[:, candidates] == 0).any()
    assert torch.equal(top_p(probability, 1.0, candidates=candidates), candidates.expand(8, -1))


def test_p_and_k_may_differ_by_row() -> None:
    probability = torch.tensor([0.5, 0.25, 0.125, 0.125]).expand(2, 3, 4)
    p = torch.tensor([[0.5, 0.75, 1.0], [0.0, 0.8, 0.4]])
    assert top_p(probability, p).sum(-1).tolist() == [[1, 2, 4], [1, 3, 1]]
    assert top_p(probability, 0.0, torch.tensor([[1], [3]])).sum(-1).tolist() == [[1] * 3, [3] * 3]
    assert top_k(probability, torch.tensor([0, 2, 9])).sum(-1).tolist() == [[0, 2, 4]] * 2


def test_top_k_keeps_the_highest_candidates_and_breaks_ties_by_position() -> None:
    scores = torch.tensor([[-1.0, 3.0, 3.0, 3.0, -2.0, 7.0]])
    candidates = torch.tensor([True, True, True, True, True, False])
    assert top_k(scores, 2).nonzero()[:, 1].tolist() == [1, 5]
    assert top_k(scores, 2, candidates=candidates).nonzero()[:, 1].tolist() == [1, 2]
    assert top_k(scores, 99, candidates=candidates).tolist() == candidates[None].tolist()
    assert not top_k(scores, 3, candidates=torch.zeros(6, dtype=torch.bool)).any()
    assert not top_p(scores.softmax(-1), 0.9, candidates=torch.zeros(6, dtype=torch.bool)).any()


def test_rules_are_traced_without_a_graph_break() -> None:
    probability = torch.rand(2, 3, 16).softmax(-1)
    candidates = torch.arange(16) < 13

    def both(x: torch.Tensor) -> torch.Tensor:
        return top_p(x, 0.4, 2, candidates=candidates) | top_k(x, 3)

    assert torch.equal(torch.compile(both, backend="eager", fullgraph=True)(probability), both(probability))
