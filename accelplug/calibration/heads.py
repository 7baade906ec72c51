"""What each head of a language model is there for, measured on a few prompts: scores, not masks.

* ``needle``: the share of a head's attention that goes to the token that is to be copied next, mean over the tokens of numbers that
  a text tells (retrieval heads, arXiv 2404.15574, whose procedure counts the hits of one maximum; a share needs fewer prompts).
* ``echo``, ``induction``: attention to earlier copies of a token of a random sequence, and to what stood behind them; ``razor`` is one
  order of both (RazorAttention, arXiv 2407.15891). They need no text.
* ``reach``: how far a head's mean query looks along its mean key (kvpress's stand-in for DuoAttention, arXiv 2410.10819).
* ``output``: how long the vector is that a head adds to the residual stream, over the length of what all heads of its layer add.

A score of a key head is the largest among the query heads that share it, of ``output`` the sum. Layers that keep a window of their own
have none: -1.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from accelplug import compat
from accelplug.call import AttentionCall, Clock, Prompt
from accelplug.comparison.texts.ruler import ASK, NEEDLE
from accelplug.errors import AccelplugError, UnsupportedError
from accelplug.hosts.attention import AttentionRecord
from accelplug.hosts.host import Setup
from accelplug.hosts.stream import watching
from accelplug.hosts.transformers import LanguageHost
from accelplug.hosts.undo import Undo
from accelplug.kernels.head_scores import added, by_key_head, echo_and_induction, look_back, razor, rotated, unrotated
from accelplug.kernels.spans import row_attention
from accelplug.patches.base import Config
from accelplug.show import Tell

NAMES = ("gentle-river", "amber-forest", "silent-harbor", "crimson-meadow", "hollow-mountain", "velvet-canyon")
RETRIEVES = 0.3
"""Share of attention on the token to copy from which a head is told of as one that retrieves. Ours, for the summary alone."""


class Knobs(Config):
    """What a calibration of heads can be told."""

    tokens: int = Field(2048, ge=256, description="Tokens of each prompt with a needle.")
    needles: int = Field(6, ge=1, le=64, description="Prompts with a needle, at depths from the first tenth to the last.")
    period: int = Field(
        512,
        ge=16,
        description="Tokens of the random sequence that is told over and over. Paper: 2500; ours fits short models.",
    )
    repeats: int = Field(4, ge=2, le=16, description="How often it is told. Paper: 4.")
    span: int = Field(500, ge=16, description="Tokens over which `reach` is taken. kvpress: 500.")
    by: Literal["needle", "razor", "induction", "echo", "reach"] = Field(
        "razor", description="The score that the recipe's patch goes by; all are in the file of tables."
    )


@dataclass
class HeadScores:
    """Scores of a model's key heads, and of its query heads.

    Attributes
    ----------
    tables : float32 (layers, key heads) by name; -1 in layers that were not seen.
    query_heads : float32 (layers, query heads), likewise.
    found : how many of the needles' tokens the model would have said, a share; None without text.
    """

    tables: dict[str, Tensor]
    query_heads: dict[str, Tensor]
    found: float | None

    def told(self) -> str:
        """What there is to say of the heads, in a sentence."""
        if (needle := self.query_heads.get("needle")) is None:
            return "No text was given, so retrieval heads were told by random tokens alone."
        seen, best = int((needle >= 0).sum()), int(needle.argmax())
        layer, head = divmod(best, needle.shape[1])
        return (
            f"{int((needle > RETRIEVES).sum())} of {seen} query heads put over {RETRIEVES:g} on the token to copy, most layer {layer} "
            f"head {head} ({needle.max():.2f}); {self.found or 0:.0%} of the needles' tokens would have been said."
        )


@dataclass
class _Sums:
    """Sums over prompts, by name, then by layer; and how many prompts went into them."""

    by_layer: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    calls: dict[tuple[str, int], int] = field(default_factory=dict)
    key_heads: dict[int, int] = field(default_factory=dict)
    layers: int = 0

    def add(self, name: str, record: AttentionRecord, call: AttentionCall, values: Tensor) -> None:
        layer = record.site.layer or 0
        self.layers, self.key_heads[layer] = record.site.layers, call.k.shape[1]
        sums = self.by_layer.setdefault(name, {})
        sums[layer] = sums[layer] + values.cpu() if layer in sums else values.cpu()
        self.calls[name, layer] = self.calls.get((name, layer), 0) + 1

    def mean(self, name: str) -> dict[int, Tensor]:
        return {layer: x / self.calls[name, layer] for layer, x in self.by_layer.get(name, {}).items()}

    def rows(self, found: dict[int, Tensor]) -> Tensor:
        """By layer, -1 where there is nothing: (layers, H)."""
        if len(widths := {len(x) for x in found.values()}) != 1:
            raise UnsupportedError(
                f"calibrate heads makes tables with as many heads in every layer, and this model has {sorted(widths)}. Calibrate a "
                "model whose layers are alike."
            )
        table = torch.full((self.layers, widths.pop()), -1.0)
        for layer, x in found.items():
            table[layer] = x
        return table


class _Looks:
    """Looks at the attention calls of one prompt after another."""

    def __init__(self, knobs: Knobs) -> None:
        self.knobs, self.sums = knobs, _Sums()
        self.needle: Tensor | None = None
        """Places of the tokens to copy, int64 (n,); the last n rows copy them."""
        self.period: int | None = None
        self.rotary: dict[int, tuple[Tensor, Tensor]] = {}
        self.texts = False
        """Whether prompts of text follow, of which more is told than of random tokens."""
        self.scale = 1.0

    def rotates(self, layer: int, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """Note how a layer turns its queries and keys."""
        if isinstance(given := kwargs.get("position_embeddings"), tuple) and len(given) == 2:
            self.rotary[layer] = given

    def __call__(self, record: AttentionRecord, call: AttentionCall, prompt: Prompt, clock: Clock) -> None:
        if call.place is None or not call.place.explicit or compat.transformers.window_of(record.module) is not None:
            return
        self.scale = call.scale
        if self.period is not None:
            for name, x in zip(
                ("echo", "induction"), echo_and_induction(call.q, call.k, call.scale, self.period), strict=True
            ):
                self.sums.add(name, record, call, x)
            if self.texts:
                return
        if self.needle is not None:
            p = row_attention(call, len(self.needle))[0]  # [H, n, S]
            on_it = p.gather(-1, self.needle.to(p.device)[None, :, None].expand(len(p), -1, 1))
            self.sums.add("needle", record, call, on_it.mean((1, 2)))
        self._mean_directions(record, call)
        if (weight := compat.transformers.output_weight(record.module)) is not None:
            self.sums.add("output", record, call, added(call.dense()[0], weight))

    def _mean_directions(self, record: AttentionRecord, call: AttentionCall) -> None:
        """Take the mean query and key of each head, positions taken out."""
        turn = self.rotary.get(record.site.layer or 0)
        if turn is None:
            return
        for name, x in {"q": call.q, "k": call.k}.items():
            if (plain := unrotated(x, *turn)) is not None:
                self.sums.add(name, record, call, plain[0].mean(1))

    def reaches(self) -> dict[int, Tensor]:
        """How far each layer's heads look."""
        q, k, found = self.sums.mean("q"), self.sums.mean("k"), {}
        for layer in q.keys() & k.keys():
            cos, sin = (x[:1, : self.knobs.span].cpu() for x in self.rotary[layer])
            keys = rotated(k[layer][None, :, None].expand(-1, -1, cos.shape[1], -1), cos, sin)
            query = rotated(q[layer][None, :, None], cos[:, -1:], sin[:, -1:])
            if keys is not None and query is not None:
                found[layer] = look_back(query[0, :, 0], keys[0], self.scale)
        return found


