"""Heads that keep fewer keys, on SmolLM2-135M: bytes that are freed, needles that are found, and the likelihood of what follows.

usage: python -m benchmarks.kv_memory TEXT --heads heads.yaml [--tokens 2048 4096] [--texts 3] [--recipes NAME ...]

Needs `accelplug fetch smollm2-135m`, a text of a few hundred thousand characters, and scores of heads:
`accelplug calibrate smollm2-135m --patch heads --prompts TEXT -o heads.yaml`.

A prompt is read with the recipe on, and so is all that follows.

* kv_mib: bytes of all storages that the cache reaches, once the prompt is read: what the allocator has given for it.
* nll: per token of the 128 tokens that follow, at `--texts` places of the file's second half; heads are scored on its beginning.
* needles: numbers told at a tenth, a half and nine tenths of each of these texts that are answered, of so many; `after`, where the
  question comes behind a prompt that was read without it, as one more turn.

`benchmarks.beside_kvpress` puts the same prompts to kvpress, in an environment of its own.
"""

from __future__ import annotations

import argparse
import copy
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch.nn.functional import cross_entropy

import accelplug
from accelplug.comparison.environment import environment
from accelplug.comparison.texts.reader import kv_bytes
from accelplug.hosts.host import model_facts
from accelplug.recipe import load
from benchmarks.common import RESULTS, write_json
from benchmarks.haystack import DEPTHS, asked_within, says, second_half, told_at
from benchmarks.long_context import loaded, read

NAME = "kv_memory"
SUFFIX = 128


def duo(by: str, keep: float, **more: Any) -> dict[str, Any]:
    return {"patch": "duo", "with": {"scores": by, "keep": keep, "sink": 64, "window": 256, "prompt": "stream", **more}}


RECIPES: dict[str, dict[str, Any] | None] = {
    "dense": None,
    **{f"duo {by} {keep:g}": duo(by, keep) for keep in (0.5, 0.25) for by in ("needle", "razor", "reach")},
    "duo needle 0.5, dense prompt": duo("needle", 0.5, prompt="dense"),
    "duo needle 0.25, dense prompt": duo("needle", 0.25, prompt="dense"),
    "duo needle 0.5, nothing for the rest": duo("needle", 0.5, compensate=False),
    "duo needle 0.25, nothing for the rest": duo("needle", 0.25, compensate=False),
    "duo 0": {"patch": "duo", "with": {"sink": 64, "window": 256, "prompt": "stream"}},
    "snapkv 0.5": {"patch": "snapkv", "with": {"share": 0.5}},
    "snapkv 0.25": {"patch": "snapkv", "with": {"share": 0.25}},
}


def rule_of(name: str, tables: dict[str, Any]) -> dict[str, Any] | None:
    """A recipe's rule, with the table that it names."""
    if (rule := copy.deepcopy(RECIPES[name])) is not None and "scores" in rule["with"]:
        rule["with"]["scores"] = tables[rule["with"]["scores"]]
    return rule


def tables_of(model: Any, path: Path) -> dict[str, Any]:
    """All tables that stand beside a recipe of calibrated heads, by name."""
    recipe = load(path, model_facts(model))
    table = next(value for rule in recipe.rules for key, value in rule.settings.items() if key == "scores")
    keys = ("needle", "razor", "reach")
    return {key: type(table).read(path.with_suffix(".safetensors"), table.sha256, key) for key in keys}


def follows(model: Any, ids: torch.Tensor, tokens: int) -> tuple[float, float]:
    """NLL per token of what follows a prompt, and MiB of its cache."""
    cache = hf.DynamicCache(config=model.config)
    last = read(model, ids[:tokens], cache)
    held = kv_bytes(cache) / 2**20
    logits = [last, *(read(model, token[None], cache) for token in ids[tokens:-1])]
    return float(cross_entropy(torch.stack(logits).float(), ids[tokens:])), held


def answers(model: Any, tokenizer: Any, cache: Any, ids: torch.Tensor, value: str) -> bool:
    """Whether a number is answered behind what a cache has and some tokens more."""
    return says(lambda token: read(model, token, cache), read(model, ids, cache), tokenizer, value)


def needles(model: Any, tokenizer: Any, ids: torch.Tensor, place: int) -> tuple[int, int]:
    """How many of three numbers that a text tells are answered: asked for at the end of the prompt, and behind it."""
    within = after = 0
    for number, depth in enumerate(DEPTHS):
        prompt, value = asked_within(tokenizer, ids, depth, 100 + 10 * place + number)
        within += answers(model, tokenizer, hf.DynamicCache(config=model.config), prompt, value)
    text, questions = told_at(tokenizer, ids)
    cache = hf.DynamicCache(config=model.config)
    read(model, text, cache)
    for question, value in questions:
        after += answers(model, tokenizer, copy.deepcopy(cache), question, value)
    return within, after


@torch.no_grad()
def measured(
    model: Any, tokenizer: Any, ids: torch.Tensor, tokens: int, rule: dict[str, Any] | None, texts: int
) -> dict[str, Any]:
    places = second_half(ids, texts, tokens + SUFFIX)
    with nullcontext() if rule is None else accelplug.apply(model, {"rules": [rule]}, strict=True):
        found = [follows(model, text, tokens) for text in places]
        told = [needles(model, tokenizer, text[:tokens], place) for place, text in enumerate(places)]
    return {
        "kv_mib": round(found[0][1], 2),
        "nll": [round(nll, 4) for nll, _ in found],
        "needles": sum(within for within, _ in told),
        "needles after": sum(after for _, after in told),
        "of": len(DEPTHS) * texts,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--heads", type=Path, required=True)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--recipes", nargs="*", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32", help="of the model")
    parser.add_argument("--texts", type=int, default=3, help="places of the file")
    asked = parser.parse_args()
    path = RESULTS / f"{NAME}.json"
    data: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    model, tokenizer = loaded(asked.dtype)
    tables = tables_of(model, asked.heads)
    ids = torch.tensor(tokenizer(asked.text.read_text()[:1_500_000]).input_ids)
    at = {"environment": environment(), "text": asked.text.name, "dtype": asked.dtype}
    for tokens in asked.tokens:
        into = data.setdefault(str(tokens), {})
        for name in asked.recipes:
            into[name] = {**measured(model, tokenizer, ids, tokens, rule_of(name, tables), asked.texts), "at": at}
            print(tokens, name, into[name], flush=True)
            write_json(NAME, data)


if __name__ == "__main__":
    main()
