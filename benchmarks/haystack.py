"""Texts with numbers hidden in them, for benchmarks of long prompts. It needs torch alone: other libraries' environments have it too.

Each text tells three numbers. It is read once; how it goes on is weighed behind it, and what it told is asked for on copies of its cache.
Of the first text three more prompts ask at their own end (`within`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

DEPTHS = (0.1, 0.5, 0.9)
KEYS = ("gentle-river", "amber-clock", "silent-harbor")
NEEDLE = " One of the special magic numbers for {key} is: {value}."
QUESTION = "\nWhat is the special magic number for {key} mentioned in the text above? The special magic number for {key} is:"
ANSWER = 10
"""Tokens of an answer."""


def second_half(ids: Tensor, number: int, tokens: int) -> list[Tensor]:
    """Texts of so many tokens from the second half of a file, at equal distances: heads are scored on its beginning."""
    half = ids[len(ids) // 2 :]
    return [half[i * len(half) // number :][:tokens] for i in range(number)]


def middle(ids: Tensor, number: int, tokens: int) -> list[Tensor]:
    """Texts of so many tokens from a file, at equal distances, its beginning and its end left out."""
    return [ids[(i + 1) * len(ids) // (number + 2) :][:tokens] for i in range(number)]


def drawn(seed: int, number: int = 1) -> list[str]:
    """Numbers of seven digits."""
    g = torch.Generator().manual_seed(seed)
    return [str(int(torch.randint(1_000_000, 9_999_999, (1,), generator=g))) for _ in range(number)]


def planted(ids: Tensor, lines: Sequence[tuple[float, list[int]]], behind: Sequence[int] = ()) -> Tensor:
    """A text with lines at depths from 0 to 1, and `behind` at its end, as long as it was."""
    room, parts, last = len(ids) - sum(len(line) for _, line in lines) - len(behind), [], 0
    for depth, line in lines:
        parts += [ids[last : int(depth * room)], torch.tensor(line)]
        last = int(depth * room)
    return torch.cat([*parts, ids[last:room], torch.tensor(list(behind), dtype=ids.dtype)])


def asked_within(tokenizer: Any, ids: Tensor, depth: float, seed: int) -> tuple[Tensor, str]:
    """A prompt that tells a number at some depth and asks for it at its end; and the number."""
    (value,), key = drawn(seed), KEYS[0]
    told = tokenizer(NEEDLE.format(key=key, value=value)).input_ids
    return planted(ids, [(depth, told)], tokenizer(QUESTION.format(key=key)).input_ids), value


def told_at(tokenizer: Any, ids: Tensor) -> tuple[Tensor, list[tuple[Tensor, str]]]:
    """A text that tells a number for a key at each of `DEPTHS`; and the question for each, with the number."""
    values = drawn(0, len(DEPTHS))
    told = [tokenizer(NEEDLE.format(key=key, value=value)).input_ids for key, value in zip(KEYS, values, strict=True)]
    asked = [torch.tensor(tokenizer(QUESTION.format(key=key)).input_ids) for key in KEYS]
    return planted(ids, list(zip(DEPTHS, told, strict=True))), list(zip(asked, values, strict=True))


def gathered(row: dict[str, Any], texts: int, measure: Callable[[int], dict[str, Any]], write: Callable[[], Any]) -> None:
    """Measure the texts that a row lacks, by number, writing after each: what was cut off goes on from there. Say what they come to."""
    done = row.setdefault("texts", [])
    for place in range(len(done), texts):
        done.append(measure(place))
        row["nll"] = [text["nll"] for text in done]
        row["needles"] = f"{sum(text['needles'] for text in done)} of {len(DEPTHS) * len(done)}"
        row["within"] = f"{done[0]['within']} of {len(DEPTHS)}"
        write()


def says(read: Callable[[Tensor], Tensor], last: Tensor, tokenizer: Any, value: str) -> bool:
    """Whether a number is in a greedy answer behind logits (V,); `read` takes tokens (S,) and returns logits of the last one."""
    said: list[int] = []
    for _ in range(ANSWER):
        said.append(int(last.argmax()))
        last = read(torch.tensor(said[-1:]))
    return value in tokenizer.decode(said)
