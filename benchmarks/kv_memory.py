"""Heads that keep fewer keys, on SmolLM2-135M: bytes that are freed, needles that are found, and the likelihood of what follows.

usage: python -m benchmarks.kv_memory TEXT --heads heads.yaml [--tokens 2048 4096] [--recipes NAME ...]

Needs `accelplug fetch smollm2-135m`, a text of a few hundred thousand characters, and scores of heads:
`accelplug calibrate smollm2-135m --patch heads --prompts TEXT -o heads.yaml`.

A prompt is read with the recipe on, and so is all that follows.

* kv_mib: bytes of all storages that the cache reaches, once the prompt is read: what the allocator has given for it.
* nll: per token of the 128 tokens that follow, at `--texts` places of the file's second half; heads are scored on its beginning.
* needles: numbers told at a tenth, a half and nine tenths of the text that are answered; `after`, where the question comes behind a prompt
  that was read without it, as one more turn.
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
from benchmarks.long_context import DEPTHS, NEEDLE, QUESTION, loaded, read

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


def needles(model: Any, tokenizer: Any, ids: torch.Tensor, apart: bool) -> int:
    """How many of three numbers that a text tells are answered; `apart`: the question comes behind the prompt."""
    found = 0
    for seed, depth in enumerate(DEPTHS):
        g = torch.Generator().manual_seed(100 + seed)
        value = str(int(torch.randint(1_000_000, 9_999_999, (1,), generator=g)))
        needle = tokenizer(NEEDLE.format(key="gentle-river", value=value)).input_ids
        question = tokenizer(QUESTION.format(key="gentle-river")).input_ids
        room = len(ids) - len(needle) - len(question)
        text = [*ids[: int(depth * room)].tolist(), *needle, *ids[int(depth * room) : room].tolist()]
        cache = hf.DynamicCache(config=model.config)
        for part in (text, question) if apart else ([*text, *question],):
            last = read(model, torch.tensor(part), cache)
        said: list[int] = []
        for _ in range(10):
            said.append(int(last.argmax()))
            last = read(model, torch.tensor(said[-1:]), cache)
        found += value in tokenizer.decode(said)
    return found


@torch.no_grad()
def measured(
    model: Any, tokenizer: Any, ids: torch.Tensor, tokens: int, rule: dict[str, Any] | None, texts: int
) -> dict[str, Any]:
    half = ids[len(ids) // 2 :]  # heads are scored on the beginning
    places = [half[i * len(half) // texts :][: tokens + SUFFIX] for i in range(texts)]
    with nullcontext() if rule is None else accelplug.apply(model, {"rules": [rule]}, strict=True):
        found = [follows(model, text, tokens) for text in places]
        told = {apart: needles(model, tokenizer, places[0][:tokens], apart) for apart in (False, True)}
    return {
        "kv_mib": round(found[0][1], 2),
        "nll": [round(nll, 4) for nll, _ in found],
        "needles": told[False],
        "needles after": told[True],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--heads", type=Path, required=True)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--recipes", nargs="*", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32", help="of the model")
    parser.add_argument("--texts", type=int, default=2, help="places of the file")
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
