"""What stands at one attention module of a language model, and answers its calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from accelplug import compat
from accelplug.call import AttentionCall, Clock, KeptKeys, Place, Rows, Site
from accelplug.errors import UnsupportedError
from accelplug.hosts.ledger import Event, Ledger
from accelplug.hosts.record import Choice
from accelplug.hosts.stream import AHEAD, PREFILL, WATCHER, Forward, Stream, Watch
from accelplug.hosts.tensor_parallel import TensorParallel
from accelplug.kernels.timing import timed_ms

if TYPE_CHECKING:
    from accelplug.kernels.plan import BlockPlan
    from accelplug.patches.base import Patch


class AttendingHost(Protocol):
    """The language model's host, as far as records ask it."""

    model: Any
    ledger: Ledger
    tensor_parallel: TensorParallel | None

    def prepare(self, choice: Choice, site: Site, stream: Stream, clock: Clock) -> Any:
        """Ask a patch what it needs at a site, None to run dense."""

    def keep_layer(self, record: AttentionRecord, stream: Stream, cache: Any) -> None:
        """Have a patch keep the keys and values of its layer, where it asks for it."""


class Answer(NamedTuple):
    """What a choice makes of a call: params, None for dense attention."""

    choice: Choice
    call: AttentionCall
    params: Any

    @property
    def patch(self) -> Patch:
        """The patch that answers."""
        assert self.choice.patch is not None
        return self.choice.patch

    def inspected(self) -> tuple[float | None, BlockPlan | None, float | None]:
        """What is read of the pairs, by which plan, and the share of attention that falls on it."""
        density, plan = self.patch.inspect(self.call, self.params)
        kept = self.patch.kept(self.call, self.params, plan)
        return density, plan, None if kept is None else float(kept.mean())


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

    @property
    def patches(self) -> list[Patch]:
        """The patches that rules put here."""
        return [choice.patch for choice in self.choice.stages if choice.patch is not None]

    def attend(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, forward: Forward | None, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """Answer one attention call as transformers asks it: (B, H, S, D) in, ((B, S_q, H, D_v), probabilities or None) out."""
        name = compat.transformers.attention_name(self.config)
        base, asked = (
            compat.transformers.attention_function(name, type(module)),
            compat.transformers.seen_by(name, module, self.config),
        )

        kept, keys = self.kept(forward), k

        def whole() -> tuple[Tensor, Tensor | None]:
            return base(asked, q, *self.in_full(q, k, v, kept), mask, **kwargs)

        if forward is not None and forward.companion is not None:
            return forward.companion(self, whole()[0].transpose(1, 2)).transpose(1, 2).contiguous(), None
        compiling = torch.compiler.is_compiling()
        watch = None if compiling else WATCHER.get()
        if watch is None and not self.choice.chosen:
            return whole()

        def dense(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            its_own = kept if k is keys else None  # what a patch hands in is for it to answer for
            return base(asked, q, *self.in_full(q, k, v, its_own), mask, **kwargs)[0].transpose(1, 2)

        decoding = forward is None or forward.clock.phase == "decode"
        if decoding and not compiling and watch is None and forward is not None and self.idles(forward):
            self.note(None, q.shape[2], forward.clock, None)
            return whole()
        found = 0
        answering: list[Answer] = []
        for choice in (self.choice,) if decoding else self.choice.stages:
            watches = watch if choice is self.choice else None
            if (answer := self.asked(choice, q, k, v, mask, dense, forward, kwargs, watches)) is not None:
                found += 1
                if answer.params is not None:
                    answering.append(answer)
        run: Callable[[], tuple[Tensor, Tensor | None]] = whole
        if answering:
            top, beneath = answering[-1], answering[0]
            call = top.call if top is beneath else replace(top.call, dense=_over(beneath, dense))
            run = partial(_attended, top, call)
        if compiling or forward is None or forward.clock is AHEAD or not found:
            return run()
        (out, probabilities), ms = timed_ms(run, q.device) if self.host.ledger.timed else (run(), None)
        if forward.clock is PREFILL and forward.stream is not None and forward.cache is not None:
            self.host.keep_layer(self, forward.stream, forward.cache)
        for answer in answering[:-1]:
            self.note(answer, q.shape[2], forward.clock, None)
        self.note(answering[-1] if answering else None, q.shape[2], forward.clock, ms)
        if answering and name == "eager" and compat.transformers.attention_is_collected():
            probabilities = top.patch.attention(call, top.params).to(q.dtype)
        return out, probabilities

    def asked(
        self,
        choice: Choice,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Any,
        dense: Callable[..., Tensor],
        forward: Forward | None,
        kwargs: dict[str, Any],
        watch: Watch | None,
    ) -> Answer | None:
        """Return what a choice makes of a call, its params None where it is dense; None where it cannot be served, which is counted."""
        patch, ahead = choice.patch, forward is not None and forward.clock is AHEAD
        reason = self.obstacle(choice, q, k, mask, forward, kwargs)
        if reason is not None or forward is None or forward.stream is None:
            if not ahead and (patch is not None or choice.reason is not None):
                self.fell_back(str(reason))
            return None
        audited = None if torch.compiler.is_compiling() else partial(self.host.ledger.audited, choice.name, self.site.module)
        place, scale, kept = self.place(q, k, mask, forward, kwargs), self.scale(q, kwargs), self.kept(forward)
        call = AttentionCall(q, k, v, mask, scale, dense, place, forward.hidden, audited=audited, kept=kept)
        if watch is not None and not ahead:
            watch(self, call, forward.stream.prompt, forward.clock)
        if forward.clock.phase == "decode":
            params = forward.stream.decode[self.index]
        else:
            params = self.host.prepare(choice, self.site, forward.stream, forward.clock)
        if patch is not None and params is not None and not isinstance(params, str):
            params = patch.declines(call, params) or (None if patch.idles(call, params) else params)
        if isinstance(params, str):
            self.fell_back(params)
            return None
        return Answer(choice, call, params)

    def idles(self, forward: Forward) -> bool:
        """Whether a decode step is nothing to the patch, so that the call need not be looked at; nobody traces it either."""
        patch, stream = self.choice.patch, forward.stream
        if patch is None or patch.about_images or stream is None or self.choice.reason is not None:
            return False
        return stream.decode[self.index] is None and not self.host.ledger.traces

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

    def note(self, answer: Answer | None, tokens: int, clock: Clock, ms: float | None) -> None:
        """Count a call of so many queries, None where no patch answers it, and tell those who trace what it reads and took."""
        self.routed = True
        name = "dense" if answer is None else answer.choice.name
        self.host.ledger.count(self.host.ledger.served, name)
        if self.host.ledger.traces:
            density, plan, kept = (None, None, None) if answer is None else answer.inspected()
            plan = plan if self.host.ledger.keeps_plans else None
            self.host.ledger.note(Event(self.site, clock, name, None, density, tokens, ms, plan, kept=kept))

    def obstacle(
        self, choice: Choice, q: Tensor, k: Tensor, mask: Any, forward: Forward | None, kwargs: dict[str, Any]
    ) -> str | None:
        """Why a call that a patch is there for must run dense, or None."""
        patch = choice.patch
        if compat.transformers.packs_sequences(kwargs):
            raise UnsupportedError(
                f"{choice.name} keeps what it knows of a sequence on that sequence's cache, and continuous batching packs "
                "several into one. Use generate() instead of generate_batch(), or remove the plug first."
            )
        if choice.reason is not None:
            return choice.reason
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
        if torch.compiler.is_compiling() and patch is not None and {"logits", "rehearsal"} & patch.needs:
            return "a compiled step cannot be told what came of the last one"
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


def patches_of(records: Iterable[AttentionRecord]) -> list[Patch]:
    """Return the patches that stand at any of these, each once."""
    return list({id(patch): patch for record in records for patch in record.patches}.values())


def _attended(answer: Answer, call: AttentionCall) -> tuple[Tensor, None]:
    """What a patch answers, as transformers takes it."""
    return answer.patch.attend(call, answer.params).transpose(1, 2).contiguous(), None


def _over(beneath: Answer, dense: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Dense attention over a patch that stands beneath: it answers the call as it is, the model any with other queries, keys or values."""
    call = beneath.call

    def answer(q: Tensor | None = None, k: Tensor | None = None, v: Tensor | None = None) -> Tensor:
        if q is None and k is None and v is None:
            return beneath.patch.attend(call, beneath.params)
        return dense(call.q if q is None else q, call.k if k is None else k, call.v if v is None else v)

    return answer


def _these_heads(x: Tensor) -> Tensor:
    return x
