"""A host for another library is one file and one line: here the file, and a library of one class.

It goes on and off, says what runs where and what ran, and what cannot be done with its models is refused in one way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import accelplug
from accelplug.call import AttentionCall, Clock, Layout, Site
from accelplug.errors import AccelplugError, AlreadyAppliedError, NoMatchError, RecipeError, UnsupportedError
from accelplug.hosts import host
from accelplug.hosts.host import Host, Setup, host_of, require_ability
from accelplug.hosts.placement import Placed
from accelplug.hosts.record import Choice
from accelplug.hosts.undo import Undo
from accelplug.patches.base import Patch
from accelplug.recipe import ModelFacts

GRID = (1, 6, 8)
RULE = {
    "where": {"layers": "1:"},
    "patch": "neighborhood",
    "with": {"block": 8, "window": [1, 3, 3], "backend": "reference"},
}

# ------------------------------------------------------------------------------------------------------------- the library


class ToyAttention(nn.Module):
    """Its attention is an attribute, which a host may set."""

    heads = 2

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(16, 48)
        self.attention = F.scaled_dot_product_attention

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, 8)).transpose(1, 2) for part in self.project(x).chunk(3, -1))
        return x + self.attention(q, k, v).transpose(1, 2).flatten(-2)


class ToyModel(nn.Module):
    """Three layers over a grid of pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ToyAttention() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


# ---------------------------------------------------------------------------------------------------------------- the host


@dataclass(eq=False)
class ToyRecord:
    """What stands at one layer."""

    host: ToyHost
    module: ToyAttention
    site: Site
    choice: Choice
    params: Any = None
    routed: bool = False

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def dense(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v)

        self.routed = True
        self.host.setup.ledger.count(self.host.setup.ledger.served, self.choice.name)
        if self.choice.patch is None:
            return dense()
        self.params = self.choice.patch.prepare(self.site, Layout(GRID), Clock(), {})
        return self.choice.patch.attend(AttentionCall(q, k, v, None, q.shape[-1] ** -0.5, dense), self.params)


