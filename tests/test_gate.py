"""The worth-it gate: what it times and when, what that predicts for a run, and choices that are replayed. Times are made up."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import accelplug
from accelplug.errors import AccelplugError
from accelplug.hosts import answering, forecast, gate
from accelplug.hosts.forecast import Forecast, amdahl, overall_gain
from accelplug.kernels import attention
from accelplug.testing.laws import run_once
from tests import tiny_models, tiny_pipelines
from tests.patch_rows import ROWS

LAYERS = 3
"""Self-attention modules of the tiny Wan."""
OTHER_MS, DENSE_MS, SPARSE_MS = 20.0, 10.0, 4.0
DENSE_FORWARD_MS = OTHER_MS + LAYERS * DENSE_MS


def sparse(**where: Any) -> dict[str, Any]:
    return ROWS["radial"].recipe(**where)


class MadeUpTime:
    """A clock that goes on by `OTHER_MS` in a model's first feed-forward, `DENSE_MS` in each attention call, and 1000 in the gate."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, model: Any, sparse_ms: float = SPARSE_MS) -> None:
        self.ms, self.judged = 0.0, 0
        self.by_gate = (DENSE_MS, sparse_ms)
        monkeypatch.setattr(forecast, "time", SimpleNamespace(perf_counter=lambda: self.ms / 1e3))
        monkeypatch.setattr(gate, "median_ms", self.median_ms)
        monkeypatch.setattr(answering, "timed_ms", self.timed_ms)
        model.blocks[0].ffn.register_forward_hook(self.feed_forward)

    def median_ms(self, call: Any, device: torch.device) -> float:
        self.judged += 1
        self.ms += 1000.0
        return self.by_gate[(self.judged - 1) % 2]

    def timed_ms(self, call: Any, device: torch.device) -> tuple[Any, float]:
        self.ms += DENSE_MS
        return call(), DENSE_MS

    def feed_forward(self, *_: Any) -> None:
        self.ms += OTHER_MS


@pytest.fixture
def wan(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, dict[str, Any], MadeUpTime]:
    model, inputs = tiny_models.build("wan")
    return model, inputs, MadeUpTime(monkeypatch, model)


def test_amdahl_by_hand() -> None:
    assert amdahl(0.5, 2.0) == pytest.approx(1 / 0.75)
    assert amdahl(0.75, math.inf) == pytest.approx(4.0)
    assert amdahl(1.0, math.inf) == math.inf
    assert amdahl(0.0, 5.0) == 1.0


def test_the_share_of_attention_is_that_of_a_dense_forward_and_the_gate_counts_nowhere(
    wan: tuple[Any, dict[str, Any], MadeUpTime],
) -> None:
    model, inputs, time = wan
    with accelplug.apply(model, sparse()) as plug:
        run_once(model, inputs)
        (found,) = plug.forecasts
    assert time.judged == 2
    assert found.forward_ms == pytest.approx(DENSE_FORWARD_MS)
    assert found.attention_share == pytest.approx(LAYERS * DENSE_MS / DENSE_FORWARD_MS)
    assert found.ceiling == pytest.approx(DENSE_FORWARD_MS / OTHER_MS)
    assert found.forward_gain == pytest.approx(DENSE_FORWARD_MS / (OTHER_MS + LAYERS * SPARSE_MS))
    assert found.run_gain is None
    assert found.shape == tuple(inputs["hidden_states"].shape)


def test_the_run_counts_its_dense_steps_and_layers(wan: tuple[Any, dict[str, Any], MadeUpTime]) -> None:
    model, inputs, _ = wan
    with accelplug.apply(model, sparse(steps="50%:", layers="1:")) as plug:
        plug.step(0, 8)
        run_once(model, inputs)
        (first,) = plug.forecasts
        assert first.attention_share == pytest.approx(LAYERS * DENSE_MS / DENSE_FORWARD_MS)
        assert first.forward_gain is None
        assert "warmup" in str(first)
        plug.step(4, 8)
        run_once(model, inputs)
        (found,) = plug.forecasts
        said = str(plug.report())
    patched = OTHER_MS + DENSE_MS + 2 * SPARSE_MS
    assert found.forward_gain == pytest.approx(DENSE_FORWARD_MS / patched)
    assert found.run_gain == pytest.approx(2 * DENSE_FORWARD_MS / (DENSE_FORWARD_MS + patched))
    assert (found.sparse_steps, found.steps) == (4, 8)
    assert "60% of a dense forward" in said
    assert "4 of whose 8 steps" in said


def test_what_is_left_dense_gains_nothing_and_says_what_it_would_have_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny_models.build("wan")
    MadeUpTime(monkeypatch, model, sparse_ms=15.0)
    with accelplug.apply(model, sparse()) as plug:
        run_once(model, inputs)
        (found,) = plug.forecasts
        (reason,) = plug.report().gated
    assert found.forward_gain == pytest.approx(1.0)
    gain = DENSE_FORWARD_MS / (OTHER_MS + LAYERS * 15.0)
    assert f"60% of a forward, which would be {gain:.2f}x as fast" in reason


