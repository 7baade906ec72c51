"""Reads contexts with a model as it is, stock or with a recipe on, and puts the questions; greedy, one sequence at a time.

A context is read in one forward, and every question is put behind a copy of its cache: so what a recipe makes of a context cannot
depend on the question (*query-agnostic*). With ``anew`` a context is read with each question, as one prompt. A question's last
token, and all that is weighed, is fed as answers are, one token at a time: decoding is then the recipe's too.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from accelplug import compat
from accelplug.chat import tokenizer_of
from accelplug.comparison.environment import forget_peak, peak_mib
from accelplug.comparison.questions import Item, Reply
from accelplug.comparison.texts.context import Context, TokenQuestion
from accelplug.kernels.timing import synchronise

ANSWER_TOKENS = 128
"""Tokens of the answer in the time of a request."""
GLANCE_TAIL, GLANCE_STEPS = 256, 16
"""Tokens of a context, and tokens behind it, by whose likelihood a first look goes."""


@dataclass
class Reading:
    """What came of a context: a reply to each of its items, and what it took.

    Attributes
    ----------
    first_s : seconds of reading it, up to the logits of the next token.
    step_s : median seconds of a token that is fed behind it; None where none was weighed in a text.
    begin_s : seconds that the first of these took longer, in which a decode patch may build its index.
    kv_mib : what the cache held then.
    peak_mib : most memory meanwhile; None where the system does not tell.
    """

    replies: list[Reply] = field(default_factory=list)
    first_s: float = 0.0
    step_s: float | None = None
    begin_s: float = 0.0
    kv_mib: float = 0.0
    peak_mib: float | None = None

    @property
    def seconds(self) -> float:
        """Seconds of a request: the context, and an answer of `ANSWER_TOKENS` where time per token was measured."""
        return self.first_s + self.begin_s + ANSWER_TOKENS * (self.step_s or 0.0)

    def time_steps(self, steps: Sequence[float]) -> None:
        """Take in the seconds of each token that was fed behind it."""
        self.step_s = statistics.median(steps)
        self.begin_s = max(steps[0] - self.step_s, 0.0)


@dataclass
class Glance:
    """What one reading of a context tells of a recipe.

    Attributes
    ----------
    seconds : of a request, as in `Reading`.
    costs : nats of each of the last `GLANCE_TAIL` tokens of the context, and of the `GLANCE_STEPS` tokens behind it.
    took_s : seconds of it all.
    """

    seconds: float
    costs: list[float]
    took_s: float


class ContextReader:
    """Puts the questions of contexts to a model.

    Parameters
    ----------
    model : a transformers language model.
    processor : its tokenizer, or a processor that has one.
    contexts : all that may be asked.
    anew : whether a context is read anew with every question.
    """

    likelihoods = True

    def __init__(self, model: Any, processor: Any, contexts: Sequence[Context], anew: bool = False) -> None:
        self.model, self.processor, self.anew = model, processor, anew
        self.tokenizer = tokenizer_of(processor)
        self.contexts = {context.key: context for context in contexts}
        self.cache_name = compat.transformers.cache_keyword(type(model).forward)

    def ask(self, page: Sequence[Item]) -> list[Reply]:
        """Return replies to the items of contexts, in their order; see `timed`."""
        return self.timed(page)[0]

    def timed(self, page: Sequence[Any]) -> tuple[list[Reply], float]:
        """Return replies to all items of one or several contexts, and seconds of a request, summed over contexts."""
        found = [self.read(self.contexts[key]) for key in dict.fromkeys(item.context for item in page)]
        return [reply for reading in found for reply in reading.replies], sum(reading.seconds for reading in found)

    @torch.no_grad()
    def warm(self, ids: Sequence[int], steps: int = 0) -> None:
        """Read tokens, say so many greedily, and drop what comes of it."""
        cache, last = self.first(ids)
        for _ in range(steps):
            last = self.next(cache, [int(last.argmax())])

    @torch.no_grad()
    def read(self, context: Context) -> Reading:
        """Read a context and put its questions."""
        device = self.model.device
        told = forget_peak(device)
        start = time.perf_counter()
        cache, last = self.first(context.ids)
        synchronise(device)
        made = Reading(first_s=time.perf_counter() - start, kv_mib=kv_bytes(cache) / 2**20)
        made.peak_mib = peak_mib(device) if told else None
        for asked in context.asked:
            if self.anew and asked.room:
                whole, _ = self.first((*context.ids, *asked.ids[:-1]))
                replies = self.say(asked, asked.ids[-1:], whole)
            elif asked.room:
                replies = self.say(asked, asked.ids, copy.deepcopy(cache))
            else:
                replies, steps = self.weigh(asked, copy.deepcopy(cache), last)
                if asked.items[0].task == "suffix":
                    made.time_steps(steps)
            made.replies += replies
        return made

    @torch.no_grad()
    def glance(self, context: Context) -> Glance:
        """Read a context once, and the next tokens one by one; put no question."""
        asked = next(asked for asked in context.asked if asked.items[0].task == "suffix")
        start, told = time.perf_counter(), Reading()
        cache = self.new_cache()
        logits = self.logits(cache, context.ids, GLANCE_TAIL + 1)
        synchronise(self.model.device)
        told.first_s = time.perf_counter() - start
        tail = torch.tensor(context.ids[-(len(logits) - 1) :], device=logits.device)
        costs = cross_entropy(logits[:-1].float(), tail, reduction="none").tolist()
        ids = asked.ids[:GLANCE_STEPS]
        few = TokenQuestion(ids, asked.items, spans=tuple((i, i + 1) for i in range(len(ids))))
        replies, steps = self.weigh(few, cache, logits[-1])
        told.time_steps(steps)
        return Glance(told.seconds, [*costs, *(reply.nll for reply in replies)], time.perf_counter() - start)

    def new_cache(self) -> Any:
        """Return an empty cache for the model."""
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config.get_text_config(decoder=True))

    def first(self, ids: Sequence[int]) -> tuple[Any, Tensor]:
        """Read tokens into a new cache; return it with logits (V,) of what comes next."""
        cache = self.new_cache()
        return cache, self.next(cache, ids)

    def next(self, cache: Any, ids: Iterable[int]) -> Tensor:
        """Read tokens behind what a cache has; return logits (V,) of what comes next."""
        return self.logits(cache, ids)[-1]

    def logits(self, cache: Any, ids: Iterable[int], last: int = 1) -> Tensor:
        """Read tokens behind what a cache has; return logits (last, V) of what comes behind each of the last ones."""
        given = torch.tensor([list(ids)], device=self.model.device)
        return self.model(given, logits_to_keep=last, use_cache=True, **{self.cache_name: cache}).logits[0]

    def say(self, asked: TokenQuestion, ids: Sequence[int], cache: Any) -> list[Reply]:
        """Read the tokens of a question, and answer greedily: up to the last reference, the end, or as far as there is room.

        Where there is one reference, a new line ends the answer too.
        """
        if len(ids) > 1:
            self.next(cache, ids[:-1])
        last, said, text = self.next(cache, ids[-1:]), list[int](), ""
        ends = self.model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list | tuple) else [ends])
        wanted = [item.answer.lower() for item in asked.items]
        while len(said) < asked.room:
            said.append(int(last.argmax()))
            text = self.tokenizer.decode(said)
            ended = said[-1] in ends or (len(wanted) == 1 and "\n" in text.lstrip())
            if ended or all(answer in text.lower() for answer in wanted):
                break
            last = self.next(cache, said[-1:])
        right = [answer in text.lower() for answer in wanted]
        return [Reply(text.strip(), None, found, float("nan"), float("nan"), 0) for found in right]

    def weigh(self, asked: TokenQuestion, cache: Any, last: Tensor) -> tuple[list[Reply], list[float]]:
        """Feed tokens one by one; return what the weighed ones cost, and the seconds of each token."""
        costs, likeliest, steps = list[float](), list[bool](), list[float]()
        for place, token in enumerate(asked.ids):
            logs = last.float().log_softmax(-1)
            costs.append(-float(logs[token]))
            likeliest.append(int(last.argmax()) == token)
            if place < len(asked.ids) - 1:
                start = time.perf_counter()
                last = self.next(cache, [token])
                synchronise(self.model.device)
                steps.append(time.perf_counter() - start)
        return [
            Reply(None, None, all(likeliest[first:end]), float("nan"), sum(costs[first:end]), end - first)
            for first, end in asked.spans
        ], steps


def kv_bytes(cache: Any) -> int:
    """Bytes of all storages that a cache's layers hold on the device of their keys, each once: what the allocator has given for it."""
    tensors = list(_tensors(cache.layers, set()))
    home = tensors[0].device if tensors else None
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors if x.device == home}
    return sum(storages.values())


def _tensors(held: Any, seen: set[int]) -> Iterator[Tensor]:
    """All tensors in lists, mappings and attributes."""
    if isinstance(held, Tensor):
        yield held
        return
    if id(held) in seen or isinstance(held, torch.nn.Module | str | int | float | type | None):
        return
    seen.add(id(held))
    if isinstance(held, dict):
        held = list(held.values())
    for item in held if isinstance(held, list | tuple) else vars(held).values() if hasattr(held, "__dict__") else ():
        yield from _tensors(item, seen)
