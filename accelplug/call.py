"""What a patch sees: the attention call, where it happens, how its tokens lie, and when. Types only, no torch at import."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["self", "joint", "cross", "temporal"]
FULL_ATTENTION = "full_attention"
"""The type of a layer whose queries read all that stands before them, in the words of transformers."""
Rows: TypeAlias = "int | Tensor"
"""Some of a forward's queries: the last so many, or their places, int64 (B, n), of which some may be named twice."""


class KeptKeys(Protocol):
    """Keys and values of one layer of a language model's cache, as a patch keeps them (see `Patch.keep`)."""

    length: int
    """Tokens that went in, whatever has become of their keys: positions and masks follow it."""
    freed: bool
    """Whether some keys are gone: then no model can go on from here without the patch."""

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add tokens (B, H_kv, n, D); return what attention is handed: all keys and values, on any device, or, where some are gone,
        what the patch makes of it."""

    def crop(self, length: int) -> None:
        """Drop all tokens behind the first `length`."""

    def take_rows(self, rows: Tensor) -> None:
        """Have these rows of the batch, int64 (n,), in this order; a row may come several times, or not at all."""

    def whole(self) -> tuple[Tensor, Tensor]:
        """Return all keys and values, (B, H_kv, length, D). Not asked where some are gone."""


@dataclass(frozen=True)
class AttentionCall:
    """One attention call, after RoPE and norm.

    Attributes
    ----------
    q : Tensor (B, H, S_q, D). Tokens that are keys alone (`Layout.unasked`) have zeros, and what they are answered is thrown away.
    k, v : Tensor (B, H_kv, S_k, D) and (B, H_kv, S_k, D_v); H_kv divides H (grouped-query attention).
    mask : None, or bool (B, S_k), True where the key may be read. In language models also bool or additive
        (B, 1|H, S_q, S_k), as the model made it; with None and several queries, attention is causal.
    scale : factor on q.k, never None.
    dense : ``dense(q=None, k=None, v=None) -> (B, H, S_q, D_v)``, the user's own backend; a tensor left out is the call's.
        Denoisers also take ``attn_mask``, None or bool (B, 1, 1, S_k), for keys of another number.
    place : where the call stands in its sequence; None for denoisers.
    hidden : (B, S_q, C), what enters the layer (the residual stream), for patches that need ``hidden_states``; else None.
    error : float32 (), into which a patch that can writes an estimate of its output's relative error; None where nobody asks.
    audited : language models: takes the share of attention that a plan kept, float32 (B, H), and which heads read everything for that,
        bool (B, H), for `Plug.report`; None where nobody asks.
    kept : a language model's: what the patch keeps the layer's keys and values in, where it does.
    ticket : int64 () on the CPU, of the `kernels.memory.Memory` in which such a patch finds what it left here in the last step; or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    scale: float
    dense: Callable[..., Tensor]
    place: Place | None = None
    hidden: Tensor | None = None
    error: Tensor | None = None
    ticket: Tensor | None = None
    audited: Callable[[Tensor, Tensor], None] | None = None
    kept: KeptKeys | None = None


@dataclass(frozen=True)
class Place:
    """Where a language model's attention call stands in its sequence, and what of it this process has.

    Attributes
    ----------
    first_query, first_key : positions of ``q[:, :, 0]`` and ``k[:, :, 0]``; a sliding window's first key is not 0.
    answers : queries whose next token is asked for: the last one, several when drafts are verified, or the places of every row's
        where padding stands behind them or labels say so.
    causal : whether a query reads no key behind it, where the mask does not say so (it is None or (B, S_k)).
    window : how many keys a query reads at most, its own the last; None where there is no such bound, or the mask has it.
    explicit : whether q, k, v, mask, scale and the above say all there is. False where the model adds more (sink logits, a soft cap).
    first_head : number of ``q[:, 0]`` among all heads of the layer; not 0 on later ranks of tensor parallelism.
    gather_heads : (B, H, ...) of this rank -> (B, H of all ranks, ...).
    """

    first_query: int = 0
    first_key: int = 0
    answers: Rows = 1
    causal: bool = True
    window: int | None = None
    explicit: bool = True
    first_head: int = 0
    gather_heads: Callable[[Tensor], Tensor] = lambda x: x


