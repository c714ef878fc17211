"""Draw the CSVs of bench/results, each as a picture beside it.

python bench/plot.py
"""

from common import RESULTS, read_csv
from matplotlib.figure import Figure

COLOURS = {
    "depthnet": "#0072B2",
    "eager": "#D55E00",
    "compile": "#E69F00",
    "bare GEMMs": "#009E73",
    "copy": "#999999",
}


def unique(values) -> list:
    return list(dict.fromkeys(values))


def grouped_bars(
    axis, labels: list[str], heights: dict[str, list[float]], colours: dict[str, str] = COLOURS
) -> None:
    """A group of bars for each label, in it a bar for each provider."""
    width = 0.8 / len(heights)
    for offset, (provider, values) in enumerate(heights.items()):
        places = [index + width * (offset - (len(heights) - 1) / 2) for index in range(len(values))]
        axis.bar(places, values, width, color=colours[provider], label=provider)
    axis.set_xticks(range(len(labels)), labels)
    axis.grid(axis="y", alpha=0.3)


def save(figure: Figure, title: str, row: dict, name: str) -> None:
    figure.suptitle(
        f"{title}: {row['cpu']}, {row['threads']} threads, {row['isa']}, torch {row['torch']}"
    )
    figure.savefig(RESULTS / name, dpi=120)
    print(f"wrote {RESULTS / name}")


def residual() -> None:
    rows = read_csv("residual.csv")
    kinds = sorted({(row["dtype"], row["mode"]) for row in rows}, reverse=True)
    figure = Figure(figsize=(11, 7), layout="constrained")
    for axis, (dtype, mode) in zip(figure.subplots(2, 2).flat, kinds, strict=True):
        own = [row for row in rows if (row["dtype"], row["mode"]) == (dtype, mode)]
        rates = {
            provider: [float(row["gb_per_s"]) for row in own if row["provider"] == provider]
            for provider in unique(row["provider"] for row in own)
        }
        grouped_bars(axis, unique(f"{row['rows']} x {row['n']}" for row in own), rates)
        axis.tick_params(axis="x", rotation=20)
        axis.set_title(f"{mode}, {dtype}")
        axis.set_xlabel("rows x n")
        axis.set_ylabel("GB/s of the bytes that must move")
    figure.axes[0].legend()
    save(figure, "scaled_residual", rows[0], "residual.png")


def throughput() -> None:
    rows = read_csv("throughput.csv")
    figure = Figure(figsize=(11, 8), layout="constrained")
    (steps, inference), (depth, others) = (
        half.subplots(1, 2, width_ratios=ratios)  # each row is laid out on its own
        for half, ratios in zip(figure.subfigures(2, 1), ((1, 1), (1.3, 1)), strict=True)
    )
    of_limit(steps, [row for row in rows if row["section"] == "step"])
    steps.set_title("forward + backward, float32, B = 128")
    steps.legend(loc="upper left", ncols=2)
    of_limit(inference, [row for row in rows if row["section"] == "inference"])
    inference.set_title("inference, float32, B = 128")
    linear_in_depth(depth, [row for row in rows if row["section"] == "depth"])
    speedups(others, rows)
    save(figure, "residual_stack", rows[0], "throughput.png")


def milliseconds(rows: list[dict], columns: tuple[str, ...]) -> dict[tuple, dict[str, float]]:
    """For each setting of the columns: provider -> ms."""
    times = {}
    for row in rows:
        times.setdefault(tuple(row[column] for column in columns), {})[row["provider"]] = float(
            row["ms"]
        )
    return times


def of_limit(axis, rows: list[dict]) -> None:
    times = milliseconds(rows, ("n", "depth"))
    shares = {
        provider: [100 * ms["FMA limit"] / ms[provider] for ms in times.values()]
        for provider in unique(row["provider"] for row in rows)
        if provider != "FMA limit"
    }
    grouped_bars(axis, [f"n={n}\nL={depth}" for n, depth in times], shares)
    axis.set_ylabel("% of the FMA limit")
    axis.axhline(100, color="black", linewidth=1)
    axis.set_ylim(0, 120)


