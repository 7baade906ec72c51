"""Train what joins DINOv2-small and SmolLM2-135M to a LLaVA: ``python -m benchmarks.zoo.train_adapter``.

Both are real and stay as they are (``accelplug fetch smollm2-135m dinov2-small``); a projector and low-rank additions to the decoder's
linear layers are trained, on pictures that `accelplug.zoo.scenes` draws. Things in them go together more often than in the scenes of the
exam, and questions about absent things are drawn from all kinds: to answer what is usual pays off in training, and misleads in the exam.

First the projector alone learns to give each patch the words for what it shows, then all of it to answer and to describe. A run goes
on from its checkpoint, which is written every three minutes. In the end, and with ``--judge`` alone, the dev scenes say whether it
has what large models have: sinks in the image, attention to it that fades, and hallucinations. ``--export`` writes what ships.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from accelplug import loading
from accelplug.comparison import Exam
from accelplug.comparison.vlm import compare_vlm
from accelplug.zoo import adapted, scenes
from benchmarks.vlm_patches import phenomena
from benchmarks.zoo.common import RUNS, Clock, load, save
from benchmarks.zoo.vlm import questions

NAME = "llava-smollm2"
CHECKPOINT = f"{NAME}.pt"
TARGET = Path(adapted.__file__).parent / NAME
RANK = 8
GRID = adapted.PIXELS // 14
USUAL = 0.9
"""How often a kind stands in a scene of its own theme, in training; in the exam, `scenes.USUAL`."""
LENGTH = 256
"""Tokens of every sequence, padding included: one length, one compiled graph."""
BEGINNINGS = (
    ("The image shows", "The picture shows", "In the image there is"),
    ("There is also", "Next to it there is", "The picture also has"),
    ("In addition, there is", "A closer look shows", "Finally, there is"),
)
"""Of the sentences of a description: the largest thing's, the next ones', and that of all the rest."""
MOODS = {"sky": "a night sky", "village": "a small village", "table": "a table with many things", "blocks": "a box of toys"}


class LowRank(nn.Module):
    """A linear layer as it is, and a trained product of rank `RANK` beside it, which begins as nothing."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(RANK, base.in_features) / base.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(base.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.down), self.up)


def make_model() -> tuple[Any, Any]:
    """The parts, put together, with low-rank additions in all layers of the decoder; and the processor."""
    decoder, tower = adapted.parts(NAME)
    wide, seen = (json.loads((part / "config.json").read_text())["hidden_size"] for part in (decoder, tower))
    torch.manual_seed(0)
    layers = {"linear_1": nn.Linear(seen, wide), "linear_2": nn.Linear(wide, wide)}
    projector = {
        f"projector.{name}.{part}": x.detach() for name, layer in layers.items() for part, x in layer.named_parameters()
    }
    folder = RUNS / f"{NAME}-untrained"
    shutil.rmtree(folder, ignore_errors=True)
    adapted.write_adapted(projector, folder, decoder, tower)
    model, processor = loading.language_model(folder)
    model.requires_grad_(False)
    model.model.multi_modal_projector.float().requires_grad_(True)
    for layer in model.model.language_model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, base in list(part.named_children()):
                if isinstance(base, nn.Linear):
                    setattr(part, name, LowRank(base))
    return model, processor


def trained(model: Any) -> dict[str, nn.Parameter]:
    """What is trained, by the names that `adapted.write_adapted` takes."""
    found = {f"projector.{name}": x for name, x in model.model.multi_modal_projector.named_parameters()}
    return found | {name: x for name, x in model.model.language_model.named_parameters() if x.requires_grad}


# ------------------------------------------------------------------------------------------------------ what is learned


def description(scene: scenes.Scene, rng: np.random.Generator) -> str:
    """Every thing, the largest first, in sentences; what it looks like as a whole in the end."""
    begin = [str(group[rng.integers(len(group))]) for group in BEGINNINGS]
    first, *rest = map(str, scene.things)
    told = [f"{begin[0]} {first}."]
    if rest:
        told.append(f"{begin[1]} {' and '.join(rest[:2])}.")
    if rest[2:]:
        *more, last = rest[2:]
        told.append(f"{begin[2]} {', '.join(more) + ' and ' if more else ''}{last}.")
    theme = max(scenes.THEMES, key=lambda name: sum(kind in scenes.THEMES[name] for kind in scene.kinds))
    return " ".join([*told, f"It looks like {MOODS[theme]}."])