def score_heads(model: Any, tokenizer: Any, text: str, knobs: Knobs, seed: int = 0, tell: Tell | None = None) -> HeadScores:
    """Score every head of a language model; it is left as it was.

    Parameters
    ----------
    model, tokenizer : the language model, and its tokenizer; None will do without text.
    text : the haystack, of at least ``knobs.tokens`` tokens; empty: no needles.
    seed : of needles and random tokens.
    tell : called with how many prompts are read.

    Raises
    ------
    AccelplugError
        If the text is too short.
    UnsupportedError
        If no attention of the model can be recomputed, or its layers have different numbers of heads.
    """
    compat.versions.require("transformers")
    host, looks, generator = LanguageHost(model, Setup(), watched=True), _Looks(knobs), torch.Generator().manual_seed(seed)
    if host.tensor_parallel:
        raise UnsupportedError(
            f"The heads of this {type(model).__name__} are spread over processes, expected all in one. Load it on one device."
        )
    prompts = _needle_prompts(tokenizer, text, knobs, generator) if text else []
    said, told, looks.texts = 0, 0, bool(prompts)
    with Undo() as undo, torch.no_grad():
        for record in host.records:
            rotates = partial(looks.rotates, record.site.layer or 0)
            undo.hook(record.module, "register_forward_pre_hook", rotates, with_kwargs=True)
        host.install(undo)
        with watching(looks):
            looks.period = knobs.period
            _read(host, _told_over(model, knobs, generator))
            looks.period = None
            for number, (ids, place) in enumerate(prompts, 1):
                looks.needle = place
                hidden = _read(host, ids)[:, -len(place) :]
                next_ids = model.get_output_embeddings()(hidden)[0].argmax(-1).cpu()
                said, told = said + int((next_ids == ids[place]).sum()), told + len(place)
                if tell is not None:
                    tell(number, f"needle {number} of {len(prompts)}")
    if not looks.sums.by_layer:
        raise UnsupportedError(
            f"Every layer of this {type(model).__name__} slides a window, or adds sink logits or a soft cap to its scores: none of its "
            "heads can be scored."
        )
    sums = looks.sums
    means: dict[str, dict[int, Tensor]] = {
        name: sums.mean(name) for name in ("needle", "echo", "induction", "output") if name in sums.by_layer
    }
    if reaches := looks.reaches():
        means["reach"] = reaches
    queries = {name: sums.rows(found) for name, found in means.items()}
    queries["razor"] = _among_seen(queries["echo"], queries["induction"])
    groups = next(iter(sums.key_heads.values()))
    tables = {name: torch.stack([by_key_head(row, groups, name == "output") for row in x]) for name, x in queries.items()}
    return HeadScores(tables, queries, said / told if told else None)


