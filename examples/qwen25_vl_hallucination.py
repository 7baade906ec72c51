"""Does Qwen2.5-VL see fewer things that are not there, once its attention is aimed at the picture? An exam on your COCO folder.

    python examples/qwen25_vl_hallucination.py COCO_FOLDER

COCO_FOLDER holds `annotations/instances_val2014.json` and the pictures, from cocodataset.org. 200 pictures are asked about, 18 questions
each (POPE), and described (CHAIR), by the stock model and with each recipe; differences come with intervals and p-values. Writes
`qwen25_vl.html`, a page with the figures and with answers that changed. The same from a shell:

    accelplug compare MODEL_DIR --coco COCO_FOLDER --recipe visual_bias --recipe vhr --report qwen25_vl.html

The weights take 17 GB. Not run on a GPU yet. `tests/test_examples.py` runs it on a tiny Qwen2.5-VL.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import accelplug
from accelplug.comparison import Exam
from accelplug.comparison.vlm import VlmComparison

MODEL = "Qwen/Qwen2.5-VL-7B-Instruct"


def main(
    coco: Path,
    model: str | Path = MODEL,
    recipes: tuple[str, ...] = ("visual_bias", "vhr"),
    pictures: int = 200,
    device: str = "cuda",
    out: Path = Path("qwen25_vl.html"),
) -> VlmComparison:
    """Examine the model stock and with each recipe of recipes/vlm.yaml; then ask one question with the first of them on."""
    vlm = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.bfloat16).to(device)
    processor = AutoProcessor.from_pretrained(model)
    exam = Exam.coco(coco, pictures)

    result = accelplug.compare(vlm, list(recipes), exam, processor=processor)
    print(result)
    result.to_html(out)

    asked = exam.questions[0]
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": asked.text}]}
    text = processor.apply_chat_template([turn], add_generation_prompt=True)
    inputs = processor(text=[text], images=[exam.picture(asked.image)], return_tensors="pt").to(device, vlm.dtype)
    with accelplug.apply(vlm, recipes[0]) as plug:  # from here on, generate() as ever
        said = vlm.generate(**inputs, max_new_tokens=16)[:, inputs["input_ids"].shape[1] :]
    print(asked.text, "->", *processor.batch_decode(said, skip_special_tokens=True))
    print(plug.report())
    return result


if __name__ == "__main__":
    main(Path(sys.argv[1]))
