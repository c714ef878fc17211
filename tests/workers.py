"""Workers of a sweep as processes: started in a moment, and stopped at any."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import resource
import signal
import sys
import time
from pathlib import Path

import optuna
import torch

from depthnet import cli
from depthnet.sweep import ledger, worker
from depthnet.training.population import PopulationTrainer

# Forked from a process that has imported everything.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        *("depthnet.cli", "depthnet.report.sweep", "depthnet.sweep.worker", "alembic.command"),
        *("jinja2", "matplotlib.backends.backend_agg", "matplotlib.backends.backend_svg"),
        *("matplotlib.figure", "optuna.storages", "psycopg", "pyarrow.parquet", "rich.progress"),
        *("rich.table", "sqlalchemy.dialects.postgresql", "sqlalchemy.dialects.sqlite"),
        *("torch._dynamo", "yaml"),
    ]
)

MOMENTS = {
    "create": (optuna, "create_study"),
    "step": (PopulationTrainer, "train_step"),
    "half a save": (torch, "save"),
    "save": (worker.Worker, "_save"),
    "claim": (ledger.Ledger, "claim"),
    "append": (ledger.Ledger, "_append"),
    "write": (ledger.Ledger, "write"),
}


class WorkerProcess:
    """`depthnet sweep run ARGUMENTS` as a process; what it prints is its `log`.

    at: (moment, count, signal) sends the process the signal after the count-th of one of MOMENTS.
    checkpoints: seconds between them. waits: grace and patience of the Worker. file_size: the limit
    of the system, in bytes. user: whom to run as. report: whether to write one at the end, which takes
    longer than these studies themselves.
    """

    def __init__(self, *arguments, log: Path, **changes):
        self.log = Path(log)
        self.process = CONTEXT.Process(
            target=_sweep_run, args=(list(map(str, arguments)), str(log)), kwargs=changes
        )
        self.process.start()

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def wait(self, timeout: float = 60) -> int:
        """The exit status, negative for a signal."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"still running after {timeout} s:\n{self.printed}")
        return self.process.exitcode

    @property
    def printed(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def until_stopped(self) -> None:
        """Wait for it to be stopped by SIGSTOP."""
        stat = Path(f"/proc/{self.process.pid}/stat")
        self.until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T")

    def until_printed(self, words: str) -> None:
        self.until(lambda: words in self.printed)

    def until(self, condition, timeout: float = 60) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            alive = self.process.is_alive() and time.monotonic() < deadline
            assert alive, f"ended with {self.process.exitcode} before that:\n{self.printed}"
            time.sleep(0.01)


def _sweep_run(
    arguments: list[str],
    log: str,
    at: tuple[str, int, int] | None = None,
    checkpoints: float = 0.05,
    waits: dict[str, float] | None = None,
    file_size: int | None = None,
    user: int | None = None,
    report: bool = False,
) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    worker.CHECKPOINT_SECONDS = checkpoints
    if at is not None:
        _signal_at(*at)
    if waits is not None:
        worker.Worker = functools.partial(worker.Worker, **waits)
    if not report:
        cli.sweep._write_report = lambda *arguments: None
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    if user is not None:
        ledger.connect("sqlite://")  # imports what another user may not be able to read
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    os.environ["COLUMNS"] = "1000"  # whole lines
    sys.exit(cli.main(["sweep", "run", *arguments]))


def _signal_at(moment: str, count: int, number: int) -> None:
    owner, method = MOMENTS[moment]
    original, calls = getattr(owner, method), itertools.count(1)

    def signalling(*arguments, **keywords):
        result = original(*arguments, **keywords)
        if next(calls) == count:
            os.kill(os.getpid(), signal.Signals(number))
        return result

    setattr(owner, method, signalling)
