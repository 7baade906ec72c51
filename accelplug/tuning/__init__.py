"""tune(): a quality budget in, a recipe out."""

from accelplug.tuning.budget import Bound
from accelplug.tuning.entry import tune
from accelplug.tuning.result import Point, Tuned
from accelplug.tuning.verification import verify

__all__ = ["Bound", "Point", "Tuned", "tune", "verify"]
