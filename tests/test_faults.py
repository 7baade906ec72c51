"""A fault at any call of ours, in apply, a run or remove, leaves a model that one remove restores."""

from __future__ import annotations

import copy
import io
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import accelplug
from accelplug import compat
from accelplug.errors import AccelplugError, AlreadyAppliedError, NoMatchError, UnsupportedError
from accelplug.hosts import interface, rebind
from accelplug.hosts.host import plug_of
from accelplug.testing.language_models import forward, generate
from accelplug.testing.models import TIMESTEP, noise
from tests import tiny_language_models as tiny
from tests import tiny_models, tiny_pipelines
from tests.test_guidance import CARVE, processor

__all__ = ["processor"]
HOME = str(Path(accelplug.__file__).parent)
FAULTS = (RuntimeError, KeyboardInterrupt)


class Injected(RuntimeError):
    """Raised where nobody expects it."""


class Fault:
    """Counts calls of the package's functions, and raises at one of them."""

    def __init__(self, at: int = 0, kind: type[BaseException] = Injected) -> None:
        self.at, self.kind, self.calls = at, kind, 0
        self.names: list[str] = []

    def _called(self, frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(HOME):
            self.calls += 1
            self.names.append(frame.f_code.co_qualname)
            if self.calls == self.at:
                sys.setprofile(None)
                raise self.kind(f"at call {self.at}, {frame.f_code.co_qualname}")

    @contextmanager
    def injected(self) -> Iterator[None]:
        sys.setprofile(self._called)
        try:
            yield
        finally:
            sys.setprofile(None)


class Case:
    """A model, a recipe, and one run of it."""

    model: Any
    recipe: dict[str, Any]
    processor: Any = None

    def run(self) -> torch.Tensor:
        raise NotImplementedError

    def lifetime(self) -> None:
        """Apply, run, remove."""
        plug = accelplug.apply(self.model, self.recipe, gate="off", processor=self.processor)
        self.run()
        plug.remove()

    @property
    def root(self) -> Any:
        return getattr(self.model, "transformer", self.model)

    def left(self) -> dict[str, Any]:
        """Everything that could be left behind: every attribute by identity, tables, lists and hook registries by what is in them."""
        from transformers import AttentionInterface

        def seen(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: id(x) for key, x in value.items()}
            if type(value).__name__ == "HookRegistry":
                return {name: list(vars(value)[name]) for name in ("hooks", "_hook_order", "_fn_refs")}
            return id(value)

        owners = {"": self.model, **{f".{path}": module for path, module in self.root.named_modules()}}
        return {
            "vars": {path: {name: seen(x) for name, x in vars(owner).items()} for path, owner in owners.items()},
            "processors": {
                path: (type(x), vars(x).copy()) for path, o in owners.items() if (x := vars(o).get("processor")) is not None
            },
            "configs": {path: type(x) for path, o in owners.items() if (x := vars(o).get("config")) is not None},
            "state": list(self.root.state_dict()),
            "tables": (dict(compat.diffusers.processor_metadata()), dict(AttentionInterface._global_mapping)),
            "users": (dict(rebind._users), set(interface._inside)),
        }


class Denoiser(Case):
    """A pipeline with a step cache, the steps of which are taken by hand."""

    def __init__(self) -> None:
        self.model, _ = tiny_pipelines.decoding("wan")
        rules = [
            {"where": {"layers": "1:"}, "patch": "sol", "with": {"block": 8, "backend": "reference", "order": "morton"}}
        ]
        self.recipe = {"rules": rules, "cache": {"kind": "first_block", "with": {"threshold": 0.5}}}

    def run(self) -> torch.Tensor:
        inputs = {
            "hidden_states": noise(1, self.root.config.in_channels, 3, 8, 12),
            "timestep": TIMESTEP,
            "encoder_hidden_states": noise(1, 12, self.root.config.text_dim),
        }
        with torch.no_grad(), self.root.cache_context("cond"):
            out = self.root(**inputs, return_dict=False)[0]
        self.root._reset_stateful_cache()
        return out


class Guided(Denoiser):
    """A pipeline whose denoiser is called twice a step, the second time from the middle on."""

    def __init__(self) -> None:
        super().__init__()
        self.recipe = {"rules": [{"patch": "headhunter", "with": {"heads": [[1, 0]]}}]}


class Language(Case):
    """A vision-language model whose patch reads the prompt a second time without its images."""

    def __init__(self) -> None:
        self.model, self.inputs = tiny.build("llava"), tiny.inputs("llava")
        self.recipe = {"rules": [{"patch": "vhr"}]}

    def run(self) -> torch.Tensor:
        return forward(self.model, self.inputs)


class Generating(Case):
    """A vision-language model whose ``generate`` is wrapped."""

    def __init__(self, processor: Any) -> None:
        self.model, self.inputs, self.processor = tiny.build("llava"), tiny.inputs("llava", ((3, "I", 6),)), processor
        name, settings = CARVE
        self.recipe = {"rules": [{"patch": name, "with": settings}]}

    def run(self) -> torch.Tensor:
        return generate(self.model, self.inputs, 2)


def case_of(name: str, processor: Any) -> Case:
    cases = {"denoiser": Denoiser, "guided": Guided, "language": Language, "generating": lambda: Generating(processor)}
    return cases[name]()


def calls_of(case: Case) -> list[str]:
    fault = Fault()
    with fault.injected():
        case.lifetime()
    return fault.names


def broken_by(case: Case, at: int, kind: type[BaseException], stock: torch.Tensor, before: dict[str, Any]) -> str | None:
    """What a fault at one call leaves behind, or None."""
    fault = Fault(at, kind)
    with suppress(*FAULTS, AccelplugError), fault.injected():
        case.lifetime()
    with suppress(NoMatchError):
        accelplug.remove(case.model)
    left = case.left()
    if left != before:
        differ = [key for key in before if left[key] != before[key]]
        return f"call {at}, {fault.names[-1]}: {differ}"
    if not torch.equal(case.run(), stock):
        return f"call {at}, {fault.names[-1]}: another output"
    return None


CASES = ("denoiser", "language", "generating")
SPREAD, PUT_ON = 30, 30
"""Calls that are tried in the suite: over all of a lifetime, and of those that put things on and take them off."""
ON_AND_OFF = (
    "Undo.",
    "_StockState.",
    "_Change.",
    "Plug._install",
    "Plug.remove",
    "install",
    "rebind",
    "_restore",
    "_register",
    "_forget",
)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # faults in generators that are thrown away
@pytest.mark.parametrize("name", [*CASES, "guided"])
def test_a_fault_at_any_call_leaves_what_one_remove_restores(name: str, processor: Any) -> None:
    """Some of the calls, in even strides: all of them hold, and take minutes."""
    case = case_of(name, processor)
    stock = case.run()
    calls_of(case)  # what is made once: processors of diffusers that are looked up, compiled code, registers
    before, names = case.left(), calls_of(case)
    sensitive = [at for at, called in enumerate(names, 1) if any(part in called for part in ON_AND_OFF)]
    assert len(sensitive) > 3 * PUT_ON
    chosen = sorted({*range(7, len(names), len(names) // SPREAD), *sensitive[:: len(sensitive) // PUT_ON]})
    broken = [why for i, at in enumerate(chosen) if (why := broken_by(case, at, FAULTS[i % 2], stock, before))]
    assert not broken, broken[:5]
    assert case.left() == before


def test_an_interrupt_in_the_log_line_behind_install_takes_the_recipe_off(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = tiny_models.build("wan")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(accelplug.plug.logger, "info", interrupted)
    before = set(vars(model))
    with pytest.raises(KeyboardInterrupt):
        accelplug.apply(model, {"patch": "tome"}, gate="off")
    assert set(vars(model)) == before
    assert plug_of(model) is None


def test_a_remove_that_cannot_end_is_found_and_ended_later(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny_models.build("wan")
    dense = model(**inputs, return_dict=False)[0]
    plug = accelplug.apply(model, {"patch": "tome", "with": {"ratio": 0.5}}, gate="off")

    def broken(*_: object) -> None:
        raise OSError("no")

    with monkeypatch.context() as patch:
        patch.setattr(rebind, "_unregister", broken)
        with pytest.raises(OSError, match="no"):
            accelplug.remove(model)
        assert plug.active
        with pytest.raises(AlreadyAppliedError):
            accelplug.apply(model, {"patch": "tome"})
    accelplug.remove(model)
    assert not plug.active
    assert torch.equal(model(**inputs, return_dict=False)[0], dense)


def test_of_two_threads_that_apply_at_once_one_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = tiny_models.build("wan")
    before, start, told = set(vars(model)), threading.Barrier(4), []

    def apply() -> None:
        start.wait()
        try:
            accelplug.apply(model, {"patch": "tome"}, gate="off")
        except AlreadyAppliedError as error:
            told.append(error)

    threads = [threading.Thread(target=apply) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(told) == 3
    accelplug.remove(model)
    assert set(vars(model)) == before


def saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved,
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", CASES)
def test_copies_of_all_kinds_are_stock_and_need_no_accelplug(name: str, how: str, processor: Any) -> None:
    case, fresh = case_of(name, processor), case_of(name, processor)
    twin = COPIES[how](fresh.root)
    plug = accelplug.apply(case.model, case.recipe, gate="off", processor=case.processor)
    found = COPIES[how](case.root)
    assert b"accelplug" not in pickle.dumps(case.root)
    for path, module in twin.named_modules():
        other = found.get_submodule(path)
        assert vars(other).keys() == vars(module).keys(), path
        assert not other._forward_hooks
        assert not other._forward_pre_hooks
        assert type(vars(other).get("config")) is type(vars(module).get("config"))
        assert type(vars(other).get("processor")) is type(vars(module).get("processor"))
    stock, patched = fresh.run(), case.run()
    plug.remove()
    assert torch.equal(case.run(), stock)
    assert not torch.equal(patched, stock) or name != "denoiser"
    if name == "denoiser":
        case.model.transformer = found
    else:
        case.model = found
    assert torch.equal(case.run(), stock)


@pytest.mark.parametrize("how", [pickle.dumps, copy.copy, copy.deepcopy])
def test_the_handle_itself_says_that_it_cannot_be_copied(how: Any, processor: Any) -> None:
    case = case_of("denoiser", processor)
    with (
        accelplug.apply(case.model, case.recipe, gate="off") as plug,
        pytest.raises(UnsupportedError, match="one loaded model"),
    ):
        how(plug)
