"""block_attention: attention over a block plan, by the kernel that is asked for or was seen to be fastest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from accelplug.bounded import Bounded
from accelplug.errors import ShapeError, UnsupportedError
from accelplug.kernels import blocked, flex, reference
from accelplug.kernels.linear import first_order
from accelplug.kernels.plan import BlockPlan, Threshold, pool
from accelplug.kernels.precision import DTYPES, Precision, Quantised, quantised, smoothed
from accelplug.kernels.rest import Drop, Linear, Pool, Rectified, Rest, Tied, coarse, rectified, tied
from accelplug.kernels.timing import timed_ms

Backend = Literal["auto", "first", "triton", "flex", "flash", "blocked", "reference"]

FLEX_MIN_SLOTS = 4096
"""Below this many key slots, compiling FlexAttention on a CPU costs more than it brings."""

NEED_LSE = (Tied, Linear)
"""What of the rest asks a kernel for log-sum-exps."""

_choices: Bounded[tuple, tuple[str, dict[str, float]]] = Bounded(256)


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan | Threshold,
    *,
    rest: Rest | None = None,
    scale: float | None = None,
    precision: Precision = "native",
    key_mask: Tensor | None = None,
    backend: Backend = "auto",
    return_lse: bool = False,
) -> Any:
    """Attend to the key blocks that `plan` selects, and to the others as `rest` says.

    Parameters
    ----------
    q : Tensor (B, H, P_q, D), bf16, fp16 or fp32, tokens in block order; at most ``len(plan.q_len) * plan.block_q`` slots.
    k, v : Tensor (B, H_kv, P_k, D) and (B, H_kv, P_k, D_v); H_kv divides H.
    plan : which blocks are read exactly. A causal plan takes `Drop` and `Pool`: the other rests share something among rows, which
        would tell rows of later ones.
    rest : `Drop` (default), `Pool`, `Linear`, `Rectified` or `Tied`.
    scale : factor on q.k; 1 / sqrt(D) by default.
    precision : of q.k in the blocks that are read exactly; see `precision`.
    key_mask : bool (B, P_k), keys that may be read, or (B, H, P_k) where that differs by head, as orders may; the kernels know
        one mask, so that heads then go one after the other. Pooled blocks are means over these alone.
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
        If the backend that was asked for cannot serve here, gradients are asked for, or the log-sum-exp of `Rectified` or
        `Tied`, which have none.
    """
    arguments: Any
    _check(q, k, v, plan, rest, key_mask)
    rest = Drop() if rest is None else rest
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if backend in ("auto", "first"):
        measured = _choices.peek(_call_key(q, k, v, plan, rest, key_mask, precision)) if backend == "auto" else None
        serve = _candidates(q, v, plan, precision, return_lse or isinstance(rest, NEED_LSE))
        backend = measured[0] if measured is not None and measured[0] in serve else serve[0]  # type: ignore[assignment]
    if key_mask is not None and key_mask.ndim == 3:
        arguments = {"scale": scale, "precision": precision, "backend": backend, "return_lse": return_lse}
        return _by_head(q, k, v, plan, rest, key_mask, arguments)
    if isinstance(rest, Rectified | Tied):
        if return_lse:
            raise UnsupportedError(f"rest={type(rest).__name__} has no log-sum-exp. Call without return_lse.")
        arguments = {"scale": scale, "precision": precision, "key_mask": key_mask, "backend": backend}
        if isinstance(rest, Rectified):
            return rectified(rest, block_attention(q, k, v, plan, **arguments), v, plan, key_mask)
        plan = plan if isinstance(plan, BlockPlan) else lower(plan, q, k, scale, key_mask)
        out, lse = block_attention(q, k, v, plan, **arguments, return_lse=True)
        return tied(out, lse, q, k, v, plan, scale, key_mask)
    if isinstance(rest, Linear):
        plan = plan if isinstance(plan, BlockPlan) else lower(plan, q, k, scale, key_mask)
        arguments = {"scale": scale, "precision": precision, "key_mask": key_mask, "backend": backend, "return_lse": True}
        out, lse = block_attention(q, k, v, plan, rest=Pool(rest.weight), **arguments)
        out = first_order(out, lse, q, k, v, plan, rest, scale, key_mask)
        return (out, lse) if return_lse else out
    weight, kind = (rest.weight, rest.representative) if isinstance(rest, Pool) else (None, "drop")
    band = plan.band if isinstance(plan, Threshold) else None
    causal = plan.causal if isinstance(plan, BlockPlan) else None
    tensors, sizes = plan.tensors(), (plan.block_q, plan.block_k, band, causal)
    out, lse = _op(q, k, v, key_mask, weight, tensors, *sizes, kind, scale, precision, backend, return_lse)
    return (out, lse) if return_lse else out


def _by_head(q: Tensor, k: Tensor, v: Tensor, plan: Any, rest: Any, key_mask: Tensor, arguments: dict[str, Any]) -> Any:
    """Serve one head after the other, each with its own mask."""
    pairs = []
    for head in range(q.shape[1]):
        one = slice(head, head + 1)

        def own(x: Any, names: Sequence[str], one: slice = one) -> Any:
            parts = {name: part for name in names if (part := getattr(x, name)) is not None and part.shape[1] > 1}
            return replace(x, **{name: part[:, one] for name, part in parts.items()})

        their_rest = rest
        if isinstance(rest, Pool | Linear) and rest.weight is not None:
            their_rest = replace(rest, weight=rest.weight[one])
        elif isinstance(rest, Rectified):
            their_rest = own(rest, ("share", "weights"))
        theirs = own(plan, BlockPlan.BY_HEAD if isinstance(plan, BlockPlan) else ("theta",))
        tensors = q[:, one], k[:, one], v[:, one]
        pairs.append(block_attention(*tensors, theirs, rest=their_rest, key_mask=key_mask[:, head], **arguments))
    if arguments["return_lse"]:
        return tuple(torch.cat(parts, 1) for parts in zip(*pairs, strict=True))
    return torch.cat(pairs, 1)


@torch.library.custom_op("accelplug::block_attention", mutates_args=())
def _op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    weight: Tensor | None,
    plan: Sequence[Tensor | None],
    block_q: int,
    block_k: int,
    band: int | None,
    causal: int | None,
    rest: str,
    scale: float,
    precision: str,
    backend: str,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """One opaque node in compiled graphs, whatever the backend. `rest` is ``drop`` or the representative of a `Pool`."""
    sizes = (block_q, block_k)
    made = BlockPlan.of_tensors(plan, *sizes, causal) if band is None else Threshold.of_tensors(plan, band, *sizes)
    kept = Drop() if rest == "drop" else Pool(weight, rest)  # type: ignore[arg-type]
    out, lse = _run(backend, q, k, v, made, kept, scale, precision, key_mask, return_lse)
    return out, out.new_empty(0, dtype=torch.float32) if lse is None else lse


@_op.register_fake
def _op_fake(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return_lse = others[-1]
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    return out, q.new_empty(q.shape[:-1] if return_lse else (0,), dtype=torch.float32)


def _run(
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan | Threshold,
    rest: Drop | Pool,
    scale: float,
    precision: str,
    key_mask: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    if precision == "native":
        return _served(backend, q, k, v, plan, rest, scale, key_mask, return_lse, None)
    if isinstance(plan, Threshold):  # a rule on the scores as they are
        plan = lower(plan, q, k, scale, key_mask)
    k, mean = smoothed(k, plan.k_len, plan.block_k, key_mask)
    eight = quantised(q, k, plan, precision, key_mask)
    out, lse = _served(backend, q, k, v, plan, rest, scale, key_mask, return_lse, eight)
    if lse is not None and return_lse:
        lse = lse + scale * (q.float() @ mean.repeat_interleave(q.shape[1] // k.shape[1], 1).mT)[..., 0]
    return out, lse


def _served(
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan | Threshold,
    rest: Drop | Pool,
    scale: float,
    key_mask: Tensor | None,
    return_lse: bool,
    eight: Quantised | None,
) -> tuple[Tensor, Tensor | None]:
    if backend == "triton":
        from accelplug.kernels import triton_block

        if isinstance(plan, Threshold) and not triton_block.evaluates(plan, rest):
            plan = lower(plan, q, k, scale, key_mask)
        return triton_block.attend(q, k, v, plan, rest, scale, key_mask, return_lse, eight)
    if isinstance(plan, Threshold):
        plan = lower(plan, q, k, scale, key_mask)
    flash = partial(flex.attend, backend="flash")
    kernels: dict[str, Any] = {"flex": flex.attend, "flash": flash, "blocked": blocked.attend, "reference": reference.attend}
    more = coarse(k, v, plan, rest, key_mask)
    if 1 < plan.bits.shape[1] < q.shape[1] and backend != "blocked":  # heads that share keys read the same
        plan = plan.of_heads(torch.arange(q.shape[1], device=q.device) // (q.shape[1] // plan.bits.shape[1]))
    if eight is not None:
        q, k = eight.restored(q.dtype)
    return kernels[backend](q, k, v, plan, more, scale, key_mask, return_lse)


def lower(plan: Threshold, q: Tensor, k: Tensor, scale: float, key_mask: Tensor | None) -> BlockPlan:
    """Evaluate a threshold on the pooled queries and keys of this call."""
    q_pool, _ = pool(q, plan.q_len, plan.block_q)
    k_pool, _ = pool(k, plan.k_len, plan.block_k, key_mask)
    return plan.lower(q_pool, k_pool.repeat_interleave(q.shape[1] // k.shape[1], 1), scale)


# -------------------------------------------------------------------------------------------------------------- choice


def available_backends(device: torch.device | str) -> dict[str, str | None]:
    """Return, for every backend, None where it serves on `device`, else why not."""
    device = torch.device(device)
    compiled = {"triton": triton_missing(device), "flex": flex.missing(device), "flash": flex.flash_missing(device)}
    return {**compiled, "blocked": None, "reference": None}


def triton_missing(device: torch.device) -> str | None:
    try:
        from accelplug.kernels import triton_block
    except ImportError:
        return "triton 3.4 or newer is not installed"
    return triton_block.missing(device)


def measure_choice(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan | Threshold,
    *,
    rest: Rest | None = None,
    scale: float | None = None,
    precision: Precision = "native",
    key_mask: Tensor | None = None,
    backend: Backend = "auto",
) -> dict[str, float]:
    """Time the backends that could serve this call, and remember the fastest for its shape. Never call it inside a graph.

    Returns
    -------
    Milliseconds by backend, the fastest of two after one call to warm up. A backend that fails here is left out.
    """
    rest = Drop() if rest is None else rest

    def measure() -> tuple[str, dict[str, float]]:
        times = {}
        for name in _candidates(q, v, plan, precision, isinstance(rest, NEED_LSE)):
            try:
                arguments: Any = {
                    "rest": rest,
                    "scale": scale,
                    "precision": precision,
                    "key_mask": key_mask,
                    "backend": name,
                }
                run = partial(block_attention, q, k, v, plan, **arguments)
                times[name] = min(timed_ms(run, q.device)[1] for _ in range(3))
            except UnsupportedError:
                continue
        return min(times, key=times.__getitem__), times

    return _choices.get(_call_key(q, k, v, plan, rest, key_mask, precision), measure)[1]


def choices() -> list[dict[str, Any]]:
    """Return what this process chose by measurement, as plain data that `recall` takes."""
    return [{"call": _as_json(key), "backend": name, "ms": times} for key, (name, times) in _choices.items()]


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
            if entry["backend"] not in get_args(Backend):
                raise ValueError(f"no kernel is called {entry['backend']!r}")
            _choices.put(key, (entry["backend"], dict(entry["ms"])))
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UnsupportedError(f"These are not choices of kernels: expected what plug.choices gave, got {error}.") from error


def _as_json(key: Any) -> Any:
    """A key of `_choices` as JSON has it."""
    if isinstance(key, tuple):
        return [_as_json(part) for part in key]
    return str(key).removeprefix("torch.") if isinstance(key, torch.device | torch.dtype) else key


def _as_tuple(part: Any) -> Any:
    return tuple(_as_tuple(item) for item in part) if isinstance(part, list | tuple) else part


def forget_choices() -> None:
    """Forget what was measured."""
    _choices.clear()


def _call_key(q: Tensor, k: Tensor, v: Tensor, plan: Any, rest: Rest, key_mask: Tensor | None, precision: str) -> tuple:
    shapes = (tuple(q.shape), tuple(k.shape), v.shape[-1], plan.block_q, plan.block_k)
    kind: Any = type(plan).__name__
    if isinstance(plan, BlockPlan):
        kind = (plan.box is not None, plan.causal, plan.levels, tuple(plan.bits.shape))
    return (q.device, q.dtype, *shapes, kind, type(rest).__name__, key_mask is not None, precision)


def _candidates(q: Tensor, v: Tensor, plan: Any, precision: Precision, return_lse: bool) -> list[str]:
    """Backends that can serve, the one that is tried first without a measurement ahead."""
    names = []
    if q.device.type != "cpu" and triton_missing(q.device) is None:
        from accelplug.kernels import triton_block

        if triton_block.unsupported(q, v, plan, DTYPES[precision]) is None:
            names.append("triton")
    # Causal prompts differ in length, and a CPU would compile for each.
    causal = isinstance(plan, BlockPlan) and plan.causal is not None
    large = q.device.type != "cpu" or (len(plan.k_len) * plan.block_k >= FLEX_MIN_SLOTS and not causal)
    if large and flex.unsupported(q, plan, return_lse) is None:
        names.append("flex")
    if flex.flash_unsupported(q, v, plan) is None:  # behind the others: taken where it was measured to be the fastest
        names.append("flash")
    return [*names, "blocked"]


def _check(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan | Threshold, rest: Rest | None, key_mask: Tensor | None) -> None:
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
    expected, by_head = (k.shape[0], k.shape[-2]), (k.shape[0], q.shape[1], k.shape[-2])
    fits = key_mask is None or key_mask.shape == expected or (key_mask.shape == by_head and k.shape[1] == q.shape[1])
    if key_mask is not None and not (fits and key_mask.dtype == torch.bool):
        raise ShapeError(
            f"key_mask must be bool (B, P_k) = {expected}, or {by_head} with as many heads in k, got {key_mask.dtype} "
            f"{tuple(key_mask.shape)} and {k.shape[1]} heads in k."
        )
    heads = plan.bits.shape[1] if isinstance(plan, BlockPlan) else plan.theta.shape[1]
    if heads not in (1, k.shape[1], q.shape[1]):
        raise ShapeError(
            f"The plan has {heads} heads; expected 1, {k.shape[1]} as the keys, or {q.shape[1]} as the queries."
        )
    if isinstance(plan, BlockPlan) and plan.causal is not None and isinstance(rest, Linear | Rectified | Tied):
        raise UnsupportedError(
            f"rest={type(rest).__name__} shares something among rows, which would tell rows of a causal plan of later ones. Take "
            "Drop or Pool."
        )
    if isinstance(rest, Rectified):
        blocks = (len(plan.q_len), len(plan.k_len))
        if rest.share.shape[2:] != blocks[:1] or rest.weights.shape[2:] != blocks:
            raise ShapeError(
                f"Rectified takes share (B|1, H|1, M) and weights (B|1, H|1, M, N) with M, N = {blocks}, got "
                f"{tuple(rest.share.shape)} and {tuple(rest.weights.shape)}."
            )
