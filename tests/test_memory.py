"""The memory law: what a patch's `attend` holds above dense attention is at most its stated share, and nothing of it is S x S.

Counted are the bytes that torch's allocator hands out and takes back on the CPU while `attend` runs, insides of operators and custom
ops too, by the profiler's allocation events, after a first call that fills the caches. Not seen: what a library takes past the
allocator, and what kernels on a GPU need (the Triton kernel's lists, 2 bytes a pair, are in the docs' sum). What is kept between calls
is what tensors hold that were not there before.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._C._profiler import _EventType
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from accelplug.call import AttentionCall, Clock, Layout, Site
from accelplug.kernels import chunks, importance
from accelplug.kernels.memory import Memory
from accelplug.patches.base import Patch
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
    "toma": (0.85, 0),
    "todo": (0.25, 0),
    "agent": (0.95, 0),
    "ptdit": (1.80, 0),
    "sparse_vdit": (0.90, 4),
    "paro": (0.85, 4),
    "sta": (1.25, 4),
    "freeswim": (1.00, 4),
    "svg": (0.90, 8),
    "vmoba": (0.15, 10),
    "bilevel": (0.80, 15),
    "lvsa": (1.00, 4),
    "freelong": (3.00, 0),
    "bias": (1.25, 0),
    "regions": (1.25, 0),
    "segments": (1.25, 0),
    "headhunter": (1.00, 0),
}
"""What each holds above dense: a share of q, k, v and out, and so many bytes a head and pair of blocks."""
KEYS: dict[str, tuple[dict[str, Any], float, float]] = {
    "repair: output_query": ({"repair": "output_query", "probes": 48}, 0.05, 1.4),
    "rest: linear": ({"rest": "linear"}, 0.0, 2.75),
    "precision: int8": ({"precision": "int8"}, 0.0, 1.5),
    "values: int8": ({"values": "int8", "backend": "reference"}, 0.0, 3.5),
}
"""What a key holds above its patch: a share of q, k, v and out, and of those of one head where one head is made at a time."""
KEPT = 0.10
"""What is kept between calls for all layers together, as a share of q, k, v and out of one."""
KEPT_BY_SITE = {"svg_ear": 8 << 10, "headhunter": 8}  # which of eight heads, a byte each
"""And by attention module and guidance branch, bytes here; nothing where a patch is not named."""
SCRATCH = 128 << 10
"""What torch's own attention takes for itself, bytes, whatever the size."""
HEADS = 8
PROMPTED = {"regions": 12, "segments": 12}
"""Tokens of text beside the picture, where a patch divides what is read by prompts."""
MOST = {"headhunter": {"heads": [[layer, head] for layer in range(4) for head in range(HEADS)]}}
"""Settings that take most and reach every layer, where those of the laws choose heads."""
SITE = Site("blocks.0.attn1", "transformer", "self", 0, 1)
WAN = {"tokens": 75_600, "heads": 40, "width": 128}


def layout_of(patch: str, frames: int = 8) -> Layout:
    return Layout((frames, 8, 12), text_before=PROMPTED.get(patch, 0))


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


def method_of(patch: str, tile_thw: tuple[int, int, int], **keys: Any) -> Patch:
    """A patch at its working settings, its blocks full."""
    row, block = DENOISING[patch], tile_thw[0] * tile_thw[1] * tile_thw[2]
    config: dict[str, Any] = {"block": block, "backend": "blocked"} if row.blocks else {}
    for key, value in {"tile_thw": tile_thw, "window_thw": tile_thw, "block_k": block}.items():
        if key in row.working:
            config[key] = value
    return patch_class(patch)({**row.working, **MOST.get(patch, {}), **config, **keys})


def call_of(layout: Layout, width: int) -> AttentionCall:
    """Attention of 8 heads in bf16."""
    seed = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, HEADS, layout.length, width, generator=seed).bfloat16().unbind()

    def dense(
        q: torch.Tensor = q, k: torch.Tensor = k, v: torch.Tensor = v, attn_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask)

    return AttentionCall(q, k, v, None, width**-0.5, dense)


def above_dense(patch: str, frames: int, width: int, tile_thw: tuple[int, int, int], **keys: Any) -> tuple[int, int, int]:
    """`measured`, in a process of its own: torch's profiler never gives back what it recorded, half a gigabyte each time."""
    with ProcessPoolExecutor(1, get_context("fork")) as child:
        return child.submit(measured, patch, frames, width, tile_thw, **keys).result()


