"""Probe repair: what a few exact rows of a head say about the error of all others.

After the probe repair of SparsePR (arXiv 2608.18484), which regresses the error of sparse attention on its own output. Here (ours) it is
regressed on the output *and* the query, a head is repaired only where rows that were held back say that it helps, and these rows
estimate what error is left.

With output o_r, query q_r and exact output e_r of the probed rows r, features ``x_r = (o_r, q_r)`` and residual ``y_r = e_r - o_r``, both
centred and with channels scaled to a mean square of 1 by part, the ridge regression

    ``W = (X^T X + ridge I)^-1 X^T Y``

is added to every row, ``o + mean y + (x - mean x) W``. Probed rows are exact. `ridge` thus counts as so many more rows without error.
"""

from __future__ import annotations

import torch
from torch import Tensor

HELD_BACK = 4
"""One in so many probes takes no part in the fit that is judged."""

GOLDEN = 0.6180339887498949


def probe_rows(first: int, number: int, probes: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the rows that are probed, int64 (probes,): one in each stretch of ``number / probes`` rows from `first` on.

    Its place in the stretch moves by the golden ratio: at the same place, rows of a grid could all be of one column.
    """
    stretch = torch.arange(probes, device=device, dtype=torch.float64)
    return first + ((stretch + stretch * GOLDEN % 1) * (number / probes)).long().clamp(max=number - 1)


def repair(
    out: Tensor,
    q: Tensor,
    exact: Tensor,
    rows: Tensor,
    within: slice = slice(None),
    *,
    on_query: bool = True,
    ridge: float = 5.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Add to a sparse output what its exact rows say of its error.

    Parameters
    ----------
    out : Tensor (B, H, S, D_v), sparse attention.
    q : Tensor (B, H, S, D), its queries.
    exact : Tensor (B, H, R, D_v), dense attention of the probed rows.
    rows : int64 (R,), which rows these are.
    within : the rows that are repaired; others, which are exact, stay as they are.
    on_query : whether the error is regressed on the query too.
    ridge : above 0, how many rows without error the prior counts for.

    Returns
    -------
    mended : Tensor (B, H, S, D_v) in the dtype of `out`.
    left, whole : float32 (B, H), norm of the error that is left in rows held back from the fit, and of these rows. One over the other
        estimates the relative error, of a head or of all.
    """
    output, target = out[..., rows, :].float(), exact.float()
    parts = [output, q[..., rows, :].float()] if on_query else [output]
    residual = target - output
    held = torch.arange(len(rows), device=rows.device) % HELD_BACK == 0
    # Both fits at a time: without the rows that judge, and with all.
    weight = torch.stack([(~held).float(), torch.ones_like(held, dtype=torch.float32)])[
        :, None, None, :, None
    ]  # [2, 1, 1, R, 1]
    number = weight.sum(-2, keepdim=True)
    size = [x.square().mean((-2, -1), keepdim=True).sqrt().clamp(min=1e-12) for x in parts]  # [B, H, 1, 1]
    x = torch.cat([part / s for part, s in zip(parts, size, strict=True)], -1)  # [B, H, R, F]
    x_mean, y_mean = ((weight * z).sum(-2, keepdim=True) / number for z in (x, residual))  # [2, B, H, 1, F]
    centred = weight * (x - x_mean)
    gram = centred.mT @ (x - x_mean)
    gram.diagonal(dim1=-2, dim2=-1).add_(ridge)
    slope = torch.cholesky_solve(centred.mT @ (residual - y_mean), torch.linalg.cholesky_ex(gram)[0])  # [2, B, H, F, D_v]
    left = residual - y_mean[0] - (x - x_mean[0]) @ slope[0]
    before, after, whole = ((z.square() * held[:, None]).sum((-2, -1)).sqrt() for z in (residual, left, target))
    helps = after < before  # [B, H]
    slope = slope[1] * helps[..., None, None]
    constant = (y_mean[1] * helps[..., None, None] - x_mean[1] @ slope).to(out.dtype)  # [B, H, 1, D_v]
    factors = [(w / s).to(out.dtype) for w, s in zip(slope.split([p.shape[-1] for p in parts], -2), size, strict=True)]
    error = constant + sum(
        (z[..., within, :] @ w for z, w in zip((out, q), factors, strict=False)), torch.zeros_like(constant)
    )
    mended = out.clone()
    mended[..., within, :] += error
    return mended.index_copy(-2, rows, exact.to(out.dtype)), torch.where(helps, after, before), whole