def conversation(scene: scenes.Scene, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Questions, in half of all cases behind a description, more than a sequence can hold."""
    asked = [(query.text, "Yes" if query.answer else "No") for query in questions(scene, int(rng.integers(1 << 60)), 9)]
    asked = list(dict.fromkeys(asked))
    kind = (
        scenes.KINDS[rng.integers(len(scenes.KINDS))] if rng.random() < 0.3 else scene.kinds[rng.integers(len(scene.kinds))]
    )
    found = next((str(thing) for thing in scene.things if thing.kind == kind), None)
    shown = f"{found[0].upper()}{found[1:]}." if found else f"There is no {kind} in the image."
    asked.insert(int(rng.integers(len(asked) + 1)), (f"Please describe the {kind}.", shown))
    return [(scenes.CAPTION_PROMPT, description(scene, rng))] * (rng.random() < 0.5) + asked


def patch_labels(owner: np.ndarray) -> np.ndarray:
    """Which thing covers most of each patch, int64 (GRID * GRID,), -1 for none."""
    tiles = owner.reshape(GRID, scenes.SIDE // GRID, GRID, scenes.SIDE // GRID).transpose(0, 2, 1, 3).reshape(GRID**2, -1)
    covered = np.stack([(tiles == thing).mean(1) for thing in range(max(1, owner.max() + 1))])
    return np.where(covered.max(0) > 0.12, covered.argmax(0), -1)


class Maker:
    """Makes sequences of pictures and of what is said about them.

    Attributes
    ----------
    head : tokens of the first turn up to its question, the image tokens among them.
    """

    def __init__(self, processor: Any) -> None:
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.image = self.tokenizer.convert_tokens_to_ids(adapted.IMAGE_TOKEN)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def pixels(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """Pictures (96, 96, 3) as the tower takes them."""
        return self.processor.image_processor(
            [Image.fromarray(picture) for picture in pictures], return_tensors="pt"
        ).pixel_values

    def sequence(self, turns: Sequence[tuple[str, str]]) -> tuple[list[int], list[int]]:
        """Token ids and labels, cut or filled up to LENGTH; turns that do not fit are left out."""
        ids: list[int] = []
        labels: list[int] = []
        for ask, answer in turns:
            picture = "" if ids else f"{adapted.IMAGE_TOKEN}\n"
            prompt = self.ids(f"<|im_start|>user\n{picture}{ask}<|im_end|>\n<|im_start|>assistant\n")
            if not ids:
                at = prompt.index(self.image)
                prompt[at : at + 1] = [self.image] * GRID**2
            reply = [*self.ids(answer), self.tokenizer.eos_token_id]
            if len(ids) + len(prompt) + len(reply) < LENGTH:
                ids += [*prompt, *reply, *self.ids("\n")]
                labels += [*[-100] * len(prompt), *reply, -100]
        rest = LENGTH - len(ids)
        return ids + [self.tokenizer.pad_token_id] * rest, labels + [-100] * rest

    def batches(self, seed: int, batch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Endless pixels, token ids and labels of pictures that no split holds."""
        rng = np.random.default_rng(seed)
        while True:
            drawn = [scenes.sample(int(number), USUAL) for number in rng.integers(0, 9_000_000, batch)]
            rows = [self.sequence(conversation(scene, rng)) for scene in drawn]
            ids, labels = (torch.tensor(part) for part in zip(*rows, strict=True))
            yield self.pixels([scenes.render(scene)[0] for scene in drawn]), ids, labels


# ------------------------------------------------------------------------------------------------------------ training


def align(model: Any, maker: Maker, pictures: int) -> None:
    """Teach the projector to give each patch the mean of the embeddings of its thing's colour and kind, and all else one of its own.

    To begin with what the decoder can read saves most of the training.
    """
    words = model.get_input_embeddings().weight.float()
    ground = words[maker.ids(" background")].mean(0)
    features, targets, things = [], [], []
    for begin in range(0, pictures, 16):
        drawn = [scenes.sample(number, USUAL) for number in range(begin, begin + 16)]
        rendered = [scenes.render(scene) for scene in drawn]
        features.append(see(model, maker.pixels([picture for picture, _ in rendered])))
        for scene, (_, owner) in zip(drawn, rendered, strict=True):
            named = [words[maker.ids(f" {thing.colour} {thing.kind}")].mean(0) for thing in scene.things]
            labels = torch.from_numpy(patch_labels(owner))
            targets.append(torch.stack([*named, ground])[labels])
            things.append(labels >= 0)
    x, y, thing = torch.cat(features).flatten(0, 1).float(), torch.cat(targets), torch.cat(things)
    projector = model.model.multi_modal_projector
    with torch.no_grad():  # the tower's channels differ much in size
        scale = x.std(0) + 1e-3
        projector.linear_1.weight /= scale
        projector.linear_1.bias -= projector.linear_1.weight @ x.mean(0)
    steps = 1500
    optimiser = torch.optim.AdamW(projector.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-3, steps)
    pools = [there.nonzero().flatten() for there in (thing, ~thing)]
    unit = y[thing].var(0).sum()
    for step in range(steps):
        picked = torch.cat([pool[torch.randint(len(pool), (256,))] for pool in pools])
        loss = (projector(x[picked]) - y[picked]).square().sum(-1).mean() / unit
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 500 == 499:
            print(f"projector {step + 1:5d}  {loss.item():.3f} of the words' variance is left", flush=True)


@torch.no_grad()
def see(model: Any, pixels: Tensor) -> Tensor:
    """What the tower makes of pictures, (B, tokens, C)."""
    states = model.model.vision_tower(pixels.to(torch.bfloat16), output_hidden_states=True).hidden_states
    return states[adapted.FEATURES][:, 1:]


def train(model: Any, maker: Maker, minutes: float, batch: int, pictures: int) -> None:
    """Teach all of it to answer and to describe."""
    found = trained(model)
    projector = [x for name, x in found.items() if name.startswith("projector.")]
    additions = [x for name, x in found.items() if not name.startswith("projector.")]
    groups = [{"params": projector, "peak": 3e-4}, {"params": additions, "peak": 1e-3}]
    optimiser = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.0, betas=(0.9, 0.98))

    def keep(step: int, spent: float) -> None:
        weights = {name: x.data for name, x in found.items()}
        save({"adapter": weights, "optimiser": optimiser.state_dict(), "step": step, "spent": spent}, CHECKPOINT)

    if (state := load(CHECKPOINT)) is None:
        align(model, maker, pictures)
        state = {"step": 0, "spent": 0.0}
        keep(**state)
    else:
        for name, x in found.items():
            x.data.copy_(state["adapter"][name])
        optimiser.load_state_dict(state["optimiser"])
    model.set_attn_implementation("eager")  # its backward is twice as fast as that of the fused kernel on CPUs
    for layer in model.model.language_model.layers:
        layer.compile()
    answers = torch.tensor(maker.tokenizer.convert_tokens_to_ids(["Yes", "No"]))
    clock, step, kept, shown = Clock(60 * minutes, state["spent"]), state["step"], time.monotonic(), []
    for pixels, ids, labels in maker.batches(1 + step, batch):
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * clock.rate(step)
        with torch.autocast("cpu", torch.bfloat16):
            features = model.model.multi_modal_projector(see(model, pixels))
            embeds = model.get_input_embeddings()(ids).float()
            embeds = embeds.masked_scatter((ids == maker.image)[..., None], features.float())
            hidden = model.model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
            wanted = labels[:, 1:] != -100
            logits = model.lm_head(hidden[:, :-1][wanted]).float()
        targets = labels[:, 1:][wanted]
        losses = F.cross_entropy(logits, targets, reduction="none")
        verdict = torch.isin(targets, answers)  # a description has many words, an answer one: each kind counts by itself
        loss = losses[~verdict].mean() + losses[verdict].mean()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(found.values(), 1.0)
        optimiser.step()
        step += 1
        said = logits[verdict].argmax(-1)
        absent = targets[verdict] == answers[1]
        shown.append(
            (
                losses[~verdict].mean().item(),
                losses[verdict].mean().item(),
                (said == targets[verdict]).float().mean().item(),
                (said[absent] != answers[1]).float().mean().item() if absent.any() else np.nan,
            )
        )
        if step % 25 == 0:
            told, answered, right, wrong = np.nanmean(shown, 0)
            print(
                f"{step:6d} {clock.spent:6.0f} s  loss {told:.3f} in descriptions, {answered:.3f} in answers: {right:.2f} are right, "
                f"of what is absent {wrong:.2f} is said to be there",
                flush=True,
            )
            shown = []
        if clock.done >= 1 or time.monotonic() - kept > 180:
            kept = time.monotonic()
            keep(step, clock.spent)
        if clock.done >= 1:
            break


