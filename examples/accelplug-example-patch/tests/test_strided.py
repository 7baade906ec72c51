"""The laws that every patch of accelplug obeys, for this one, and that accelplug finds it once it is installed."""

import pytest
from accelplug_strided import Strided

import accelplug
from accelplug.testing import Law, laws

LAWS = laws(Strided, {"stride": 3, "reach": 0}, neutral={"stride": 1}, everything={"reach": 1000})


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_law(law: Law) -> None:
    law()


def test_it_is_listed() -> None:
    assert "strided" in [entry.name for entry in accelplug.list_patches()]