def linear_in_depth(axis, rows: list[dict]) -> None:
    depths = [int(row["depth"]) for row in rows]
    layer = [float(row["ms"]) / depth for row, depth in zip(rows, depths, strict=True)]
    axis.plot(depths, [ms / layer[0] for ms in layer], "o-", color=COLOURS["depthnet"])
    axis.axhspan(0.85, 1.15, color=COLOURS["copy"], alpha=0.3, label="within 15 %")
    axis.set_xscale("log", base=2)
    axis.set_xticks(depths, depths)
    axis.set_ylim(bottom=0)
    axis.set_title("forward + backward, n = 64, B = 128")
    axis.set_xlabel("depth L")
    axis.set_ylabel(f"time a layer, relative to L = {depths[0]}")
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right")


def speedups(axis, rows: list[dict]) -> None:
    """How often as fast as its only competitor, in the sections that have one."""
    labels = {
        "population": "{members} networks, n={n} L={depth}, B={rows}",
        "training": "AdamW step, n={n} L={depth}",
        "dtypes": "{dtype}, n={n} L={depth}",
    }
    ratios = {}
    for section, label in labels.items():
        own = [row for row in rows if row["section"] == section]
        columns = ("members", "n", "depth", "rows", "dtype")
        for setting, ms in milliseconds(own, columns).items():
            ours = ms.pop("depthnet")
            ms.pop("FMA limit", None)
            (other,) = ms
            text = label.format(**dict(zip(columns, setting, strict=True)))
            ratios[f"{text}\nagainst {other}"] = ms[other] / ours
    bars = axis.barh(list(ratios), list(ratios.values()), color=COLOURS["depthnet"])
    axis.bar_label(bars, fmt="%.1f", padding=3, bbox={"color": "white", "pad": 0.5})
    axis.axvline(1, color="black", linewidth=1)
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.tick_params(axis="y", labelsize=8)
    axis.set_title("depthnet, how often as fast")
    axis.grid(axis="x", alpha=0.3)


def optimizer() -> None:
    rows = read_csv("optimizer.csv")
    colours = {
        "depthnet, a group each": COLOURS["depthnet"],
        "depthnet, stacked": "#56B4E9",
        "depthnet, one lr": "#56B4E9",
        "torch fused, one lr": "black",
        "torch fused, a group each": COLOURS["eager"],
        "torch compile, one lr": COLOURS["compile"],
        "torch foreach, one lr": "#F0E442",
        "torch foreach, a group each": "#CC79A7",
        "copy": COLOURS["copy"],
    }
    figure = Figure(figsize=(11, 8), layout="constrained")
    stacks, right = figure.subfigures(2, 1)
    axis = stacks.subplots()
    times = milliseconds([row for row in rows if row["section"] == "stack"], ("n", "tensors"))
    labels = [f"n={n}, L={tensors}" for n, tensors in times]
    relative = {
        provider: [ms[provider] / ms["torch fused, one lr"] for ms in times.values()]
        for provider in colours
        if provider not in ("depthnet, one lr", "torch fused, one lr")
    }
    grouped_bars(axis, labels, relative, colours)
    axis.axhline(1, color="black", linewidth=1, label="torch fused, one lr")
    axis.set_yscale("log")
    axis.set_title("AdamW step on L weights (n, n), float32")
    axis.set_ylabel("time, relative to torch fused with one lr")
    stacks.legend(loc="outside lower center", ncols=4)
    many, small = right.subplots(1, 2, width_ratios=(1.3, 1))
    own = {row["provider"]: float(row["ms"]) for row in rows if row["section"] == "many"}
    bars = many.barh(list(own), list(own.values()), color=[colours[provider] for provider in own])
    many.bar_label(bars, fmt="%.0f ms", padding=3)
    many.invert_yaxis()
    many.margins(x=0.15)
    many.set_title("10,000 tensors of 1,000 elements")
    many.set_xlabel("ms a step")
    for provider in ("depthnet, one lr", "torch fused, one lr"):
        own = [
            (int(row["tensors"]), float(row["ms"]) * 1e3)
            for row in rows
            if (row["section"], row["provider"]) == ("overhead", provider)
        ]
        small.plot(*zip(*own, strict=True), "o-", color=colours[provider], label=provider)
    small.set_xscale("log")
    small.set_yscale("log")
    small.set_title("tensors of 4 elements")
    small.set_xlabel("tensors")
    small.set_ylabel("microseconds a step")
    small.grid(alpha=0.3)
    small.legend()
    save(figure, "optimizer step", rows[0], "optimizer.png")


