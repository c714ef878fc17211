"""depthnet classify and depthnet doctor."""

from __future__ import annotations

import argparse
import platform
from pathlib import Path

from depthnet._checks import optional_import
from depthnet.cli.terminal import console


def add_verbs(verbs) -> None:
    classify = verbs.add_parser(
        "classify", help="what the infinite-depth limit of (ALPHA, GAMMA) is"
    )
    classify.set_defaults(run=run_classify)
    classify.add_argument("alpha", type=float, help="branch multiplier ∝ depth^-ALPHA")
    classify.add_argument("gamma", type=float, help="Adam learning rate ∝ depth^-GAMMA")
    classify.add_argument(
        "--block-depth", type=int, default=1, metavar="K", help="layers in a block"
    )

    doctor = verbs.add_parser("doctor", help="what this installation has, and what it lacks")
    doctor.set_defaults(run=run_doctor)


def run_classify(options: argparse.Namespace) -> int:
    from depthnet.scaling import PRESETS, classify

    terminal = console()
    found = classify(options.alpha, options.gamma, options.block_depth)
    presets = [
        preset.name
        for preset in PRESETS.values()
        if (preset.alpha, preset.gamma) == (found.alpha, found.gamma)
    ]
    called = f" ({', '.join(presets)})" if presets else ""
    terminal.print(
        f"[bold]alpha={found.alpha:g}, gamma={found.gamma:g}[/bold]{called}: {found.summary}"
    )
    grid = optional_import("rich.table", "cli", "the command line").Table.grid(padding=(0, 2))
    words = {True: "yes", False: "no", None: "-"}
    for label, value in (
        ("stable at initialization", words[found.stable_at_initialization]),
        ("stable in training", words[found.stable_in_training]),
        ("nontrivial", words[found.nontrivial]),
        ("faithful", words[found.faithful]),
        ("feature learning", words[found.feature_learning]),
        ("feature diversity exponent",
         "-" if found.diversity_exponent is None else f"{found.diversity_exponent:g} (1/2 is the most)"),
        ("layerwise linearization", words[found.layerwise_linearization]),
        ("lost in the limit", "-" if found.lost is None else ", ".join(found.lost) or "nothing"),
    ):  # fmt: skip
        grid.add_row("", label, value)
    terminal.print(grid, highlight=False)
    terminal.print(found.explanation, highlight=False)
    if found.exponents is not None:
        sizes = ", ".join(
            f"{name.replace('_', ' ')} L^{exponent + 0:g}"
            for name, exponent in found.exponents.items()
        )
        terminal.print(f"Sizes: {sizes}.", highlight=False)
    blocks = (
        "One-layer blocks" if found.block_depth == 1 else f"Blocks of {found.block_depth} layers"
    )
    terminal.print(
        f"{blocks}, infinite width then depth; branch multiplier ∝ depth^-alpha, Adam learning "
        "rate of the blocks ∝ depth^-gamma. A dash: the claims say nothing there.",
        style="dim",
    )
    return 0


def run_doctor(options: argparse.Namespace) -> int:
    import importlib.metadata

    import torch

    import depthnet
    from depthnet.kernels import backends

    terminal = console()
    terminal.print(
        f"depthnet {depthnet.__version__} in {Path(depthnet.__file__).parent}\n"
        f"Python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}",
        highlight=False,
    )
    for status in backends():
        text = status.details if status.active else "; ".join(status.reasons)
        mark = "[green]active[/green]  " if status.active else "[yellow]inactive[/yellow]"
        terminal.print(f"  {status.name:<10} {mark} ", end="")
        terminal.print(text, highlight=False, markup=False)
    accelerator = (
        torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    )
    terminal.print(f"  accelerator: {accelerator or 'none found'}", highlight=False)
    for requirement in (
        *("triton", "matplotlib", "scikit-learn", "scipy", "optuna", "rich"),
        *("tokenizers", "safetensors"),
    ):
        try:
            version = importlib.metadata.version(requirement)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        terminal.print(f"  {requirement} {version}", highlight=False)
    return 0
