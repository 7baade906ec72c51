"""What every patch does to the bundled vision-language model, beside the controls that a real effect must beat.

``python -m benchmarks.vlm_patches --jobs 2``: about 20 minutes on two cores, an hour with ``--model llava-smollm2``. First it is
checked whether what a patch treats is there at all (sinks in the image, heads that the image makes a difference to, visual mass that
decays); a patch without its phenomenon gets no figure. Heads for `adhh` are found on the dev split, since no list was published for
the model. The controls: a blind picture, equally many heads at random (vhr), the same bias on equally many tokens at random
(visual_bias), and, in the column "offset", the stock model with its yes-logit shifted to the same share of yes.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import accelplug
from accelplug import chat
from accelplug.comparison.environment import environment
from accelplug.comparison.exam import Exam
from accelplug.comparison.outcome import Outcome, hold_against_stock
from accelplug.comparison.rows import STOCK_ROW, Variant
from accelplug.comparison.vlm import Examiner, VlmComparison
from accelplug.inspection.looking import VlmInspection
from accelplug.recipe import named, read_file, shipped_files
from accelplug.zoo import path, scenes
from benchmarks.common import RESULTS
from benchmarks.hallucinating_heads import hallucinating_heads

HEADS = ("vhr", "var", "gift", "visual_bias", "vaf", "pai", "hgai", "imbalance", "spin", "adaptive_boost")
PATCHES = (*HEADS, "ilvad", "ilvad_pope", "farsight", "carve", "agla")


def load(name: str) -> tuple[Any, Any]:
    """A model of the zoo in its own dtype, and its processor."""
    folder = path(name)
    return AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


def phenomena(model: Any, processor: Any, pictures: int = 64) -> dict[str, Any]:
    """Whether what the patches treat is there, on scenes of the dev split."""
    drawn = [scenes.sample(number) for number in scenes.SPLITS["dev"][:pictures]]
    prompt = chat.prompt(processor, scenes.CAPTION_PROMPT, picture=True)
    shown = [[Image.fromarray(scenes.render(scene)[0])] for scene in drawn]
    given = processor(text=[prompt] * len(drawn), images=shown, padding=True, return_tensors="pt")
    seen = accelplug.inspect(model, given)
    assert isinstance(seen, VlmInspection)
    mass = seen.visual_mass
    vhd = seen.vhd
    ratio = np.median(vhd.max(1) / np.median(vhd, 1).clip(1e-9))
    return {
        "visual_mass_by_layer": mass.mean(1).round(3).tolist(),
        "visual_attention_score": round(seen.vas_mean, 3),
        "sinks_by_cosine_with_the_first_token": [len(x) for x in seen.cosine_sinks],
        "sinks_by_massive_dimensions": [len(x) for x in seen.visual_sinks],
        "vhd_largest_over_median_head": float(ratio),
        "visual_mass_while_describing": decay(model, processor, shown[:32], prompt),
    }


def decay(model: Any, processor: Any, shown: list, prompt: str) -> list[float]:
    """Mean attention to the image over layers and heads, at answer tokens 1 to 8, 9 to 16, 17 to 24 ..."""
    from accelplug.hosts.host import Setup
    from accelplug.hosts.stream import watching
    from accelplug.hosts.transformers import LanguageHost
    from accelplug.hosts.undo import Undo
    from accelplug.kernels.spans import fit, row_attention

    given = processor(text=[prompt] * len(shown), images=shown, padding=True, return_tensors="pt")
    masses: list[list[float]] = [[] for _ in range(200)]
    host = LanguageHost(model, Setup(), watched=True)
    step = -1

    def watch(record: Any, call: Any, prompt: Any, clock: Any) -> None:
        nonlocal step
        step += record.index == 0
        p = row_attention(call)[:, :, -1]
        masses[step].append(float((p * fit(prompt.visual, call)[:, None]).sum(-1).mean()))

    with Undo() as undo, watching(watch), torch.no_grad():
        host.install(undo)
        model.generate(**given, max_new_tokens=48, do_sample=False)
    by_step = [np.mean(found) for found in masses if found]
    return [round(float(np.mean(by_step[i : i + 8])), 3) for i in range(0, len(by_step), 8)]


def testable(found: dict[str, Any]) -> dict[str, str]:
    """Patches whose phenomenon is not there, with the reason."""
    missing = {}
    if not any(found["sinks_by_massive_dimensions"]) and not any(found["sinks_by_cosine_with_the_first_token"]):
        missing["var"] = "no image token is a sink"
    if found["vhd_largest_over_median_head"] < 1.5:
        missing["vhr"] = "heads do not differ in what the image does to them"
    return missing


def blind(picture: Image.Image) -> Image.Image:
    """A picture that shows nothing."""
    return Image.new("RGB", picture.size, (115, 115, 115))


def recipe(file: str, name: str, **more: Any) -> dict[str, Any]:
    """A shipped recipe, with more settings."""
    rule = named(f"{file}/{name}").rules[0]
    where = {} if rule.where.layers is None else {"layers": [span.text for span in rule.where.layers]}
    return {"rules": [{"where": where, "patch": rule.patch, "with": {**rule.settings, **more}}]}


def variants(file: str, missing: dict[str, str], heads: list[list[int]]) -> list[Variant]:
    """All patches that can be tested here, and the controls; `heads` : those that hallucinate, [layer, head] each, or none."""
    shipped = read_file(shipped_files()[file]).recipes  # imbalance is for towers with a class token alone
    rows = [Variant(name, recipe(file, name)) for name in PATCHES if name in shipped and name not in missing]
    rows += [Variant("adhh", {"patch": "adhh", "with": {"heads": heads}})] if heads else []
    if "vhr" not in missing:
        rows.append(Variant("vhr, gain 3", recipe(file, "vhr", gain=3.0)))
        rows += [Variant(f"vhr, random heads {s}", recipe(file, "vhr", control_seed=s), "control") for s in (0, 1)]
    rows.append(Variant("visual_bias, x 2", recipe(file, "visual_bias", image_weight=2.0)))
    rows += [
        Variant("visual_bias, x 2, random tokens", recipe(file, "visual_bias", image_weight=2.0, control_seed=0), "control")
    ]
    return [*rows, Variant("blind picture", None, "control", blind)]


def examined(model: str, pictures: int, variant: Variant) -> Outcome:
    """What a model of the zoo answers, in a process that ends thereafter."""
    row = Examiner(*load(model), Exam.scenes(pictures), batch=100).examine(variant)
    print(f"{row.name}: {row.tokens_per_s:.0f} tokens/s", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llava-scenes", help="of the zoo, by its name")
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=1, help="rows at a time, each in a process of its own")
    parser.add_argument("--only", nargs="*", help="rows to run")
    parser.add_argument("--name", default="vlm_patches", help="of the result file")
    options = parser.parse_args()
    model, processor = load(options.model)
    found = phenomena(model, processor)
    missing, heads = testable(found), hallucinating_heads(model, processor, Exam.scenes(64, "dev"))
    missing |= {} if heads else {"adhh": "no description says what is not there"}
    print(json.dumps(found, indent=1), missing, heads, flush=True)
    rows = variants(options.model, missing, heads)
    rows = [row for row in rows if not options.only or row.name in options.only]
    exam, stock = Exam.scenes(options.pictures), Variant(STOCK_ROW, kind=STOCK_ROW)
    with ProcessPoolExecutor(options.jobs, get_context("spawn"), max_tasks_per_child=1) as pool:
        outcomes = list(pool.map(partial(examined, options.model, options.pictures), [stock, *rows]))
    hold_against_stock(outcomes, exam)
    result = VlmComparison(type(model).__name__, exam, outcomes, environment(model))
    file = RESULTS / f"{options.name}.json"
    result.to_json(file)
    data = json.loads(file.read_text())
    data = {"phenomena": found, "not_testable_here": missing, "hallucinating_heads": heads, **data}
    file.write_text(json.dumps(data, indent=1) + "\n")
    from accelplug.cli import _console

    _console().print(result)


if __name__ == "__main__":
    main()