def memory() -> None:
    rows = read_csv("memory.csv")
    styles = {
        "eager": (COLOURS["eager"], "o-"),
        "eager, inference": (COLOURS["eager"], "s--"),
        "depthnet": (COLOURS["depthnet"], "o-"),
        "depthnet, inference": (COLOURS["depthnet"], "s--"),
        "depthnet, checkpoints": ("#56B4E9", "o-"),
    }
    widths = unique(row["n"] for row in rows)
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    for axis, n in zip(figure.subplots(1, len(widths), sharey=True), widths, strict=True):
        for provider, (colour, style) in styles.items():
            own = [row for row in rows if (row["n"], row["provider"]) == (n, provider)]
            depths = [int(row["depth"]) for row in own]
            # Linux counts resident memory in steps of about 0.25 MiB.
            peaks = [max(0.25, float(row["peak_bytes"]) / 2**20) for row in own]
            axis.plot(depths, peaks, style, color=colour, label=provider)
        gradients = [
            float(row["gradient_bytes"]) / 2**20
            for row in rows
            if (row["n"], row["provider"]) == (n, "depthnet")
        ]
        axis.plot(depths, gradients, ":", color="black", label="the gradients alone")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(depths, depths)
        axis.set_title(f"n = {n}, B = {rows[0]['rows']}, {rows[0]['dtype']}")
        axis.set_xlabel("depth L")
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("peak above inputs and weights, MiB")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    save(figure, "Memory of forward + backward", rows[0], "memory.png")


def roofline() -> None:
    rows = read_csv("roofline.csv")
    colours = {
        "depthnet": COLOURS["depthnet"],
        "depthnet, by plan": "#56B4E9",
        "eager": COLOURS["eager"],
        "compile": COLOURS["compile"],
    }
    figure = Figure(figsize=(12, 8.5), layout="constrained")
    chips = unique(row["chip"] for row in rows)
    for axis, chip in zip(figure.subplots(2, 2, sharey=True).flat, chips, strict=True):
        own = [row for row in rows if row["chip"] == chip]
        labels = unique(f"n={row['n']}\nL={row['depth']}\nB={row['rows']}" for row in own)
        times, device = (
            {name: [float(row[key]) for row in own if row["provider"] == name] for name in colours}
            for key in ("ms", "device_ms")
        )
        grouped_bars(axis, labels, times, colours)
        for name, bars in zip(colours, list(axis.containers), strict=True):
            middles = [bar.get_x() + bar.get_width() / 2 for bar in bars]
            (marks,) = axis.plot(middles, device[name], "_", color="black", markersize=8)
        marks.set_label("of it the GPU alone, as in a CUDA graph")
        axis.set_yscale("log")
        axis.set_title(chip)
        axis.set_ylabel("predicted ms a step")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.suptitle(
        "PREDICTED, not measured: a training step of a ResNet with AdamW, bfloat16 autocast"
    )
    figure.savefig(RESULTS / "roofline.png", dpi=120)
    print(f"wrote {RESULTS / 'roofline.png'}")


