"""Every private name of a host library, in one room, each with a contract that tests and `accelplug doctor` check."""

from accelplug.compat import cache_dit, contracts, diffusers, torch, transformers, versions

__all__ = ["cache_dit", "contracts", "diffusers", "torch", "transformers", "versions"]
