"""Measuring what arms do to a few moments of a dense run, kept in the journal: for a `Forecast` to foretell whole runs from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from accelplug.tuning.forecast import Forecast, Probe
from accelplug.tuning.journal import Journal
from accelplug.tuning.refine import in_8_bits, weights, with_weights
from accelplug.tuning.space import Arm, Candidate
from accelplug.tuning.verdict import WORTH


@dataclass
class Prober:
    """Fills a forecast with what was measured on the moments of its trajectory.

    Attributes
    ----------
    pipe : the pipeline.
    tell : is told what is measured now.
    """

    forecast: Forecast
    pipe: Any
    journal: Journal
    tell: Callable[[str], None]

    def arm(self, arm: Arm) -> None:
        """Measure the errors by step and the time of an arm."""

        def measure() -> dict[str, Any]:
            self.tell(f"probing {arm}")
            probe = self.forecast.trajectory.probe(self.pipe, Candidate(arm).rules())
            errors = {str(step): error for step, error in probe.errors.items()}
            return {"errors": errors, "ratio": probe.ratio, "density": probe.density}

        self.forecast.probes[arm] = self.journal.get(f"probe {arm}", measure, TypeAdapter(Probe).validate_python)

    def arm_in_8_bits(self, arm: Arm) -> None:
        """Measure an arm with q.k in 8 bits, and know of it where it is faster."""
        probes = self.forecast.probes
        for eight in in_8_bits(arm):
            self.arm(eight)
            if probes[eight].ratio > probes[arm].ratio / WORTH:
                del probes[eight]

    def layers(self) -> None:
        """Measure the share of the squared error that each layer makes, by the boldest arm on that layer alone, at one moment."""
        trajectory, probes = self.forecast.trajectory, self.forecast.probes
        arm = max(probes, key=lambda arm: probes[arm].error(0))
        moment = trajectory.moments[len(trajectory.moments) // 2]

        def measure() -> list[float]:
            squares = []
            for layer in range(trajectory.layers):
                self.tell(f"probing layer {layer}")
                only = {"rules": [{"where": {"layers": layer}, "patch": arm.patch, "with": dict(arm.settings)}]}
                squares.append(trajectory.probe(self.pipe, only, [moment]).errors[moment.step] ** 2)
            return squares

        squares = self.journal.get(f"layers {arm}", measure, TypeAdapter(list[float]).validate_python)
        self.forecast.layer_share = {layer: square / (sum(squares) or 1.0) for layer, square in enumerate(squares)}

    def weighted(self, arm: Arm, inputs: dict[str, Any], seed: int) -> Arm | None:
        """Calibrate the weights of an arm's pooled blocks on a run, and measure the arm with them; None if they stay as they are."""

        def measure() -> dict[str, Any]:
            self.tell(f"weighing the pooled blocks of {arm}")
            return weights(self.pipe, arm, inputs, seed)

        found = self.journal.get(f"weights {arm}", measure, lambda table: with_weights(arm, table))
        if found is not None:
            self.arm(found)
        return found
