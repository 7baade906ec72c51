"""Patches that stand around generation: passes of their own tell where to look, or a second branch is mixed in."""
