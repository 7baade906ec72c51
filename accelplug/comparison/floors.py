"""Floors: what dense attention itself scores against the dense run. A figure means something only between them, on the same prompt.

From above: another kernel, and another dtype. Nobody calls that a change, yet on a large model it may cost more than a gentle patch
(MiniMax-H3, dense SageAttention against dense FlashAttention 3: 27.7 dB, SSIM .85; github.com/sgl-project/sglang/pull/33703). The lower
of both is *the* floor: what scores as much is as good as dense. From below: another seed, which is another clip.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from accelplug.call import AttentionCall, Clock, Site
from accelplug.comparison.metrics import BY_KEY, METRICS
from accelplug.comparison.rows import Row, Sample
from accelplug.errors import AccelplugError, worded
from accelplug.patches.base import Patch
from accelplug.plug import apply

MOST = 0.5
"""Unless all are asked for, runs for floors are at most this share of the others; those of the first prompt are always made. Ours."""
OTHER_DTYPE = {torch.float32: torch.bfloat16, torch.bfloat16: torch.float16}


@dataclass(frozen=True)
class Floor:
    """One floor.

    Attributes
    ----------
    name : in budgets.
    row : what its row is called.
    on : ``on(pipe, device) -> context`` in which dense attention is that of the floor.
    reseeded : whether it is run at another seed.
    """

    name: str
    row: str
    on: Callable[[Any, torch.device], AbstractContextManager[Any]] = lambda pipe, device: nullcontext()
    reseeded: bool = False


class OtherDtype(Patch):
    """Dense attention in another dtype: of float32 in bfloat16, of bfloat16 in float16, of others in float32."""

    name, family = "another dtype", "sparse"
    speed = False

    def prepare(self, site: Site, layout: Any, clock: Clock, state: dict[str, Any]) -> tuple[()]:
        """Return what `attend` needs: nothing."""
        return ()

    def attend(self, call: AttentionCall, params: tuple[()]) -> torch.Tensor:
        """Return dense attention, computed in another dtype."""
        dtype = OTHER_DTYPE.get(call.q.dtype, torch.float32)
        mask = {} if call.mask is None else {"attn_mask": call.mask[:, None, None]}
        return call.dense(call.q.to(dtype), call.k.to(dtype), call.v.to(dtype), **mask).to(call.q.dtype)


@contextmanager
def _another_kernel(pipe: Any, device: torch.device) -> Iterator[None]:
    """Torch's memory-efficient kernel, where flash or cuDNN would run (half precision on a GPU); else its plain maths."""
    half = device.type == "cuda" and getattr(pipe, "dtype", torch.float32) != torch.float32
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH] if half else [SDPBackend.MATH]):
        yield


FLOORS: Mapping[str, Floor] = {
    floor.name: floor
    for floor in (
        Floor("kernel", "dense, another kernel", _another_kernel),
        Floor("dtype", "dense, another dtype", lambda pipe, device: apply(pipe, OtherDtype(), gate="off")),
        Floor("seed", "dense, another seed", reseeded=True),
    )
}
"""By their names in budgets, where ``floor`` is the lower of ``kernel`` and ``dtype``."""
RELATIVE_TO = ("floor", *FLOORS)
"""What a bound of a budget may be relative to."""
NO_FLOOR = "the same as dense to the last bit, for the pipeline's attention did not run otherwise"
"""Of a floor that is none."""


def floor_prompts(floors: Any, prompts: int, seeds: int, runs: int) -> int:
    """Return on how many prompts, the first ones, floors are run.

    Parameters
    ----------
    floors : True for as many as `MOST` allows, ``all``, or False for none.
    prompts, seeds, runs : how many there are, and runs without floors.

    Raises
    ------
    AccelplugError
        If `floors` is none of these.
    """
    if floors is False:
        return 0
    if floors == "all":
        return prompts
    if floors is not True:
        raise AccelplugError(
            worded("floors", "--floors") + f": expected True, False or 'all', got {floors!r}; False leaves them out."
        )
    each = len(FLOORS) - (seeds > 1)  # at a second seed, dense runs anyway
    return min(prompts, max(1, int(MOST * runs / each)))


