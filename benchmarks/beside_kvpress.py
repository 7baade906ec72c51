"""kvpress on the prompts of `benchmarks.kv_memory`: needles, likelihood, and the bytes that it really frees.

usage: python -m benchmarks.beside_kvpress TEXT --model FOLDER --heads heads.safetensors [--tokens 2048 4096] [--presses NAME ...]

It runs in an environment of its own, which has kvpress 0.5.5 and the transformers that this asks for (below 5.3), and not accelplug:

    python -m venv kvpress-env && kvpress-env/bin/pip install torch==2.13.0 kvpress==0.5.5

FOLDER is the model that `accelplug fetch smollm2-135m` makes, heads.safetensors what `accelplug calibrate smollm2-135m --patch heads`
writes beside its recipe: DuoAttention is given the same scores as `duo`, since its own come of a data set that it downloads.

A prompt is read with a press on, what follows by the model that kvpress patches when it is imported. `share` is what is left of the keys
as kvpress counts; kv_mib what the allocator has given for the cache. Results go to benchmarks/results/beside_kvpress.json.
"""

from __future__ import annotations

import argparse
import copy
import json
from contextlib import nullcontext
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.haystack import DEPTHS, asked_within, gathered, says, second_half, told_at

PATH = Path(__file__).parent / "results" / "beside_kvpress.json"
SUFFIX = 128
SINK, WINDOW = 64, 256
"""Of streaming heads, as in `benchmarks.kv_memory`."""


def presses(scores: dict[str, Tensor]) -> dict[str, Any]:
    """What is tried, by name: a press, None for the model alone. Shares of keys that are left are those of `duo` and `snapkv`, or near."""
    import kvpress  # type: ignore[import-not-found]

    class Duo(kvpress.DuoAttentionPress):
        """DuoAttention with scores of heads that are given."""

        given: Tensor

        def post_init_from_model(self, model: Any) -> None:
            self.sink_size, self.recent_size = SINK, WINDOW
            worst = self.given.flatten().argsort(stable=True)[: round(self.given.numel() * self.head_compression_ratio)]
            mask = torch.zeros(self.given.numel(), dtype=torch.bool)
            self.streaming_mask = mask.index_fill(0, worst, True).view(self.given.shape)

    def duo(by: str, keep: float) -> Any:
        press = Duo(head_compression_ratio=1 - keep)
        press.given = scores[by]
        return press

    found: dict[str, Any] = {"dense": None}
    for share in (0.6, 0.5, 0.4, 0.25):
        found[f"SnapKV {share:g}"] = kvpress.SnapKVPress(compression_ratio=1 - share)
        found[f"StreamingLLM {share:g}"] = kvpress.StreamingLLMPress(compression_ratio=1 - share, n_sink=SINK)
        found[f"ExpectedAttention {share:g}"] = kvpress.ExpectedAttentionPress(compression_ratio=1 - share)
    return found | {f"DuoAttention {by} {keep:g}": duo(by, keep) for by in ("needle", "razor") for keep in (0.5, 0.25)}


class Sequence:
    """A cache with how many tokens it stands for, which is more than it holds."""

    def __init__(self, model: Any) -> None:
        self.model, self.cache, self.tokens = model, hf.DynamicCache(), 0

    def read(self, ids: Tensor) -> Tensor:
        """Read tokens (S,) behind what there is; logits of the last one, (V,)."""
        return self.logits(ids, 1)[-1]

    def logits(self, ids: Tensor, last: int) -> Tensor:
        """Read tokens (S,) behind what there is; logits of the last ones, (last, V)."""
        at = torch.arange(self.tokens, self.tokens + len(ids))[None]
        self.tokens += len(ids)
        return self.model(ids[None], past_key_values=self.cache, position_ids=at, logits_to_keep=last).logits[0]

    def open(self, ids: Tensor, press: Any) -> Tensor:
        """Read a prompt with a press on."""
        with nullcontext() if press is None else press(self.model):
            return self.read(ids)

    @property
    def mib(self) -> float:
        """MiB of all storages of keys and values."""
        held = [x.untyped_storage() for layer in self.cache.layers for x in (layer.keys, layer.values)]
        return sum({storage.data_ptr(): storage.nbytes() for storage in held}.values()) / 2**20

    def behind(self) -> Sequence:
        """A copy, which goes on by itself."""
        made = copy.copy(self)
        made.cache = copy.deepcopy(self.cache)
        return made


@torch.no_grad()
def measured(model: Any, tokenizer: Any, ids: Tensor, place: int, press: Any) -> dict[str, Any]:
    """What a press makes of a text (tokens + `SUFFIX`), and of what is asked about it."""
    text, questions = told_at(tokenizer, ids[:-SUFFIX])
    sequence, asked = Sequence(model), 0
    last = sequence.open(text, press)
    behind, follows = sequence.behind(), ids[-SUFFIX:-1]
    # Masked keys are made such that all queries of a call miss them: one token at a time, as when it answers.
    pieces = follows.split(1 if hasattr(press, "streaming_mask") else len(follows))
    logits = torch.cat([last[None], *(behind.logits(piece, len(piece)) for piece in pieces)])
    found = {
        "kv_mib": round(sequence.mib, 2),
        "share": 1.0 if press is None else round(1 - press.compression_ratio, 3),
        "nll": round(float(cross_entropy(logits.float(), ids[-SUFFIX:])), 4),
    }
    for question, value in questions:
        behind = sequence.behind()
        asked += says(behind.read, behind.read(question), tokenizer, value)
    found["needles"] = asked
    if place == 0:
        found["within"] = 0
        for seed, depth in enumerate(DEPTHS):
            prompt, value = asked_within(tokenizer, ids[:-SUFFIX], depth, seed)
            sequence = Sequence(model)
            found["within"] += says(sequence.read, sequence.open(prompt, press), tokenizer, value)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--heads", type=Path, required=True)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--presses", nargs="*", help="all, if none is named")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the model")
    parser.add_argument("--texts", type=int, default=3, help="places of the file")
    asked = parser.parse_args()
    known = presses(load_file(asked.heads))
    if unknown := set(asked.presses or ()) - set(known):
        parser.error(f"there are {', '.join(known)}; not {', '.join(unknown)}")
    data: dict[str, Any] = json.loads(PATH.read_text()) if PATH.exists() else {}
    model = (
        hf.AutoModelForCausalLM.from_pretrained(asked.model, dtype=getattr(torch, asked.dtype)).eval().requires_grad_(False)
    )
    tokenizer = hf.AutoTokenizer.from_pretrained(asked.model)
    ids = torch.tensor(tokenizer(asked.text.read_text()[:1_500_000]).input_ids)
    at = {
        "date": date.today().isoformat(),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("kvpress", "transformers", "torch")},
        "text": asked.text.name,
        "dtype": asked.dtype,
    }
    for tokens in asked.tokens:
        places = second_half(ids, asked.texts, tokens + SUFFIX)
        for name in asked.presses or known:
            row = data.setdefault(str(tokens), {}).setdefault(name, {"at": at})
            measure = lambda place: measured(model, tokenizer, places[place], place, known[name])  # noqa: B023, E731
            gathered(row, asked.texts, measure, lambda: PATH.write_text(json.dumps(data, indent=1) + "\n"))
            print(tokens, name, row["texts"], flush=True)


if __name__ == "__main__":
    main()
