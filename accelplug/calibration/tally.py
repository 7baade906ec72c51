"""The dense runs of a calibration: what they show to it, and what they gave so far, which a file can hold."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from accelplug import files, show
from accelplug.calibration.target import Target
from accelplug.call import ALL_HEADS, AttentionCall, Clock, Layout, Site
from accelplug.comparison.ranks import Ranks
from accelplug.errors import AccelplugError, UnsupportedError
from accelplug.patches.base import Patch
from accelplug.patches.calibration import Calibration, Seen
from accelplug.table import bucket


@dataclass
class Tally:
    """The runs of one calibration, and what they gave so far."""

    target: Target
    prompts: int
    buckets: int
    seed: int
    settings: str
    """All that the result depends on, as JSON: a partial file must agree."""
    calibrations: dict[str, Calibration] = field(default_factory=dict)
    """By denoiser, those that saw a call."""
    grid_thw: tuple[int, int, int] | None = None
    steps: int | None = None
    kinds: set[str] = field(default_factory=set)
    turn: int = 0
    settled: dict[str, list[str]] = field(default_factory=dict)
    """By denoiser, names of the sums that earlier parts made."""
    before: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """By denoiser, the sums of this part up to the present round."""

    def __post_init__(self) -> None:
        self.watcher = Watcher(self)
        self.turns = self.target.make().parts * self.prompts
        self._tell: show.Tell = lambda done, now="": None

    def start(self, turn: int, tell: show.Tell) -> int:
        """Begin a run of the pipeline; return which prompt it is for."""
        self.turn, self._tell = turn, tell
        return turn % self.prompts

    def round(self, done: int, number: int) -> range:
        """Begin a round: the next runs, `number` at most, all of one part. Each is summed for itself."""
        if done % self.prompts == 0:
            self.settled = {name: list(one.state) for name, one in self.calibrations.items()}
        self.before = self._pop_sums()
        return range(done, min(done + number, (done // self.prompts + 1) * self.prompts))

    def add_up(self, ranks: Ranks) -> None:
        """End a round: add to the sums, in the order of the runs, what every process saw."""
        found = ranks.gather((self._pop_sums(), self.grid_thw, self.steps, self.kinds))
        for sums in (self.before, *(part[0] for part in found)):
            for name, tensors in sums.items():
                state = self.calibrations.setdefault(name, self.target.make()).state
                for key, x in tensors.items():
                    state[key] = state[key] + x if key in state else x
        for _, grid_thw, steps, kinds in found:
            self._on(grid_thw, "the denoiser")
            self.steps = steps if self.steps is None else self.steps
            self.kinds |= kinds

    def _pop_sums(self) -> dict[str, dict[str, Tensor]]:
        """Take this part's sums out of the calibrations."""
        return {
            name: {key: one.state.pop(key) for key in list(one.state) if key not in self.settled.get(name, ())}
            for name, one in self.calibrations.items()
        }

    def _on(self, grid_thw: tuple[int, int, int] | None, denoiser: str) -> None:
        """Take note of the grid of a call."""
        if None not in (self.grid_thw, grid_thw) and self.grid_thw != grid_thw:
            raise UnsupportedError(
                f"calibrate knows one grid per model, {denoiser} attends on {self.grid_thw} and {grid_thw} tokens."
            )
        self.grid_thw = grid_thw or self.grid_thw

    def due(self, site: Site, layout: Layout, clock: Clock) -> int | None:
        """Which bucket a call is looked at for, if at all: the step in its middle stands for it."""
        if site.heads != ALL_HEADS:
            raise UnsupportedError(
                f"calibrate looks at all heads of a layer, and {site.denoiser} has them shared out over {site.heads.ranks} ranks. "
                "Calibrate without tensor or context parallelism."
            )
        if clock.step is None or clock.steps is None:
            raise UnsupportedError("calibrate must know the diffusion step, and this pipeline's scheduler does not say it.")
        self._tell(self.turn + (clock.step + 1) / clock.steps, f"run {self.turn + 1} of {self.turns}")
        found = bucket(clock, buckets := min(self.buckets, clock.steps))
        steps = [step for step in range(clock.steps) if bucket(Clock(step, clock.steps), buckets) == found]
        return found if site.layer is not None and clock.step == steps[len(steps) // 2] else None

    def observe(self, place: Due, call: AttentionCall, out: Tensor) -> None:
        """Hand a dense call to the denoiser's calibration."""
        site, layout, clock = place.site, place.layout, place.clock
        self._on(layout.grid_thw, site.denoiser)
        self.steps = clock.steps
        self.kinds.add(site.kind)
        text = f"{self.seed} {self.turn} {site.denoiser} {site.module} {clock.step} {clock.branch}"
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])
        generator = torch.Generator().manual_seed(number)
        if site.denoiser not in self.calibrations:
            self.calibrations[site.denoiser] = self.target.make()
        buckets = min(self.buckets, clock.steps or 1)
        part, prompt = divmod(self.turn, self.prompts)
        seen = Seen(call, out, site, layout, clock, place.bucket, buckets, generator, prompt, self.prompts)
        self.calibrations[site.denoiser].observe(seen, part)

    # --------------------------------------------------------------------------------------------------- results

    def key(self, denoiser: str, key: str) -> str:
        """Name of a table in the file."""
        return f"{denoiser}.{key}" if len(self.calibrations) > 1 else key

    def tables(self) -> tuple[dict[str, Tensor], dict[str, tuple[str, ...]]]:
        """Return all tables and their axes."""
        tables, axes = {}, {}
        for denoiser, calibration in self.calibrations.items():
            for key, values in calibration.tables().items():
                tables[self.key(denoiser, key)] = values.contiguous()
                axes[self.key(denoiser, key)] = calibration.axes[key]
        return tables, axes

    def save(self, path: Path, turns: int) -> None:
        """Write the state after `turns` runs."""
        facts = asdict(Partial(self.settings, turns, self.grid_thw, self.steps, sorted(self.kinds), self.settled))
        tensors = {f"{name}/{key}": x for name, one in self.calibrations.items() for key, x in one.state.items()}
        files.write(path, save(tensors, {"partial": json.dumps(facts)}))

    def resume(self, path: Path) -> int:
        """Take up what `path` holds, if it is there; return how many runs it holds."""
        if not path.exists():
            return 0
        try:
            with safe_open(path, "pt") as file:
                facts = TypeAdapter(Partial).validate_json((file.metadata() or {})["partial"])
                tensors = {tuple(key.split("/", 1)): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise AccelplugError(f"{path}: no partial calibration: {error}. Delete it to start anew.") from error
        if facts.settings != self.settings or not 0 <= facts.turns <= self.turns:
            raise AccelplugError(
                f"{path} holds a calibration with other prompts, knobs or sizes, or of another model. "
                "Delete it to start anew, or give another path."
            )
        for (denoiser, *name), value in tensors.items():
            self.calibrations.setdefault(denoiser, self.target.make()).state["/".join(name)] = value
        self.grid_thw, self.steps = facts.grid_thw, facts.steps
        self.kinds, self.settled = set(facts.kinds), facts.settled
        return facts.turns


@dataclass(frozen=True)
class Partial:
    """What a partial file says of its sums: see `Tally`. `turns` are the runs that are in them."""

    settings: str
    turns: int
    grid_thw: tuple[int, int, int] | None
    steps: int | None
    kinds: list[str]
    settled: dict[str, list[str]]


@dataclass(frozen=True)
class Due:
    """Where and when a call is that is looked at."""

    site: Site
    layout: Layout
    clock: Clock
    bucket: int

    def to(self, device: Any) -> Due:
        """Nothing here lies on a device."""
        return self


class Watcher(Patch):
    """Runs dense, and shows what is due to a tally."""

    name, family = "watch", "sparse"
    speed = False

    def __init__(self, tally: Tally) -> None:
        super().__init__()
        self._tally = tally

    def prepare(self, site: Site, layout: Layout, clock: Clock, state: dict[str, Any]) -> Due | None:
        due = self._tally.due(site, layout, clock) if site.kind in ("self", "joint") else None
        return None if due is None else Due(site, layout, clock, due)

    def attend(self, call: AttentionCall, params: Due) -> Tensor:
        out = call.dense()
        self._show(params, call, out)
        return out

    @torch.compiler.disable
    def _show(self, place: Due, call: AttentionCall, out: Tensor) -> None:
        self._tally.observe(place, call, out)