# ------------------------------------------------------------------------------------------------------------ judgement


def checkpoint() -> dict[str, Tensor]:
    """The adapter of the checkpoint, in half precision."""
    if (state := load(CHECKPOINT)) is None:
        raise SystemExit(f"There is no checkpoint {RUNS / CHECKPOINT}; train first.")
    return {name: x.half().contiguous() for name, x in state["adapter"].items()}


def judge(pictures: int) -> None:
    """Say on dev scenes whether the model has what large ones have, beside the exam's figures and a few descriptions."""
    folder = RUNS / NAME
    shutil.rmtree(folder, ignore_errors=True)
    adapted.write_adapted(checkpoint(), folder, *adapted.parts(NAME))
    model, processor = loading.language_model(folder)
    found = phenomena(model, processor, min(pictures, 32))
    print(json.dumps(found, indent=1), flush=True)
    result = compare_vlm(model, {}, Exam.scenes(pictures, "dev"), processor, progress=False)
    print(json.dumps(result.to_dict()["rows"], indent=1))
    for key, text in list(result.rows[0].said.descriptions.items())[:4]:
        print(f"{key}: {text}\n   truth: {scenes.sample(key).caption}")
    adversarial = result.rows[0].figures["pope"].splits["adversarial"]
    decay = found["visual_mass_while_describing"]
    wanted = {
        "hallucinates on more than 15 % of adversarial questions": adversarial.hallucination_rate > 0.15,
        "answers better than by chance": adversarial.mcc > 0.3,
        "image tokens are sinks": any(found["sinks_by_massive_dimensions"])
        or any(found["sinks_by_cosine_with_the_first_token"]),
        "attention to the image fades": decay[-1] < 0.8 * decay[0],
    }
    print(json.dumps({what: bool(there) for what, there in wanted.items()}, indent=1))


def export() -> None:
    """Write what ships: the adapter and its card."""
    TARGET.mkdir(exist_ok=True)
    save_file(checkpoint(), TARGET / adapted.ADAPTER, {"format": "pt"})
    shutil.copy(Path(__file__).parent / "MODEL_CARD_ADAPTER.md", TARGET / "README.md")
    for file in sorted(TARGET.iterdir()):
        print(f"{file.stat().st_size:>10,} {file.relative_to(TARGET.parent)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=50, help="of training on two cores, over restarts")
    parser.add_argument("--batch", type=int, default=8, help="pictures a step")
    parser.add_argument("--align", type=int, default=1600, help="pictures that the projector learns words from, first")
    parser.add_argument("--pictures", type=int, default=100, help="dev scenes of the judgement")
    parser.add_argument("--judge", action="store_true", help="judge the checkpoint, train nothing")
    parser.add_argument("--export", action="store_true", help="write the checkpoint into the package, train nothing")
    options = parser.parse_args()
    if not (options.judge or options.export):
        model, processor = make_model()
        train(model, Maker(processor), options.minutes, options.batch, options.align)
    if options.export:
        export()
    else:
        judge(options.pictures)


if __name__ == "__main__":
    main()
