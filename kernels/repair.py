"""Probe repair: what a few exact rows of a head say about the error of all others.

After the probe repair of SparsePR (arXiv 2608.18484), which regresses the error of sparse attention on its own output. Ours is that it is
regressed on the output *and* the query, and that it is judged: every probed row by a fit to all the others. What they say decides by head
how much of the repair is done, and estimates what error is left.

With output o_r, query q_r and exact output e_r of the probed rows r, features ``x_r = (o_r, q_r)`` and residual ``y_r = e_r - o_r``, both
centred and with channels scaled to a mean square of 1 by part, the ridge regression

    ``W = (X^T X + ridge I)^-1 X^T Y``

foresees ``y'_r`` at a row that has no part in it, which takes no second fit: with the leverage

    ``h_r = 1 / R + x_r (X^T X + ridge I)^-1 x_r^T``

it errs there by ``(y_r - mean y - x_r W) / (1 - h_r)``. Every row gets ``o + t (mean y + x W)``, where t in [0, 1], by head, brings
``t y'`` nearest to ``y``: 0 where nothing is foreseen. Probed rows are exact. `ridge` counts as so many more rows without error.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
    rows : int64 (R,), which rows these are; two at least.
    within : the rows that are repaired; others, which are exact, stay as they are.
    on_query : whether the error is regressed on the query too.
    ridge : above 0, how many rows without error the prior counts for.

    Returns
    -------
    mended : Tensor (B, H, S, D_v) in the dtype of `out`.
    left, whole : float32 (B, H), norm of the error that is left in probed rows, each by a fit to the others, and of these rows. One over
        the other estimates the relative error, of a head or of all.
    """
    output, target = out[..., rows, :].float(), exact.float()
    parts = [output, q[..., rows, :].float()] if on_query else [output]
    size = [x.square().mean((-2, -1), keepdim=True).sqrt().clamp(min=1e-12) for x in parts]  # [B, H, 1, 1]
    x = torch.cat([part / s for part, s in zip(parts, size, strict=True)], -1)  # [B, H, R, F]
    residual = target - output
    x_mean, y_mean = x.mean(-2, keepdim=True), residual.mean(-2, keepdim=True)
    x, y = x - x_mean, residual - y_mean
    gram = x.mT @ x
    gram.diagonal(dim1=-2, dim2=-1).add_(ridge)
    root = torch.linalg.cholesky_ex(gram)[0]  # [B, H, F, F]
    z = torch.linalg.solve_triangular(root, x.mT, upper=False)  # [B, H, F, R]
    leverage = z.square().sum(-2) + 1 / len(rows)  # [B, H, R]
    foreseen = residual - (y - z.mT @ (z @ y)) / (1 - leverage).clamp(min=1e-6)[..., None]
    agreement, size_foreseen = ((foreseen * w).sum((-2, -1), keepdim=True) for w in (residual, foreseen))
    trust = (agreement / size_foreseen.clamp(min=1e-30)).clamp(0, 1)  # [B, H, 1, 1]
    slope = trust * torch.linalg.solve_triangular(root.mT, z @ y, upper=True)  # [B, H, F, D_v]
    constant = (trust * y_mean - x_mean @ slope).to(out.dtype)  # [B, H, 1, D_v]
    factors = [(w / s).to(out.dtype) for w, s in zip(slope.split([p.shape[-1] for p in parts], -2), size, strict=True)]
    error = constant + sum(
        (w[..., within, :] @ factor for w, factor in zip((out, q), factors, strict=False)), torch.zeros_like(constant)
    )
    mended = out.clone()
    mended[..., within, :] += error
    left = (residual - trust * foreseen).norm(dim=(-2, -1))
    return mended.index_copy(-2, rows, exact.to(out.dtype)), left, target.norm(dim=(-2, -1))
