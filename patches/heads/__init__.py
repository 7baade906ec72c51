"""Patches that change what heads look at, or what they weigh: one file, one method."""