class ToyHost(Host):
    """Gets into `ToyModel`."""

    library = "pytest"  # an installed package that accelplug knows no versions of
    called = "a toy"
    expects = "a toy"
    gives = "pixels"
    serves = frozenset({"sparse"})
    abilities: ClassVar[Mapping[str, str]] = {}
    name = "toy"

    def __init__(self, model: Any, setup: Setup) -> None:
        self.root, self.setup, self.skipped = model, setup, {}
        sites = [Site(f"layers.{i}", self.name, "self", i, len(model.layers)) for i in range(len(model.layers))]
        layout, clock = Layout(GRID), Clock()
        self.records = [
            ToyRecord(self, module, site, setup.decide(site, layout, clock))
            for module, site in zip(model.layers, sites, strict=True)
        ]

    @classmethod
    def knows(cls, model: Any) -> bool:
        return isinstance(model, ToyModel)

    @classmethod
    def parts(cls, model: Any) -> dict[str, Any]:
        return {cls.name: model}

    @classmethod
    def facts(cls, model: Any) -> ModelFacts:
        return ModelFacts((type(model).__name__,), {})

    @classmethod
    def of(cls, model: Any, parts: Mapping[str, Any], setup: Setup) -> list[ToyHost]:
        return [cls(model, setup)]

    def install(self, undo: Undo) -> None:
        for record in self.records:
            undo.put(record.module, "attention", record)

    def collect(self) -> None:
        """Nothing is compiled."""

    def unrouted(self) -> list[str]:
        return [r.site.module for r in self.records if r.choice.patch is not None and not r.routed]

    def placed(self) -> list[Placed]:
        return [Placed(r.site, r.choice.name, r.choice.patch, r.params, Layout(GRID), r.choice.reason) for r in self.records]


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one line."""
    monkeypatch.setattr(host, "HOSTS", (f"{__name__}:ToyHost", *host.HOSTS))


@pytest.fixture
def toy() -> Iterator[tuple[ToyModel, Tensor]]:
    with torch.no_grad():
        yield ToyModel(), torch.randn(1, 48, 16)


# ------------------------------------------------------------------------------------------------------------------- tests


def test_a_recipe_goes_on_and_off(toy: tuple[ToyModel, Tensor]) -> None:
    model, x = toy
    dense, before = model(x), [dict(vars(module)) for module in model.modules()]
    plug = accelplug.apply(model, {"rules": [RULE]}, strict=True)
    with pytest.raises(AlreadyAppliedError):
        accelplug.apply(model, {"rules": [RULE]})
    assert plug.report().unrouted == ["layers.1", "layers.2"]
    patched = model(x)
    assert not torch.equal(patched, dense)
    assert plug.report().served == {"dense": 1, "neighborhood": 2}
    assert not plug.report().unrouted
    assert "2 of 3" in plug.summary()
    accelplug.remove(model)
    assert [dict(vars(module)) for module in model.modules()] == before
    assert torch.equal(model(x), dense)
    assert not plug.active


def test_it_says_what_runs_where(toy: tuple[ToyModel, Tensor]) -> None:
    model, x = toy
    with accelplug.apply(model, {"rules": [RULE]}) as plug:
        assert [row.name for row in plug.where()] == ["dense", "neighborhood", "neighborhood"]
        model(x)
        rows = list(plug.where())
        assert rows[0].plan is None
        assert 0 < rows[1].density < 1
        assert "1-2" in str(plug.where())


def test_an_instance_of_a_patch_serves_all_layers(toy: tuple[ToyModel, Tensor]) -> None:
    class Halved(Patch):
        """Half of what attention says."""

        name, family = "halved", "sparse"

        def prepare(self, site: Site, layout: Any, clock: Clock, state: dict[str, Any]) -> Any:
            return ()

        def attend(self, call: AttentionCall, params: Any) -> Tensor:
            return call.dense() / 2

    model, x = toy
    dense = model(x)
    with accelplug.apply(model, Halved()) as plug:
        assert not torch.equal(model(x), dense)
        assert {row.name for row in plug.where()} == {"halved"}


def test_what_a_host_cannot_have_is_refused_at_apply(toy: tuple[ToyModel, Tensor]) -> None:
    model, _ = toy
    with pytest.raises(UnsupportedError, match="visual_bias, a patch of the family heads; ToyModel takes sparse"):
        accelplug.apply(model, {"patch": "visual_bias"})
    with pytest.raises(UnsupportedError, match="step cache first_block, and a toy takes none"):
        accelplug.apply(model, {"rules": [RULE], "cache": {"kind": "first_block"}})
    with pytest.raises(RecipeError, match=r"where\.steps, and a toy has neither diffusion steps"):
        accelplug.apply(model, {"rules": [{**RULE, "where": {"steps": "1:"}}]})
    with pytest.raises(NoMatchError, match="3 of kind self in 3 layers"):
        accelplug.apply(model, {"rules": [{**RULE, "where": {"layers": "7:"}}]})
    with pytest.raises(
        NoMatchError,
        match=r"neither a denoiser nor a geometry transformer nor a language model nor an image encoder nor a toy: expected .*; or a toy",
    ):
        accelplug.apply(object(), {"rules": [RULE]})


@pytest.mark.parametrize(
    ("what", "ask"),
    [
        ("compare", lambda model: accelplug.compare(model, {"rules": [RULE]}, {"prompt": "a"})),
        ("tune", lambda model: accelplug.tune(model, {"prompt": "a"})),
        ("calibrate", lambda model: accelplug.calibrate(model, "sparse_vdit", ["a"])),
        ("inspect", accelplug.inspect),
        ("step", lambda model: accelplug.apply(model, {"rules": [RULE]}).step(0, 2)),
        ("mark", lambda model: accelplug.apply(model, {"rules": [RULE]}).mark(None)),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_way(toy: tuple[ToyModel, Tensor], what: str, ask: Any) -> None:
    with pytest.raises(
        UnsupportedError, match=rf"^{what}: expected an? .*, got ToyModel, a toy\. .*this one takes apply, remove\.$"
    ):
        ask(toy[0])


def test_a_host_is_found_by_its_models(toy: tuple[ToyModel, Tensor]) -> None:
    assert host_of(toy[0]).gives == "pixels"
    assert host_of(nn.Linear(1, 1)).called == "a denoiser"
    with pytest.raises(
        AccelplugError,
        match=r"compare: expected an image encoder or .* or a geometry transformer or a whole diffusers pipeline, got Linear",
    ):
        require_ability(nn.Linear(1, 1), "compare")
