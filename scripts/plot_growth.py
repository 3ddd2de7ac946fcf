"""Draws how time grows, from what `gr bench-stack --growth --json FILE` measured.

    python scripts/plot_growth.py [FILE [PICTURE]]

Needs matplotlib (the dependency group ``plots``).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parent.parent
MEASURED = ROOT / "benchmarks" / "results" / "stack_growth.json"
PICTURE = ROOT / "docs" / "growth.svg"

AXES = {
    "history": ("new", "history L, 256 candidates"),
    "candidates": ("candidates", "candidates N, history 1024"),
    "cached history": ("cached", "cached history, 16 new, 64 candidates"),
}
"""For each series, the field of a point that grows, and what it is."""


def main(measured: Path = MEASURED, picture: Path = PICTURE) -> None:
    report = json.loads(measured.read_text(encoding="utf-8"))
    # The same picture for the same figures, and text as text.
    matplotlib.rcParams.update({"svg.hashsalt": "growth", "svg.fonttype": "none"})
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, panels = plt.subplots(1, len(AXES), figsize=(11, 3.6), sharey=True)
    for panel, (series, (field, title)) in zip(panels, AXES.items(), strict=True):
        draw(panel, report["series"][series], field)
        panel.set_title(title, fontsize=9)
        panel.set_xlabel("tokens")
    panels[0].set_ylabel("CPU milliseconds, one core")
    panels[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(picture, metadata={"Date": None})


def draw(panel: Axes, points: list[dict[str, Any]], field: str) -> None:
    """Double logarithmic, with lines of slope 1 and 2 for comparison above the last points."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for point in points:
        for side in point["sides"]:
            if side["cpu_ms"] is not None:
                lines.setdefault(side["name"], []).append((point[field], side["cpu_ms"]))
    panel.set_xscale("log", base=2)
    panel.set_yscale("log", base=10)
    for number, (name, line) in enumerate(lines.items()):
        x, y = zip(*line, strict=True)
        panel.plot(x, y, "o-", markersize=3, linewidth=1.2, label=name, color=f"C{number}")
    ticks = [point[field] for point in points]
    highest = 2 * max(y for line in lines.values() for _, y in line)
    for power, style, word in ((1, "--", "linear"), (2, ":", "quadratic")):
        guide = [ticks[-1] / 8, ticks[-1]]
        panel.plot(
            guide,
            [highest * (x / ticks[-1]) ** power for x in guide],
            style,
            color="0.7",
            label=word,
        )
    panel.set_xticks(ticks, [str(tick) for tick in ticks], rotation=45)
    panel.grid(True, which="major", alpha=0.3)


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:3]))
