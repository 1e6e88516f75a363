"""Draw results/latency_pruning.json as docs/images/latency.svg, the picture of README.md."""

import json
from pathlib import Path

import matplotlib as mpl
from common import RESULTS

PICTURE = Path(__file__).parent.parent / "docs" / "images" / "latency.svg"
SERIES = {
    "a": ("half of the MACs, any width", "#9aa0a6"),
    "b": ("half of the MACs, whole blocks", "#4c8bf5"),
    "c": ("--target-latency 0.6", "#e8710a"),
}


def draw(rows: list[dict[str, object]], path: Path = PICTURE) -> None:
    """Plot the measured latency of each model's cuts against what the MACs promise."""
    mpl.use("svg")
    # Text stays text, and two runs on the same numbers give the same bytes.
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "latency", "font.size": 11})
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 0.45 * len(rows) + 1.4), layout="constrained")
    for y, row in enumerate(reversed(rows)):
        measured = {key: row[key]["latency"]["median"] for key in SERIES}  # type: ignore[index]
        axes.plot([min(measured.values()), max(measured.values())], [y, y], color="#dadce0", lw=2)
        for key, (_, colour) in SERIES.items():
            axes.plot(measured[key], y, "o", color=colour, ms=8)
    axes.axvline(1, color="black", lw=1)
    axes.axvline(0.5, color="black", lw=1, ls=":")
    axes.set_yticks(range(len(rows)), [str(row["model"]) for row in reversed(rows)])
    axes.set_xlim(0.4, 1.1)
    axes.set_xlabel("measured latency, original = 1 (dotted: what half of the MACs promises)")
    for label, colour in SERIES.values():
        axes.plot([], [], "o", color=colour, label=label)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    draw(json.loads((RESULTS / "latency_pruning.json").read_text())["rows"])
