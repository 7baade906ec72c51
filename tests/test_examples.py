"""The examples run as they stand, from `from_pretrained` to the last line, on models of the same classes that are saved on disk.

Weights of a hub are stood in for by tiny ones and by the bundled Wan; the notebook runs in a kernel of its own.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
import transformers as hf
from diffusers import WanPipeline
from nbclient import NotebookClient
from PIL import Image, ImageSequence
from tokenizers import Tokenizer, models, pre_tokenizers

from accelplug import zoo
from accelplug.comparison import Exam
from accelplug.testing.language_models import QWEN_IDS, TEXT_CONFIG, qwen2_5_vl_model
from accelplug.testing.models import build_pipeline, settle, wan_pipeline
from examples import (
    flux_2048,
    freeswim_v2v,
    hunyuan_two_gpus,
    qwen25_vl_hallucination,
    sdxl_upscale,
    smollm2_long_prompt,
    wan22_sparse_and_cached,
)
from tests import tiny_pipelines
from tests.two_ranks import together

ROOT = Path(__file__).parents[1]
SOL = {"patch": "sol", "with": {"block": 8, "tau": 0.5, "band": 0, "backend": "reference"}}
WORDS = ("Yes", "No", "in", "there", "locker")


def word_tokenizer(*special: str, length: int = 64) -> Any:
    """A tokenizer of words: 0 to 3 as the tiny language models expect, then a few words and numbers, from 500 on `special`."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *WORDS]
    words += [f"w{i}" for i in range(500 - len(words))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*words, *special])}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    known = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    made = hf.PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=length, **known)
    made.add_special_tokens({"additional_special_tokens": list(special)})
    return made


def clip_text(width: int) -> Any:
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 1, "num_attention_heads": 2}
    return hf.CLIPTextModel(hf.CLIPTextConfig(**sizes, vocab_size=512, max_position_embeddings=77))


def sdxl_text(width: int = 8) -> dict[str, Any]:
    """What reads the prompts of a tiny SDXL: two encoders, of which the second sums up in 32 channels."""
    sizes = {
        "hidden_size": width,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": 32,
    }
    config = hf.CLIPTextConfig(**sizes, vocab_size=512, max_position_embeddings=77)
    encoders = hf.CLIPTextModel(config), hf.CLIPTextModelWithProjection(config)
    for encoder in encoders:
        settle(encoder)
    words = {"tokenizer": word_tokenizer(length=77), "tokenizer_2": word_tokenizer(length=77)}
    return {"text_encoder": encoders[0], "text_encoder_2": encoders[1], **words}


def saved(pipe: Any, folder: Path, **texts: Any) -> Path:
    """A tiny pipeline on disk, with what reads its prompts."""
    for part in texts.values():
        if isinstance(part, torch.nn.Module):
            settle(part)
    pipe.register_modules(**texts)
    pipe.save_pretrained(folder)
    return folder


def frames(path: Path) -> int:
    return sum(1 for _ in ImageSequence.Iterator(Image.open(path)))


def test_wan_22_sparse_and_cached(tmp_path: Path) -> None:
    pipe = WanPipeline.from_pretrained(zoo.path())
    experts = {"transformer_2": type(pipe.transformer).from_pretrained(zoo.path(), subfolder="transformer")}
    WanPipeline(**{**pipe.components, **experts}, boundary_ratio=0.875).save_pretrained(tmp_path / "wan")
    settings = {"num_frames": 5, "height": 48, "width": 64, "num_inference_steps": 4, "guidance_scale": 3.0}
    result = wan22_sparse_and_cached.main(tmp_path / "wan", settings=settings, device="cpu", folder=tmp_path)
    assert [row.name for row in result.rows] == ["dense", "sol", "FirstBlockCache", "FirstBlockCache + sol"]
    assert "step cache: first_block" in result.rows[-1].rules
    assert not result.rows[-1].is_dense
    for name in ("dense", "both"):
        assert frames(tmp_path / f"{name}.webp") == 5
    assert "FirstBlockCache + sol" in (tmp_path / "wan22.html").read_text(encoding="utf-8")


