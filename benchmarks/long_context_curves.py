"""Two pictures of long prompts, of what `benchmarks.long_context` wrote: docs/long_prompts.png and docs/long_times.png.

usage: python -m benchmarks.long_context_curves [--folder FOLDER]

* long_prompts.png: seconds that a prompt takes against what it loses, a panel a length, for recipes that were both timed and weighed
  there. Up and down: nats a token more than dense on the same texts, mean, and from the least to the most of any text; beside a name,
  needles that were found.
* long_times.png: seconds to the first token, and milliseconds of each token behind it, over the length of the prompt.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common import RESULTS
from benchmarks.long_context import NAME, STEPPED

DOCS = Path(__file__).parents[1] / "docs"
PROMPTS = ("dense", "smollm2-135m/long", "xattention", "rows .90")
STEPS = ("dense", "pages 512", "clusters .05", "retrieval")


Curves = dict[str, tuple[list[int], list[float]]]
"""Lengths in tokens and times there, by recipe."""


class Spot(NamedTuple):
    """A recipe in a panel: seconds, nats a token more than dense (mean, least, most), needles found and asked for."""

    name: str
    seconds: float
    more: tuple[float, float, float]
    needles: str


def spots(data: dict[str, Any], tokens: str) -> list[Spot]:
    """What there is to draw at a length, the slowest first."""
    weighed, seconds = data["quality"][tokens], data["time"].get(tokens, {}).get("seconds", {})
    dense, found = weighed.get("dense", {}).get("nll", []), []
    for name in weighed.keys() & seconds.keys():
        row = weighed[name]
        if len(row["nll"]) == len(dense):  # on the same texts
            more = [own - stock for own, stock in zip(row["nll"], dense, strict=True)]
            told = str(row["needles"])
            found.append(Spot(name, seconds[name], (statistics.fmean(more), min(more), max(more)), told))
    return sorted(found, key=lambda spot: -spot.seconds)


def draw(panels: dict[str, list[Spot]], file: Path) -> None:
    """Draw a panel for each length."""
    import matplotlib.pyplot as plt  # the bench extra

    figure, axes = plt.subplots(1, len(panels), figsize=(6.4 * len(panels), 4.6), squeeze=False, sharey=True)
    colours = {
        name: f"C{number % 10}"
        for number, name in enumerate({spot.name: None for found in panels.values() for spot in found})
    }
    for axis, (tokens, found) in zip(axes[0], panels.items(), strict=True):
        axis.axhline(0.0, color="#969da6", linewidth=0.8, linestyle="--")
        for spot in found:
            mean, least, most = spot.more
            bar = [[mean - least], [most - mean]]
            label = f"{spot.name} ({spot.needles} needles)"
            axis.errorbar(spot.seconds, mean, bar, fmt="o", color=colours[spot.name], capsize=3, label=label)
        axis.set_title(f"{int(tokens):,} tokens")
        axis.set_xlabel("seconds to the first token")
        axis.set_xlim(left=0)
        axis.legend(fontsize=8, frameon=False)
    axes[0][0].set_ylabel("nats a token more than dense")
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def over_lengths(
    data: dict[str, Any], names: tuple[str, ...], value: Callable[[dict[str, Any], str], float | None]
) -> Curves:
    """For each name: lengths at which it was timed, ascending, and its times there."""
    found: Curves = {}
    for name in names:
        timed = {int(tokens): seconds for tokens, at in data.items() if (seconds := value(at, name)) is not None}
        found[name] = (sorted(timed), [timed[tokens] for tokens in sorted(timed)])
    return found


def draw_times(first: Curves, each: Curves, file: Path) -> None:
    """Draw time over length: of the first token in seconds, of each behind it in milliseconds."""
    import matplotlib.pyplot as plt  # the bench extra

    figure, axes = plt.subplots(1, 2, figsize=(12, 4.6))
    for axis, curves, label in zip(axes, (first, each), ("seconds to the first token", "milliseconds a token"), strict=True):
        for name, (lengths, times) in curves.items():
            axis.plot(
                lengths,
                times,
                marker="o",
                label=name,
                **({"color": "#5f6770", "linestyle": "--"} if name == "dense" else {}),
            )
        ticks = sorted({length for lengths, _ in curves.values() for length in lengths})
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [f"{length:,}" for length in ticks])
        axis.minorticks_off()
        axis.set_xlabel("tokens of the prompt")
        axis.set_ylabel(label)
        axis.legend(fontsize=8, frameon=False)
    axes[0].set_yscale("log")
    axes[1].set_ylim(bottom=0)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=DOCS)
    asked = parser.parse_args()
    data = json.loads((RESULTS / f"{NAME}.json").read_text())
    panels = {tokens: found for tokens in data["quality"] if len(found := spots(data, tokens)) > 1}
    draw(panels, asked.folder / "long_prompts.png")
    for tokens, found in panels.items():
        for spot in found:
            print(f"{tokens} {spot.name}: {spot.seconds:.2f} s, {spot.more[0]:+.4f} nats, needles {spot.needles}")

    stepped = json.loads((RESULTS / f"{STEPPED}.json").read_text())
    first = over_lengths(data["time"], PROMPTS, lambda at, name: at["seconds"].get(name))
    each = over_lengths(stepped["step"], STEPS, lambda at, name: at.get(name, {}).get("step"))
    draw_times(first, each, asked.folder / "long_times.png")
    print(f"wrote long_prompts.png and long_times.png into {asked.folder}")


if __name__ == "__main__":
    main()
