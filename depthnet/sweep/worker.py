"""A worker: trains the jobs of a study that nobody else trains, until all are finished."""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from depthnet._files import reading, replacing
from depthnet.data import Dataset
from depthnet.sweep import plan
from depthnet.sweep.ledger import Claim, Ledger, StorageError
from depthnet.sweep.population import trainer
from depthnet.sweep.study import Job, Trial
from depthnet.training.population import PopulationTrainer

try:
    import fcntl
except ImportError:  # on Windows a dead worker is told by its silence only
    fcntl = None

CHECKPOINT_SECONDS = 30.0
REPORT_SECONDS = 5.0
GRACE_SECONDS = 60.0  # of silence, after which a worker is taken for dead
PATIENCE_SECONDS = 60.0  # with a storage that fails, before the worker gives up

Result = TypeVar("Result")


class Interrupted(Exception):
    """The study was asked to stop; what it had done is saved."""


@dataclass(frozen=True)
class Progress:
    """part: of the study that is done by all workers, from 0 to 1. words: what this worker does."""

    part: float
    words: str


class Worker:
    """Trains what is not yet trained of a study, beside other workers of the same study.

    A worker that was stopped, or killed, goes on where it was when one is started with the same folder;
    elsewhere its job starts again, with the same results.

    Args:
        ledger: the study. data: what to train on.
        out: a folder of this machine for checkpoints; workers may share one.
        progress: called with a Progress, often.
        stop: asked after every step; if true, the state is saved and Interrupted raised.
        log: called with a line of text for people.
        grace, patience: seconds; see GRACE_SECONDS and PATIENCE_SECONDS.

    Raises:
        ValueError: the folder cannot be written.
    """

    def __init__(
        self,
        ledger: Ledger,
        data: Dataset,
        out: str | Path,
        *,
        progress: Callable[[Progress], Any] = lambda progress: None,
        stop: Callable[[], bool] = lambda: False,
        log: Callable[[str], Any] = lambda line: None,
        grace: float = GRACE_SECONDS,
        patience: float = PATIENCE_SECONDS,
    ):
        self.ledger, self.settings, self.data = ledger, ledger.settings, data
        self.out = Path(out)
        self.progress, self.stop, self.log = progress, stop, log
        self.grace, self.patience = grace, patience
        self.host = socket.gethostname()
        self.name = f"{self.host}-{os.getpid()}-{secrets.token_hex(4)}"
        # Each worker's last words, and when they were new.
        self.silence: dict[str, tuple[Any, float]] = {}
        self.status: dict[str, Any] = {}
        digest = hashlib.sha256(json.dumps(ledger.record, sort_keys=True).encode())
        self.study_digest = digest.hexdigest()
        try:
            for folder in ("checkpoints", "workers"):
                (self.out / folder).mkdir(parents=True, exist_ok=True)
            self._lock = open(self._lock_path(self.name), "w")  # noqa: SIM115 (held while it lives)
        except OSError as error:
            raise ValueError(f"out: {self.out} cannot be written ({error})") from None
        if fcntl is not None:
            with suppress(OSError):  # a folder without locks: silence tells
                fcntl.flock(self._lock, fcntl.LOCK_EX)

    def run(self) -> Iterator[tuple[Job, list[Trial]]]:
        """Yield each job that this worker finishes, and its trials, until the study is finished.

        Raises:
            Interrupted: `stop` said so.
            StorageError: the storage failed for longer than `patience`; what was trained is saved.
        """
        try:
            with _Heart(self):
                while (job := self._next_job()) is not None:
                    yield from self._train(job)
        finally:
            # The file stays: where the storage could not be told that this worker has stopped, it tells.
            self._lock.close()
        self._tidy()

    # ---- which job ----

    def _next_job(self) -> Job | None:
        """A job that this worker has claimed; None when the study is finished."""
        while True:
            finished = self._persistently(self.ledger.finished)
            jobs = plan.jobs(self.settings, self.data, finished)
            open_jobs = [job for job in jobs if plan.unfinished(job, finished)]
            trained = [trial.network for trials in finished.values() for trial in trials.values()]
            self.part = sum(map(plan.work, trained)) / plan.work_of_study(self.settings)
            self.progress(Progress(self.part, "waiting for other workers" if open_jobs else ""))
            if not open_jobs:
                return None
            claims = self._persistently(self.ledger.claims)
            workers = self._persistently(self.ledger.workers)
            for job in open_jobs:
                claim = claims.get(job.name)
                if claim is None or self._dead(claim, workers):
                    if claim is not None:
                        self.log(f"{job.name} is taken over from {claim.worker}, which has stopped")
                    if self._persistently(
                        lambda j=job, c=claim: self.ledger.claim(j, self.name, c)
                    ):
                        return job
                    break  # somebody was faster: look again
            else:
                self._say("waiting")
                self._rest(min(1.0, self.grace / 4))

    def _dead(self, claim: Claim, workers: dict[str, dict[str, Any]]) -> bool:
        """Whether the worker of a claim has stopped: it said so, its lock is free, or it is silent."""
        status = workers.get(claim.worker)
        if status is not None and status.get("doing") == "stopped":
            return True
        if claim.worker.startswith(f"{self.host}-") and _free(self._lock_path(claim.worker)):
            return True
        words, since = self.silence.get(claim.worker, (None, 0.0))
        if claim.worker not in self.silence or words != status:
            self.silence[claim.worker] = (status, time.monotonic())
            return False
        return time.monotonic() - since > self.grace

    # ---- one job ----

    def _train(self, job: Job) -> Iterator[tuple[Job, list[Trial]]]:
        population = trainer(self.settings, job, self.data)
        self._load(job, population)
        work = plan.work(job.network) * len(job.members) / plan.work_of_study(self.settings)
        last_save = time.monotonic()
        while not population.done:
            population.train_step()
            self._say("training", job, population)
            part = self.part + work * population.step / self.settings.steps
            self.progress(Progress(part, job.name))
            if population.done:
                break
            if self.stop():
                self._save(job, population)
                raise Interrupted
            if time.monotonic() - last_save > CHECKPOINT_SECONDS:
                self._save(job, population)
                last_save = time.monotonic()
        try:
            trials = self._persistently(lambda: self._write(job, population))
        except (StorageError, Interrupted):
            self._save(job, population)
            raise
        if trials is not None:
            self._checkpoint(job).unlink(missing_ok=True)
            yield job, trials

    def _write(self, job: Job, population: PopulationTrainer) -> list[Trial] | None:
        """Keep the trials of a job that is trained; None if another worker has taken the job over."""
        flops = plan.step_flops(job.network, self.settings, self.data)
        steps_of = [_steps(losses) for losses in population.losses.T]
        seconds = sum(population.seconds.values()) / max(1, sum(steps_of))
        asked, there = -math.inf, {}
        for index, member in enumerate(job.members):
            # Asked again after a pause: this process may have been suspended, and its job taken over.
            if time.time() - asked > 1.0:
                holder = self.ledger.claims()[job.name].worker
                if holder != self.name:
                    self.log(
                        f"{job.name} was taken over by {holder}: this worker was silent for too long"
                    )
                    return None
                there, asked = self.ledger.finished().get(job.name, {}), time.time()
            if index in there:
                continue  # this worker, or the one before it, was stopped while it wrote
            losses, steps = population.losses[:, index], steps_of[index]
            diverged_at = None if np.isfinite(losses).all() else steps - 1
            trial = Trial(job.network, member, losses, seconds * steps, flops * steps, diverged_at)
            self.ledger.write(job, index, trial)
        return list(self.ledger.finished()[job.name].values())

    # ---- checkpoints ----

    def _checkpoint(self, job: Job) -> Path:
        return self.out / "checkpoints" / f"{job.name}.pt"

    def _save(self, job: Job, population: PopulationTrainer) -> None:
        with replacing(self._checkpoint(job)) as temporary:
            torch.save({"study": self.study_digest, "state": population.state_dict()}, temporary)

    def _load(self, job: Job, population: PopulationTrainer) -> None:
        path = self._checkpoint(job)
        for left in path.parent.glob(f".{path.name}.*.tmp"):
            # By a worker that was killed as it saved; one that was only suspended may still go on.
            if not _running(int(left.name.split(".")[-2])):
                left.unlink(missing_ok=True)
        if path.exists():
            with reading(path):
                checkpoint = torch.load(path, weights_only=True)
                if checkpoint["study"] != self.study_digest:
                    raise ValueError("it is of another study")
                population.load_state_dict(checkpoint["state"])

    def _tidy(self) -> None:
        """Remove what a finished study needs no more: other workers may have left it."""
        for path in (self.out / "checkpoints").glob("*.pt"):
            with suppress(Exception):  # gone, or nothing that can be read: then it is not ours
                if torch.load(path, weights_only=True, mmap=True)["study"] == self.study_digest:
                    path.unlink()
        for path in (self.out / "workers").glob("*.lock"):
            if _free(path):
                path.unlink(missing_ok=True)

    def _lock_path(self, worker: str) -> Path:
        return self.out / "workers" / f"{worker}.lock"

    # ---- the storage ----

    def _say(
        self, doing: str, job: Job | None = None, population: PopulationTrainer | None = None
    ) -> None:
        """What the heart tells the others next."""
        self.status = {"doing": doing}
        if job is not None and population is not None:
            losses = population.losses[population.step - 1]
            best = float(np.min(losses, where=np.isfinite(losses), initial=np.inf))
            self.status |= {
                "job": job.name,
                "step": population.step,
                "members": len(job.members),
                "alive": len(population.alive),
                "best": best if np.isfinite(best) else None,
            }

    def _persistently(self, call: Callable[[], Result]) -> Result:
        """Call until the storage answers, for `patience` seconds."""
        until, told = time.monotonic() + self.patience, False
        while True:
            try:
                return call()
            except StorageError as error:
                self.silence.clear()  # nobody could say anything
                if time.monotonic() > until:
                    raise
                if not told:
                    self.log(f"{error}; trying again for {self.patience:.0f} s")
                    told = True
                self._rest(1.0)

    def _rest(self, seconds: float) -> None:
        if self.stop():
            raise Interrupted
        time.sleep(seconds)


def _free(path: Path) -> bool:
    """Whether the worker whose lock file this is has ended."""
    if fcntl is None or not path.exists():
        return False
    with open(path, "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


def _running(process: int) -> bool:
    if fcntl is None:  # where a signal would end it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _steps(losses: np.ndarray) -> int:
    """How many steps a member trained: up to the first loss that is not finite, and with it."""
    lost = np.flatnonzero(~np.isfinite(losses))
    return int(lost[0]) + 1 if len(lost) else len(losses)


class _Heart:
    """Tells the other workers every few seconds that this one lives, from a thread of its own, since a
    step may take long."""

    def __init__(self, worker: Worker):
        self.worker, self.beats = worker, 0
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def _beat(self) -> None:
        while not self.ended.wait(min(REPORT_SECONDS, self.worker.grace / 4)):
            self._report(self.worker.status)

    def _report(self, status: dict[str, Any]) -> None:
        self.beats += 1
        with suppress(StorageError):  # the worker itself finds out, and waits
            self.worker.ledger.report(self.worker.name, {**status, "beat": self.beats})

    def __exit__(self, *exception) -> None:
        self.ended.set()
        self.thread.join()
        self._report({"doing": "stopped"})