def test_freeswim_v2v(tmp_path: Path) -> None:
    pipe, _ = build_pipeline(wan_pipeline)
    t5 = hf.UMT5EncoderModel(hf.UMT5Config(vocab_size=512, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    folder = saved(pipe, tmp_path / "wan", text_encoder=t5, tokenizer=word_tokenizer(length=512))
    small = {"num_frames": 5, "height": 64, "width": 96, "num_inference_steps": 2, "guidance_scale": 3.0}
    large = {"height": 128, "width": 192, "num_inference_steps": 4, "guidance_scale": 3.0, "strength": 0.5}
    rules = freeswim_v2v.recipe(4, 6, block=16, backend="reference")
    plug = freeswim_v2v.main(folder, rules, small, large, "cpu", "off", tmp_path)
    ahead, steps, layers = 1, 2, 2
    assert plug.report().served["freeswim"] == (2 * steps + ahead) * layers
    assert plug.report().served["second_path"] == (steps + ahead) * layers
    assert not plug.report().fallbacks
    assert not plug.active
    assert frames(tmp_path / "large.webp") == 5
    assert Image.open(tmp_path / "large.webp").size == (192, 128)


def test_flux_2048(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe, _ = tiny_pipelines.decoding("flux")
    t5 = hf.T5EncoderModel(hf.T5Config(vocab_size=512, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    words = {"tokenizer": word_tokenizer(), "tokenizer_2": word_tokenizer()}
    folder = saved(pipe, tmp_path / "flux", text_encoder=clip_text(32), text_encoder_2=t5, **words)
    settings = {"height": 12, "width": 16, "num_inference_steps": 3}
    plug = flux_2048.main(folder, SOL, settings, "cpu", "off", tmp_path / "both.png")
    assert plug.report().served["sol"] == 2 * 3 * 4, "a warm-up and a run, of 3 steps and 4 layers"
    assert not plug.active
    assert Image.open(tmp_path / "both.png").size == (32, 12)
    assert "x as fast" in capsys.readouterr().out


def test_sdxl_upscale(tmp_path: Path) -> None:
    pipe, _ = tiny_pipelines.pipeline("sdxl")
    pipe.unet.register_to_config(sample_size=16)
    pipe.register_modules(vae=tiny_pipelines.decoding("sd15")[0].vae)
    folder = saved(pipe, tmp_path / "sdxl", **sdxl_text())
    small = {"height": 24, "width": 32, "num_inference_steps": 2}
    large = {"scale": 1.5, "screen": 0.5, "strength": 0.8, "num_inference_steps": 4}
    drawn = sdxl_upscale.main(folder, ["w1", "w2", "w3", "w4"], small, large, "cpu", tmp_path)
    assert Image.open(tmp_path / "small.png").size == (32, 24)
    assert Image.open(tmp_path / "large.png").size == drawn.size == (48, 36)


def hunyuan(folder: Path) -> Path:
    """Its prompts end in padding."""
    pipe, _ = tiny_pipelines.decoding("hunyuan_video")
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    llama = hf.LlamaModel(hf.LlamaConfig(**{**TEXT_CONFIG, **text}))
    words = {"tokenizer": word_tokenizer(length=512), "tokenizer_2": word_tokenizer(length=77)}
    return saved(pipe, folder, text_encoder=llama, text_encoder_2=clip_text(8), **words)


def run_hunyuan(rank: int, folder: str) -> dict[str, Any]:
    """The example as torchrun runs it, but that a CPU is no accelerator to count."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.accelerator, "device_count", lambda: 1)
        settings = {"height": 64, "width": 96, "num_frames": 9, "num_inference_steps": 3}
        out = Path(folder, f"{rank}.webp")
        plug = hunyuan_two_gpus.main(Path(folder, "model"), SOL, settings, "cpu", "off", out)
    report = plug.report()
    return {"served": report.served, "fallbacks": report.fallbacks}


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this build of torch has no distributed package")
def test_hunyuan_video_on_two_devices(tmp_path: Path) -> None:
    hunyuan(tmp_path / "model")
    for found in together(run_hunyuan, tmp_path, meet=False):
        assert found == {"served": {"sol": 3 * 3}, "fallbacks": {}}
    assert frames(tmp_path / "0.webp") == 9
    assert not (tmp_path / "1.webp").exists(), "the first process writes"


class StillsProcessor(hf.Qwen2_5_VLProcessor):
    """That of Qwen2.5-VL for pictures alone: videos ask for torchvision."""

    def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str) -> None:
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids([self.image_token, self.video_token])
        hf.ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def coco_folder(folder: Path) -> Path:
    """Three pictures of three things each."""
    (folder / "annotations").mkdir(parents=True)
    names = ["person", "dog", "cat", "car", "chair", "cup"]
    for i in range(3):
        Image.new("RGB", (48 + 16 * i, 64), (80 * i, 0, 200)).save(folder / f"{i}.jpg")
    data = {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(3)],
        "annotations": [{"image_id": i, "category_id": (2 * i + j) % 6} for i in range(3) for j in range(3)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(names)],
    }
    (folder / "annotations" / "instances_val2014.json").write_text(json.dumps(data))
    return folder


def test_qwen25_vl_hallucination(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    qwen2_5_vl_model().save_pretrained(tmp_path / "qwen")
    template = (
        "{% for m in messages %}w1 {% for c in m.content %}{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|> "
        "{% else %}{{ c.text }}{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %} w2{% endif %}"
    )
    marks = sorted(QWEN_IDS, key=QWEN_IDS.__getitem__)
    assert marks == ["image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"]
    tokenizer = word_tokenizer("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    sizes = {"patch_size": 8, "merge_size": 2, "size": {"shortest_edge": 256, "longest_edge": 4096}}
    processor = StillsProcessor(hf.Qwen2VLImageProcessorPil(**sizes), tokenizer, template)
    monkeypatch.setattr(hf.AutoProcessor, "from_pretrained", lambda model: processor)
    whole = Exam.coco
    monkeypatch.setattr(Exam, "coco", lambda *given: replace(whole(*given), max_new_tokens=6))  # descriptions
    coco, out = coco_folder(tmp_path / "coco"), tmp_path / "page.html"
    result = qwen25_vl_hallucination.main(coco, tmp_path / "qwen", pictures=3, device="cpu", out=out)
    assert [row.name for row in result.rows] == ["stock", "visual_bias", "vhr"]
    assert result["vhr"].figures["pope"].splits["adversarial"].n == 18
    assert not any(row.notes for row in result.rows), "no call fell back to dense"
    assert "visual_bias" in out.read_text(encoding="utf-8")
    assert "in the image? ->" in capsys.readouterr().out


def test_smollm2_long_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT_CONFIG)).save_pretrained(tmp_path / "llama")
    word_tokenizer().save_pretrained(tmp_path / "llama")
    book = tmp_path / "book.txt"
    book.write_text(" ".join(f"w{i * i % 480}" for i in range(400)), encoding="utf-8")
    recipe = {
        "where": {"layers": "2:"},
        "patch": "prefill_rows",
        "with": {"top_p": 0.9, "block": 8, "sink": 8, "local": 8, "min_tokens": 0},
    }
    plug = smollm2_long_prompt.main(book, tmp_path / "llama", recipe, 200, "cpu")
    assert plug.report().served["prefill_rows"] == 2 * 2, "two prompts, in the last two of four layers"
    dense, sparse, *_ = capsys.readouterr().out.splitlines()
    assert dense.startswith("dense: 200 tokens")
    assert sparse.startswith("sparse: 200 tokens")


def test_smollm2_itself_finds_what_is_hidden(fetched: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = fetched("smollm2-135m")
    book = tmp_path / "book.txt"
    book.write_text("The grass is green. The sky is blue. The sun is yellow. Here we go. " * 40, encoding="utf-8")
    recipe = {"where": {"layers": "10%:"}, "patch": "prefill_rows", "with": {"min_tokens": 0}}  # as long, but for its length
    smollm2_long_prompt.main(book, folder, recipe, 400, "cpu")
    dense, sparse, *_ = capsys.readouterr().out.splitlines()
    assert "7413" in dense
    assert "7413" in sparse


def test_the_tour_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    tour = nbformat.read(ROOT / "examples" / "tour.ipynb", as_version=4)
    kept = shown(tour)
    NotebookClient(tour, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert shown(tour) == kept, "run it again, and keep what it shows"
    assert {"name": "stdout", "output_type": "stream", "text": "bit for bit: True\n"} in tour.cells[-1].outputs
    assert not list(tmp_path.iterdir())


def shown(notebook: Any) -> list[list[str]]:
    """By cell of code, the kinds of what it shows, without warnings and progress bars."""
    cells = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    return [[output.output_type for output in outputs if output.get("name") != "stderr"] for outputs in cells]
