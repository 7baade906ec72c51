"""Probe repair: what a few exact rows of a head say about the error of all others.

After the probe repair of SparsePR (arXiv 2608.18484): the error of 64 exact rows of a head, regressed by ridge on their sparse output,
is taken off all others. There it is projected on its 16 leading directions first; here it is not. Ours is that it is regressed on the
output *and* the query, centred and scaled; that it is judged, every probed row by a fit to all the others, which decides by head how
much of the repair is done and estimates what error is left; that a step goes on from the last; and that rows which a selector has
computed anyway serve as probes.

With output o_r, query q_r and exact output e_r of the probed rows r, features ``x_r = (o_r, q_r)`` and residual ``y_r = e_r - o_r``, both
centred and with channels scaled to a mean square of 1 by part, the ridge regression

    ``W = (X^T X + ridge I)^-1 X^T Y``

predicts ``y'_r`` at a row that has no part in it, which takes no second fit: with the leverage

    ``h_r = 1 / R + x_r (X^T X + ridge I)^-1 x_r^T``

it errs there by ``(y_r - mean y - x_r W) / (1 - h_r)``. Every row gets ``o + t (mean y + x W)``, where t in [0, 1], by head, brings
``t y'`` nearest to ``y``: 0 where nothing is predicted. Probed rows are exact. `ridge` counts as so many more rows without error.

A diffusion step takes the sums of the last one too, at a weight (`carry`), and probes other rows: the same rows again would say nothing
new, and would be predicted too well. The sums are float32 (B, H, F + 1, F + 1 + D_v) for each attention module and guidance branch.
Whole runs of the bundled model (1,728 tokens, 12 steps, eight captions): with 8 % of the rows exact, foreground PSNR of `sol` at tau 1
rises from 17.4 to 23.9 dB, of a fixed window of 5 x 5 from 15.5 to 26.7, of random blocks from 12.2 to 14.7
(`python -m benchmarks.whole_runs`).

What is predicted decides, not a vote by head whether to repair: a few rows of a head may err hundreds of times as much as most, and
a fit that gains on these harms the others downstream. In DINOv2-small, all layers sparse (`rows` in tiles of 8 x 8, pooled, density .2,
2,304 patches), the mean cosine of features to dense rises on two photographs from .975 and .925 to .993 and .989 with 128 probes, and .995
and .991 with 256; at densities .05 and .1, and with the rest dropped, it rises too (`python -m benchmarks.repair_layers`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from accelplug.kernels.chunks import by_heads, by_rows
from accelplug.kernels.memory import COLD, memory_of
from accelplug.kernels.orders import take

GOLDEN, SILVER = 0.6180339887498949, 0.41421356237309515


@dataclass(frozen=True, eq=False)
class Probes:
    """Rows of each head that were computed exactly.

    Attributes
    ----------
    rows : int64 (R,), or (H, R) or (B, H, R) where they differ by head, which these are.
    out : Tensor (B, H, R, D_v), dense attention of them.
    counted : bool (R,), False for what is another one's double; None where all are different.
    """

    rows: Tensor
    out: Tensor
    counted: Tensor | None = None


def spread(lengths: Tensor, number: int, step: Tensor | float = 0.0) -> Tensor:
    """Return places in runs of `lengths`, int64 (M, number): one in each stretch of ``length / number`` of a run.

    Its place in the stretch moves by the golden ratio: at the same place, rows of a grid could all be of one column. It moves from step to
    step too, since what is carried over says little new of the same rows, and would predict them too well.
    """
    stretch = torch.arange(number, device=lengths.device, dtype=torch.float64)
    turn = torch.arange(len(lengths), device=lengths.device)[:, None] * number + stretch
    place = (turn * GOLDEN + step * SILVER) % 1
    return ((stretch + place) * (lengths[:, None] / number)).long().clamp(max=lengths[:, None] - 1)


def block_rows(lengths: Tensor, block: int, number: int, step: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """Return `number` slots of each block, spread over its tokens: int64 (M, number), and which of them count, bool.

    What does not count is there twice: a block that holds fewer tokens has some of them again, and one without the first of all.
    """
    place = spread(lengths.clamp(min=1), number, step)
    slots = torch.where(lengths[:, None] > 0, place + torch.arange(len(lengths), device=lengths.device)[:, None] * block, 0)
    first = torch.ones_like(lengths[:, None], dtype=torch.bool)
    return slots, torch.cat([first, place.diff() > 0], -1) & (lengths[:, None] > 0)


def probe_rows(
    first: int, number: int, probes: int, device: torch.device | str = "cpu", step: Tensor | float = 0.0
) -> Tensor:
    """Return the rows that are probed, int64 (probes,), of `number` from `first` on: see `spread`."""
    return first + spread(torch.full((1,), number, device=device), probes, step)[0]


@torch.library.custom_op("accelplug::step_of", mutates_args=())
def step_of(x: Tensor, ticket: Tensor) -> Tensor:
    """Return the step that a memory is at, float64 () on the device of x; 0 without one."""
    memory = memory_of(ticket, x.device)
    return torch.full((), float((memory and memory.step) or 0), dtype=torch.float64, device=x.device)


@step_of.register_fake
def _step_of_fake(x: Tensor, ticket: Tensor) -> Tensor:
    return x.new_empty((), dtype=torch.float64)


@torch.library.custom_op("accelplug::carried", mutates_args=())
def carried(sums: Tensor, carry: float, ticket: Tensor) -> Tensor:
    """Add to sums those of the last step, weighed by `carry`, and leave the result for the next one.

    The first call of a step settles it: later ones of the step take what it left, so that one set of sums is held, not two. In the
    first step of all there is nothing to add, and each call goes by its own.
    """
    memory = memory_of(ticket, sums.device)
    if memory is None or memory.step is None:
        return sums.clone()
    if memory.first:
        memory.end = sums.clone()
        return sums.clone()
    if (settled := memory.ended(sums.shape, sums.device)) is None:
        last = memory.started(sums.shape, sums.device)
        settled = sums.clone() if last is None else sums + carry * last
        memory.start, memory.end = None, settled
    return settled.clone()  # a graph may write over what it is given


@carried.register_fake
def _carried_fake(sums: Tensor, carry: float, ticket: Tensor) -> Tensor:
    return torch.empty_like(sums)


def repair_(
    out: Tensor,
    q: Tensor,
    probes: Probes,
    within: slice = slice(None),
    *,
    on_query: bool = True,
    ridge: float = 5.0,
    carry: float = 0.0,
    ticket: Tensor = COLD,
    skipped: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Add to a sparse output, in place, what its exact rows say of its error.

    Parameters
    ----------
    out : Tensor (B, H, S, D_v), sparse attention.
    q : Tensor (B, H, S, D), its queries.
    probes : two exact rows at least.
    within : the rows that are repaired; others, which are exact, stay as they are.
    on_query : whether the error is regressed on the query too.
    ridge : above 0, how many rows without error the prior counts for.
    carry, ticket : what rows of the last step weigh, and where to find what is known of them, see `kernels.memory`. They must be others.
    skipped : bool (B|1, H|1), heads that stay as they are, all wrong; None for none.

    Returns
    -------
    left, whole : float32 (B, H), norm of the error that is left in probed rows, each by a fit to the others, and of these rows. One over
        the other estimates the relative error, of a head or of all.
    """
    output = take(out, probes.rows)
    given = (output, take(q, probes.rows)) if on_query else (output,)
    counted = torch.ones_like(output[0, 0, :, :1]) if probes.counted is None else probes.counted[:, None]
    counted = counted.float()  # [R, 1]

    def regression(exact: Tensor, *given: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        parts = [x.float() * counted for x in given]
        return counted, parts, exact.float() * counted - parts[0]

    # What is made of a head's probes is several times their size: some heads at a time, and the sums of all in between.
    each = 4 * len(out) * output.shape[-2] * (sum(x.shape[-1] for x in given) + output.shape[-1])
    heads = list(by_heads(each, probes.out, *given))
    sums = carried(torch.cat([_sums(*regression(*some)) for some in heads], 1), carry, ticket)
    theirs = sums.split(heads[0][0].shape[1], 1)
    fits = [_fit(*regression(*some), of_heads, ridge) for some, of_heads in zip(heads, theirs, strict=True)]
    slope, constant, left = (torch.cat(found, 1) for found in zip(*fits, strict=True))
    whole = torch.cat([(exact.float() * counted).norm(dim=(-2, -1)) for exact, *_ in heads], 1)
    exact = probes.out.to(out.dtype)
    if skipped is not None:
        keep = skipped[..., None, None]
        slope, constant = slope.masked_fill(keep, 0.0), constant.masked_fill(keep, 0.0)
        exact, left = torch.where(keep, output, exact), torch.where(skipped, whole, left)
    of_output, of_query = slope.to(out.dtype).flatten(0, 1).tensor_split([out.shape[-1]], 1)
    constant = constant.to(out.dtype).flatten(0, 1)
    for some, query in by_rows(out[..., 0, :].numel(), out[..., within, :], q[..., within, :]):
        error = torch.baddbmm(constant, some.flatten(0, 1), of_output)
        if on_query:
            error = error.baddbmm_(query.flatten(0, 1), of_query)
        some += error.unflatten(0, some.shape[:2])
    _put_(out, probes.rows, exact)
    return left, whole


def _sums(counted: Tensor, parts: list[Tensor], residual: Tensor) -> Tensor:
    """Return sums over rows of all products of features, 1 and residual, float32 (B, H, F + 1, F + 1 + D_v); arguments as of `_fit`."""
    x = torch.cat([*parts, counted.expand(*residual.shape[:-1], 1)], -1)
    return x.mT @ torch.cat([x, residual], -1)


def _fit(
    counted: Tensor, parts: list[Tensor], residual: Tensor, sums: Tensor, ridge: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Regress residuals on features, judged by leaving out: see above.

    Parameters
    ----------
    counted : float32 (R, 1), 1 for rows that count, else 0.
    parts : features, float32 (B, H, R, D) each, 0 in rows that do not count.
    residual : float32 (B, H, R, D_v), 0 there too.
    sums : what `_sums` gives of these rows, and of earlier ones.

    Returns
    -------
    slope, constant : float32 (B, H, F, D_v) and (B, H, 1, D_v).
    left : float32 (B, H), norm of what each row's residual is wrong by, as a fit to the others predicts it.
    """
    x = torch.cat(parts, -1)  # [B, H, R, F]
    squares = [
        part.square().sum((-2, -1), keepdim=True).expand(*part.shape[:2], 1, part.shape[-1]) / part.shape[-1]
        for part in parts
    ]
    size = (torch.cat(squares, -1) / counted.sum()).sqrt().clamp(min=1e-12)  # [B, H, 1, F]
    width = x.shape[-1]
    number = sums[..., width:, width : width + 1]  # [B, H, 1, 1]
    x_mean, y_mean = sums[..., width:, :width] / number, sums[..., width:, width + 1 :] / number
    gram = (sums[..., :width, :width] - number * x_mean.mT * x_mean) / (size.mT * size)
    gram.diagonal(dim1=-2, dim2=-1).add_(ridge)
    cross = (sums[..., :width, width + 1 :] - number * x_mean.mT * y_mean) / size.mT  # [B, H, F, D_v]
    root = torch.linalg.cholesky_ex(gram)[0]  # [B, H, F, F]
    both = torch.linalg.solve_triangular(root, torch.cat([((x - x_mean) / size).mT, cross], -1), upper=False)
    z, half = both.split([x.shape[-2], cross.shape[-1]], -1)  # [B, H, F, R], [B, H, F, D_v]
    others = 1 - z.square().sum(-2) - 1 / number[..., 0]  # [B, H, R], 1 - leverage
    wrong = (residual - y_mean - z.mT @ half) / others.clamp(min=1e-6)[..., None]
    # A row that nothing else says anything of is not predicted.
    predicted = torch.where(others[..., None] > 1e-6, residual - wrong, 0.0) * counted
    agreement, size_predicted = ((predicted * w).sum((-2, -1), keepdim=True) for w in (residual, predicted))
    trust = (agreement / size_predicted.clamp(min=1e-30)).clamp(0, 1)  # [B, H, 1, 1]
    slope = trust * torch.linalg.solve_triangular(root.mT, half, upper=True) / size.mT
    return slope, trust * y_mean - x_mean @ slope, (residual - trust * predicted).norm(dim=(-2, -1))


def _put_(x: Tensor, rows: Tensor, values: Tensor) -> None:
    """Write rows of x (B, H, S, D), which may differ by head."""
    if rows.ndim == 1:
        x.index_copy_(-2, rows, values)
    else:
        x.scatter_(-2, rows.expand(*x.shape[:2], -1)[..., None].expand(values.shape), values)
