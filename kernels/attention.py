"""block_attention: attention over a block plan, by the kernel that is asked for or was seen to be fastest."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from accelplug.bounded import Bounded
from accelplug.errors import ShapeError, UnsupportedError
from accelplug.kernels import blocked, flex, reference
from accelplug.kernels.plan import BlockPlan, Box, Threshold, pool
from accelplug.kernels.rest import Drop, Pool, Rest

Backend = Literal["auto", "first", "triton", "flex", "blocked", "reference"]

FLEX_MIN_SLOTS = 4096
"""Below this many key slots, compiling FlexAttention on a CPU costs more than it brings."""

_choices: Bounded[tuple, tuple[str, dict[str, float]]] = Bounded(256)


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan | Threshold,
    *,
    rest: Rest | None = None,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    backend: Backend = "auto",
    return_lse: bool = False,
) -> Any:
    """Attend to the key blocks that `plan` selects, and to the others as `rest` says.

    Parameters
    ----------
    q : Tensor (B, H, P_q, D), bf16, fp16 or fp32, tokens in block order; at most ``len(plan.q_len) * plan.block_q`` slots.
    k, v : Tensor (B, H_kv, P_k, D) and (B, H_kv, P_k, D_v); H_kv divides H.
    plan : which blocks are read exactly.
    rest : `Drop` (default) or `Pool`.
    scale : factor on q.k; 1 / sqrt(D) by default.
    key_mask : bool (B, P_k), keys that may be read. Pooled blocks are means over these alone.
    backend : ``auto`` takes what `measure_choice` found for this shape, or the first that serves; ``first`` asks no measurement.
    return_lse : also return the natural log-sum-exp of each row.

    Returns
    -------
    out : (B, H, P_q, D_v) in q's dtype. A slot without a token is finite and means nothing; a row without a key is 0.
    lse : float32 (B, H, P_q), only with `return_lse`; -inf for a row without a key.

    Raises
    ------
    ShapeError
        If shapes, dtypes or devices do not fit together or the plan.
    UnsupportedError
        If the backend that was asked for cannot serve here, or gradients are asked for.
    """
    _check(q, k, v, plan, key_mask)
    rest = Drop() if rest is None else rest
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if backend in ("auto", "first"):
        backend = _chosen(q, k, v, plan, rest, key_mask, return_lse, backend == "auto")
    lists, rule = (plan, None) if isinstance(plan, BlockPlan) else (None, plan)
    box = lists.box if lists else None
    out, lse = _op(
        q,
        k,
        v,
        plan.q_len,
        plan.k_len,
        lists.index if lists else None,
        lists.count if lists else None,
        lists.whole if lists else None,
        lists.bits if lists else None,
        box.lo if box else None,
        box.hi if box else None,
        box.coord if box else None,
        rule.theta if rule else None,
        rule.sink if rule else None,
        rule.dense_rows if rule else None,
        key_mask,
        rest.weight if isinstance(rest, Pool) else None,
        isinstance(rest, Pool),
        plan.block_q,
        plan.block_k,
        rule.band if rule else 0,
        scale,
        backend,
        return_lse,
    )
    return (out, lse) if return_lse else out


@torch.library.custom_op("accelplug::block_attention", mutates_args=())
def _op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_len: Tensor,
    k_len: Tensor,
    index: Tensor | None,
    count: Tensor | None,
    whole: Tensor | None,
    bits: Tensor | None,
    lo: Tensor | None,
    hi: Tensor | None,
    coord: Tensor | None,
    theta: Tensor | None,
    sink: Tensor | None,
    dense_rows: Tensor | None,
    key_mask: Tensor | None,
    weight: Tensor | None,
    pooled: bool,
    block_q: int,
    block_k: int,
    band: int,
    scale: float,
    backend: str,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """One opaque node in compiled graphs, whatever the backend."""
    plan: BlockPlan | Threshold
    if index is None or count is None or whole is None or bits is None:
        if theta is None or sink is None or dense_rows is None:
            raise ShapeError(
                "block_attention needs either the lists of a BlockPlan or the tensors of a Threshold, got neither."
            )
        plan = Threshold(theta, band, sink, dense_rows, q_len, k_len, block_q, block_k)
    else:
        box = None if lo is None or hi is None or coord is None else Box(lo, hi, coord)
        plan = BlockPlan(index, count, whole, bits, q_len, k_len, block_q, block_k, box)
    rest: Rest = Pool(weight) if pooled else Drop()
    out, lse = _run(backend, q, k, v, plan, rest, scale, key_mask, return_lse)
    return out, out.new_empty(0, dtype=torch.float32) if lse is None else lse


@_op.register_fake
def _(q, k, v, *others):
    return_lse = others[-1]
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    return out, q.new_empty(q.shape[:-1] if return_lse else (0,), dtype=torch.float32)


def _run(
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Any,
    rest: Rest,
    scale: float,
    key_mask: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    if backend == "triton":
        from accelplug.kernels import triton_block

        return triton_block.attend(q, k, v, plan, rest, scale, key_mask, return_lse)
    if isinstance(plan, Threshold):
        plan = lower(plan, q, k, scale, key_mask)
    kernels = {"flex": flex.attend, "blocked": blocked.attend, "reference": reference.attend}
    return kernels[backend](q, k, v, plan, rest, scale, key_mask, return_lse)


def lower(plan: Threshold, q: Tensor, k: Tensor, scale: float, key_mask: Tensor | None) -> BlockPlan:
    """Evaluate a threshold on the pooled queries and keys of this call."""
    q_pool, _ = pool(q, plan.q_len, plan.block_q)
    k_pool, _ = pool(k, plan.k_len, plan.block_k, key_mask)
    return plan.lower(q_pool, k_pool.repeat_interleave(q.shape[1] // k.shape[1], 1), scale)


# -------------------------------------------------------------------------------------------------------------- choice


def available_backends(device: torch.device | str) -> dict[str, str | None]:
    """Return, for every backend, None where it serves on `device`, else why not."""
    device = torch.device(device)
    return {"triton": _triton_missing(device), "flex": flex.missing(device), "blocked": None, "reference": None}


def _triton_missing(device: torch.device) -> str | None:
    try:
        from accelplug.kernels import triton_block
    except ImportError:
        return "triton is not installed"
    return triton_block.missing(device)


def measure_choice(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan | Threshold,
    *,
    rest: Rest | None = None,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    backend: Backend = "auto",
    repeats: int = 2,
) -> dict[str, float]:
    """Time the backends that could serve this call, and remember the fastest for its shape. Never call it inside a graph.

    Returns
    -------
    Milliseconds by backend, the fastest of `repeats` after one call to warm up. A backend that fails here is left out.
    """
    rest = Drop() if rest is None else rest

    def measure() -> tuple[str, dict[str, float]]:
        times = {}
        for name in _candidates(q, plan, rest, key_mask, False):
            try:
                arguments = {"rest": rest, "scale": scale, "key_mask": key_mask, "backend": name}
                times[name] = min(_timed_ms(q, k, v, plan, arguments) for _ in range(repeats + 1))
            except UnsupportedError:
                continue
        return min(times, key=times.__getitem__), times

    return _choices.get(_key(q, k, v, plan, rest, key_mask), measure)[1]


def choices() -> list[dict[str, Any]]:
    """Return what this process chose by measurement, as plain data that `recall` takes."""
    return [{"call": _plain(key), "backend": name, "ms": times} for key, (name, times) in _choices.items()]


def recall(chosen: Iterable[Mapping[str, Any]]) -> None:
    """Choose, for calls like those, what `choices` says; they are not timed again in this process.

    Raises
    ------
    UnsupportedError
        If `chosen` is not what `choices` gave.
    """
    try:
        for entry in chosen:
            device, dtype, *shape = entry["call"]
            key = (torch.device(device), getattr(torch, dtype), *(_as_tuple(part) for part in shape))
            _choices.put(key, (entry["backend"], dict(entry["ms"])))
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UnsupportedError(f"These are no choices of kernels: expected what plug.choices gave, got {error}.") from error


def _plain(key: Any) -> Any:
    """A key of `_choices` as JSON has it."""
    if isinstance(key, tuple):
        return [_plain(part) for part in key]
    return str(key).removeprefix("torch.") if isinstance(key, torch.device | torch.dtype) else key


def _as_tuple(part: Any) -> Any:
    return tuple(_as_tuple(item) for item in part) if isinstance(part, list | tuple) else part


def forget_choices() -> None:
    """Forget what was measured."""
    _choices.clear()


def _timed_ms(q: Tensor, k: Tensor, v: Tensor, plan: Any, arguments: dict[str, Any]) -> float:
    def wait() -> None:
        if q.device.type != "cpu":
            torch.accelerator.synchronize(q.device)

    wait()
    start = time.perf_counter()
    block_attention(q, k, v, plan, **arguments)
    wait()
    return 1e3 * (time.perf_counter() - start)


def _key(q: Tensor, k: Tensor, v: Tensor, plan: Any, rest: Rest, key_mask: Tensor | None) -> tuple:
    shapes = (tuple(q.shape), tuple(k.shape), v.shape[-1], plan.block_q, plan.block_k)
    kind = (type(plan).__name__, isinstance(plan, BlockPlan) and (plan.box is not None, tuple(plan.index.shape)))
    return (q.device, q.dtype, *shapes, *kind, type(rest).__name__, key_mask is not None)


def _chosen(
    q: Tensor, k: Tensor, v: Tensor, plan: Any, rest: Rest, key_mask: Tensor | None, return_lse: bool, by_time: bool
) -> Any:
    candidates = _candidates(q, plan, rest, key_mask, return_lse)
    measured = _choices.peek(_key(q, k, v, plan, rest, key_mask)) if by_time else None
    return measured[0] if measured is not None and measured[0] in candidates else candidates[0]


def _candidates(q: Tensor, plan: Any, rest: Rest, key_mask: Tensor | None, return_lse: bool) -> list[str]:
    """Backends that can serve, the one that is tried first without a measurement ahead."""
    names = []
    if (
        q.device.type != "cpu"
        and _triton_missing(q.device) is None
        and q.shape[-1] <= 256
        and plan.block_q >= 16 <= plan.block_k
    ):
        names.append("triton")
    large = q.device.type != "cpu" or len(plan.k_len) * plan.block_k >= FLEX_MIN_SLOTS
    if large and flex.unsupported(q, plan, return_lse) is None:
        names.append("flex")
    return [*names, "blocked"]


def _check(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan | Threshold, key_mask: Tensor | None) -> None:
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise UnsupportedError("block_attention has no backward pass. Call it under torch.no_grad().")
    if q.ndim != 4 or k.ndim != 4 or k.shape[:-1] != v.shape[:-1] or q.shape[-1] != k.shape[-1] or q.shape[0] != k.shape[0]:
        raise ShapeError(
            "block_attention takes q (B, H, P_q, D), k (B, H_kv, P_k, D), v (B, H_kv, P_k, D_v), got "
            f"{tuple(q.shape)=}, {tuple(k.shape)=}, {tuple(v.shape)=}."
        )
    if q.shape[1] % k.shape[1]:
        raise ShapeError(f"The heads of k must divide those of q, got {k.shape[1]} and {q.shape[1]}.")
    if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device == plan.k_len.device):
        raise ShapeError(
            f"q, k, v and the plan must agree in dtype and device, got {q.dtype}, {k.dtype}, {v.dtype} on {q.device}, "
            f"{k.device}, {v.device}, the plan on {plan.k_len.device}. Move the plan with plan.to(device)."
        )
    for what, x, lengths, block in (("query", q, plan.q_len, plan.block_q), ("key", k, plan.k_len, plan.block_k)):
        if x.shape[-2] > len(lengths) * block or x.shape[-2] <= (len(lengths) - 1) * block:
            raise ShapeError(
                f"The plan has {len(lengths)} {what} blocks of {block} slots, got {x.shape[-2]} {what} slots. "
                "Lay the tokens out with the tiles that the plan was made for."
            )
    expected = (k.shape[0], k.shape[-2])
    if key_mask is not None and (key_mask.shape != expected or key_mask.dtype != torch.bool):
        raise ShapeError(f"key_mask must be bool (B, P_k) = {expected}, got {key_mask.dtype} {tuple(key_mask.shape)}.")
