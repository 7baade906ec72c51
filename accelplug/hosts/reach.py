"""How much of a prompt's time rules can touch in a language model: its layers with full attention, and their share of the arithmetic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import nn

from accelplug import compat
from accelplug.call import FULL_ATTENTION
from accelplug.hosts.attention import AttentionRecord


def reach(
    decoder: nn.Module, records: Sequence[AttentionRecord], beneath: Sequence[AttentionRecord], tokens: int | None
) -> str:
    """Say which layers have full attention, and what a prompt gains at most where its attention takes no time at all.

    Parameters
    ----------
    records : all attention modules of the decoder.
    beneath : those of full attention where a rule says how a prompt is read.
    tokens : of the prompt; None where none was read yet.
    """
    types = compat.transformers.layer_types(decoder.config) or [record.site.layer_type for record in records]
    number = Counter(types)
    full = number.pop(FULL_ATTENTION, 0)
    others = f"; {', '.join(f'{n} {kind}' for kind, n in number.items())}" if number else ""
    said = f"rules read it in {len(beneath)} layers, of {full} with full attention among {len(types)}{others}"
    if tokens is None:
        return said
    share = attention_share(decoder, beneath, tokens)
    return f"{said}. At {tokens} tokens their attention is {share:.0%} of the arithmetic: at most {1 / (1 - share):.2f}x"


def attention_share(decoder: nn.Module, records: Sequence[AttentionRecord], tokens: int) -> float:
    """Return the share of some layers' q.k and p.v, dense and causal, in the multiplications of a prompt, beside those by weights.

    Of experts those count that a token is sent to. What else a layer does with its tokens (convolutions, recurrences) is left out.
    """
    pairs = tokens * (tokens + 1) / 2
    attention = sum(2 * pairs * _channels(record.module) for record in records)
    return attention / (attention + tokens * _active_weights(decoder))


def _active_weights(decoder: Any) -> float:
    """Weights of the decoder's layers that a token meets."""
    config = decoder.config
    experts = next(
        (n for name in ("num_experts", "num_local_experts", "n_routed_experts") if (n := getattr(config, name, None))), 1
    )
    met = min(getattr(config, "num_experts_per_tok", None) or experts, experts) / experts
    layers = getattr(decoder, "layers", decoder)
    return sum(x.numel() * (met if ".experts." in f".{name}." else 1) for name, x in layers.named_parameters() if x.ndim > 1)


def _channels(attention: Any) -> int:
    """Channels of all queries of an attention module."""
    heads = attention.config.num_attention_heads
    return heads * (getattr(attention, "head_dim", None) or attention.config.hidden_size // heads)
