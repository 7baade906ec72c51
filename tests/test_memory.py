"""The memory law: what a patch's `attend` holds above dense attention is at most its stated share, and nothing of it is S x S.

Counted are the bytes that torch's allocator hands out and takes back on the CPU while `attend` runs, insides of operators and custom
ops too, by the profiler's allocation events, after a first call that fills the caches. Not seen: what a cache keeps between calls, what
a library takes past the allocator, and what kernels on a GPU need (the Triton kernel's lists, 2 bytes a pair, are in the docs' sum).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._C._profiler import _EventType
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from accelplug.call import AttentionCall, Clock, Layout, Site
from accelplug.kernels import chunks, importance
from accelplug.registry import patch_class
from tests.patch_rows import DENOISING

LAW = {
    "radial": (0.10, 2),
    "neighborhood": (0.80, 2),
    "sol": (0.15, 13),
    "rows": (0.27, 14),
    "proxy": (0.80, 4),
    "rectified": (1.05, 24),
    "psa": (0.65, 36),
    "hierarchical": (0.35, 14),
    "svg_ear": (1.15, 24),
    "tome": (0.80, 0),
    "sparse_vdit": (0.90, 4),
    "paro": (0.85, 4),
    "sta": (1.25, 4),
    "freeswim": (1.00, 4),
    "svg": (0.90, 8),
    "vmoba": (0.15, 10),
    "bilevel": (0.80, 15),
    "bias": (1.25, 0),
}
"""What each holds above dense: a share of q, k, v and out, and so many bytes a head and pair of blocks."""
SCRATCH = 128 << 10
"""What torch's own attention takes for itself, bytes, whatever the size."""
HEADS = 8
SITE = Site("blocks.0.attn1", "transformer", "self", 0, 1)
WAN = {"tokens": 75_600, "heads": 40, "width": 128}


@pytest.fixture
def one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is made in pieces of a fixed size on large calls is so here too; one thread: torch's attention has scratch for each."""
    monkeypatch.setattr(chunks, "CHUNK", 1)
    monkeypatch.setattr(importance, "BUDGET", 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


def above_dense(patch: str, frames: int, width: int, tile_thw: tuple[int, int, int]) -> tuple[int, int, int]:
    """Bytes held above q, k, v and out in bf16, those of these four, and pairs of blocks of all heads."""
    row, layout, block = DENOISING[patch], Layout((frames, 8, 12)), tile_thw[0] * tile_thw[1] * tile_thw[2]
    width = width if row.blocks else 128  # others add channels to each head, so many whatever its width
    config: dict[str, Any] = {"block": block, "backend": "blocked"} if row.blocks else {}
    for key, value in {"tile_thw": tile_thw, "window_thw": tile_thw, "block_k": block}.items():
        if key in row.working:  # blocks are to be full
            config[key] = value
    method = patch_class(patch)({**row.working, **config})
    seed = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, HEADS, layout.length, width, generator=seed).bfloat16().unbind()

    def dense(
        q: torch.Tensor = q, k: torch.Tensor = k, v: torch.Tensor = v, attn_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask)

    call = AttentionCall(q, k, v, None, width**-0.5, dense)
    params = method.prepare(SITE, layout, Clock(0, 4), {})
    assert params is not None, "it runs dense here"
    held, one = peak(partial(method.attend, call, params)), q.nbytes
    return held - one, 4 * one, HEADS * (-(-layout.length // block)) ** 2


@pytest.mark.usefixtures("one_at_a_time")
@pytest.mark.parametrize(
    ("frames", "width", "tile_thw"),
    [(8, 32, (1, 8, 4)), (3, 8, (1, 2, 4)), (5, 8, (1, 2, 4))],
    ids=["copies", "pairs", "more"],
)
@pytest.mark.parametrize("patch", DENOISING)
def test_no_patch_takes_more_than_its_share(patch: str, frames: int, width: int, tile_thw: tuple[int, int, int]) -> None:
    with torch.no_grad():
        held, dense, pairs = above_dense(patch, frames, width, tile_thw)
    share, each = LAW[patch]
    allowed = share * dense + each * pairs + SCRATCH
    assert held <= allowed, (
        f"{held} bytes above dense: {held / dense:.2f} of it, {held / pairs:.1f} a pair; {allowed:.0f} allowed"
    )


def block_of(patch: str) -> int | None:
    method: Any = patch_class(patch)
    return method().config.block if DENOISING[patch].blocks else None


def test_no_share_leaves_room_for_a_bit_of_every_pair_of_tokens() -> None:
    for patch, (_, each) in LAW.items():
        assert each * 8 < (block_of(patch) or 64) ** 2


def test_the_docs_state_the_law_and_what_it_means_at_75600_tokens() -> None:
    text = (Path(__file__).parents[1] / "docs" / "memory.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (\d*) \| ([\d.]+) \| (\d+) \| ([\d.]+) \|", text, re.MULTILINE)
    assert {name: (float(share), int(each)) for name, _, share, each, _ in rows} == LAW
    dense = 4 * 2 * WAN["tokens"] * WAN["heads"] * WAN["width"]
    for name, stated_block, share, each, stated in rows:
        block = block_of(name)
        assert stated_block == ("" if block is None else str(block))
        pairs = WAN["heads"] * (-(-WAN["tokens"] // block)) ** 2 if block else 0
        assert float(stated) == pytest.approx(float(share) + (int(each) + 2) * pairs / dense, abs=0.0051)
