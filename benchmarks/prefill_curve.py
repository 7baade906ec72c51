"""Seconds that a long prompt takes against what it loses, by recipe: draws docs/long_prompts.png from what `benchmarks.long_context` wrote.

usage: python -m benchmarks.prefill_curve [--out FILE.png]

A panel a length, for recipes that were both timed and weighed there. Up and down: nats a token more than dense on the same texts, mean,
and from the least to the most of any text; beside a name, needles that were found.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common import RESULTS

PICTURE = Path(__file__).parents[1] / "docs" / "long_prompts.png"


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

    figure, axes = plt.subplots(1, len(panels), figsize=(6.4 * len(panels), 4.6), squeeze=False)
    for place, (axis, (tokens, found)) in enumerate(zip(axes[0], panels.items(), strict=True)):
        axis.axhline(0.0, color="#969da6", linewidth=0.8, linestyle="--")
        middle = statistics.fmean([min(spot.seconds for spot in found), max(spot.seconds for spot in found)])
        for number, spot in enumerate(found):
            mean, least, most = spot.more
            axis.errorbar(spot.seconds, mean, [[mean - least], [most - mean]], fmt="o", color=f"C{number % 10}", capsize=3)
            left = spot.seconds > middle  # its name stands on the side where there is room
            above = 10 if number % 2 else -14
            axis.annotate(
                f"{spot.name} ({spot.needles})",
                (spot.seconds, mean),
                (-6 if left else 6, above),
                textcoords="offset points",
                ha="right" if left else "left",
                fontsize=8,
            )
        axis.set_title(f"{int(tokens):,} tokens")
        axis.set_xlabel("seconds to the first token")
        axis.margins(x=0.25, y=0.2)
        if place == 0:
            axis.set_ylabel("nats a token more than dense")
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PICTURE)
    asked = parser.parse_args()
    data = json.loads((RESULTS / "long_context.json").read_text())
    panels = {tokens: found for tokens in data["quality"] if len(found := spots(data, tokens)) > 1}
    draw(panels, asked.out)
    for tokens, found in panels.items():
        for spot in found:
            print(f"{tokens} {spot.name}: {spot.seconds:.2f} s, {spot.more[0]:+.4f} nats, needles {spot.needles}")
    print(f"wrote {asked.out}")


if __name__ == "__main__":
    main()
