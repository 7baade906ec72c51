"""The Triton kernel compiled for GPUs that are not there: what the interpreter cannot tell."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys

import pytest

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from accelplug.kernels import triton_block

sizes = dict.fromkeys(("D", "D_V", "BLOCK_D", "BLOCK_DV", "BLOCK_M", "BLOCK_K", "TILE_K", "GROUP_K"), 64)
constants = sizes | dict(AXES=0, HAS_MASK=False, EIGHT=False, LISTED=True, FIRST_RUN=2, LEVELS=0, POOLED=False, THRESHOLD=False)
kinds = dict.fromkeys(("lse", "theta", "bias", "q_step", "k_step"), "*fp32") | {"scale": "fp32", "key_mask": "*u8"}
kinds |= dict.fromkeys("index count whole level_count bits q_len k_len lo hi coord".split(), "*i32")
kinds |= dict.fromkeys(("q", "k", "v", "out", "k_coarse", "v_coarse"), "*bf16")
kinds |= dict.fromkeys([*constants, "KEY_TILES", "ROW_TILES"], "constexpr")
names = triton_block._kernel.arg_names
for capability, described in ((90, ("q", "k", "v", "out")), (80, ())):
    mine = kinds | dict.fromkeys(described, "tensordesc<bf16[1, 1, 64, 64]>")
    signature = {name: mine.get(name, "i32") for name in names}
    even = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n][0] == "*" or n.startswith("stride")}
    chosen = constants | dict(KEY_TILES=bool(described), ROW_TILES=bool(described))
    source = ASTSource(fn=triton_block._kernel, signature=signature, constexprs=chosen, attrs=even)
    target = GPUTarget("cuda", capability, 32)
    print("=====", triton.compile(source, target=target, options={"num_warps": 4, "num_stages": 2}).asm["ptx"])
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_tiles_are_copied_as_the_hardware_can(tmp_path):
    """Hopper, tier whole: TMA for queries once, keys and values in the loops of whole and of ragged blocks, and the output. Ampere,
    tier pointers: 16 bytes at a time, while it computes."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    _, hopper, ampere = run.stdout.split("=====")
    assert ".target sm_90" in hopper
    assert len(re.findall(r"cp\.async\.bulk\.tensor\.\dd\.shared", hopper)) >= 5
    assert len(re.findall(r"cp\.async\.bulk\.tensor\.\dd\.global", hopper)) == 1
    assert ".target sm_80" in ampere
    assert "cp.async.cg.shared.global" in ampere
    assert "ld.global.b16" not in ampere
