"""Models saved on disk, loaded for the command line: never from a hub, and whatever goes wrong is said in one sentence."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from accelplug import files
from accelplug.comparison import ranks
from accelplug.errors import AccelplugError, UnsupportedError
from accelplug.hosts.models import denoisers
from accelplug.zoo.geometry import VGGT

Saved = Literal["pipeline", "language model", "image encoder", "geometry transformer"]
PIPELINES = ("model_index.json", "modular_model_index.json")
"""Files that name a pipeline's parts: of a classic one, of a modular one."""


def kind_of(folder: Path) -> Saved:
    """Say what was saved to a folder, by the file that names it.

    Raises
    ------
    AccelplugError
        If it is not a folder, or holds none of them.
    """
    folder = files.path_of(folder, "The model's folder")
    try:
        if any((folder / name).is_file() for name in PIPELINES):
            return "pipeline"
        if (folder / "config.json").is_file():
            if _named_class(folder) == VGGT.__name__:
                return "geometry transformer"
            return "image encoder" if _encoder_class(folder) is not None else "language model"
    except OSError as error:
        raise AccelplugError(f"{folder} cannot be read: {error.strerror or error}.") from error
    raise AccelplugError(
        f"{folder} is neither a saved pipeline nor a saved language model, image encoder or geometry transformer: expected a folder with "
        f"{' or '.join(PIPELINES)}, or config.json."
    )


def require_device(device: str | None) -> None:
    """Refuse a device that is not there, ahead of the loading.

    Raises
    ------
    AccelplugError
        If nothing can be put on it.
    """
    if device is None:
        return
    with _told(f"The device {device!r} cannot be used"):
        if torch.empty(1, device=device).is_meta:
            raise ValueError("it holds no numbers")


def pipeline(folder: Path, dtype: str = "auto", device: str | None = None) -> Any:
    """Load a pipeline, onto the accelerator that is there if no device is named.

    Raises
    ------
    AccelplugError
        If the folder holds none, a file of it is missing or broken, or it does not fit the device.
    """
    from diffusers import DiffusionPipeline, ModularPipeline

    if kind_of(folder) != "pipeline":
        raise AccelplugError(f"{folder} is not a saved pipeline: expected a folder with {' or '.join(PIPELINES)}.")
    require_device(device)
    wanted = {} if dtype == "auto" else {"dtype": getattr(torch, dtype)}
    if device is None:
        device = str(ranks.device() if files.launched() else torch.accelerator.current_accelerator() or "cpu")
    with _told(f"{folder} cannot be loaded as a pipeline"), quietly():
        pipe: Any
        if (folder / PIPELINES[0]).is_file():
            pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True, **wanted)
        else:
            pipe = ModularPipeline.from_pretrained(folder, local_files_only=True)
            pipe.load_components(local_files_only=True, **wanted)
            if not denoisers(pipe):
                raise ValueError("it has no denoiser that can be loaded from there")
        _require_weights(pipe.components)
        return pipe.to(device)


def language_model(folder: Path, dtype: str = "auto", device: str | None = None, text: bool = False) -> tuple[Any, Any]:
    """Load a vision-language model and its processor; with `text`, a language model and its tokenizer where it sees no pictures.

    Raises
    ------
    UnsupportedError
        If the folder holds no such model, or a file of it is missing or broken.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    kind_of(folder)
    require_device(device)
    cure = "Give a folder that the model and its processor or tokenizer were saved to with save_pretrained()"
    with _told(f"{folder} cannot be loaded as a {'' if text else 'vision-'}language model", cure), quietly():
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        sees = config.get_text_config() is not config
        model_type, processor_type = (
            (AutoModelForImageTextToText, AutoProcessor) if sees or not text else (AutoModelForCausalLM, AutoTokenizer)
        )
        model, told = model_type.from_pretrained(folder, local_files_only=True, output_loading_info=True)
        if missing := sorted(told["missing_keys"]):
            raise ValueError(f"its files hold no weights for {missing[0]} and {len(missing) - 1} more")
        processor = processor_type.from_pretrained(folder, local_files_only=True)
        model = model.eval() if dtype == "auto" else model.eval().to(getattr(torch, dtype))
        return (model.to(device) if device else model), processor


def image_encoder(folder: Path, dtype: str = "auto", device: str | None = None) -> tuple[Any, Any]:
    """Load an image encoder, and its image processor where it was saved too.

    Raises
    ------
    UnsupportedError
        If the folder holds no such model, or a file of it is missing or broken.
    """
    from transformers import AutoImageProcessor

    require_device(device)
    if (cls := _encoder_class(folder)) is None:
        raise UnsupportedError(f"{folder} is not a saved image encoder: expected a config.json that names the class of one.")
    with _told(f"{folder} cannot be loaded as an image encoder"), quietly():
        model, told = cls.from_pretrained(folder, local_files_only=True, output_loading_info=True)
        if missing := sorted(told["missing_keys"]):
            raise ValueError(f"its files hold no weights for {missing[0]} and {len(missing) - 1} more")
        saved = (folder / "preprocessor_config.json").is_file()
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, use_fast=False) if saved else None
        model = model.eval() if dtype == "auto" else model.eval().to(getattr(torch, dtype))
        return (model.to(device) if device else model), processor


def geometry_transformer(folder: Path, dtype: str = "auto", device: str | None = None) -> VGGT:
    """Load a geometry transformer that `zoo.geometry.VGGT.save_pretrained` wrote; large ones are loaded by their own repositories.

    Raises
    ------
    UnsupportedError
        If the folder holds no such model, or a file of it is missing or broken.
    """
    require_device(device)
    with _told(
        f"{folder} cannot be loaded as a geometry transformer", "accelplug.compare(model, ...) takes those of other makers"
    ):
        model = VGGT.from_pretrained(folder)
        return model.to(device or "cpu", None if dtype == "auto" else getattr(torch, dtype))


def _named_class(folder: Path) -> str:
    """The class that a folder's config names, an empty string if it names none."""
    try:
        return str((json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or [""])[0])
    except (ValueError, AttributeError, LookupError, TypeError):
        return ""


def _encoder_class(folder: Path) -> Any:
    """The class of transformers that a folder's config names, if it is given pictures and does not write; else None."""
    import transformers

    cls = getattr(transformers, _named_class(folder), None)
    sees = getattr(cls, "main_input_name", "") == "pixel_values"
    return cls if cls is not None and sees and not cls.can_generate() else None


def _require_weights(components: dict[str, Any]) -> None:
    """Raise ValueError where a module was left without numbers, since its files hold none."""
    for name, part in components.items():
        for path, weight in part.named_parameters() if isinstance(part, torch.nn.Module) else ():
            if weight.is_meta:
                raise ValueError(f"its files hold no weights for {path} of {name}")


@contextlib.contextmanager
def _told(what: str, cure: str = "") -> Iterator[None]:
    """Turn what a library raises about a user's files or device into one sentence; its errors are of many kinds, and many are long."""
    try:
        yield
    except AccelplugError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise UnsupportedError(f"{what}: {said.rstrip('.')}.{f' {cure}.' if cure else ''}") from error


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Silence the libraries' own bars and warnings inside: what matters of them is raised."""
    import diffusers.utils.logging as of_diffusers
    import transformers.utils.logging as of_transformers

    libraries: Any = (of_diffusers, of_transformers)
    before = [(library, library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, level, bars in before:
            library.set_verbosity(level)
            if bars:
                library.enable_progress_bar()