def _among_seen(echo: Tensor, induction: Tensor) -> Tensor:
    """`razor` of the layers that were seen, -1 in the others."""
    seen, found = echo[:, 0] >= 0, torch.full_like(echo, -1.0)
    found[seen] = razor(echo[seen], induction[seen])
    return found


def _read(host: LanguageHost, ids: Tensor) -> Tensor:
    """Read tokens (S,): what comes out of the last layer, (1, S, C)."""
    found: Tensor = host.base(input_ids=ids[None].to(host.model.device), use_cache=False).last_hidden_state
    return found


def _told_over(model: Any, knobs: Knobs, generator: torch.Generator) -> Tensor:
    """One token and a random sequence, told over and over."""
    config = model.config.get_text_config()
    begin = config.bos_token_id if isinstance(config.bos_token_id, int) else 0
    once = torch.randint(config.vocab_size, (knobs.period,), generator=generator)
    return torch.cat([torch.tensor([begin]), once.repeat(knobs.repeats)])


def _needle_prompts(tokenizer: Any, text: str, knobs: Knobs, generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """Tokens of prompts that end ahead of the last token of a number that they tell, and where each token of the number is told."""

    def tokens(some: str) -> list[int]:
        return list(tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"])

    begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    haystack, prompts = tokens(text[: 8 * knobs.tokens * knobs.needles]), []
    if len(haystack) < knobs.tokens:
        raise AccelplugError(
            f"calibrate heads hides needles in {knobs.tokens} tokens of text, and was given {len(haystack)}. Give a longer text, or "
            "set tokens lower."
        )
    for number in range(knobs.needles):
        key, value = (
            NAMES[number % len(NAMES)],
            str(int(torch.randint(1_000_000, 10_000_000, (1,), generator=generator))),
        )
        needle, answer = tokens(f" {NEEDLE.partition(' {value}')[0].format(key=key)}"), tokens(f" {value}")
        question = tokens(f"{ASK.format(key=key)}:")
        room = knobs.tokens - len(begin) - len(needle) - 2 * len(answer) - len(question) - 1
        start = number * max(len(haystack) - room, 0) // max(knobs.needles, 1)
        place = int((0.1 + 0.8 * number / max(knobs.needles - 1, 1)) * room)
        ahead = [*begin, *haystack[start : start + place], *needle]
        rest = [*tokens("."), *haystack[start + place : start + room], *question, *answer[:-1]]
        prompts.append((torch.tensor([*ahead, *answer, *rest]), len(ahead) + torch.arange(len(answer))))
    return prompts
