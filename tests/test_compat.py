"""The private names of host libraries still mean what we rely on."""

from __future__ import annotations

import pytest

from accelplug import compat

CONTRACTS = dict(compat.contracts())


@pytest.mark.parametrize("promise", CONTRACTS)
def test_contract(promise):
    CONTRACTS[promise]()  # raises, saying what is broken


def test_a_broken_contract_raises(monkeypatch):
    monkeypatch.setattr(compat, "dispatch_attention_fn", lambda: lambda query, key: None)
    with pytest.raises(RuntimeError, match="lacks the parameters"):
        CONTRACTS["diffusers: dispatch_attention_fn takes query, key, value, attn_mask, scale, backend"]()


def test_newer_library_warns(monkeypatch):
    monkeypatch.setattr(compat, "installed", lambda package: "99.1.0")
    with pytest.warns(UserWarning, match="tested with diffusers up to"):
        compat.warn_untested("diffusers")
