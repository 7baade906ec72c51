"""Row rules: which entries of each row of scores are kept. The selectors' common last step; rows are the last axis."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from accelplug.kernels.chunks import by_heads


def top_p(
    probability: Tensor,
    p: float | Tensor,
    k_min: int | Tensor = 1,
    *,
    candidates: Tensor | None = None,
) -> Tensor:
    """Keep the likeliest entries of each row: the fewest whose sum reaches p. The entry that crosses it is kept.

    So do Twilight, SVG2 and Rectified SpaAttn; Jenga leaves the crossing entry out.

    Parameters
    ----------
    probability : Tensor (..., N), at least 0; each row sums to 1 over its candidates.
    p : mass, 0 to 1; a float, or Tensor (...) with one for each row. From 1 on, every candidate is kept.
    k_min : entries that a row keeps at least, as far as it has candidates; an int or Tensor (...).
    candidates : bool, broadcast to (..., N), the entries that may be kept; None for all.

    Returns
    -------
    members : bool (..., N). Of equally likely entries the first is kept first. A row without candidates keeps nothing.
    """

    def rule(probability: Tensor, p: Tensor, k_min: Tensor, candidates: Tensor | None = None) -> Tensor:
        sorted_probability, entry, candidate = _sorted(probability, candidates)
        mass = torch.where(candidate, sorted_probability, 0.0)
        up_to = mass.cumsum(-1)
        before = torch.cat([torch.zeros_like(up_to[..., :1]), up_to[..., :-1]], -1)
        keep = (before < p) | (p >= 1) | (_ranks(probability) < k_min)
        return torch.zeros_like(keep).scatter(-1, entry, keep & candidate)

    return _piecewise(rule, probability, _per_row(p, probability), _per_row(k_min, probability), candidates)


def top_k(scores: Tensor, k: int | Tensor, *, candidates: Tensor | None = None) -> Tensor:
    """Keep the k entries of each row that score highest.

    Parameters
    ----------
    scores : Tensor (..., N), any finite numbers.
    k : entries to keep, as far as a row has candidates; an int or Tensor (...) with one for each row.
    candidates : bool, broadcast to (..., N), the entries that may be kept; None for all.

    Returns
    -------
    members : bool (..., N). Of equal scores the first is kept first.
    """

    def rule(scores: Tensor, k: Tensor, candidates: Tensor | None = None) -> Tensor:
        _, entry, candidate = _sorted(scores, candidates)
        return torch.zeros_like(candidate).scatter(-1, entry, (_ranks(scores) < k) & candidate)

    return _piecewise(rule, scores, _per_row(k, scores), candidates)


def within_budget(scores: Tensor, cost: Tensor, budget: Tensor, *, candidates: Tensor | None = None) -> Tensor:
    """Keep the entries of each row that score highest while the row has budget left; the entry that uses it up is kept.

    Parameters
    ----------
    scores : Tensor (..., N), any finite numbers.
    cost : what an entry takes of the budget, at least 0, broadcast to (..., N).
    budget : Tensor (...), one for each row.
    candidates : bool, broadcast to (..., N), the entries that may be kept; None for all.

    Returns
    -------
    members : bool (..., N). Of equal scores the first is kept first.
    """

    def rule(scores: Tensor, cost: Tensor, budget: Tensor, candidates: Tensor | None = None) -> Tensor:
        _, entry, candidate = _sorted(scores, candidates)
        ordered_cost = torch.where(candidate, cost.expand(scores.shape).gather(-1, entry), 0.0)
        keep = ordered_cost.cumsum(-1) - ordered_cost < budget
        return torch.zeros_like(candidate).scatter(-1, entry, keep & candidate)

    return _piecewise(rule, scores, cost, budget[..., None], candidates)


def _piecewise(rule: Callable[..., Tensor], scores: Tensor, *given: Tensor | None) -> Tensor:
    """Apply a rule to scores (B, H, ..., N), some heads at a time, with what else is given, broadcast to them."""
    tensors = [scores, *(x for x in given if x is not None)]
    if scores.ndim < 3:
        return rule(*tensors)
    tensors = [x.view((1,) * (scores.ndim - x.ndim) + x.shape) for x in tensors]
    return torch.cat([rule(*some) for some in by_heads(scores[:, 0].numel(), *tensors)], 1)


def _sorted(scores: Tensor, candidates: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, entries and candidacy, each (..., N), best first and candidates before all others."""
    if candidates is None:
        ordered, entry = scores.sort(dim=-1, descending=True, stable=True)
        return ordered, entry, torch.ones_like(ordered, dtype=torch.bool)
    candidates = candidates.expand(scores.shape)
    ordered, entry = scores.masked_fill(~candidates, -torch.inf).sort(dim=-1, descending=True, stable=True)
    return ordered, entry, candidates.gather(-1, entry)


def _ranks(scores: Tensor) -> Tensor:
    return torch.arange(scores.shape[-1], device=scores.device)


def _per_row(value: float | Tensor, scores: Tensor) -> Tensor:
    """A number, or one for each row, beside the rows' entries: (..., 1)."""
    return torch.as_tensor(value, device=scores.device)[..., None]
