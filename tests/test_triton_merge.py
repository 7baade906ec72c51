"""The hot parts of token merging in Triton against their references: under the interpreter on a CPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import normalize

from accelplug.kernels import triton_merge
from accelplug.kernels.merge import _best_op, _merge_op, _slot_means, best_destination, match, partition
from tests.conftest import DEVICE
from tests.test_tome import noise

on_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="says nothing about a GPU that is here")


@pytest.mark.parametrize("channels", [6, 64, 130])
@pytest.mark.parametrize("grid", [(1, 7, 9), (3, 5, 6), (2, 1, 11)])
def test_the_likest_destination_is_that_of_all_scores(grid: tuple[int, int, int], channels: int) -> None:
    drawn = partition(grid, (1, 2, 2), (2, 4, 4), seed=5, device=DEVICE)
    unit = normalize(noise(2, drawn.tokens, channels), dim=-1).to(DEVICE)
    parts = (drawn.source, drawn.destination, drawn.is_destination)
    best, which = best_destination(unit, *parts)
    found, at = triton_merge.likest_destination(unit, *parts)
    real = drawn.is_source.expand_as(best)
    torch.testing.assert_close(found[real], best[real])
    assert torch.equal(at[real], which[real])


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_means_are_those_of_the_reference(dtype: torch.dtype, weighed: bool) -> None:
    x, slot, slots, weight = means(dtype, weighed)
    torch.testing.assert_close(triton_merge.merge_slots(x, slot, slots, weight), _slot_means(x, slot, slots, weight))


def means(dtype: torch.dtype, weighed: bool) -> tuple[torch.Tensor, torch.Tensor, int, torch.Tensor | None]:
    """What means are made of: 63 tokens, heads that are no power of two wide, with strides."""
    drawn = partition((1, 7, 9), seed=2)
    merged = drawn.sources // 2
    slot = match(noise(2, 63, 6), drawn, merged).to(DEVICE)
    x = noise(2, 3, 63, 24, seed=1).to(DEVICE, dtype)[..., :20]
    weight = (noise(2, 63, seed=3) > -0.5).float().to(DEVICE) if weighed else None
    return x, slot, 63 - merged, weight


def test_both_are_operators_that_graphs_know_the_shapes_of() -> None:
    drawn = partition((1, 7, 9), seed=2, device=DEVICE)
    unit = normalize(noise(2, 63, 6), dim=-1).to(DEVICE)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(_best_op, (unit, drawn.source, drawn.destination, drawn.is_destination), test_utils=tests)
    torch.library.opcheck(_merge_op, means(torch.float32, True), test_utils=tests)


@on_cpu
def test_both_compile_for_gpus_that_are_not_here() -> None:
    script = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from accelplug.kernels.triton_merge import _best_kernel, _merge_kernel

best = dict(unit="*fp32", source="*i64", destination="*i64", is_destination="*u8", best="*fp32", which="*i64")
means = dict(x="*bf16", order="*i64", ends="*i64", weight="*fp32", out="*bf16")
for kernel, pointers, numbers in ((_best_kernel, best, dict(BLOCK_C=128, BLOCK=32)),
                                  (_merge_kernel, means, dict(D=80, BLOCK_D=128, BLOCK=32, WEIGHED=True))):
    types = dict.fromkeys(kernel.arg_names, "i32") | pointers | dict.fromkeys(numbers, "constexpr")
    at = {(kernel.arg_names.index(name),): value for name, value in numbers.items()}
    for capability in (80, 90):
        triton.compile(ASTSource(kernel, types, at), target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
print("compiled")
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    ran = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.endswith("compiled\n")
