"""Tests for your own patch: the laws that all of ours obey, tiny models to try it on, and a registration that ends.

>>> for law in accelplug.testing.laws(Mine, {"reach": 1}, neutral={"reach": 999}):
...     law()

Nothing here imports pytest; see `laws` for how to hand them to it.
"""

from accelplug.testing.laws import Law, Subject, laws
from accelplug.testing.registered import registered

__all__ = ["Law", "Subject", "laws", "registered"]
