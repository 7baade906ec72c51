"""reuse_steps: a plan that several steps share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import accelplug
from accelplug.call import AttentionCall, Clock, Layout
from accelplug.patches.sparse.template import Scored
from accelplug.registry import patch_class
from accelplug.testing.laws import Law, Subject, it_does_something_and_undoes_it, laws, nothing_is_left_of_a_run
from tests import tiny_pipelines
from tests.patch_rows import ROWS
from tests.test_repair_laws import CLUSTERED, LAYOUT, SITE, VIDEO, WAN, asked, call_of

SUBJECTS = [*(row for row in ROWS.values() if issubclass(patch_class(row.patch), Scored)), CLUSTERED]
SHARED = [replace(row, working={**row.working, "reuse_steps": 2}) for row in SUBJECTS]

every_way = pytest.mark.parametrize(
    "subject", SHARED, ids=lambda row: f"{row.patch}-{'kmeans' if row.working.get('order') == 'kmeans' else 'own'}"
)


def patch_of(subject: Subject, **config: Any) -> Any:
    return patch_class(subject.patch)({"block": 8, "backend": "reference", **subject.working, **config})


def later(call: AttentionCall) -> AttentionCall:
    """Other queries and keys, the same values."""
    return asked(call.q.flip(-2), call.k.roll(11, -2), call.v, call.mask)


def at(patch: Any, step: int, state: dict[str, Any], branch: str | None = "cond", layout: Layout = LAYOUT) -> Any:
    return patch.prepare(SITE, layout, Clock(step, 8, branch), state)


@every_way
def test_a_plan_stands_for_so_many_steps(subject: Subject) -> None:
    patch, own, first = patch_of(subject), patch_of(subject, reuse_steps=1), call_of()
    state: dict[str, Any] = {}
    other, made = later(first), at(patch, 0, state)
    assert torch.equal(patch.attend(first, made), own.attend(first, at(own, 0, {})))
    read, recalling = patch.planned(first, made).bits, at(patch, 1, state)
    assert torch.equal(patch.planned(other, recalling).bits, read)
    assert not torch.equal(patch.attend(other, recalling), own.attend(other, at(own, 1, {})))
    assert not torch.equal(patch.planned(other, at(patch, 2, state)).bits, read)


@every_way
def test_what_recalls_is_right_for_its_plan(subject: Subject) -> None:
    """On the call that made it, a recalled plan gives what it gave, levels too."""
    patch, call = patch_of(subject), call_of(batch=2)
    state: dict[str, Any] = {}
    expected = patch.attend(call, at(patch, 4, state))
    assert torch.equal(patch.attend(call, at(patch, 5, state)), expected)


@every_way
def test_another_batch_reads_everything(subject: Subject) -> None:
    patch, call = patch_of(subject), call_of(batch=2)
    state: dict[str, Any] = {}
    patch.attend(call, at(patch, 0, state))
    half = asked(call.q[:1], call.k[:1], call.v[:1])
    torch.testing.assert_close(patch.attend(half, at(patch, 1, state)), half.dense(), rtol=1e-4, atol=1e-5)


def test_nothing_is_recalled_where_it_does_not_belong() -> None:
    patch, other, call = patch_of(SHARED[0]), patch_of(SHARED[0], rest="drop"), call_of()
    state: dict[str, Any] = {}
    patch.attend(call, at(patch, 0, state))
    assert not at(patch, 0, state).reuse.recalls, "the same step begins anew"
    assert not at(patch, 1, state).reuse.recalls, "no call has made one"
    patch.attend(call, at(patch, 2, state))
    assert not at(other, 3, state).reuse.recalls, "other settings"
    patch.attend(call, at(patch, 4, state))
    assert not at(patch, 5, state, layout=VIDEO).reuse.recalls, "another layout"
    assert patch.prepare(SITE, LAYOUT, Clock(None, None), state).reuse is None, "no step is known"


def test_branches_without_names_do_not_share_a_plan() -> None:
    patch, call = patch_of(SHARED[0]), call_of()
    for calls, recalls in (([call], True), ([call, call], True), ([call, later(call)], False)):
        state: dict[str, Any] = {}
        params = at(patch, 0, state, None)
        for one in calls:
            patch.attend(one, params)
        assert at(patch, 1, state, None).reuse.recalls is recalls


@every_way
def test_two_graphs_serve_all_layers_and_steps(subject: Subject) -> None:
    torch._dynamo.reset()
    counter, patch = CompileCounter(), patch_of(subject)

    @torch.compile(fullgraph=True, backend=counter)
    def attend(q: Tensor, k: Tensor, v: Tensor, params: Any) -> Tensor:
        return patch.attend(asked(q, k, v), params)

    call = call_of(VIDEO)
    other = later(call)
    for layer in (1, 4, 7):  # methods that go by turns have three
        site = replace(SITE, layer=layer, layers=9, kind="self")
        states: tuple[dict[str, Any], dict[str, Any]] = {}, {}
        for step, one in enumerate((call, other, other, call)):
            compiled, plain = (patch.prepare(site, VIDEO, Clock(step, 4, "cond"), state) for state in states)
            expected = patch.attend(one, plain)
            torch.testing.assert_close(attend(one.q, one.k, one.v, compiled), expected, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 2


@pytest.mark.parametrize(
    "law",
    [
        law
        for row in SHARED
        for law in laws(row, models=WAN)
        if law.check in (it_does_something_and_undoes_it, nothing_is_left_of_a_run)
    ],
    ids=str,
)
def test_laws_of_every_patch(law: Law) -> None:
    law()


def test_a_run_makes_half_as_many_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, inputs = tiny_pipelines.pipeline("wan")
    cls: Any = patch_class("rows")
    made: list[int] = []
    route = cls.route
    monkeypatch.setattr(cls, "route", lambda self, *given, **more: made.append(1) or route(self, *given, **more))
    for steps in (1, 2):
        rule = {"patch": "rows", "with": {"block": 8, "backend": "reference", "density": 0.3, "reuse_steps": steps}}
        with accelplug.apply(pipe, rule, gate="off", strict=True):
            pipe(**inputs)
        if steps == 1:
            number = len(made)
    assert len(made) - number == number // 2


def test_rows_that_are_probes_are_probed_where_a_plan_is_recalled() -> None:
    shared = patch_of(ROWS["rows"], rows=4, repair="output_query", reuse_steps=2)
    plain = patch_of(ROWS["rows"], rows=4, reuse_steps=2)
    call, errors = call_of(), []
    for patch in (shared, plain):
        state: dict[str, Any] = {}
        patch.attend(call, at(patch, 0, state))
        out = patch.attend(call, at(patch, 1, state))
        errors.append(float((out - call.dense()).norm()))
    assert errors[0] < 0.9 * errors[1]