@dataclass(frozen=True)
class Share:
    """Which of a layer's heads are in this process. Heads are split evenly over ranks; the last rank may hold fewer."""

    rank: int = 0
    ranks: int = 1

    def of(self, heads: int) -> range:
        """Numbers of these heads, where a layer has `heads` in all."""
        each = -(-heads // self.ranks)
        return range(self.rank * each, min((self.rank + 1) * each, heads))

    def part(self, x: Tensor) -> Tensor:
        """Of what stands for all heads, [heads, ...], what stands for these."""
        here = self.of(len(x))
        return x[here.start : here.stop]


ALL_HEADS = Share()


@dataclass(frozen=True)
class Site:
    """Where a call happens: one attention module of one part of a model."""

    module: str
    """Path inside the part, ``blocks.3.attn1``."""
    denoiser: str
    """Name of the part: ``transformer``, ``transformer_2``, ``unet``; ``decoder``; ``vision``."""
    kind: Kind
    layer: int | None
    """0-based over double, then single blocks; None where layers have no order (refiners)."""
    layers: int
    """Number of layers that `layer` counts in."""
    heads: Share = ALL_HEADS
    """Which heads the calls have: not all where tensor or context parallelism shares them out."""
    layer_type: str = FULL_ATTENTION
    """As transformers has it: ``sliding_attention``, ``chunked_attention`` ... where the model's own design bounds what is read."""
    takes: tuple[str, ...] = ()
    """Families of patches that may answer here; any if empty."""


@dataclass(frozen=True)
class Layout:
    """How the tokens of an attention call of a denoiser lie along the sequence.

    The visual tokens are one run, t-major, then rows, then columns. Everything else is text, tokens of other images too: read and
    answered densely.
    """

    grid_thw: tuple[int, int, int]
    """Latent frames, patch rows, patch columns."""
    text_before: int = 0
    """Tokens ahead of the visual run."""
    text_after: int = 0
    """Tokens behind the visual run."""
    unasked: tuple[int, int] = (0, 0)
    """How many tokens at the start and at the end are keys alone: what they read is asked in another call, or by nobody."""
    crossed: bool = False
    """Cross-attention: the visual tokens ask alone, and the text alone is read."""
    texts: tuple[int, ...] = ()
    """Tokens of each prompt in the text, one behind the other; empty where that is not known."""
    special: int = 0
    """Geometry transformers: how many of the tokens ahead are each frame's own, camera token and registers; frame by frame."""
    reference: bool = False
    """Whether poses are told in the coordinates of the first frame: then it is unlike all others."""

    @property
    def visual(self) -> int:
        """Number of visual tokens, T * H * W."""
        return math.prod(self.grid_thw)

    @property
    def length(self) -> int:
        """Number of tokens in all."""
        return self.text_before + self.visual + self.text_after

    @property
    def asked(self) -> slice:
        """Where the tokens stand that ask."""
        return slice(self.unasked[0], self.length - self.unasked[1])

    @property
    def text(self) -> int:
        """Number of tokens that are not visual."""
        return self.text_before + self.text_after

    @property
    def queries(self) -> int:
        """Number of tokens that ask."""
        return self.visual if self.crossed else self.length - sum(self.unasked)

    @property
    def keys(self) -> int:
        """Number of tokens that are read."""
        return self.text if self.crossed else self.length


TEMPLATE = -(2**15)
"""In `Prompt.turns`: a token that opens or ends a turn, which belongs to neither speaker."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """What the tokens of a language model's sequence are, up to and including those of the present forward.

    Attributes
    ----------
    image : int16 (B, S), which image of its row a token shows, from 1; 0 for text and padding.
    valid : bool (B, S), False for padding.
    length : how many of the S tokens were asked, int64 (B, 1) where rows differ; the others were generated.
    past : how many of the S tokens were there before this forward.
    answers : which tokens of this forward have their next token asked for, as in `Place`; the first of them ends the prompt.
    ids : int64 (B, S) token ids, None where the model was given embeddings.
    turns : int16 (B, S), n in the n-th turn of the user's, -n in the model's answer to it, 0 ahead of the first: the system's;
        `TEMPLATE` where the chat template itself speaks. None where that is not known: then what stands ahead of the first image is
        taken for the system's, and the rest for the user's.
    """

    image: Tensor
    valid: Tensor
    length: int | Tensor
    past: int = 0
    answers: Rows = 1
    ids: Tensor | None = None
    turns: Tensor | None = None

    @cached_property
    def visual(self) -> Tensor:
        """Bool (B, S): tokens of images."""
        return self.image > 0

    @cached_property
    def padded(self) -> bool:
        """Whether any token is padding."""
        return not bool(self.valid.all())

    @cached_property
    def shows(self) -> bool:
        """Whether any row has an image."""
        return bool(self.visual.any())

    @cached_property
    def asks(self) -> bool:
        """Whether any row has an image that was asked about, not generated."""
        return bool((self.visual & self.asked).any())

    @cached_property
    def asked(self) -> Tensor:
        """Bool (B, S): tokens that were asked, not generated."""
        return _positions(self.image)[None] < self.length

    @cached_property
    def later(self) -> Tensor:
        """Bool (B, S): text behind the first image of its row, question or answer."""
        return (self.visual.cumsum(-1) > 0) & ~self.visual & self.valid

    @cached_property
    def system(self) -> Tensor:
        """Bool (B, S): text of the system's turn. Rows without an image have none."""
        seen = self.visual.cumsum(-1)
        if self.turns is None:
            return (seen == 0) & (seen[:, -1:] > 0) & self.valid
        spoken = (self.turns != 0).cumsum(-1) > 0
        return ~spoken & ~self.visual & (seen[:, -1:] > 0) & self.valid

    @cached_property
    def question(self) -> Tensor:
        """Bool (B, S): text that was asked, not generated, in the turn of the first image, before or behind it, and in the user's
        later ones."""
        if self.turns is None:
            return self.later & self.asked
        first = self.turns.gather(1, self.visual.long().argmax(-1, keepdim=True))
        of_user = (self.turns > 0) & (self.turns >= first) & self.visual.any(-1, keepdim=True)
        return of_user & ~self.visual & self.valid & self.asked

    @property
    def drafts(self) -> bool:
        """Whether this forward verifies tokens that were guessed, behind a prompt that was read."""
        return self.past > 0 and (self.answers if isinstance(self.answers, int) else self.answers.shape[1]) > 1

    @property
    def rows(self) -> Tensor:
        """Bool (B, S_q): `later`, for the tokens of the present forward alone."""
        return self.later[:, self.past :]


@dataclass(frozen=True, eq=False)
class Behind:
    """What came of a language model's forward.

    Attributes
    ----------
    prompt : the tokens of its sequences up to the prompt's end.
    logits : (B, vocabulary), behind the last token of each row.
    hidden : (B, S_q, C), what the decoder gave of a forward that read a prompt; None of a decode step.
    unembed : (N, C) of those -> (N, vocabulary), their logits.
    """

    prompt: Prompt
    logits: Tensor
    hidden: Tensor | None
    unembed: Callable[[Tensor], Tensor]


def _positions(like: Tensor) -> Tensor:
    """Positions 0..S-1 on the device of a (B, S) tensor."""
    return like.new_ones(like.shape[-1]).cumsum(0) - 1


@dataclass(frozen=True)
class Clock:
    """When a call happens.

    ``step`` is the 0-based place of the denoiser's timestep in the schedule of the pipeline that runs, ``steps`` the length of that
    schedule; both are None where the host cannot know them. They count calls of the model: Heun and KDPM2 have two for each of the
    pipeline's steps but one, and an image-to-image pipeline begins late.
    """

    step: int | None = None
    steps: int | None = None
    branch: str | None = None
    """Name of the guidance branch: ``cond``, ``uncond``, ..., None where the pipeline does not say."""
    phase: Literal["ahead", "prefill", "decode"] | None = None
    """Language models: whether the forward reads a prompt (or verifies drafts), or makes one token; ahead: a plain reading of the
    prompt before that. Denoisers: ahead, of a forward that a patch has run before the one that answers; else None."""
    turn: int = 0
    """How many forwards of this step came before, where no branch is named: pipelines then call the conditional one first."""
