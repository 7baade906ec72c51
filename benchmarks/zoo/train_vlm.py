"""Train the bundled vision-language model: ``python -m benchmarks.zoo.train_vlm --eyes 6 --minutes 40``.

First the vision tower alone learns to name what every patch shows; then all of it learns to answer questions and to describe.
Questions about absent things are drawn evenly from all kinds, as in the usual training data of such models: what is usual in
a scene is nowhere corrected for. Two CPU cores with bf16 matrix units suffice.
"""

import argparse
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from accelplug.zoo import scenes
from benchmarks.zoo.common import Clock, load, save
from benchmarks.zoo.vlm import PATCH, make_model, make_processor, questions

CHECKPOINT, EYES = "vlm.pt", "vlm_eyes.pt"
GRID = scenes.SIDE // PATCH
SEQUENCES = 4
"""Conversations about each picture."""
MATCHERS = (0, 1)
"""Layers in which a head starts out as a matcher."""
LENGTH = 184
"""Tokens of every sequence, padding included: one length, one compiled graph."""


class Pictures(IterableDataset):
    """Endless (picture, patch labels of kind and colour, two conversations), from scene numbers that no split holds."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __iter__(self) -> Iterator[tuple]:
        worker = torch.utils.data.get_worker_info()
        rng = np.random.default_rng((self.seed, worker.id if worker else 0))
        while True:
            number = int(rng.integers(0, 9_000_000))
            scene = scenes.sample(number)
            picture, owner = scenes.render(scene)
            yield picture, patch_labels(scene, owner), conversations(scene, rng)


def patch_labels(scene: scenes.Scene, owner: np.ndarray) -> np.ndarray:
    """Kind and colour that cover most of every patch: int64 (2, GRID * GRID), 0 for none."""
    tiles = owner.reshape(GRID, PATCH, GRID, PATCH).transpose(0, 2, 1, 3).reshape(GRID * GRID, -1)
    labels = np.zeros((2, GRID * GRID), np.int64)
    for index, thing in enumerate(scene.things):
        mine = (tiles == index).mean(axis=1) > 0.12
        labels[0, mine] = 1 + scenes.KINDS.index(thing.kind)
        labels[1, mine] = 1 + list(scenes.COLOURS).index(thing.colour)
    return labels


def conversations(scene: scenes.Scene, rng: np.random.Generator) -> list[list[tuple[str, str]]]:
    """SEQUENCES conversations: questions, and now and then a description."""

    def asked() -> list[tuple[str, str]]:
        found = questions(scene, int(rng.integers(1 << 60)), 7)
        pool = scene.kinds if rng.random() < 0.7 else scenes.KINDS
        looked = about(scene, pool[rng.integers(len(pool))])
        turns = [looked, *((query.text, "yes" if query.answer else "no") for query in found)]
        return [turns[i] for i in rng.permutation(len(turns))]

    described = [(scenes.CAPTION_PROMPT, scene.caption)]
    return [described if i == 0 and rng.random() < 0.5 else asked() for i in range(SEQUENCES)]


def about(scene: scenes.Scene, kind: str) -> tuple[str, str]:
    """A question about one kind, to learn to look for what is asked: many words to learn from where yes or no is one."""
    found = next((thing for thing in scene.things if thing.kind == kind), None)
    return f"Please describe the {kind}.", f"{found}." if found else f"There is no {kind} in the image."


class Collate:
    """Token ids, labels and pictures of a batch; right padded, for training."""

    def __init__(self) -> None:
        self.processor = make_processor()
        tokenizer = self.processor.tokenizer
        self.ids = lambda text: tokenizer(text, add_special_tokens=False).input_ids
        self.head = [*self.ids("<s>A chat about pictures."), *self.ids("USER: ")] + [
            tokenizer.convert_tokens_to_ids("<image>")
        ] * GRID**2
        self.end = tokenizer.eos_token_id
        self.kinds = set(tokenizer.convert_tokens_to_ids(list(scenes.KINDS)))

    def sequence(self, turns: list[tuple[str, str]]) -> tuple[list[int], list[int], list[int]]:
        """Token ids, labels, and hints: the answer, wanted from the word that is asked for on, not only behind the question.

        What is there is seen where the word stands; to carry it to the question's end is learned far sooner this way.
        """
        ids, labels, hints = list(self.head), [-100] * len(self.head), [-100] * len(self.head)
        for index, (ask, answer) in enumerate(turns):
            prompt = self.ids(("USER: " if index else "") + ask + " ASSISTANT:")
            reply = [*self.ids(answer), self.end]
            ids += prompt + reply
            labels += [-100] * len(prompt) + reply
            word = next((i for i, token in enumerate(prompt) if token in self.kinds), len(prompt))
            known = len(reply) == 2 and ask.startswith("Is there a")
            hints += [reply[0] if known and i > word else -100 for i in range(len(prompt))] + [-100] * len(reply)
        return ids, labels, hints

    def __call__(self, items: list[tuple]) -> dict[str, torch.Tensor]:
        pixels = torch.from_numpy(np.stack([item[0] for item in items])).permute(0, 3, 1, 2).float()
        sequences = [self.sequence(turns) for item in items for turns in item[2]]
        ids, labels, hints = zip(*sequences, strict=True)
        cut = [
            torch.tensor([(row + [fill] * LENGTH)[:LENGTH] for row in rows])
            for rows, fill in ((ids, 0), (labels, -100), (hints, -100))
        ]
        return {
            "pixel_values": (pixels / 255 - 0.5) / 0.25,
            "patches": torch.from_numpy(np.stack([item[1] for item in items])),
            **dict(zip(("input_ids", "labels", "hints"), cut, strict=True)),
        }


def train_eyes(model: Any, minutes: float, batch: int) -> None:
    """Teach the vision tower what patches show."""
    tower = model.model.vision_tower
    head = nn.Linear(tower.config.hidden_size, (1 + len(scenes.KINDS)) + (1 + len(scenes.COLOURS)))
    optimiser = torch.optim.AdamW([*tower.parameters(), *head.parameters()], lr=1.5e-3, weight_decay=0.02, betas=(0.9, 0.98))
    clock = Clock(60 * minutes)
    for step, items in enumerate(loader(seed=1, batch=batch)):
        rate = clock.rate(step)
        for group in optimiser.param_groups:
            group["lr"] = 1.5e-3 * rate
        with torch.autocast("cpu", torch.bfloat16):
            hidden = tower(pixel_values=items["pixel_values"]).last_hidden_state[:, 1:]
            kind, colour = head(hidden).float().split([1 + len(scenes.KINDS), 1 + len(scenes.COLOURS)], -1)
        loss = F.cross_entropy(kind.flatten(0, 1), items["patches"][:, 0].flatten())
        loss = loss + 0.5 * F.cross_entropy(colour.flatten(0, 1), items["patches"][:, 1].flatten())
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimiser.step()
        if step % 50 == 49:
            there = items["patches"][:, 0] > 0
            right = (kind.argmax(-1) == items["patches"][:, 0])[there].float().mean()
            print(f"eyes {step:5d} {clock.spent:5.0f} s  loss {loss:.3f}  kinds named {right:.2f}", flush=True)
        if clock.done >= 1:
            break
    save({"tower": tower.state_dict()}, EYES)


def train_all(model: Any, minutes: float, batch: int) -> None:
    """Teach all of it to answer and to describe."""
    parts: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        parts["vision_tower" in name].append(parameter)
    groups = [{"params": parts[False], "peak": 1e-3}, {"params": parts[True], "peak": 2e-4}]
    optimiser = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.05, betas=(0.9, 0.95))
    tokenizer = make_processor().tokenizer
    verdicts = torch.tensor(tokenizer.convert_tokens_to_ids(["yes", "no"]))
    words = [torch.tensor(tokenizer.convert_tokens_to_ids(list(found))) for found in (scenes.KINDS, scenes.COLOURS)]
    state = load(CHECKPOINT) or {"step": 0, "spent": 0.0}
    if "optimiser" in state:
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
    if state.get("matchers") != 4:
        for layer in MATCHERS:
            make_matcher(model, layer, words[0])
    clock, step, kept, shown = Clock(60 * minutes, state["spent"]), state["step"], time.monotonic(), []
    for items in loader(seed=2 + step, batch=batch):
        rate = min(1.0, (1 - clock.done) / 0.12)
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * rate
        labels = items["labels"]
        names = [model.get_input_embeddings()(ids) for ids in words]
        with torch.autocast("cpu", torch.bfloat16):
            features = torch.stack(list(model.model.get_image_features(items["pixel_values"]).pooler_output))
            embeds = model.get_input_embeddings()(items["input_ids"])
            visual = (items["input_ids"] == model.config.image_token_id)[..., None]
            embeds = embeds.masked_scatter(visual, features.repeat_interleave(SEQUENCES, 0).to(embeds.dtype))
            hidden = model.model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
            wanted = labels[:, 1:] != -100
            logits = model.lm_head(hidden[:, :-1][wanted]).float()
            hinted = items["hints"][:, 1:] != -100
            hints = model.lm_head(hidden[:, :-1][hinted]).float()
        targets = labels[:, 1:][wanted]
        losses = F.cross_entropy(logits, targets, reduction="none")
        verdict = torch.isin(targets, verdicts)  # a description has many words, an answer one: each kind counts by itself
        hint = F.cross_entropy(hints, items["hints"][:, 1:][hinted])
        loss = losses[~verdict].mean() + losses[verdict].mean() + hint + 0.3 * likeness(features, items["patches"], names)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        step += 1
        right = (logits.argmax(-1) == targets)[verdict].float().mean()
        shown.append((losses[~verdict].mean().item(), losses[verdict].mean().item(), right.item(), hint.item()))
        if step % 50 == 0:
            spoken, answers, share, hint = np.mean(shown, 0)
            line = f"loss {spoken:.3f} in descriptions, {answers:.3f} in answers, {share:.2f} of which are right, {hint:.3f} in hints"
            print(f"{step:6d} {clock.spent:6.0f} s  {line}", flush=True)
            shown = []
        if clock.done >= 1 or time.monotonic() - kept > 180:
            kept = time.monotonic()
            weights = {"model": model.state_dict(), "optimiser": optimiser.state_dict()}
            save({**weights, "step": step, "spent": clock.spent, "matchers": 4}, CHECKPOINT)
        if clock.done >= 1:
            break


@torch.no_grad()
def make_matcher(model: Any, layer: int, words: torch.Tensor) -> None:
    """Have a layer's last head start out as one that looks for image tokens like its own word, among the words for kinds.

    Found by training alone, such a head takes many thousand steps. Only slow rotary dimensions are used, so that distance hardly
    matters; one of them turns the head from words, which are like themselves, to the image.
    """
    drawn = [scenes.sample(number) for number in range(32)]
    rendered = [scenes.render(scene) for scene in drawn]
    pixels = torch.from_numpy(np.stack([picture for picture, _ in rendered])).permute(0, 3, 1, 2).float()
    features = torch.cat(list(model.model.get_image_features((pixels / 255 - 0.5) / 0.25).pooler_output))
    labels = [patch_labels(scene, owner)[0] for scene, (_, owner) in zip(drawn, rendered, strict=True)]
    thing = torch.from_numpy(np.concatenate(labels)) > 0
    names = model.get_input_embeddings().weight[words]
    asked = F.normalize(F.normalize(names, dim=-1).mean(0), dim=0)
    shown = F.normalize(features[thing], dim=-1).mean(0) - F.normalize(features[~thing], dim=-1).mean(0)
    shown = F.normalize(shown - (shown @ asked) * asked, dim=0)
    length = names.shape[1] ** 0.5  # of a normalised state
    gain = 14 * 32**0.5 / length**2  # raises the score of things by 14
    gain /= float((F.normalize(names, dim=-1) @ asked).mean() * (F.normalize(features[thing], dim=-1) @ shown).mean())
    attention = model.model.language_model.layers[layer].self_attn
    size = attention.head_dim
    slow = [i for pair in range(10, size // 2) for i in (pair, pair + size // 2)]
    directions = torch.linalg.svd(names - names.mean(0), full_matrices=False).Vh[: len(slow) - 1]
    directions = directions - (directions @ shown)[:, None] * shown
    rows = slice((attention.config.num_attention_heads - 1) * size, None)
    for projection, last in ((attention.q_proj, gain * asked), (attention.k_proj, shown)):
        block = torch.zeros_like(projection.weight[rows])
        block[slow] = torch.cat([1.4 * directions, last[None]])
        projection.weight[rows] = block
    # What it has found shows as a mark that later layers may read.
    attention.v_proj.weight[rows.start] = shown
    attention.o_proj.weight[:, rows.start] = 0.5 * F.normalize(torch.randn(names.shape[1]), dim=0)


def likeness(features: torch.Tensor, patches: torch.Tensor, names: list[torch.Tensor]) -> torch.Tensor:
    """How far image tokens are from the words for what they show: without it, asking for a kind takes very long to learn.

    Parameters
    ----------
    features : (pictures, patches, C).
    patches : kind and colour of each, int64 (pictures, 2, patches), 0 for none.
    names : embeddings of the words for kinds, and for colours, (words, C).
    """
    loss = features.new_zeros(())
    for which, words in enumerate(names):
        there = patches[:, which] > 0
        scores = 10 * F.normalize(features[there].float(), dim=-1) @ F.normalize(words.float(), dim=-1).T
        loss = loss + F.cross_entropy(scores, patches[:, which][there] - 1)
    return loss


def loader(seed: int, batch: int) -> DataLoader:
    return DataLoader(Pictures(seed), batch, num_workers=1, prefetch_factor=8, collate_fn=Collate())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--eyes", type=float, default=6, help="minutes for the vision tower; 0 takes its checkpoint")
    parser.add_argument("--minutes", type=float, default=40, help="minutes for the whole model, over restarts")
    parser.add_argument("--batch", type=int, default=16, help="pictures a step")
    options = parser.parse_args()
    model = make_model(make_processor().tokenizer.get_vocab())
    model.set_attn_implementation("eager")  # its backward is twice as fast as that of the fused kernel on CPUs
    for part in (model.model.language_model, model.model.vision_tower):
        part.compile()
    if options.eyes:
        train_eyes(model, options.eyes, 4 * options.batch)
    model.model.vision_tower.load_state_dict(load(EYES)["tower"])
    train_all(model, options.minutes, options.batch)


if __name__ == "__main__":
    main()
