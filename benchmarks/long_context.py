"""Sparse prefill on SmolLM2-135M: what it costs a prompt, and what it saves.

usage: python -m benchmarks.long_context TEXT [--tokens 2048 4096 8192] [--only quality|time|call|decode|step] [--recipes NAME ...]

Needs `accelplug fetch smollm2-135m`, and a text file of a few hundred thousand characters: the haystack, and what is predicted.

* quality: a text is read by the recipe, what follows by the stock model on the cache that the recipe left. NLL per token of the 256 tokens
  that follow, on texts from `--texts` places of the file; and how many numbers are answered that were told at a tenth, a half and nine
  tenths of each text, and are asked for behind it; `within`: of the first text, where the prompt itself asks. Density is the share of
  causal (query, key) pairs that were read, mean over all layers, sparse or not.
* time: a prompt read by the stock model and by each recipe in turn, the least of `--repeats` rounds, and what attention took of it in a
  round more: all that a patch does, choosing too, or dense attention.
* call: one attention call with random queries and keys of the model's shape, and random blocks, against dense causal attention.

* decode: the prompt is read by the model's own attention, what follows token by token by the recipe. NLL per token of the 64 tokens that
  follow; three needles in one text, whose questions come token by token on copies of its cache; density is the share of the cache that
  a step reads, mean over all layers.
* step: time of such a step: of the first, in which what was read is indexed, and the least of the next. "room" is dense attention on keys
  that stand in room which grows ahead, as all these recipes have them; the stock cache is copied for every token.

A part, a length or a recipe that is not run stays as the file has it, with the commit it was run at; so does the quality of a text that
was measured: delete a row to measure it anew.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import accelplug
from accelplug import compat, recipe, zoo
from accelplug.comparison.environment import environment
from accelplug.kernels.attention import block_attention
from accelplug.kernels.plan import BlockPlan
from benchmarks import prefill_baselines
from benchmarks.common import RESULTS, write_json
from benchmarks.haystack import DEPTHS, asked_within, gathered, middle, says, told_at

PARTS = ("quality", "time", "call", "decode", "step")
NAME, STEPPED = "long_context", "long_context_decode"
SUFFIX = 256
RECIPES: dict[str, list[dict[str, Any]]] = {
    "rows .98": [{"patch": "prefill_rows", "with": {"top_p": 0.98}}],
    "rows .95": [{"patch": "prefill_rows", "with": {"top_p": 0.95}}],
    "rows .90": [{"patch": "prefill_rows", "with": {"top_p": 0.90}}],
    "rows .80": [{"patch": "prefill_rows", "with": {"top_p": 0.80}}],
    "rows .95, layers 3:": [{"where": {"layers": "3:"}, "patch": "prefill_rows", "with": {"top_p": 0.95}}],
    "rows .95, layers 3:, grouped": [
        {"where": {"layers": "3:"}, "patch": "prefill_rows", "with": {"top_p": 0.95, "grouped": True}}
    ],
    "rows .95, strict": [{"patch": "prefill_rows", "with": {"top_p": 0.95, "strict": True}}],
    "rows .95, grouped": [{"patch": "prefill_rows", "with": {"top_p": 0.95, "grouped": True}}],
    "rows, density .3": [{"patch": "prefill_rows", "with": {"density": 0.3}}],
    "flashprefill": [{"patch": "flashprefill"}],
    "flashprefill, blocks of 64": [{"patch": "flashprefill", "with": {"block": 64}}],
    "xattention": [{"patch": "xattention"}],
    "triangle, layers 15:": [{"where": {"layers": "15:"}, "patch": "triangle"}],
    "stream": [{"patch": "stream"}],
    "power": [{"patch": "power"}],
    "superlinear": [{"patch": "superlinear"}],
    "landmark": [{"patch": "landmark", "with": {"k": 16}}],
    "dynamic_mask": [{"patch": "dynamic_mask", "with": {"keys": 1024}}],
    "minference": [{"patch": "minference"}],
    "flexprefill": [{"patch": "flexprefill"}],
}
RECIPES |= {
    f"{name}, last 0": [{**rule, "with": {**rule["with"], "last": 0}} for rule in rules]
    for name, rules in list(RECIPES.items())
    if name.startswith("rows .")
}
SHIPPED = ("smollm2-135m/long",)
"""Recipes by full name, beside them."""
DECODE: dict[str, list[dict[str, Any]]] = {
    "room": [{"patch": "pages", "with": {"min_tokens": 1 << 30}}],
    "pages 512": [{"patch": "pages", "with": {"budget": 512}}],
    "pages 1024": [{"patch": "pages", "with": {"budget": 1024}}],
    "clusters .018": [{"patch": "clusters", "with": {"exact": 0.018}}],
    "clusters .05": [{"patch": "clusters", "with": {"exact": 0.05, "estimate": 0.95}}],
    "clusters p .9": [{"patch": "clusters", "with": {"exact": 0.25, "estimate": 0.75, "top_p": 0.9}}],
    "retrieval": [{"patch": "retrieval"}],
}
STEPS = 64
HEADS, KEY_HEADS, DIM, BLOCK = 9, 3, 64, 64


def loaded(dtype: str) -> tuple[Any, Any]:
    folder = zoo.path("smollm2-135m")
    model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval().requires_grad_(False)
    return model, hf.AutoTokenizer.from_pretrained(folder)


def rules_of(name: str) -> list[dict[str, Any]]:
    """A recipe's rules, for prompts of any length."""
    found = recipe.named(name).to_mapping()["rules"] if name in SHIPPED else (RECIPES | DECODE)[name]
    return [{**rule, "with": {"min_tokens": 0, **rule.get("with", {})}} for rule in found]


