"""The memory law: what a patch's `attend` holds above dense attention is at most its stated share of q, k, v and out.

Counted are the bytes that torch's allocator hands out and takes back on the CPU while `attend` runs, insides of operators and custom
ops too, by the profiler's allocation events, after a first call that fills the caches. Not seen: what a cache keeps between calls, what
a library takes past the allocator, and a GPU kernel's own needs (the Triton kernel's lists of blocks are added by arithmetic).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from patch_rows import DENOISING
from torch._C._profiler import _EventType
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from accelplug.call import AttentionCall, Clock, Layout, Site
from accelplug.kernels import chunks
from accelplug.registry import patch_class

HEADS, DIM, BLOCK = 8, 32, 32
FRAMES = (5, 10, 20)
TILE = (1, 8, 4)
FITTING = {
    "neighborhood": {"tile_thw": TILE},
    "freeswim": {"tile_thw": TILE},
    "proxy": {"window_thw": TILE},
    "svg_ear": {"block_k": BLOCK},
}
"""Settings that fill blocks of so many slots."""
SITE = Site("blocks.0.attn1", "transformer", "self", 0, 1)


def peak(run: Callable[[], Any]) -> int:
    """Most bytes that are alive at a time while it runs the second time, above those alive before."""
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        kept = run()
    del kept
    events, changes = list(found.profiler.kineto_results.experimental_event_tree()), []
    while events:
        event = events.pop()
        events.extend(event.children)
        if event.tag == _EventType.Allocation:
            changes.append((event.start_time_ns, event.extra_fields.alloc_size))
    alive = most = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        alive += change
        most = max(most, alive)
    return most


def terms(patch: str) -> tuple[list[int], float, float]:
    pass


def extra(patch: str, frames: int, DIM=DIM, BLOCK=BLOCK, dtype=torch.bfloat16) -> tuple[int, int]:
    """Bytes above dense, and those of q, k, v and out."""
    row, layout = DENOISING[patch], Layout((frames, 8, 12))
    common = {"block": BLOCK, "backend": "blocked"} if row.blocks else {}
    method = patch_class(patch)({**row.working, **common, **FITTING.get(patch, {})})
    q, k, v = torch.randn(3, 1, HEADS, layout.length, DIM, generator=torch.Generator().manual_seed(0)).to(dtype).unbind()

    def dense(q_: Any = None, k_: Any = None, v_: Any = None, attn_mask: Any = None, **named: Any) -> torch.Tensor:
        a, b, c = named.get("q", q_), named.get("k", k_), named.get("v", v_)
        return scaled_dot_product_attention(
            q if a is None else a, k if b is None else b, v if c is None else c, attn_mask=attn_mask
        )

    call = AttentionCall(q, k, v, None, DIM**-0.5, dense)
    params = method.prepare(SITE, layout, Clock(0, 4), {})
    assert params is not None, "it runs dense here"
    return peak(partial(method.attend, call, params)) - q.numel() * q.element_size(), 4 * q.numel() * q.element_size()


if __name__ == "__main__":
    import time, sys

    chunks.CHUNK = 1
    with torch.no_grad():
        for p in sys.argv[1:] or DENOISING:
            t = time.time()
            try:
                e = [extra(p, f) for f in FRAMES]
            except AssertionError as err:
                print(p, err)
                continue
            x = [f * 96 for f in FRAMES]
            y = [a for a, _ in e]
            c = ((y[2] - y[1]) / (x[2] - x[1]) - (y[1] - y[0]) / (x[1] - x[0])) / (x[2] - x[0])
            b = (y[1] - y[0]) / (x[1] - x[0]) - c * (x[0] + x[1])
            print(
                f"{p:14s} {y} share {[round(a / s, 2) for a, s in e]} bytes/pair {c * BLOCK**2 / HEADS:.1f} share-linear {b / (8 * HEADS * DIM):.2f} {time.time() - t:.1f}s",
                flush=True,
            )
