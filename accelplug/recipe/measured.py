"""The rows of a recipe that say how fast and how good it was, on real weights."""

from __future__ import annotations

from pydantic import Field

from accelplug.recipe.conditions import Strict


class Spread(Strict):
    """Quantiles over repeated timings, in milliseconds, or over gains."""

    p20: float = Field(gt=0)
    p50: float = Field(gt=0)
    p80: float = Field(gt=0)


class Quality(Strict):
    """A score over seeds. Leave it out where it is not finite (identical videos)."""

    mean: float
    worst: float


class Task(Strict):
    """A figure of answers, of the stock model and with the recipe, on the same questions."""

    dense: float
    value: float


class Measured(Strict):
    """One measurement on real weights: what ran, on what, how fast, how far from the dense run at the same seed."""

    date: str
    """ISO 8601 day."""
    device: str
    versions: dict[str, str]
    """accelplug, torch, diffusers, ..."""
    git: str | None = None
    weights: str | None = None
    """Which checkpoint, name and revision."""
    inputs: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """height, width, num_frames, num_inference_steps, ..."""
    prompts: list[str] = Field(default_factory=list)
    dtype: str | None = None
    seeds: list[int] = Field(min_length=1)
    baseline: str | None = None
    """Name of the dense attention it is compared with."""
    choices: dict[str, str] = Field(default_factory=dict)
    """Kernel, gate: what was chosen by timing."""
    dense_ms: Spread
    ms: Spread
    speedup: Spread | None = None
    """Gain over dense: of each prompt and seed the fastest dense run's time over the recipe's; of older rows `dense_ms` over `ms`."""
    density: float | None = Field(None, ge=0, le=1)
    """Keys read over all keys, pooled ones counted."""
    peak_mib: float | None = Field(None, ge=0)
    psnr_db: Quality | None = None
    ssim: Quality | None = None
    foreground_psnr_db: Quality | None = None
    flicker: Quality | None = None
    lpips: Quality | None = None
    floors: dict[str, dict[str, Quality]] = Field(default_factory=dict)
    """What dense attention itself scored: in another `kernel`, another `dtype`, at another `seed`, by figure."""
    floor_psnr_db: Quality | None = None
    """Of older rows: dense in another kernel."""
    budget: str | None = None
    """Bounds that every run kept; `verify` holds new runs against them."""
    objective: str | None = None
    """Language models: the figure of `task` that the recipe was tuned for."""
    task: dict[str, Task] = Field(default_factory=dict)
    """Language models: accuracy, hallucination, nll ... on questions that `inputs` names; times are milliseconds a question."""

    @property
    def gain(self) -> float:
        """The median gain over dense."""
        if self.speedup is not None:
            return self.speedup.p50
        return self.dense_ms.p50 / self.ms.p50 if self.ms.p50 else float("inf")