def on(model: Any, name: str) -> accelplug.Plug:
    """Have a recipe on."""
    return accelplug.apply(model, {"rules": rules_of(name)}, gate="off")


def read(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    """Read tokens (S,) behind what a cache has; logits of the last one, (V,)."""
    given = {compat.transformers.cache_keyword(type(model).forward): cache}
    return model(ids[None], logits_to_keep=1, **given).logits[0, -1]


def read_sparse(model: Any, ids: torch.Tensor, name: str | None) -> tuple[Any, torch.Tensor, float]:
    """Read a prompt by a recipe: the cache, logits of the last token, and the share of pairs that was read."""
    cache = hf.DynamicCache(config=model.config)
    if name is None:
        return cache, read(model, ids, cache), 1.0
    with on(model, name) as plug, plug.trace() as events:
        last = read(model, ids, cache)
    layers = model.config.num_hidden_layers
    read_share = (
        sum(event.density or 1.0 for event in events) + layers - len(events)
    )  # layers that no rule names tell nothing
    return cache, last, read_share / layers


@torch.no_grad()
def quality(model: Any, tokenizer: Any, ids: torch.Tensor, place: int, name: str | None) -> dict[str, Any]:
    """What is left of a text (S,) that a recipe read: the last `SUFFIX` tokens and questions are the stock model's."""
    given = compat.transformers.cache_keyword(type(model).forward)
    text, questions = told_at(tokenizer, ids[:-SUFFIX])
    cache, last, density = read_sparse(model, text, name)
    logits = model(ids[None, -SUFFIX:-1], **{given: copy.deepcopy(cache)}).logits[0]
    nll = float(cross_entropy(torch.cat([last[None], logits]).float(), ids[-SUFFIX:]))
    told = 0
    for question, value in questions:
        behind = copy.deepcopy(cache)
        told += says(partial(read, model, cache=behind), read(model, question, behind), tokenizer, value)
    found = {"density": round(density, 4), "nll": round(nll, 4), "needles": told}
    if place == 0:
        prompts = [asked_within(tokenizer, ids, depth, seed) for seed, depth in enumerate(DEPTHS)]
        found["within"] = sum(finds(model, tokenizer, prompt, value, name) for prompt, value in prompts)
    return found


def finds(model: Any, tokenizer: Any, prompt: torch.Tensor, value: str, name: str | None) -> bool:
    """Whether a number is answered that a prompt tells and asks for."""
    cache, last, _ = read_sparse(model, prompt, name)
    return says(partial(read, model, cache=cache), last, tokenizer, value)


def said_behind(model: Any, cache: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Logits behind each of some tokens (n,), read one by one behind what a cache has: (n, V)."""
    return torch.stack([read(model, token[None], cache) for token in tokens])


@torch.no_grad()
def decode(model: Any, tokenizer: Any, ids: torch.Tensor, tokens: int, name: str | None, texts: int) -> dict[str, Any]:
    """What a recipe makes of the tokens behind a prompt, and of questions for what the prompt told."""
    found, density, told = [], 1.0, 0
    with nullcontext() if name is None else on(model, name) as plug:
        for text in middle(ids, texts, tokens + STEPS):
            cache = hf.DynamicCache(config=model.config)
            logits = torch.cat([read(model, text[:tokens], cache)[None], said_behind(model, cache, text[tokens:-1])])
            found.append(float(cross_entropy(logits.float(), text[tokens:])))
        if plug is not None:
            with plug.trace() as events:
                read(model, text[-1:], cache)
            density = sum(event.density or 1.0 for event in events) / model.config.num_hidden_layers
        cache, (text, questions) = (
            hf.DynamicCache(config=model.config),
            told_at(tokenizer, middle(ids, texts, tokens)[0]),
        )
        read(model, text, cache)
        for question, value in questions:
            behind = copy.deepcopy(cache)
            last = said_behind(model, behind, question)[-1]
            told += says(partial(read, model, cache=behind), last, tokenizer, value)
    return {"density": round(density, 4), "nll": [round(value, 4) for value in found], "needles": told}


@torch.no_grad()
def step_ms(model: Any, ids: torch.Tensor, tokens: int, name: str | None, steps: int) -> dict[str, float]:
    """Milliseconds of a step behind so many tokens: of the first, in which what was read is indexed, and the least of the others."""
    with nullcontext() if name is None else on(model, name):
        cache, taken = hf.DynamicCache(config=model.config), []
        read(model, ids[:tokens], cache)
        for token in ids[tokens : tokens + steps]:
            start = time.perf_counter()
            read(model, token[None], cache)
            taken.append(1e3 * (time.perf_counter() - start))
    return {"first": round(taken[0], 1), "step": round(min(taken[1:]), 1)}


@torch.no_grad()
def prefill_s(
    model: Any, ids: torch.Tensor, tokens: int, names: list[str | None], repeats: int
) -> dict[str, dict[str, float]]:
    """Least time of a prompt in seconds, recipes in turn; and what attention took in a round more."""
    times: dict[str, list[float]] = {name or "dense": [] for name in names}
    for _ in range(repeats):
        for name in names:
            plug = None if name is None else on(model, name)
            start = time.perf_counter()
            read(model, ids[:tokens], hf.DynamicCache(config=model.config))
            times[name or "dense"].append(time.perf_counter() - start)
            if plug is not None:
                plug.remove()
    return {
        "seconds": {name: round(min(taken), 3) for name, taken in times.items()},
        "attention_s": {name or "dense": attention_s(model, ids[:tokens], name) for name in names},
    }


def attention_s(model: Any, ids: torch.Tensor, name: str | None) -> float:
    """Seconds that attention takes of a prompt, in all layers: those that no rule names are told by a rule that answers nothing."""
    rules, depth = [] if name is None else rules_of(name), model.config.num_hidden_layers
    named = {layer for rule in rules for layer in recipe.Where.model_validate(rule.get("where", {})).layers_of(depth)}
    others = [layer for layer in range(depth) if layer not in named]
    idle = {"where": {"layers": others}, "patch": "stream", "with": {"min_tokens": len(ids) + 1}}
    left = [idle] if others else []
    with accelplug.apply(model, {"rules": [*rules, *left]}, gate="off") as plug, plug.trace(timed=True) as events:
        read(model, ids, hf.DynamicCache(config=model.config))
    return round(sum(event.ms or 0.0 for event in events) / 1e3, 3)


def random_causal_plan(blocks: int, heads: int, density: float) -> BlockPlan:
    """Every head reads its own random past blocks, as many as the share of causal pairs asks for."""
    g, lengths = torch.Generator().manual_seed(0), torch.full((blocks,), BLOCK, dtype=torch.int32)
    score = torch.rand(1, heads, blocks, blocks, generator=g).masked_fill(~torch.ones(blocks, blocks).tril(-1).bool(), -1)
    number = (density * torch.arange(1, blocks + 1)).round().clamp(min=1).long()[:, None] - 1
    members = score.argsort(-1, descending=True).argsort(-1) < number
    return BlockPlan.from_members(members, lengths, lengths, BLOCK, BLOCK, causal=0)


def least_ms(run: Callable[[], Any], repeats: int) -> float:
    run()
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return round(1e3 * min(taken), 1)


@torch.no_grad()
def call_ms(tokens: int, repeats: int) -> dict[str, Any]:
    """One call, float32 and bfloat16: dense causal attention, and `blocked` with an own plan for each head, or one for heads that
    share keys."""
    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (torch.randn(1, heads, tokens, DIM).to(dtype) for heads in (HEADS, KEY_HEADS, KEY_HEADS))
        dense = partial(scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=True)
        times: dict[str, Any] = {"dense": least_ms(dense, repeats)}
        for heads in (HEADS, KEY_HEADS):
            for density in (0.15, 0.3, 0.5):
                plans = iter([random_causal_plan(tokens // BLOCK, heads, density) for _ in range(repeats + 1)])

                def anew(plans: Iterator[BlockPlan] = plans) -> torch.Tensor:  # nothing is kept between calls
                    return block_attention(q, k, v, next(plans), backend="blocked")  # noqa: B023

                times[f"density {density}, {heads} plans"] = least_ms(anew, repeats)
        found[str(dtype).removeprefix("torch.")] = times
    return found


def main() -> None:
    prefill_baselines.register()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--recipes", nargs="*", choices=["dense", *RECIPES, *SHIPPED, *DECODE], help="all, if none is named")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the model")
    parser.add_argument("--texts", type=int, default=4, help="places of the file")
    parser.add_argument("--repeats", type=int, default=2)
    asked = parser.parse_args()
    written = {
        name: json.loads(path.read_text()) if (path := RESULTS / f"{name}.json").exists() else {} for name in (NAME, STEPPED)
    }
    at = {"environment": environment(), "text": asked.text.name, "dtype": asked.dtype}
    model, tokenizer = loaded(asked.dtype) if asked.only != "call" else (None, None)
    ids = torch.tensor(tokenizer(asked.text.read_text()[:1_500_000]).input_ids) if tokenizer is not None else torch.empty(0)

    def names(recipes: list[str]) -> list[str | None]:
        return [
            None if name == "dense" else name
            for name in ("dense", *recipes)
            if asked.recipes is None or name in asked.recipes
        ]

    for tokens in asked.tokens:
        for part in PARTS if asked.only is None else (asked.only,):
            file = STEPPED if part in ("decode", "step") else NAME
            into = written[file].setdefault(part, {}).setdefault(str(tokens), {})
            if part == "call":
                into |= {**call_ms(tokens, asked.repeats), "at": at}
            elif part == "time":
                taken = prefill_s(model, ids, tokens, names([*RECIPES, *SHIPPED]), asked.repeats)
                into |= {key: {**into.get(key, {}), **values} for key, values in taken.items()} | {"at": at}
                print(tokens, taken, flush=True)
            for name in names([*RECIPES, *SHIPPED]) if part == "quality" else ():
                row, places = into.setdefault(name or "dense", {"at": at}), middle(ids, asked.texts, tokens)
                if "texts" not in row:  # of another kind
                    row = into[name or "dense"] = {"at": at}
                measure = lambda place: quality(model, tokenizer, places[place], place, name)  # noqa: B023, E731
                gathered(row, asked.texts, measure, lambda: write_json(file, written[file]))  # noqa: B023
                row["density"] = row["texts"][0]["density"]
                print(tokens, name or "dense", {key: value for key, value in row.items() if key != "at"}, flush=True)
            runs: dict[str, Callable[[str | None], dict[str, Any]]] = {
                "decode": lambda name: decode(model, tokenizer, ids, tokens, name, asked.texts),  # noqa: B023
                "step": lambda name: step_ms(model, ids, tokens, name, 24),  # noqa: B023
            }
            for name in names([*DECODE]) if part in runs else ():
                into[name or "dense"] = {**runs[part](name), "at": at}
                print(tokens, name or "dense", into[name or "dense"], flush=True)
                write_json(file, written[file])
            write_json(file, written[file])


if __name__ == "__main__":
    main()
