"""Heads that keep fewer keys, on SmolLM2-135M: bytes that are freed, needles that are found, and the likelihood of what follows.

usage: python -m benchmarks.kv_memory TEXT --heads heads.yaml [--tokens 2048 4096] [--texts 3] [--recipes NAME ...]

Needs `accelplug fetch smollm2-135m`, a text of a few hundred thousand characters, and scores of heads:
`accelplug calibrate smollm2-135m --patch heads --prompts TEXT -o heads.yaml`.

A prompt is read with the recipe on, and so is all that follows.

* kv_mib: bytes of all storages that the cache reaches, once the prompt is read: what the allocator has given for it.
* nll: per token of the 128 tokens that follow, at `--texts` places of the file's second half; heads are scored on its beginning.
* needles: numbers told at a tenth, a half and nine tenths of each of these texts that are answered, where the question comes behind the
  prompt, as one more turn; `within`: of the first text, where it is the prompt's end.

Texts that a recipe was measured on stay as the file has them; delete its row to measure it anew.

`benchmarks.beside_kvpress` puts the same prompts to kvpress, in an environment of its own.
"""

from __future__ import annotations

import argparse
import copy
import json
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch.nn.functional import cross_entropy

import accelplug
from accelplug import compat
from accelplug.comparison.environment import environment
from accelplug.comparison.texts.reader import kv_bytes
from accelplug.hosts.host import model_facts
from accelplug.recipe import load
from benchmarks.common import RESULTS, write_json
from benchmarks.haystack import DEPTHS, asked_within, gathered, says, second_half, told_at
from benchmarks.long_context import loaded, read

NAME = "kv_memory"
SUFFIX = 128


def duo(by: str, keep: float, **more: Any) -> dict[str, Any]:
    return {"patch": "duo", "with": {"scores": by, "keep": keep, "sink": 64, "window": 256, "prompt": "stream", **more}}


RECIPES: dict[str, dict[str, Any] | None] = {
    "dense": None,
    **{f"duo {by} {keep:g}": duo(by, keep) for keep in (0.5, 0.25) for by in ("needle", "razor", "reach")},
    **{
        f"duo {by} {keep:g}, dense prompt": duo(by, keep, prompt="dense")
        for keep in (0.5, 0.25)
        for by in ("needle", "razor")
    },
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


def answers(model: Any, tokenizer: Any, cache: Any, ids: torch.Tensor, value: str) -> bool:
    """Whether a number is answered behind what a cache has and some tokens more."""
    return says(lambda token: read(model, token, cache), read(model, ids, cache), tokenizer, value)


@torch.no_grad()
def measured(model: Any, tokenizer: Any, ids: torch.Tensor, place: int, rule: dict[str, Any] | None) -> dict[str, Any]:
    """What a recipe makes of a text (tokens + `SUFFIX`), and of what is asked about it."""
    given = compat.transformers.cache_keyword(type(model).forward)
    with nullcontext() if rule is None else accelplug.apply(model, {"rules": [rule]}, strict=True):
        text, questions = told_at(tokenizer, ids[:-SUFFIX])
        cache = hf.DynamicCache(config=model.config)
        last = read(model, text, cache)
        found: dict[str, Any] = {"kv_mib": round(kv_bytes(cache) / 2**20, 2)}
        logits = model(ids[None, -SUFFIX:-1], **{given: copy.deepcopy(cache)}).logits[0]
        found["nll"] = round(float(cross_entropy(torch.cat([last[None], logits]).float(), ids[-SUFFIX:])), 4)
        found["needles"] = sum(answers(model, tokenizer, copy.deepcopy(cache), *asked) for asked in questions)
        if place == 0:
            prompts = [asked_within(tokenizer, ids[:-SUFFIX], depth, seed) for seed, depth in enumerate(DEPTHS)]
            empty = partial(hf.DynamicCache, config=model.config)
            found["within"] = sum(answers(model, tokenizer, empty(), *asked) for asked in prompts)
    return found


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
        places = second_half(ids, asked.texts, tokens + SUFFIX)
        for name in asked.recipes:
            row = data.setdefault(str(tokens), {}).setdefault(name, {"at": at})
            if "texts" not in row:  # of another kind
                row = data[str(tokens)][name] = {"at": at}
            rule = rule_of(name, tables)
            measure = lambda place: measured(model, tokenizer, places[place], place, rule)  # noqa: B023, E731
            gathered(row, asked.texts, measure, lambda: write_json(NAME, data))
            print(
                tokens, name, {key: row[key] for key in ("nll", "needles", "within")}, row["texts"][0]["kv_mib"], flush=True
            )


if __name__ == "__main__":
    main()
