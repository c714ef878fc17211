"""The default transfer study as populations, beside the same study as a loop of eager PyTorch networks.

The study is trained whole, as `depthnet transfer` does it: storage, checkpoints, pruning and all.  The
loop would take the better part of an hour: of each depth some steps are timed after each of the study's
jobs, and extrapolated to as many steps as the study took, diverged trials ending where they ended there.
Eager networks are as a user of PyTorch writes them: one at a time, torch.optim.AdamW(fused=True), no
storage, nothing logged.

What storing and logging cost is measured too: all calls of the storage, its opening, and checkpoints.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from common import argument_parser, print_machine, print_table, write_csv
from torch import nn
from torch.nn import functional

from depthnet import _C
from depthnet.data import NextByte, load
from depthnet.scaling import Parametrization
from depthnet.sweep.ledger import Ledger
from depthnet.sweep.population import BETAS
from depthnet.sweep.study import Member, Network, SweepSettings, record
from depthnet.sweep.worker import Worker
from depthnet.training.memory import keep_freed_memory

PEAK_SECONDS = 0.1
COLUMNS = ("depth", "population_s", "loop_s_extrapolated", "ratio", "fma_limit_s")


class Eager(nn.Module):
    """The network of `depthnet.ResNet`, in plain PyTorch."""

    def __init__(self, network: Network, member: Member, settings: SweepSettings, data: NextByte):
        super().__init__()
        n, depth = network.width, network.depth
        parametrization = Parametrization.of(network.parametrization)
        relative_depth = depth / settings.base_depth
        self.scale = 2**member.log2_block_multiplier * relative_depth**-parametrization.alpha
        self.input = nn.EmbeddingBag(data.in_features, n, mode="sum")
        self.blocks = nn.ModuleList(nn.Linear(n, n, bias=False) for _ in range(depth))
        self.output = nn.Linear(n, data.out_features, bias=False)
        nn.init.normal_(self.input.weight, std=data.active_features**-0.5)
        for block in self.blocks:
            nn.init.normal_(block.weight, std=n**-0.5)
        nn.init.zeros_(self.output.weight)
        hidden_lr = 2**member.log2_lr * relative_depth**-parametrization.gamma
        outer = {"lr": 2**member.log2_lr}
        groups = [
            {"params": self.input.parameters(), **outer},
            {"params": self.blocks.parameters(), "lr": hidden_lr},
            {"params": self.output.parameters(), **outer},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=BETAS, weight_decay=0.0, fused=True)

    def forward(self, x):
        x = self.input(x)
        for block in self.blocks:
            z = block(x).abs()
            x = x + self.scale * (z - z.mean(-1, keepdim=True))
        return self.output(x)

    def step(self, x, y) -> float:
        loss = functional.cross_entropy(self(x), y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


class TimedLedger(Ledger):
    """A Ledger that sums up the seconds that its calls take."""

    seconds = 0.0

    def timed(self, call, *arguments):
        started = time.perf_counter()
        try:
            return call(*arguments)
        finally:
            self.seconds += time.perf_counter() - started

    def claims(self):
        return self.timed(super().claims)

    def claim(self, *arguments):  # what it reads by claims() is counted there
        started, before = time.perf_counter(), self.seconds
        valid = super().claim(*arguments)
        self.seconds = before + time.perf_counter() - started
        return valid

    def report(self, *arguments):
        return self.timed(super().report, *arguments)

    def workers(self):
        return self.timed(super().workers)

    def write(self, *arguments):
        return self.timed(super().write, *arguments)

    def finished(self):
        return self.timed(super().finished)


class TimedWorker(Worker):
    """A Worker that sums up the seconds that its checkpoints take."""

    checkpoint_seconds = 0.0

    def _save(self, job, population):
        started = time.perf_counter()
        super()._save(job, population)
        self.checkpoint_seconds += time.perf_counter() - started


def eager_seconds(network: Network, settings: SweepSettings, data: NextByte, steps: int) -> float:
    """Seconds a step of one network of the loop, its batches included."""
    member = Member(-8.0, *settings.log2_block_multiplier, 0.0, 0)
    model = Eager(network, member, settings, data)
    for step in range(5):
        model.step(*data.batch(0, step, settings.batch))
    started = time.perf_counter()
    for step in range(steps):
        model.step(*data.batch(0, step, settings.batch))
    return (time.perf_counter() - started) / steps


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--steps", type=int, default=200, help="of training (%(default)s)")
    parser.add_argument(
        "--sampled",
        type=int,
        default=40,
        help="steps of the loop timed after each job (%(default)s)",
    )
    args = parser.parse_args()
    print_machine()
    keep_freed_memory()  # as the command does
    settings = SweepSettings(
        name="transfer",
        parametrization=("depth_mup", "half_zero", "ode", "standard"),
        depth=(8, 32, 128),
        log2_lr={"low": -9, "high": -6, "step": 0.5},
        seeds=5,
        steps=args.steps,
    )
    data = load(settings.data)

    samples = defaultdict(list)  # seconds a step of the loop, by depth
    peaks = []  # FLOP/s of multiply-adds
    trained = defaultdict(float)  # seconds of training as populations
    sampling = 0.0
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        ledger = TimedLedger(f"sqlite:///{folder}/study.db", settings.name, record(settings, data))
        opening = time.perf_counter() - started
        worker = TimedWorker(ledger, data, folder)
        for job, trials in worker.run():
            trained[job.network.depth] += sum(trial.seconds for trial in trials)
            since = time.perf_counter()
            sample = eager_seconds(job.network, settings, data, args.sampled)
            samples[job.network.depth].append(sample)
            peaks.append(_C.fma_peak(PEAK_SECONDS, torch.get_num_threads()))
            sampling += time.perf_counter() - since
        whole = time.perf_counter() - started - sampling
        trials = ledger.trials()
        size = Path(folder, "study.db").stat().st_size

    training = sum(trained.values())
    storage = opening + ledger.seconds + worker.checkpoint_seconds
    overhead = 100 * storage / whole
    steps = defaultdict(int)  # that all trials of a depth trained
    for trial in trials:
        steps[trial.network.depth] += (
            settings.steps if trial.diverged_at is None else trial.diverged_at + 1
        )
    loop = {depth: statistics.median(samples[depth]) * steps[depth] for depth in settings.depth}
    flops = defaultdict(float)
    for trial in trials:
        flops[trial.network.depth] += trial.flops
    peak = statistics.median(peaks)
    diverged = sum(trial.diverged_at is not None for trial in trials)
    rows = [
        {
            "depth": depth,
            "trials": settings.planned // len(settings.depth),
            "steps": steps[depth],
            "population_s": round(trained[depth], 2),
            "loop_s_extrapolated": round(loop[depth], 1),
            "ratio": round(loop[depth] / trained[depth], 2),
            "fma_limit_s": round(flops[depth] / peak, 2),
        }
        for depth in settings.depth
    ]
    rows.append(
        {
            "depth": "all, with storage",
            "trials": settings.planned,
            "steps": sum(steps.values()),
            "population_s": round(whole, 2),
            "loop_s_extrapolated": round(sum(loop.values()), 1),
            "ratio": round(sum(loop.values()) / whole, 2),
            "fma_limit_s": round(sum(flops.values()) / peak, 2),
        }
    )
    rows = [{**row, "storage_percent": round(overhead, 2)} for row in rows]
    print_table(
        f"{settings.planned} trials of {settings.steps} steps, {diverged} of them diverged and pruned; "
        "the loop is extrapolated from a sample",
        ("depth", "populations, s", "eager loop, s", "ratio", "limit of the FMA units, s"),
        [tuple(row[key] for key in COLUMNS) for row in rows],
    )
    print(f"\nStorage and checkpoints took {storage:.1f} s of {whole:.1f} s: {overhead:.1f} %.")
    rate = sum(flops.values()) / 1e9 / training
    print(f"Training ran at {rate:.0f} GFLOP/s; study.db has {size / 1e6:.1f} MB.")
    write_csv("sweep.csv", rows)


if __name__ == "__main__":
    main()