def test_gate_report_predicts_what_it_forces(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny_models.build("wan")
    MadeUpTime(monkeypatch, model, sparse_ms=15.0)
    with accelplug.apply(model, sparse(), gate="report") as plug:
        run_once(model, inputs)
        assert plug.forecasts[0].forward_gain == pytest.approx(DENSE_FORWARD_MS / (OTHER_MS + LAYERS * 15.0))


def test_a_forward_that_a_cache_cut_short_does_not_stand(wan: tuple[Any, dict[str, Any], MadeUpTime]) -> None:
    model, inputs, _ = wan
    with accelplug.apply(model, sparse()) as plug:
        run_once(model, inputs)
        model.blocks[2].forward = lambda hidden_states, *args, **kwargs: hidden_states
        run_once(model, inputs)
        del model.blocks[2].forward
        assert plug.forecasts[0].attention_share == pytest.approx(LAYERS * DENSE_MS / DENSE_FORWARD_MS)


def test_only_the_first_forwards_of_a_size_are_timed(
    wan: tuple[Any, dict[str, Any], MadeUpTime], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs, time = wan
    with accelplug.apply(model, sparse()) as plug:
        for _ in range(forecast.FORWARDS):
            run_once(model, inputs)
        before = time.ms
        monkeypatch.setattr(answering, "timed_ms", lambda *_: pytest.fail("timed again"))
        run_once(model, inputs)
        assert time.ms == before + OTHER_MS
        assert len(plug.forecasts) == 1


def test_with_the_gate_off_nothing_is_timed_or_predicted(wan: tuple[Any, dict[str, Any], MadeUpTime]) -> None:
    model, inputs, time = wan
    for options in ({"gate": "off"}, {"deterministic": True}):
        with accelplug.apply(model, sparse(), **options) as plug:
            run_once(model, inputs)
            assert not plug.forecasts
            assert time.judged == 0


def test_compiled_attention_has_no_share(wan: tuple[Any, dict[str, Any], MadeUpTime]) -> None:
    model, inputs, time = wan
    for block in model.blocks:
        block.compile(backend="eager")
    with accelplug.apply(model, sparse()) as plug:
        run_once(model, inputs)
        (found,) = plug.forecasts
        assert found.attention_share is None
        assert "compiled" in str(found)
        assert "unknown" in str(plug.report())
    assert time.judged == 2, "made-up tensors are still judged, outside the graph"


def test_a_denoiser_compiled_whole_predicts_nothing() -> None:
    model, inputs = tiny_models.build("wan")
    with accelplug.apply(model, sparse()) as plug:
        run_once(torch.compile(model, backend="eager", fullgraph=True), inputs)
        assert not plug.forecasts


def test_nothing_is_timed_while_a_graph_is_captured(
    wan: tuple[Any, dict[str, Any], MadeUpTime], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs, time = wan
    monkeypatch.setattr(gate, "capturing", lambda device: True)
    measured = []
    monkeypatch.setattr("accelplug.patches.sparse.template.measure_choice", lambda **_: measured.append(1))
    with accelplug.apply(model, ROWS["radial"].recipe({**ROWS["radial"].working, "backend": "auto"})) as plug:
        run_once(model, inputs)
        assert time.judged == 0
        assert not measured
        assert not plug.forecasts
        (told,) = plug.report().unjudged
        assert "plug.warmup" in told
        assert plug.report().served == {"radial": LAYERS}


def test_two_denoisers_are_predicted_over_the_steps_each_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, inputs = tiny_pipelines.decoding("wan22_moe")
    monkeypatch.setattr(gate, "median_ms", lambda call, device: 1.0)
    with accelplug.apply(pipe, sparse(), gate="report") as plug:
        pipe(**inputs)
        found = plug.forecasts
    assert {each.denoiser for each in found} == {"transformer", "transformer_2"}
    assert sum(each.steps for each in found) == inputs["num_inference_steps"]
    assert overall_gain(found, "run_gain", "steps") == pytest.approx(1.0)


def test_gains_of_denoisers_are_weighed_by_their_time() -> None:
    slow = Forecast("a", (1,), forward_ms=30.0, run_gain=3.0, steps=2)
    fast = Forecast("b", (1,), forward_ms=10.0, run_gain=1.0, steps=4)
    assert overall_gain([slow, fast], "run_gain", "steps") == pytest.approx(100 / (20 + 40))
    assert overall_gain([slow, Forecast("b", (1,))], "run_gain", "steps") is None
    assert overall_gain([], "run_gain", "steps") is None


# ------------------------------------------------------------------------------------------------------------ replaying


def stored(plug: accelplug.Plug) -> dict[str, Any]:
    """Choices as a file gives them back."""
    return json.loads(json.dumps(plug.choices))


@pytest.mark.parametrize("sparse_ms", [4.0, 15.0])
@pytest.mark.parametrize("deterministic", [False, True])
def test_choices_are_replayed_untimed(monkeypatch: pytest.MonkeyPatch, sparse_ms: float, deterministic: bool) -> None:
    model, inputs = tiny_models.build("wan")
    dense = run_once(model, inputs)
    time = MadeUpTime(monkeypatch, model, sparse_ms)
    with accelplug.apply(model, sparse()) as plug:
        first, choices = run_once(model, inputs), stored(plug)
    assert torch.equal(first, dense) == (sparse_ms > DENSE_MS)
    time.by_gate = (DENSE_MS, 19.0 - sparse_ms)  # timed again, it would be judged the other way
    with accelplug.apply(model, sparse(), choices=choices, deterministic=deterministic) as plug:
        assert torch.equal(run_once(model, inputs), first)
        assert stored(plug)["verdicts"] == choices["verdicts"]
    assert time.judged == 2


def test_what_choices_do_not_hold_is_judged_or_under_deterministic_forced(
    wan: tuple[Any, dict[str, Any], MadeUpTime],
) -> None:
    model, inputs, time = wan
    with accelplug.apply(model, sparse()) as plug:
        run_once(model, inputs)
        choices = stored(plug)
    larger = {**inputs, "hidden_states": torch.randn(1, 4, 3, 16, 16)}
    time.by_gate = (DENSE_MS, 15.0)
    with accelplug.apply(model, sparse(), choices=choices) as plug:
        run_once(model, larger)
        assert len(plug.report().gated) == 1
    judged = time.judged
    with accelplug.apply(model, sparse(), choices=choices, deterministic=True) as plug:
        run_once(model, larger)
        assert time.judged == judged
        assert plug.report().served == {"radial": LAYERS}
        assert "no verdict" in plug.report().unjudged[0]


def test_a_verdict_is_on_one_config(wan: tuple[Any, dict[str, Any], MadeUpTime]) -> None:
    model, inputs, time = wan
    with accelplug.apply(model, sparse()) as plug:
        run_once(model, inputs)
        choices = stored(plug)
    other = ROWS["radial"].recipe({"decay": 0.9})
    with accelplug.apply(model, other, choices=choices) as plug:
        run_once(model, inputs)
        assert time.judged == 4


def test_kernels_are_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = ROWS["radial"].recipe({"decay": 0.2, "backend": "auto"})
    model, inputs = tiny_models.build("wan")
    attention.forget_choices()
    monkeypatch.setattr(attention, "_candidates", lambda *_, **__: ["blocked", "reference"])
    with accelplug.apply(model, recipe, gate="report") as plug:
        run_once(model, inputs)
        choices = stored(plug)
    assert choices["kernels"]
    for kernel in choices["kernels"]:
        kernel["backend"] = "reference"
    attention.forget_choices()
    monkeypatch.setattr(attention, "timed_ms", lambda *_: pytest.fail("timed again"))
    asked = []
    op = attention._run
    monkeypatch.setattr(attention, "_run", lambda backend, *args: asked.append(backend) or op(backend, *args))
    with accelplug.apply(model, recipe, choices=choices) as plug:
        run_once(model, inputs)
        assert stored(plug)["kernels"] == choices["kernels"]
    assert set(asked) == {"reference"}
    attention.forget_choices()


def test_deterministic_takes_no_kernel_that_another_plug_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = ROWS["radial"].recipe({"decay": 0.2, "backend": "auto"})
    model, inputs = tiny_models.build("wan")
    ran: list[str] = []
    kernel = attention._run

    def noted(backend: str, *arguments: Any) -> Any:
        ran.append(backend)
        return kernel(backend, *arguments)

    monkeypatch.setattr(attention, "_run", noted)
    monkeypatch.setattr(attention, "_candidates", lambda *_, **__: ["blocked", "reference"])
    monkeypatch.setattr(attention._choices, "peek", lambda key: ("reference", {"reference": 1.0}))  # measured elsewhere
    with accelplug.apply(model, recipe, gate="off"):
        run_once(model, inputs)
    assert set(ran) == {"reference"}
    ran.clear()
    with accelplug.apply(model, recipe, deterministic=True) as plug:
        run_once(model, inputs)
        assert plug.choices["backend"] == "first"
    assert set(ran) == {"blocked"}


def test_choices_of_something_else_are_refused(wan: tuple[Any, dict[str, Any], MadeUpTime]) -> None:
    model, inputs, _ = wan
    with accelplug.apply(model, sparse()) as plug:
        run_once(model, inputs)
        choices = stored(plug)
    for wrong, what in (
        ({}, "plug.choices gave"),
        ({**choices, "recipe": "wan2.1-t2v-14b/sol"}, "made for"),
        ({**choices, "verdicts": [{"patch": "radial"}]}, "verdicts"),
        ({**choices, "kernels": [{"backend": "flex"}]}, "kernels"),
        ({**choices, "gate": "sometimes"}, "gate must be"),
    ):
        with pytest.raises(AccelplugError, match=what):
            accelplug.apply(model, sparse(), choices=wrong)
    assert not model._forward_pre_hooks
