"""What runs where: the answer of ``plug.where()``, one row an attention module, shown by layers."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from accelplug.call import Layout, Prompt, Site
from accelplug.show import Shown, table

if TYPE_CHECKING:
    from rich.table import Table

    from accelplug.kernels.plan import BlockPlan
    from accelplug.patches.base import Patch


@dataclass(frozen=True, eq=False)
class Placed:
    """What runs at one attention module.

    Attributes
    ----------
    site : the module; None for a patch that stands around ``generate``.
    name : of the patch that a rule puts there, ``dense`` where none does.
    patch : its instance, which modules with the same settings share; None for dense.
    params : what the patch was given for this forward; None where it was given nothing and dense attention runs.
    layout : how the tokens lie, a `Layout` for denoisers and a `Prompt` for language models; None where that is not known.
    reason : why a module that a rule names runs dense, where that is known before the call; else None.
    error : the patch's last estimate of its answer's relative error; None where it makes none.
    """

    site: Site | None
    name: str = "dense"
    patch: Patch | None = None
    params: Any = None
    layout: Layout | Prompt | None = None
    reason: str | None = None
    error: float | None = None

    @property
    def plan(self) -> BlockPlan | None:
        """The block plan, where it does not wait for the queries and keys of a call."""
        return getattr(self.params, "plan", None)

    @property
    def density(self) -> float | None:
        """Share of (query, key) pairs that the plan reads exactly, on average over heads; None without a plan."""
        return None if self.plan is None else float(self.plan.density().mean())

    @property
    def config(self) -> dict[str, Any]:
        """Settings of the patch that are not its defaults, as plain data."""
        return {} if self.patch is None else self.patch.config.model_dump(mode="json", exclude_defaults=True)

    @property
    def repairs(self) -> str:
        """How the patch takes its own error off, in words; empty where it does not."""
        return "" if self.patch is None else self.patch.repairs


@dataclass(frozen=True, repr=False)
class Placement(Shown):
    """What runs where, row by row; prints as a table in which layers that run alike are one line."""

    title: str
    rows: tuple[Placed, ...]

    def __iter__(self) -> Iterator[Placed]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data: a row's site, patch, settings, reason, density, repair and estimated error."""
        return {
            "title": self.title,
            "rows": [
                {
                    "site": None if row.site is None else asdict(row.site),
                    "patch": row.name,
                    "config": row.config,
                    "reason": row.reason,
                    "density": row.density,
                    "repairs": row.repairs,
                    "error": row.error,
                }
                for row in self.rows
            ],
        }

    def __rich__(self) -> Table:
        headings = ["part", "attention", "layers", "runs", "settings", "density", ""]
        mended = any(row.repairs for row in self.rows)
        found = table(self.title, *headings, *(["repair", "estimated error"] if mended else []))
        alike: dict[tuple[str, ...], list[Placed]] = {}
        for row in self.rows:
            alike.setdefault(_cells(row), []).append(row)
        for (part, kind, *cells), rows in alike.items():
            repair = [rows[0].repairs, _errors(rows)] if mended else []
            found.add_row(part, kind, _layers(row.site for row in rows), *cells, *repair)
        return found


def _cells(row: Placed) -> tuple[str, ...]:
    """What a table says of a row, but for its layer."""
    part, kind = ("", "around generate") if row.site is None else (row.site.denoiser, row.site.kind)
    config = ", ".join(f"{name}={value}" for name, value in row.config.items())
    return part, kind, row.name, config, "" if row.density is None else f"{row.density:.2f}", row.reason or ""


def _errors(rows: Iterable[Placed]) -> str:
    """The last estimates of layers that run alike: their median, and the worst with its layer."""
    known = [(row.error, row.site) for row in rows if row.error is not None and row.site is not None]
    if not known:
        return ""
    worst, site = max(known, key=lambda pair: pair[0])
    return f"{statistics.median(error for error, _ in known):.3f}, worst {worst:.3f} in layer {site.layer}"


def _layers(sites: Iterable[Site | None]) -> str:
    """Layers in words: ``0-3, 7``; modules that have no place in the order of layers by their number."""
    known = [site for site in sites if site is not None]
    numbers = sorted({site.layer for site in known if site.layer is not None})
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    said = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    without = sum(site.layer is None for site in known)
    return ", ".join([*said, *([f"{without} modules without a number"] if without else [])])