def numerics() -> None:
    # What coincides is drawn by hollow marks around the others' filled ones.
    styles = {
        "depthnet, native": {"color": COLOURS["depthnet"], "fmt": "o-", "ms": 5},
        "depthnet, Triton": {"color": COLOURS["depthnet"], "fmt": "s", "ms": 9, "mfc": "none"},
        "depthnet, reference": {"color": "black", "fmt": "D", "ms": 12, "mfc": "none"},
        "eager autocast, float32 x": {"color": COLOURS["compile"], "fmt": "^-", "ms": 6},
        "eager autocast, 16-bit x": {"color": COLOURS["eager"], "fmt": "v-", "ms": 6},
        "eager, all 16-bit": {"color": COLOURS["eager"], "fmt": "o", "ms": 12, "mfc": "none"},
    }
    phis = {"abs": "phi(h) = |h|", "identity": "phi(h) = h: no slope depends on a sign"}
    quantities = {
        "output": "output",
        "grad_x": "gradient of x",
        "grad_weight": "gradients of the weights",
    }
    rows = [row for row in read_csv("numerics.csv") if row["dtype"] == "bfloat16"]
    figure = Figure(figsize=(12, 8), layout="constrained")
    grid = figure.subplots(len(phis), len(quantities), sharey=True)
    for line, (phi, phi_title) in zip(grid, phis.items(), strict=True):
        for axis, (quantity, title) in zip(line, quantities.items(), strict=True):
            for provider in unique(row["provider"] for row in rows if row["activation"] == phi):
                own = [r for r in rows if (r["activation"], r["provider"]) == (phi, provider)]
                depths = [int(row["depth"]) for row in own]
                middle, least, most = (
                    [float(row[quantity + which]) for row in own]
                    for which in ("", "_least", "_most")
                )
                below = [m - low for m, low in zip(middle, least, strict=True)]
                above = [high - m for m, high in zip(middle, most, strict=True)]
                label = f"{provider} ({own[0]['stream']} stream)"
                axis.errorbar(
                    depths, middle, (below, above), capsize=3, label=label, **styles[provider]
                )
            root = [2e-3 * (depth / depths[0]) ** 0.5 for depth in depths]
            axis.plot(depths, root, ":", color=COLOURS["copy"], label="growth like √L")
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xticks(depths, depths)
            axis.set_title(title)
            axis.set_xlabel("depth L")
            axis.grid(alpha=0.3)
        line[0].set_ylabel(f"{phi_title}\nrelative RMS error against float64")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    first = rows[0]
    title = (
        f"Rounding error, bfloat16, n = {first['n']}, median and range of {first['seeds']} seeds"
    )
    save(figure, title, first, "numerics.png")


def sweep() -> None:
    rows = read_csv("sweep.csv")[:-1]
    seconds = {
        "populations": [float(row["population_s"]) for row in rows],
        "eager loop (extrapolated)": [float(row["loop_s_extrapolated"]) for row in rows],
        "FMA limit": [float(row["fma_limit_s"]) for row in rows],
    }
    colours = {
        "populations": COLOURS["depthnet"],
        "eager loop (extrapolated)": COLOURS["eager"],
        "FMA limit": COLOURS["copy"],
    }
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axis = figure.subplots()
    grouped_bars(axis, [row["depth"] for row in rows], seconds, colours)
    for index, row in enumerate(rows):
        axis.annotate(f"{float(row['ratio']):.1f} x", (index, float(row["loop_s_extrapolated"])),
            ha="center", va="bottom")  # fmt: skip
    axis.set_yscale("log")
    axis.set_ylim(top=2 * max(seconds["eager loop (extrapolated)"]))
    axis.set_xlabel("depth L")
    axis.set_ylabel(f"seconds of {rows[0]['trials']} trials")
    axis.legend(loc="upper left", frameon=False)
    title = "A transfer study as populations and as a loop"
    save(figure, title, rows[0], "sweep.png")


if __name__ == "__main__":
    residual()
    throughput()
    optimizer()
    memory()
    roofline()
    numerics()
    sweep()
