"""Flash attention as the model's own kernel: transformers' real path around it, with stand-ins for the two functions of the package.

The stand-ins take what flash-attn takes, in its order of axes, refuse what it refuses, and compute in float64.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash
from torch import Tensor

import accelplug
from accelplug.testing.language_models import forward, generate
from tests.test_language_host import PAIRS, WORKING, recipe
from tests.tiny_language_models import build, inputs, looked


class Flash:
    """Counts its calls, and the head dimensions that it was given."""

    def __init__(self) -> None:
        self.dense, self.varlen, self.dims = 0, 0, set[int]()

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool, window: tuple[int, int]) -> Tensor:
        """(S_q, H, D), (S_k, H_kv, D) twice -> (S_q, H, D); the last query sees the last key."""
        assert q.shape[-1] == k.shape[-1] == v.shape[-1], "flash kernels have one head dimension"
        assert q.shape[-1] <= 256
        assert k.shape[1] == v.shape[1]
        self.dims.add(q.shape[-1])
        q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
        k, v = (x.repeat_interleave(len(q) // len(k), 0) for x in (k, v))
        scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        ahead = torch.arange(k.shape[1]) - (torch.arange(q.shape[1]) + k.shape[1] - q.shape[1])[:, None]
        hidden = (ahead > 0) if causal else torch.zeros_like(ahead, dtype=torch.bool)
        if window[0] >= 0:
            hidden |= -ahead > window[0]
        return (scores.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0.0) @ v).transpose(0, 1)

    def flash_attn_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
    ) -> Tensor:
        """(B, S, H, D) each."""
        assert dropout_p == softcap == 0
        self.dense += 1
        rows = zip(q, k, v, strict=True)
        return torch.stack([self._attend(*row, softmax_scale, causal, window_size) for row in rows]).to(q.dtype)

    def flash_attn_varlen_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
        block_table: Tensor | None = None,
    ) -> Tensor:
        """(all tokens, H, D) each, and where each sequence begins, int32 (B + 1,)."""
        assert dropout_p == softcap == 0
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert max_seqlen_k == int(cu_seqlens_k.diff().max())
        self.varlen += 1
        cut = zip(
            q.split(cu_seqlens_q.diff().tolist()), *(x.split(cu_seqlens_k.diff().tolist()) for x in (k, v)), strict=True
        )
        return torch.cat([self._attend(q, k, v, softmax_scale, causal, window_size) for q, k, v in cut]).to(q.dtype)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Flash:
    """The stand-ins where transformers keeps the functions that it loaded."""
    found = Flash()
    loaded = {
        "_loaded_implementation": "flash_attention_2",
        "_flash_fn": found.flash_attn_func,
        "_flash_varlen_fn": found.flash_attn_varlen_func,
        "_flash_with_kvcache_fn": None,
        "_pad_fn": flash._pad_input,
        "_unpad_fn": flash._unpad_input,
        "_process_flash_kwargs_fn": flash._lazy_define_process_function(found.flash_attn_varlen_func),
        "_process_with_kvcache_kwargs_fn": dict,
    }
    for name, value in loaded.items():
        monkeypatch.setattr(flash, name, value, raising=False)  # not all are in transformers 5.17
    return found


def on_flash(name: str) -> Any:
    """A tiny model whose decoder runs on the stand-ins; its vision tower stays as it was."""
    model = build(name)
    model.config.get_text_config()._attn_implementation = "flash_attention_2"
    return model


FAMILIES = ("llava", "qwen2_5_vl", "smolvlm")


@pytest.mark.parametrize(("patch", "name"), [(patch, name) for patch, name in PAIRS if name in FAMILIES])
def test_patches_ride_on_flash_attention(patch: str, name: str, kernel: Flash) -> None:
    """A padded batch goes by the varlen function, a row of its own by the other; both say what SDPA says."""
    model, other, given, one = on_flash(name), build(name), inputs(name), inputs(name, ((3, "I", 6),))
    valid = given["attention_mask"].bool()
    stock = forward(model, given)
    assert kernel.varlen == len(model.get_decoder().layers)
    torch.testing.assert_close(stock[valid], forward(other, given)[valid], atol=2e-5, rtol=1e-4)
    plain = set(kernel.dims)
    with accelplug.apply(model, recipe(patch), strict=True), accelplug.apply(other, recipe(patch)):
        changed = forward(model, given)
        torch.testing.assert_close(changed[valid], forward(other, given)[valid], atol=2e-5, rtol=1e-4)
        assert not torch.allclose(changed[valid], stock[valid], atol=1e-4)
        varlen = kernel.varlen
        torch.testing.assert_close(forward(model, one)[:, -1], forward(other, one)[:, -1], atol=2e-5, rtol=1e-4)
        assert kernel.varlen == varlen
        assert kernel.dense
        assert torch.equal(generate(model, given), generate(other, given))
        assert torch.equal(generate(model, one), generate(other, one))
    if patch in ("visual_bias", "var"):
        assert all(dim % 8 == 0 for dim in kernel.dims - plain)
    if patch == "visual_bias":
        assert kernel.dims > plain  # the bias rode in dimensions of its own
    assert torch.equal(forward(model, given), stock)


@pytest.mark.parametrize("patch", [patch for patch in WORKING if patch != "imbalance"])
def test_neutral_on_flash_attention_is_exact(patch: str, kernel: Flash) -> None:
    from tests.patch_rows import ROWS

    model, given = on_flash("llava"), inputs("llava")
    logits, tokens = forward(model, given), generate(model, given)
    with accelplug.apply(model, recipe(patch, ROWS[patch].neutral), strict=True):
        assert torch.equal(forward(model, given), logits)
        assert torch.equal(generate(model, given), tokens)


def test_inspect_reads_a_model_on_flash_attention(kernel: Flash) -> None:
    given = inputs("llava")
    ours, theirs = looked(on_flash("llava"), given), looked(build("llava"), given)
    assert ours.attention == "flash_attention_2"
    for name in ("visual_mass", "system_mass", "question_mass", "vas", "vhd"):
        torch.testing.assert_close(*(torch.tensor(getattr(x, name)) for x in (ours, theirs)), atol=1e-5, rtol=1e-4)
