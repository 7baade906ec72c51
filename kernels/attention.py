"""block_attention: attention over a block plan, by the kernel that is asked for or was seen to be fastest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from accelplug.bounded import Bounded
from accelplug.errors import ShapeError, UnsupportedError
from accelplug.kernels import blocked, cudnn, flex, reference, sol_attn
from accelplug.kernels.chunks import at_once, by_heads
from accelplug.kernels.linear import first_order
from accelplug.kernels.plan import BlockPlan, Threshold, pool
from accelplug.kernels.precision import DTYPES, Precision, ValuePrecision, quantised, quantised_values, shared_key
from accelplug.kernels.rest import Drop, Linear, Pool, Rectified, Rest, Tied, coarse, rectified, tied
from accelplug.kernels.timing import timed_ms

Backend = Literal["auto", "first", "triton", "flex", "flash", "blocked", "reference", "cudnn", "sol"]

UNTRIED = ("flash", "cudnn", "sol")
"""What no GPU has run here. The last two are never chosen by themselves: they are asked for by name."""

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
    values: ValuePrecision = "native",
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
    precision, values : of q.k and of p.v in the blocks that are read exactly; see `precision`.
    key_mask : bool (B, P_k), keys that may be read, or (B, H, P_k) where that differs by head, as orders may; the kernels know
        one mask, so that heads then go one after the other. Pooled blocks are means over these alone.
    backend : ``auto`` takes what `measure_choice` found for this shape, or the first that serves; ``first`` asks no measurement. ``cudnn``
        and ``sol`` are tried where they are named alone.
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
    _check(q, k, v, plan, rest, key_mask)
    rest = Drop() if rest is None else rest
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if backend in ("auto", "first"):
        measured = _choices.peek(_call_key(q, k, v, plan, rest, key_mask, precision, values)) if backend == "auto" else None
        serve = _candidates(q, v, plan, rest, precision, values, return_lse)
        backend = measured[0] if measured is not None and measured[0] in serve else serve[0]  # type: ignore[assignment]
    arguments: dict[str, Any] = {"scale": scale, "precision": precision, "values": values, "backend": backend}
    if key_mask is not None and key_mask.ndim == 3:
        return _by_head(q, k, v, plan, rest, key_mask, {**arguments, "return_lse": return_lse})
    arguments["key_mask"] = key_mask
    if backend == "sol":
        if return_lse:
            raise UnsupportedError("backend='sol' gives no log-sum-exp. Use backend='triton' or 'auto'.")
        native = precision == values == "native"
        return sol_attn.attend(q, k, v, plan, rest, scale, key_mask, native)
    if isinstance(rest, Rectified | Tied):
        if return_lse:
            raise UnsupportedError(f"rest={type(rest).__name__} has no log-sum-exp. Call without return_lse.")
        if isinstance(rest, Rectified):
            return rectified(rest, block_attention(q, k, v, plan, **arguments), v, plan, key_mask)
        plan = plan if isinstance(plan, BlockPlan) else lower(plan, q, k, scale, key_mask)
        out, lse = block_attention(q, k, v, plan, **arguments, return_lse=True)
        return tied(out, lse, q, k, v, plan, scale, key_mask)
    if isinstance(rest, Linear):
        plan = plan if isinstance(plan, BlockPlan) else lower(plan, q, k, scale, key_mask)
        out, lse = block_attention(q, k, v, plan, rest=Pool(rest.weight), **arguments, return_lse=True)
        out = first_order(out, lse, q, k, v, plan, rest, scale, key_mask)
        return (out, lse) if return_lse else out
    weight, kind = (rest.weight, rest.representative) if isinstance(rest, Pool) else (None, "drop")
    band = plan.band if isinstance(plan, Threshold) else None
    causal = plan.causal if isinstance(plan, BlockPlan) else None
    tensors, sizes = plan.tensors(), (plan.block_q, plan.block_k, band, causal)
    out, lse = _op(q, k, v, key_mask, weight, tensors, *sizes, kind, scale, precision, values, backend, return_lse)
    return (out, lse) if return_lse else out


def _by_head(q: Tensor, k: Tensor, v: Tensor, plan: Any, rest: Any, key_mask: Tensor, arguments: dict[str, Any]) -> Any:
    """Serve one head after the other, each with its own mask."""
    pairs = []
    for head in range(q.shape[1]):
        one = slice(head, head + 1)
        tensors, theirs = (q[:, one], k[:, one], v[:, one]), (_said_of(plan, one), _said_of(rest, one))
        pairs.append(block_attention(*tensors, theirs[0], rest=theirs[1], key_mask=key_mask[:, head], **arguments))
    if arguments["return_lse"]:
        return tuple(torch.cat(parts, 1) for parts in zip(*pairs, strict=True))
    return torch.cat(pairs, 1)


def _said_of(x: Any, heads: slice) -> Any:
    """What a plan or a rest says of some query heads."""
    if isinstance(x, Pool | Linear):
        return x if x.weight is None else replace(x, weight=x.weight[heads])
    names = {BlockPlan: BlockPlan.BY_HEAD, Threshold: ("theta",), Rectified: ("share", "weights")}.get(type(x), ())
    parts = {name: part for name in names if (part := getattr(x, name)) is not None and part.shape[1] > 1}
    return replace(x, **{name: part[:, heads] for name, part in parts.items()})


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
    values: str,
    backend: str,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """One opaque node in compiled graphs, whatever the backend. `rest` is ``drop`` or the representative of a `Pool`."""
    sizes = (block_q, block_k)
    made = BlockPlan.of_tensors(plan, *sizes, causal) if band is None else Threshold.of_tensors(plan, band, *sizes)
    kept = Drop() if rest == "drop" else Pool(weight, rest)  # type: ignore[arg-type]
    out, lse = _run(backend, q, k, v, made, kept, scale, precision, values, key_mask, return_lse)
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
    values: str,
    key_mask: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    eight_bits = precision != "native" or values != "native"
    if backend == "triton":
        from accelplug.kernels import triton_block

        if isinstance(plan, Threshold) and (eight_bits or not triton_block.evaluates(plan, rest)):
            plan = lower(plan, q, k, scale, key_mask)  # in 8 bits too: it is a rule on the scores as they are
        shared = None if precision == "native" else shared_key(k, plan, key_mask)
        eight = None if shared is None else quantised(q, k, shared, plan, precision, key_mask)
        v8 = None if values == "native" else quantised_values(v, plan, key_mask)
        out, lse = triton_block.attend(q, k, v, plan, rest, scale, key_mask, return_lse, eight, v8)
        return out, lse if lse is None or shared is None else lse + _shared_logit(q, shared, scale)
    if isinstance(plan, Threshold):
        plan = lower(plan, q, k, scale, key_mask)
    if 1 < plan.bits.shape[1] < q.shape[1] and (eight_bits or backend != "blocked"):  # heads that share keys read the same
        plan = plan.of_heads(torch.arange(q.shape[1], device=q.device) // (q.shape[1] // plan.bits.shape[1]))
    if not eight_bits:
        return _kernels(backend)(q, k, v, plan, coarse(k, v, plan, rest, key_mask), scale, key_mask, return_lse)
    if values != "native" and backend != "reference":
        raise UnsupportedError(
            f"backend='{backend}' cannot serve: it rounds no probabilities, as values='{values}' asks. Use 'triton', 'reference' or 'auto'."
        )
    return _rounded_in_dtype(_kernels(backend), q, k, v, plan, rest, scale, precision, values, key_mask, return_lse)


def _kernels(backend: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """What serves a backend other than Triton: (q, k, v, plan, coarse, scale, key_mask, return_lse) -> (out, lse)."""
    flash = partial(flex.attend, backend="flash")
    kernels: dict[str, Any] = {"flex": flex.attend, "flash": flash, "blocked": blocked.attend, "reference": reference.attend}
    kernels["cudnn"] = cudnn.attend
    return kernels[backend]


def _rounded_in_dtype(
    kernel: Callable[..., tuple[Tensor, Tensor | None]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    rest: Drop | Pool,
    scale: float,
    precision: str,
    values: str,
    key_mask: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """What 8-bit products give, by a kernel that multiplies in the dtype of q; some heads at a time, since their roundings are copies."""
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    lse = torch.empty(q.shape[:-1], device=q.device) if return_lse else None
    ratio = q.shape[1] // k.shape[1]
    step = at_once(len(q) * (ratio * q[0, 0].numel() + k[0, 0].numel() + v[0, 0].numel()))
    for first in range(0, k.shape[1], step):
        ours, heads = slice(first, first + step), slice(first * ratio, (first + step) * ratio)
        q_own, k_own, v_own, plan_own = q[:, heads], k[:, ours], v[:, ours], _said_of(plan, heads)
        more = coarse(k_own, v_own, plan_own, _said_of(rest, heads), key_mask)
        logit, options = q.new_zeros(()), {}
        if precision != "native":
            shared = shared_key(k_own, plan, key_mask)
            eight = quantised(q_own, k_own, shared, plan, precision, key_mask)
            logit = _shared_logit(q_own, shared, scale) if return_lse else logit
            more = more and replace(more, k=eight.smoothed(more.k))
            q_own, k_own = eight.restored(q.dtype)
        if values != "native":
            v8 = quantised_values(v_own, plan, key_mask)
            v_own, options = v8.restored(v.dtype, v.shape[-2]), {"tile": v8.tile}
        out[:, heads], own = kernel(q_own, k_own, v_own, plan_own, more, scale, key_mask, return_lse, **options)
        if lse is not None and own is not None:
            lse[:, heads] = own + logit
    return out, lse


def _shared_logit(q: Tensor, shared: Tensor, scale: float) -> Tensor:
    """What the logits of each row lost with `shared`, float32 (B, H_kv, 1, D), of all keys: float32 (B, H, P_q)."""
    shared = shared.repeat_interleave(q.shape[1] // shared.shape[1], 1)
    return torch.cat([scale * (x.float() @ key.mT)[..., 0] for x, key in by_heads(q[:, 0].numel(), q, shared)], 1)


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
    named = {"cudnn": cudnn.missing(device), "sol": sol_attn.missing(device)}
    return {**compiled, "blocked": None, "reference": None, **named}


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
    values: ValuePrecision = "native",
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
        for name in _candidates(q, v, plan, rest, precision, values, return_lse=False):
            try:
                arguments: Any = {
                    "rest": rest,
                    "scale": scale,
                    "precision": precision,
                    "values": values,
                    "key_mask": key_mask,
                    "backend": name,
                }
                run = partial(block_attention, q, k, v, plan, **arguments)
                times[name] = min(timed_ms(run, q.device)[1] for _ in range(3))
            except UnsupportedError:
                continue
        return min(times, key=times.__getitem__), times

    return _choices.get(_call_key(q, k, v, plan, rest, key_mask, precision, values), measure)[1]


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


def _call_key(
    q: Tensor, k: Tensor, v: Tensor, plan: Any, rest: Rest, key_mask: Tensor | None, precision: str, values: str
) -> tuple:
    shapes = (tuple(q.shape), tuple(k.shape), v.shape[-1], plan.block_q, plan.block_k)
    kind: Any = type(plan).__name__
    if isinstance(plan, BlockPlan):
        kind = (plan.box is not None, plan.causal, plan.levels, tuple(plan.bits.shape))
    return (q.device, q.dtype, *shapes, kind, type(rest).__name__, key_mask is not None, precision, values)


def _candidates(
    q: Tensor, v: Tensor, plan: Any, rest: Rest, precision: Precision, values: ValuePrecision, return_lse: bool
) -> list[str]:
    """Backends that can serve, the one that is tried first without a measurement ahead."""
    names = []
    if q.device.type != "cpu" and triton_missing(q.device) is None:
        from accelplug.kernels import triton_block

        if triton_block.unsupported(q, v, plan, DTYPES[precision], values) is None:
            names.append("triton")
    if values != "native":
        return [*names, "reference"]
    # Causal prompts differ in length, and a CPU would compile for each.
    causal = isinstance(plan, BlockPlan) and plan.causal is not None
    large = q.device.type != "cpu" or (len(plan.k_len) * plan.block_k >= FLEX_MIN_SLOTS and not causal)
    compiled = large and flex.unsupported(q, plan, return_lse or isinstance(rest, NEED_LSE)) is None
    # On a CPU it is the faster one for float32 with the rest dropped alone; benchmarks.block_attention_cpu measures both.
    behind = q.device.type == "cpu" and (not isinstance(rest, Drop) or q.dtype != torch.float32)
    if compiled and not behind:
        names.append("flex")
    if flex.flash_unsupported(q, v, plan) is None:  # behind the others: taken where it was measured to be the fastest
        names.append("flash")
    return [*names, "blocked", *(["flex"] if compiled and behind else [])]


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
