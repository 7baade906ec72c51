"""What stands at one attention module of a language model, and answers its calls."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from accelplug import compat
from accelplug.call import AttentionCall, Clock, KeptKeys, Place, Rows, Site
from accelplug.errors import UnsupportedError
from accelplug.hosts.ledger import Event, Ledger
from accelplug.hosts.record import Choice
from accelplug.hosts.stream import AHEAD, WATCHER, Forward, Stream
from accelplug.hosts.tensor_parallel import TensorParallel


class AttendingHost(Protocol):
    """The language model's host, as far as records ask it."""

    model: Any
    ledger: Ledger
    tensor_parallel: TensorParallel | None

    def prepare(self, record: AttentionRecord, stream: Stream, clock: Clock) -> Any:
        """Ask a record's patch what it needs, None to run dense."""


@dataclass(eq=False)
class AttentionRecord:
    """What stands at one attention module, read inside compiled graphs."""

    host: AttendingHost
    index: int
    module: Any
    site: Site
    config: Any
    """The module's own config."""
    choice: Choice
    missed: bool = False
    routed: bool = False

    def attend(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, forward: Forward | None, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """Answer one attention call as transformers asks it: (B, H, S, D) in, ((B, S_q, H, D_v), probabilities or None) out."""
        name = compat.transformers.attention_name(self.config)
        base, asked = (
            compat.transformers.attention_function(name, type(module)),
            compat.transformers.seen_by(name, module, self.config),
        )

        kept = self.kept(forward)

        def whole() -> tuple[Tensor, Tensor | None]:
            return base(asked, q, *self.in_full(q, k, v, kept), mask, **kwargs)

        if forward is not None and forward.companion is not None:
            return forward.companion(self, whole()[0].transpose(1, 2)).transpose(1, 2).contiguous(), None
        compiling = torch.compiler.is_compiling()
        watch = None if compiling else WATCHER.get()
        patch = self.choice.patch
        if patch is None and watch is None and self.choice.reason is None:
            return whole()

        def dense(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            return base(asked, q, *self.in_full(q, k, v, kept), mask, **kwargs)[0].transpose(1, 2)

        ahead = forward is not None and forward.clock is AHEAD
        reason = self.obstacle(q, k, mask, forward, kwargs)
        if reason is not None or forward is None or forward.stream is None:
            if not ahead and (patch is not None or self.choice.reason is not None):
                self.fell_back(str(reason))
            return whole()
        audited = None if compiling else partial(self.host.ledger.audited, self.choice.name, self.site.module)
        place, scale = self.place(q, k, mask, forward, kwargs), self.scale(q, kwargs)
        call = AttentionCall(q, k, v, mask, scale, dense, place, forward.hidden, audited=audited, kept=kept)
        if watch is not None and not ahead:
            watch(self, call, forward.stream.prompt, forward.clock)
        decoding = forward.clock.phase == "decode"
        params = forward.stream.decode[self.index] if decoding else self.host.prepare(self, forward.stream, forward.clock)
        if patch is not None and params is not None and not isinstance(params, str):
            params = patch.declines(call, params) or (None if patch.idles(call, params) else params)
        if isinstance(params, str):
            self.fell_back(params)
            return whole()
        if not compiling and not ahead:
            self.note(call, params, forward.clock)
        if patch is None or params is None:
            return whole()
        out = patch.attend(call, params).transpose(1, 2).contiguous()
        collected = not compiling and name == "eager" and compat.transformers.attention_is_collected()
        return out, patch.attention(call, params).to(q.dtype) if collected else None

    def kept(self, forward: Forward | None) -> KeptKeys | None:
        """What a patch keeps the layer's keys and values in, or None. Of a compiled forward it is not known."""
        layer = None if forward is None else compat.transformers.cache_layer(forward.cache, self.module.layer_idx)
        return getattr(layer, "kept", None)

    def in_full(self, q: Tensor, k: Tensor, v: Tensor, kept: KeptKeys | None) -> tuple[Tensor, Tensor]:
        """All keys and values of a call, where the model's own attention reads them."""
        if kept is not None and kept.freed:
            raise UnsupportedError(
                f"{self.site.module} shall read all keys, and {self.choice.name} has freed some of them. plug.report() says why it "
                "could not answer; start a new cache, or remove the plug first."
            )
        return (k, v) if k.device == q.device else (k.to(q.device), v.to(q.device))

    def fell_back(self, reason: str) -> None:
        """Count a call that a rule names and that runs dense."""
        if torch.compiler.is_compiling():
            self.missed = True  # counted by the host, outside the graph
        else:
            self.host.ledger.fell_back(self.site.module, reason)

    def note(self, call: AttentionCall, params: Any, clock: Clock) -> None:
        """Count a call, and tell those who trace what it reads."""
        self.routed = True
        patch, name = self.choice.patch, self.choice.name if params is not None else "dense"
        self.host.ledger.count(self.host.ledger.served, name)
        if self.host.ledger.traces:
            density, plan = (None, None) if patch is None or params is None else patch.inspect(call, params)
            kept = None if patch is None or plan is None else patch.kept(call, params, plan)
            share = None if kept is None else float(kept.mean())
            plan = plan if self.host.ledger.keeps_plans else None
            self.host.ledger.note(Event(self.site, clock, name, None, density, call.q.shape[2], plan=plan, kept=share))

    def obstacle(self, q: Tensor, k: Tensor, mask: Any, forward: Forward | None, kwargs: dict[str, Any]) -> str | None:
        """Why a call that a patch is there for must run dense, or None."""
        patch = self.choice.patch
        if compat.transformers.packs_sequences(kwargs):
            raise UnsupportedError(
                f"{self.choice.name} keeps what it knows of a sequence on that sequence's cache, and continuous batching packs "
                "several into one. Use generate() instead of generate_batch(), or remove the plug first."
            )
        if self.choice.reason is not None:
            return self.choice.reason
        if forward is None:
            return "the decoder was called past its model, which is told the tokens"
        if forward.stream is None:
            return "the cache was filled before apply(), or in a compiled graph: where its images lie is not known"
        if mask is not None and not isinstance(mask, Tensor):
            return f"a mask of type {type(mask).__name__} is not understood; use sdpa, eager or flash attention"
        if kwargs.get("dropout"):
            return "the call has dropout"
        if not torch.compiler.is_compiling() and patch is not None:
            why = self.pruned(q, k, forward, forward.stream, patch.needs, kwargs) or (
                forward.stream.lacks(patch.needs) if patch.about_images else None
            )
            if why is not None:
                return why
        if patch is not None and "probabilities" in patch.needs and not self.explicit(kwargs):
            return (
                "the model adds sink logits, a soft cap or a position bias to its scores, which this patch does not know of"
            )
        if kwargs.get("cu_seq_lens_q") is not None:
            return "several sequences are packed into one row"
        if patch is not None and "scores" in patch.needs and kwargs.get("softcap") is not None:
            return "the model caps its scores, and what this patch adds to them would land inside of the cap"
        if unknown := {name for name, value in kwargs.items() if value is not None} - compat.transformers.ATTENTION_KWARGS:
            return f"the model passes {', '.join(sorted(unknown))} to its attention, which is not understood"
        if torch.compiler.is_compiling():
            slides = "sliding_window" in kwargs and kwargs["sliding_window"] is not None
            return "a compiled sliding window does not say which keys it has lost" if slides else None
        if self.module.training and torch.is_grad_enabled() and q.requires_grad:
            raise UnsupportedError(
                f"{type(self.host.model).__name__} is in training mode and gradients are asked for, but accelplug is for "
                "inference. Call .eval() and run under torch.no_grad(), or remove the plug to train."
            )
        return None

    def pruned(
        self, q: Tensor, k: Tensor, forward: Forward, stream: Stream, needs: frozenset[str], kwargs: dict[str, Any]
    ) -> str | None:
        """Why it is not known which tokens the queries and keys are, or None."""
        if self.kept(forward) is None and k.shape[2] < stream.tokens and not self.slides(forward, kwargs):
            return f"the cache was pruned to {k.shape[2]} keys of {stream.tokens} tokens: which are the image's is not known"
        if forward.cache is None and forward.clock.phase == "prefill" and k.shape[2] > stream.tokens:
            return (
                f"there are keys of {k.shape[2]} tokens and {stream.tokens} are known: the cache of the others was not found"
            )
        new = stream.prompt.image.shape[1] - stream.prompt.past
        if forward.clock.phase == "prefill" and q.shape[2] < new and {"hidden_states", "blind"} & needs:
            return f"the layer is given the last {q.shape[2]} of {new} tokens alone"
        return None

    def slides(self, forward: Forward, kwargs: dict[str, Any]) -> bool:
        """Whether the keys are those of a window; a layer without a cache of its own shares another's."""
        layer = compat.transformers.cache_layer(forward.cache, self.module.layer_idx)
        return kwargs.get("sliding_window") is not None if layer is None else compat.transformers.slides(layer)

    def scale(self, q: Tensor, kwargs: dict[str, Any]) -> float:
        given = kwargs.get("scaling")
        return q.shape[-1] ** -0.5 if given is None else given

    def place(self, q: Tensor, k: Tensor, mask: Tensor | None, forward: Forward, kwargs: dict[str, Any]) -> Place:
        """Say where the call stands. In a compiled decode step only the layers that see the whole sequence are known."""
        tensors = self.host.tensor_parallel
        first_head = tensors.rank * q.shape[1] if tensors else 0
        gather = tensors.gather if tensors else _these_heads
        first_query, first_key = 0, 0
        answers: Rows = 1
        if forward.stream is not None and forward.clock.phase != "decode":
            prompt = forward.stream.prompt
            first_query, answers = prompt.image.shape[1] - q.shape[2], prompt.answers
            if isinstance(answers, Tensor):  # a layer may be given the last tokens alone
                answers = answers - (first_query - prompt.past)
        if forward.stream is not None and self.slides(forward, kwargs):
            layer = compat.transformers.cache_layer(forward.cache, self.module.layer_idx)
            seen = forward.stream.tokens if layer is None else int(compat.transformers.tokens_seen(layer))
            first_key = max(0, seen - k.shape[2])
        return Place(
            first_query=first_query,
            first_key=first_key,
            answers=answers,
            causal=compat.transformers.is_causal(self.module, kwargs),
            window=compat.transformers.window_beside(compat.transformers.attention_name(self.config), mask, kwargs),
            explicit=self.explicit(kwargs),
            first_head=first_head,
            gather_heads=gather,
        )

    @staticmethod
    def explicit(kwargs: dict[str, Any]) -> bool:
        """Whether the model adds nothing of its own to the scores."""
        return all(kwargs.get(name) is None for name in ("s_aux", "softcap", "position_bias"))


def _these_heads(x: Tensor) -> Tensor:
    return x
