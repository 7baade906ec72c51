"""SmolLM2 reads a long text with sparse prefill: how long the first token takes, and what it answers, dense and sparse.

    accelplug fetch smollm2-135m
    python examples/smollm2_long_prompt.py BOOK.txt

BOOK.txt is any text of 40,000 characters or more. A number is hidden in the middle of it, and asked for at the end. Only the prompt
reads fewer keys; decoding is the model's own. For a whole exam: `accelplug.compare(llm, ["long"], TextExam(...), processor=tokenizer)`.

It needs no GPU, and has not run on one yet. `tests/test_examples.py` runs it on a tiny Llama, and on SmolLM2 itself where it was fetched.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import accelplug
from accelplug import zoo

NEEDLE = " The number of the locker is 7413."
QUESTION = "\nWhat is the number of the locker? The number of the locker is"


def prompt_of(tokenizer: Any, text: str, tokens: int) -> torch.Tensor:
    """Return so many tokens (1, S) of a text, with the needle in its middle and the question at its end."""
    needle, question = (tokenizer(part, add_special_tokens=False).input_ids for part in (NEEDLE, QUESTION))
    half = (tokens - len(needle) - len(question)) // 2
    hay = tokenizer(text).input_ids
    return torch.tensor([[*hay[:half], *needle, *hay[half : 2 * half], *question]])


def answer(llm: Any, ids: torch.Tensor, tokens: int) -> tuple[torch.Tensor, float]:
    """Return what it says, greedily, and the seconds that it took."""
    start = time.perf_counter()
    out = llm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return out[0, ids.shape[1] :].cpu(), time.perf_counter() - start


def main(
    book: Path,
    model: str | Path | None = None,
    recipe: Any = "long",
    tokens: int = 8000,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
) -> accelplug.Plug:
    """Read the prompt both ways. `recipe`: a name of recipes/llm.yaml; prompts of less than 4,096 tokens run dense by it."""
    folder = model or zoo.path("smollm2-135m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    llm = AutoModelForCausalLM.from_pretrained(folder).to(device)
    ids = prompt_of(tokenizer, book.read_text(encoding="utf-8"), tokens).to(device)

    def tell(name: str) -> None:
        said, _ = answer(llm, ids, 8)
        _, seconds = answer(llm, ids, 1)  # the first run is slower
        print(f"{name}: {ids.shape[1]:,} tokens, the first answer after {seconds:.2f} s: {tokenizer.decode(said)!r}")

    tell("dense")
    with accelplug.apply(llm, recipe) as plug:
        tell("sparse")
        print(plug.report())
    return plug


if __name__ == "__main__":
    main(Path(sys.argv[1]))
