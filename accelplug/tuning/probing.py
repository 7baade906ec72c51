"""Measuring what arms do to a few snapshots of a dense run, kept in the journal: for a `Predictor` to predict whole runs from.

Of an arm that promises something more may be made: q.k in 8 bits, and calibrated weights of its pooled blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import TypeAdapter

from accelplug.calibration import calibrate
from accelplug.comparison.journal import Journal
from accelplug.comparison.ranks import alone
from accelplug.hosts.models import denoisers, runs_compiled
from accelplug.kernels.attention import triton_missing
from accelplug.patches.sparse.template import BlockSparse
from accelplug.registry import patch_class
from accelplug.table import HEADER, Origin, Table
from accelplug.tuning.prediction import Predictor, Probe
from accelplug.tuning.space import WORTH, Arm, Candidate, repaired


@dataclass
class Prober:
    """Fills a predictor with what was measured on the snapshots of its trajectory.

    Attributes
    ----------
    pipe : the pipeline.
    tell : is told what is measured now.
    """

    predictor: Predictor
    pipe: Any
    journal: Journal
    tell: Callable[[str], None]

    def arm(self, arm: Arm) -> None:
        """Measure the errors by step and the time of an arm."""

        def measure() -> dict[str, Any]:
            self.tell(f"probing {arm}")
            probe = self.predictor.trajectory.probe(self.pipe, Candidate(arm).rules())
            errors = {str(step): error for step, error in probe.errors.items()}
            return {"errors": errors, "ratio": probe.ratio, "density": probe.density, "estimate": probe.estimate}

        self.predictor.probes[arm] = self.journal.get(f"probe {arm}", measure, TypeAdapter(Probe).validate_python)

    def arm_repaired(self, arm: Arm) -> None:
        """Measure an arm with its error repaired."""
        for mended in repaired(arm, self.predictor.trajectory.layout):
            self.arm(mended)

    def arm_in_8_bits(self, arm: Arm) -> None:
        """Measure an arm with q.k in 8 bits, and know of it where it is faster."""
        probes = self.predictor.probes
        for eight in in_8_bits(arm):
            self.arm(eight)
            if probes[eight].ratio > probes[arm].ratio / WORTH:
                del probes[eight]

    def layers(self) -> None:
        """Measure the share of the squared error that each layer makes, by the boldest arm on that layer alone, at one snapshot."""
        trajectory, probes = self.predictor.trajectory, self.predictor.probes
        arm = max(probes, key=lambda arm: probes[arm].error(0))
        snapshot = trajectory.snapshots[len(trajectory.snapshots) // 2]

        def measure() -> list[float]:
            squares = []
            for layer in range(trajectory.layers):
                self.tell(f"probing layer {layer}")
                only = {"rules": [{"where": {"layers": layer}, "patch": arm.patch, "with": dict(arm.settings)}]}
                squares.append(trajectory.probe(self.pipe, only, [snapshot]).errors[snapshot.step] ** 2)
            return squares

        squares = self.journal.get(f"layers {arm}", measure, TypeAdapter(list[float]).validate_python)
        self.predictor.layer_share = {layer: square / (sum(squares) or 1.0) for layer, square in enumerate(squares)}

    def weighted(self, arm: Arm, inputs: dict[str, Any], seed: int) -> Arm | None:
        """Calibrate the weights of an arm's pooled blocks on a run, and measure the arm with them; None if they stay as they are."""

        def measure() -> dict[str, Any]:
            self.tell(f"weighing the pooled blocks of {arm}")
            return weights(self.pipe, arm, inputs, seed)

        found = self.journal.get(f"weights {arm}", measure, lambda table: with_weights(arm, table))
        if found is not None:
            self.arm(found)
        return found


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
    """Whether an arm pools blocks by weights that are not calibrated, and does not repair what that does."""
    settings = dict(arm.settings)
    return settings.get("rest") == "pool" and not {"rest_weight", "repair"} & set(settings)


def no_weights(pipe: Any) -> str | None:
    """Why weights of pooled blocks cannot be calibrated here, or None."""
    if len(denoisers(pipe)) > 1:
        return "No calibrated weights of pooled blocks: each denoiser has its own, and a candidate is one for all of them."
    return (
        "No calibrated weights of pooled blocks: compiled attention cannot be looked into." if runs_compiled(pipe) else None
    )


def weights(pipe: Any, arm: Arm, inputs: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Calibrate the weight of each head's pooled blocks on one dense run; return the table [layers, heads] as plain data.

    Of several processes the first one alone searches, while the others wait to run what it asks for.
    """
    rules = [{"patch": arm.patch, "with": dict(arm.settings)}]
    with alone():
        recipe = calibrate(pipe, "rest", [inputs], recipe={"rules": rules}, seed=seed, progress=False)
    (table,) = (rule.settings["rest_weight"] for rule in recipe.rules)
    return {"values": table.values.tolist(), **table.origin.to_header()}


def with_weights(arm: Arm, found: Mapping[str, Any]) -> Arm | None:
    """Return an arm with what `weights` found; None if all of them are 1, which they are without a table."""
    if all(weight == 1.0 for layer in found["values"] for weight in layer):
        return None
    origin = Origin.from_header({HEADER: found[HEADER]})
    return arm.but(rest_weight=Table(torch.tensor(found["values"]), ("layers", "heads"), key="rest_weight", origin=origin))
