"""Draw the CSVs of bench/results, each as a picture beside it.

python bench/plot.py
"""

import csv

from common import RESULTS
from matplotlib.figure import Figure

COLOURS = {"depthnet": "#0072B2", "eager": "#D55E00", "compile": "#E69F00", "copy": "#999999"}


def residual() -> None:
    with open(RESULTS / "residual.csv") as file:
        rows = list(csv.DictReader(file))
    kinds = sorted({(row["dtype"], row["mode"]) for row in rows}, reverse=True)
    figure = Figure(figsize=(11, 7), layout="constrained")
    for axis, (dtype, mode) in zip(figure.subplots(2, 2).flat, kinds, strict=True):
        own = [row for row in rows if (row["dtype"], row["mode"]) == (dtype, mode)]
        shapes = list(dict.fromkeys((row["rows"], row["n"]) for row in own))
        for offset, (provider, colour) in enumerate(COLOURS.items()):
            rates = [float(row["gb_per_s"]) for row in own if row["provider"] == provider]
            places = [index + 0.2 * (offset - 1.5) for index in range(len(rates))]
            axis.bar(places, rates, 0.2, color=colour, label=provider)
        axis.set_xticks(range(len(shapes)), [f"{r} x {n}" for r, n in shapes], rotation=20)
        axis.set_title(f"{mode}, {dtype}")
        axis.set_xlabel("rows x n")
        axis.set_ylabel("GB/s of the bytes that must move")
        axis.grid(axis="y", alpha=0.3)
    figure.axes[0].legend()
    row = rows[0]
    figure.suptitle(
        f"scaled_residual: {row['cpu']}, {row['threads']} threads, {row['isa']}, torch {row['torch']}"
    )
    figure.savefig(RESULTS / "residual.png", dpi=120)
    print(f"wrote {RESULTS / 'residual.png'}")


if __name__ == "__main__":
    residual()