def other_seed(seeds: Sequence[int], seed: int) -> int:
    """Return the seed behind one, or the next number where there is no other."""
    return seeds[(list(seeds).index(seed) + 1) % len(seeds)] if len(seeds) > 1 else seed + 1


@dataclass(frozen=True)
class Between:
    """A figure between its floors: means over the runs on which the floors were measured, too.

    Attributes
    ----------
    seed : dense at another seed; NaN where the figure needs no dense run, or was not measured.
    floor : dense in another kernel or dtype, the worse of both.
    share : of the way from `seed` to `floor`; 1 is as good as dense, 0 as another clip.
    """

    value: float
    seed: float
    floor: float

    @property
    def share(self) -> float:
        """Where the figure stands; NaN where the floors are the same, or nothing tells."""
        way = self.floor - self.seed
        return (self.value - self.seed) / way if way and math.isfinite(way) else math.nan

    def __str__(self) -> str:
        return f"{self.share:.0%}" if math.isfinite(self.share) else "same" if math.isinf(self.share) else ""


def between(row: Row, floors: Mapping[str, Row], key: str) -> Between | None:
    """Hold a row's figure, by the key of its metric, against the floors on the same prompts and seeds; None where there are none.

    `floors`: rows by the names of `FLOORS`.
    """
    known = {(s.prompt, s.seed): s.scores[key] for s in row.samples if key in s.scores}
    found: dict[str, list[float]] = {}
    pairs = {(s.prompt, s.seed) for floor in floors.values() for s in floor.samples if key in s.scores} & set(known)
    for name, floor in floors.items():
        found[name] = [s.scores[key] for s in floor.samples if (s.prompt, s.seed) in pairs and key in s.scores]
    if (
        not pairs
        or not found.get("seed")
        or not (upper := [statistics.fmean(found[n]) for n in FLOORS if n != "seed" and found.get(n)])
    ):
        return None
    worse = min if BY_KEY[key].higher_is_better else max
    value = statistics.fmean(known[pair] for pair in sorted(pairs))
    return Between(value, statistics.fmean(found["seed"]), worse(upper))


@dataclass
class Floors:
    """What the floors scored, by name and prompt; what is not known is run where it is first asked for, once a prompt.

    Attributes
    ----------
    run : ``run(floor, prompt, seed) -> Sample``, where the dense run of that prompt and seed is known; None if all floors are known.
    """

    known: dict[tuple[str, int], Sample] = field(default_factory=dict)
    run: Callable[[Floor, int, int], Sample] | None = None

    def value(self, metric: str, to: str, prompt: int, seed: int) -> float:
        """Return what one of `RELATIVE_TO` scores at a prompt, by a metric of the tables; it is run at `seed` if it was not yet.

        Raises
        ------
        AccelplugError
            If it scores nothing that a bound can be relative to: the same as dense, to the last bit, or nothing at all.
        """
        names = [name for name, floor in FLOORS.items() if not floor.reseeded] if to == "floor" else [to]
        for name in names:
            if (name, prompt) not in self.known and self.run is not None:
                self.known[name, prompt] = self.run(FLOORS[name], prompt, seed)
        found = [self.known[name, prompt].scores.get(METRICS[metric].key, math.nan) for name in names]
        finite = [value for value in found if math.isfinite(value)]
        if not finite:
            raise AccelplugError(
                f"A bound of {metric} is relative to {to}, which here scores {found[0]:g}"
                f"{f': {NO_FLOOR}' if math.isinf(found[0]) else ''}. Bound it by a number, or relative to another floor."
            )
        return (min if METRICS[metric].higher_is_better else max)(finite)