@torch.no_grad()
def measured(patch: str, frames: int, width: int, tile_thw: tuple[int, int, int], **keys: Any) -> tuple[int, int, int]:
    """Bytes held above q, k, v and out in bf16, those of these four, and pairs of blocks of all heads."""
    layout, block = layout_of(patch, frames), tile_thw[0] * tile_thw[1] * tile_thw[2]
    width = width if DENOISING[patch].blocks else 128  # others add channels to each head, so many whatever its width
    method, call = method_of(patch, tile_thw, **keys), call_of(layout, width)
    params = method.prepare(SITE, layout, Clock(0, 4), {})
    assert params is not None, "it runs dense here"
    held, one = peak(partial(method.attend, call, params)), call.q.nbytes
    return held - one, 4 * one, HEADS * (-(-layout.length // block)) ** 2


def kept(patch: str, sites: int) -> int:
    """Bytes that are there for good once so many attention modules were served, in the order of a forward."""
    layout = layout_of(patch)
    call, before = call_of(layout, 32), alive()
    keys = {"backend": "reference"} if DENOISING[patch].blocks else {}  # it keeps nothing of its own
    method, states = method_of(patch, (1, 8, 4), **keys), [dict[str, Any]() for _ in range(sites)]
    for number, state in enumerate(states):
        site = Site(f"blocks.{number}.attn1", "transformer", "self", number, sites)
        method.attend(call, method.prepare(site, layout, Clock(0, 4), state))
    return sum(size for at, size in alive().items() if at not in before)


def alive() -> dict[int, int]:
    """Bytes of what tensors hold, by address."""
    gc.collect()
    held = [x.untyped_storage() for x in gc.get_objects() if type(x) is torch.Tensor]
    return {x.data_ptr(): x.nbytes() for x in held}


@pytest.mark.usefixtures("one_at_a_time")
@pytest.mark.parametrize(
    ("frames", "width", "tile_thw"),
    [(8, 32, (1, 8, 4)), (3, 8, (1, 2, 4)), (5, 8, (1, 2, 4))],
    ids=["copies", "pairs", "more"],
)
@pytest.mark.parametrize("patch", DENOISING)
def test_no_patch_takes_more_than_its_share(patch: str, frames: int, width: int, tile_thw: tuple[int, int, int]) -> None:
    held, dense, pairs = above_dense(patch, frames, width, tile_thw)
    share, each = LAW[patch]
    allowed = share * dense + each * pairs + SCRATCH
    assert held <= allowed, (
        f"{held} bytes above dense: {held / dense:.2f} of it, {held / pairs:.1f} a pair; {allowed:.0f} allowed"
    )


@pytest.mark.usefixtures("one_at_a_time")
@pytest.mark.parametrize("key", KEYS)
def test_no_key_takes_more_than_its_share(key: str) -> None:
    settings, share, heads = KEYS[key]
    alone, dense, _ = above_dense("radial", 8, 32, (1, 4, 4))
    held, _, _ = above_dense("radial", 8, 32, (1, 4, 4), **settings)
    assert held - alone <= (share + heads / HEADS) * dense, f"{(held - alone) / dense * HEADS:.2f} heads"


@pytest.mark.parametrize("patch", DENOISING)
def test_what_is_kept_is_kept_once_for_all_layers(patch: str) -> None:
    with torch.no_grad():
        kept(patch, 1)  # what is kept for good, whatever the patch
        two, four = kept(patch, 2), kept(patch, 4)
    by_site = KEPT_BY_SITE.get(patch, 0)
    dense = 4 * 2 * layout_of(patch).length * HEADS * (32 if DENOISING[patch].blocks else 128)
    assert four <= KEPT * dense + 4 * by_site
    assert four <= two + 2 * by_site, "it is kept for each layer"


def test_repair_carries_one_set_of_sums() -> None:
    """Features are channels of output and query, and a constant."""
    layout, memory = layout_of("radial"), Memory()
    call = call_of(layout, 32)
    method = method_of("radial", (1, 8, 4), repair="output_query", probes=48)
    for step in range(3):
        memory.advance(step)
        with torch.no_grad():
            method.attend(replace(call, ticket=memory.ticket), method.prepare(SITE, layout, Clock(step, 4), {}))
    held = {x.data_ptr(): x.untyped_storage().nbytes() for x in (memory.start, memory.end) if x is not None}
    assert sum(held.values()) == HEADS * 4 * (2 * 32 + 1) * (3 * 32 + 1)


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
    keys = re.findall(r"^\| `(\w+: \w+)` \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", text, re.MULTILINE)
    assert {name: (float(share), float(heads)) for name, share, heads, _ in keys} == {
        name: law[1:] for name, law in KEYS.items()
    }
    for _, share, heads, stated in keys:
        assert float(stated) == pytest.approx(float(share) + float(heads) / WAN["heads"], abs=0.0051)
    dense = 4 * 2 * WAN["tokens"] * WAN["heads"] * WAN["width"]
    for name, stated_block, share, each, stated in rows:
        block = block_of(name)
        assert stated_block == ("" if block is None else str(block))
        pairs = WAN["heads"] * (-(-WAN["tokens"] // block)) ** 2 if block else 0
        assert float(stated) == pytest.approx(float(share) + (int(each) + 2) * pairs / dense, abs=0.0051)
