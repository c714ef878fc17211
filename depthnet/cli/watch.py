"""The live view of a study."""

from __future__ import annotations

import math
import time

from depthnet._checks import optional_import
from depthnet.cli.studies import rich_table

SECONDS = 2.0


def watch(ledger, terminal) -> int:
    """Show workers and networks until the study is finished; once, where there is no terminal."""
    from depthnet.sweep.ledger import StorageError

    live = optional_import("rich.live", "cli", "the live view")
    view = View(ledger)
    if not terminal.is_terminal:
        terminal.print(view.render())
        return 0
    with live.Live(view.render(), console=terminal, auto_refresh=False) as screen:
        while not view.finished:
            time.sleep(SECONDS)
            try:
                screen.update(view.render(), refresh=True)
            except StorageError as error:
                screen.console.print(str(error), highlight=False, markup=False)
    return 0


class View:
    """What a storage says of a study; `silence` is counted from when a worker's words last changed."""

    def __init__(self, ledger):
        self.ledger, self.finished = ledger, False
        self.heard: dict[str, tuple[dict, float]] = {}

    def render(self):
        group = optional_import("rich.console", "cli", "the live view").Group
        text = optional_import("rich.text", "cli", "the live view").Text
        settings, trials = self.ledger.settings, self.ledger.trials()
        self.finished = len(trials) >= settings.planned
        diverged = sum(trial.diverged_at is not None for trial in trials)
        head = text.assemble(
            (settings.name, "bold"),
            f"  {len(trials)} of {settings.planned} trials, {diverged} diverged",
        )
        bar = self._bar(len(trials), settings.planned)
        workers = [] if self.finished else [self._workers()]
        return group(head, bar, *workers, self._networks(trials))

    @staticmethod
    def _bar(done: int, planned: int):
        bar = optional_import("rich.progress_bar", "cli", "the live view").ProgressBar
        padding = optional_import("rich.padding", "cli", "the live view").Padding
        return padding(bar(total=planned, completed=done, width=60), (0, 0, 1, 0))

    def _workers(self):
        table = rich_table(title="workers", title_justify="left")
        for heading in ("worker", "job"):
            table.add_column(heading, overflow="fold")
        for heading in ("step", "alive", "best loss", "heard"):
            table.add_column(heading, justify="right")
        now, steps = time.monotonic(), self.ledger.settings.steps
        for worker, status in sorted(self.ledger.workers().items()):
            words, since = self.heard.get(worker, (None, now))
            if words != status:
                self.heard[worker], since = (status, now), now
            if status["doing"] == "stopped":
                continue
            training = "job" in status
            best = status.get("best")
            table.add_row(
                worker,
                status["job"] if training else "waits for others",
                f"{status['step']}/{steps}" if training else "",
                f"{status['alive']}/{status['members']}" if training else "",
                f"{best:.4g}" if best is not None else "",
                f"{now - since:.0f} s ago",
            )
        return table

    def _networks(self, trials):
        from depthnet.sweep.optima import final_loss

        settings = self.ledger.settings
        table = rich_table(title="networks", title_justify="left")
        table.add_column("network", overflow="fold")
        for heading in ("trials", "diverged", "best loss", "at log2 lr"):
            table.add_column(heading, justify="right")
        each = settings.planned // len(settings.networks)
        for network in settings.networks:
            own = [trial for trial in trials if trial.network == network]
            losses = {trial: final_loss(trial.losses) for trial in own}
            good = {trial: loss for trial, loss in losses.items() if math.isfinite(loss)}
            best = min(good, key=good.__getitem__, default=None)
            table.add_row(
                network.name,
                f"{len(own)}/{each}",
                str(len(own) - len(good)),
                f"{good[best]:.4g}" if best else "",
                f"{best.member.log2_lr:g}" if best else "",
            )
        return table
