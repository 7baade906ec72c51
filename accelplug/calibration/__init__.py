"""calibrate(): what a method or a recipe leaves to be measured, found on dense runs."""

from accelplug.calibration.entry import calibrate, split_settings

__all__ = ["calibrate", "split_settings"]
