"""What may be made of an arm that promises something: q.k in 8 bits, and calibrated weights of its pooled blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from accelplug.calibration import calibrate
from accelplug.hosts.models import denoisers, runs_compiled
from accelplug.kernels.attention import triton_missing
from accelplug.patches.sparse.template import BlockSparse
from accelplug.registry import patch_class
from accelplug.table import HEADER, Origin, Table
from accelplug.tuning.space import Arm


def no_8_bits(device: torch.device) -> str | None:
    """Why q.k in 8 bits cannot be faster on a device, or None: only Triton multiplies such numbers, and only a GPU gains by it."""
    if device.type == "cpu":
        return "No 8-bit q.k: a CPU gains nothing by it."
    return None if (reason := triton_missing(device)) is None else f"No 8-bit q.k: {reason}."


def in_8_bits(arm: Arm) -> list[Arm]:
    """Return an arm with q.k in each 8-bit format, none for a patch without blocks."""
    blocks = issubclass(patch_class(arm.patch), BlockSparse)
    return [arm.but(precision=precision) for precision in ("int8", "fp8")] if blocks else []


def pools(arm: Arm) -> bool:
    """Whether an arm pools blocks by weights that are not calibrated."""
    settings = dict(arm.settings)
    return settings.get("rest") == "pool" and "rest_weight" not in settings


def no_weights(pipe: Any) -> str | None:
    """Why weights of pooled blocks cannot be calibrated here, or None."""
    if len(denoisers(pipe)) > 1:
        return "No calibrated weights of pooled blocks: each denoiser has its own, and a candidate is one for all of them."
    return (
        "No calibrated weights of pooled blocks: compiled attention cannot be looked into." if runs_compiled(pipe) else None
    )


def weights(pipe: Any, arm: Arm, inputs: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Calibrate the weight of each head's pooled blocks on one dense run; return the table [layers, heads] as plain data."""
    rules = [{"patch": arm.patch, "with": dict(arm.settings)}]
    recipe = calibrate(pipe, "rest", [inputs], recipe={"rules": rules}, seed=seed, progress=False)
    (table,) = (rule.settings["rest_weight"] for rule in recipe.rules)
    return {"values": table.values.tolist(), **table.origin.to_header()}


def with_weights(arm: Arm, found: Mapping[str, Any]) -> Arm | None:
    """Return an arm with what `weights` found; None if all of them are 1, which they are without a table."""
    if all(weight == 1.0 for layer in found["values"] for weight in layer):
        return None
    origin = Origin.from_header({HEADER: found[HEADER]})
    return arm.but(rest_weight=Table(torch.tensor(found["values"]), ("layers", "heads"), key="rest_weight", origin=origin))
