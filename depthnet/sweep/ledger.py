"""A study in an Optuna storage: its finished trials, and which worker trains what.

The Optuna study NAME holds the trials, finished or, where they diverged, pruned.  A second one, "NAME
(claims)", is a log: its trials are never changed, their numbers order them, and every reader sees the same
ones first.  So the first claim of a job that follows a given claim, or none, is the valid one, whoever
writes beside it, on any storage; nothing needs a lock or a clock.
"""

from __future__ import annotations

import base64
import json
import math
import os
import time
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from depthnet._checks import differences, optional_import
from depthnet.sweep.optima import final_loss
from depthnet.sweep.study import Job, Member, Network, SweepSettings, Trial, from_record

CHUNK = 50_000  # characters of losses in an attribute: some databases take 65,535 bytes


class StorageError(RuntimeError):
    """The storage cannot be reached, or does not do what it is asked for."""


@dataclass(frozen=True)
class Claim:
    """A worker's claim of a job; number: its place in the log."""

    job: str
    worker: str
    number: int


def connect(url: str):
    """An Optuna storage.

    Args:
        url: a database's URL (sqlite:///study.db, postgresql://..., mysql://...), journal:PATH for a
            journal file on a shared disk, or redis://HOST.

    Raises:
        StorageError: it cannot be reached.
    """
    optuna = optional_import("optuna", "sweep", "a sweep")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    scheme, _, rest = url.partition(":")
    with _failures(url), warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if scheme == "journal":
            return optuna.storages.JournalStorage(_journal(rest))
        if scheme == "redis":
            return optuna.storages.JournalStorage(optuna.storages.journal.JournalRedisBackend(url))
        if scheme in ("postgres", "postgresql"):  # whichever driver an SQLAlchemy would prefer
            optional_import("psycopg", "postgresql", "a study in PostgreSQL")
            url = f"postgresql+psycopg:{rest}"
        # Workers on one machine wait for each other's writes to SQLite.
        options = {"connect_args": {"timeout": 60}} if scheme.startswith("sqlite") else {}
        return optuna.storages.RDBStorage(url, engine_kwargs=options)


def _connect_beside_others(url: str, attempts: int = 3):
    """`connect`, again if it fails: others may be making the storage's tables."""
    while True:
        try:
            return connect(url)
        except StorageError:
            attempts -= 1
            if not attempts:
                raise
            time.sleep(0.5)


def _journal(path: str):
    """Optuna's journal file, in which a line that a kill or a full disk cut off is removed before the next
    one is written: together they would be a line that nobody can read."""
    journal = optional_import("optuna.storages.journal", "sweep", "a sweep")

    class Lock(journal.JournalFileSymlinkLock):
        def acquire(self) -> bool:
            super().acquire()
            try:
                _remove_cut_line(path)
            except BaseException:
                self.release()
                raise
            return True

    return journal.JournalFileBackend(path, lock_obj=Lock(path))


def _remove_cut_line(path: str) -> None:
    with open(path, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        if file.read() not in (b"", b"\n"):
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)


@contextmanager
def _failures(url: str) -> Iterator[None]:
    """What a storage raises, as StorageError in one line, without the password."""
    try:
        yield
    except ImportError:
        raise
    except Exception as error:  # every driver has its own
        cause = error.__cause__ or error
        reason = next(iter(str(getattr(cause, "orig", cause)).strip().splitlines()), "")
        raise StorageError(
            f"storage: {hide_password(url)} failed ({type(cause).__name__}: {reason})"
        ) from error


def hide_password(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    user, at, host = rest.rpartition("@")
    return f"{scheme}{separator}{user.partition(':')[0]}{at}{host}"


def study_names(url: str) -> list[str]:
    """The sweeps in a storage.

    Raises:
        StorageError: it cannot be reached.
    """
    storage = connect(url)
    with _failures(url):
        names = {study.study_name for study in storage.get_all_studies()}
    return sorted(name for name in names if _claims_of(name) in names)


def _claims_of(name: str) -> str:
    return f"{name} (claims)"


class Ledger:
    """The study of the given record in a storage; made there if it is new.

    Args:
        record: of study.record(); None opens a study that exists, whatever its record.

    Raises:
        StorageError: the storage cannot be reached.
        ValueError: it holds a study of this name with another record (the differences are shown), or
            without one, or, without a record, none.
    """

    def __init__(self, url: str, name: str, record: Mapping[str, Any] | None):
        optuna = optional_import("optuna", "sweep", "a sweep")
        self.url, self.name = url, name
        record = record and json.loads(json.dumps(record))
        storage = _connect_beside_others(url)
        with _failures(url):
            names = {study.study_name for study in storage.get_all_studies()}
        if record is None and not {name, _claims_of(name)} <= names:
            raise ValueError(f"study: {hide_password(url)} has no study {name!r}")

        def study(name: str):
            return optuna.create_study(
                storage=storage, study_name=name, direction="minimize", load_if_exists=True
            )

        with _failures(url):
            self._claims, self._study = study(_claims_of(name)), study(name)
        self.record = self._agree(record)
        self.settings = from_record(self.record)
        self._distributions = _distributions(self.settings)
        self._read = 0  # trials of the study that are in _trials
        self._trials: dict[str, dict[int, Trial]] = {}

    def _agree(self, record: dict[str, Any] | None) -> dict[str, Any]:
        """The record of the first worker, which is the first entry of the log."""
        entries = self._entries()
        if not entries and record is not None:
            self._append({"record": record})
            with _failures(self.url):
                self._study.set_user_attr("record", record)  # for who looks at the study
            entries = self._entries()
        there = entries[0].get("record") if entries else None
        if there is None:
            raise ValueError(f"study: {self.name!r} in {hide_password(self.url)} is no sweep's")
        if record is not None and there != record:
            raise ValueError(
                f"study: {self.name!r} is there with other settings; choose another name or storage, "
                f"or remove it:{differences(there, record)}"
            )
        return there

    def _entries(self) -> list[dict[str, Any]]:
        with _failures(self.url):
            trials = self._claims.get_trials(deepcopy=False)
        return [{**trial.user_attrs, "number": trial.number} for trial in trials]

    def _append(self, entry: dict[str, Any]) -> None:
        optuna = optional_import("optuna", "sweep", "a sweep")
        with _failures(self.url):
            self._claims.add_trial(optuna.trial.create_trial(value=0.0, user_attrs=entry))

    # ---- who trains what ----

    def claims(self) -> dict[str, Claim]:
        """The valid claim of each job."""
        valid: dict[str, Claim] = {}
        for entry in self._entries():
            if "job" not in entry:
                continue  # a record: of the first worker, or of others that started beside it
            job, current = entry["job"], valid.get(entry["job"])
            if entry["after"] == (current and current.number):
                valid[job] = Claim(job, entry["worker"], entry["number"])
        return valid

    def claim(self, job: Job, worker: str, after: Claim | None) -> bool:
        """Claim a job that nobody has, or take it over from the worker of `after`.

        Returns whether the claim is valid: another worker may have been faster.
        """
        self._append({"job": job.name, "worker": worker, "after": after and after.number})
        return self.claims()[job.name].worker == worker

    def report(self, worker: str, status: Mapping[str, Any]) -> None:
        """Tell the others what a worker does; a status that changes is a sign of life."""
        with _failures(self.url):
            self._claims.set_user_attr(worker, dict(status))

    def workers(self) -> dict[str, dict[str, Any]]:
        """What each worker last said."""
        with _failures(self.url):
            return self._claims.user_attrs

    # ---- results ----

    def write(self, job: Job, index: int, trial: Trial) -> None:
        """Keep the trial of a job's member."""
        optuna = optional_import("optuna", "sweep", "a sweep")
        packed = base64.b64encode(zlib.compress(trial.losses.tobytes())).decode()
        chunks = [packed[start : start + CHUNK] for start in range(0, len(packed), CHUNK)]
        described = {
            "job": job.name,
            "index": index,
            "network": asdict(trial.network),
            "member": asdict(trial.member),
            "seconds": trial.seconds,
            "flops": trial.flops,
            "diverged_at": trial.diverged_at,
            "losses": chunks[0],
        }
        more = {f"losses {number}": chunk for number, chunk in enumerate(chunks[1:], 1)}
        values = {**described["network"], **described["member"]}
        value = final_loss(trial.losses)
        states = optuna.trial.TrialState
        frozen = optuna.trial.create_trial(
            # Optuna's samplers and pictures leave diverged trials out, or count them as worst.
            state=states.COMPLETE if math.isfinite(value) else states.PRUNED,
            value=value if math.isfinite(value) else None,
            params={key: values[key] for key in self._distributions},
            distributions=self._distributions,
            user_attrs={"trial": described, **more},
        )
        with _failures(self.url):
            self._study.add_trial(frozen)

    def finished(self) -> dict[str, dict[int, Trial]]:
        """The finished trials of each job, by their index in it."""
        with _failures(self.url):
            frozen = self._study.get_trials(deepcopy=False)
        for one in frozen[self._read :]:
            attributes = one.user_attrs
            if "trial" in attributes:  # others may add trials of their own
                described, trial = _decoded(attributes)
                own = self._trials.setdefault(described["job"], {})
                own.setdefault(described["index"], trial)
        self._read = len(frozen)
        return self._trials

    def trials(self) -> list[Trial]:
        """Every finished trial, in the order of jobs and members."""
        jobs = self.finished()
        return [jobs[job][index] for job in sorted(jobs) for index in sorted(jobs[job])]


def _decoded(attributes: Mapping[str, Any]) -> tuple[dict[str, Any], Trial]:
    described = attributes["trial"]
    more = sum(key.startswith("losses ") for key in attributes)
    packed = described["losses"] + "".join(attributes[f"losses {i + 1}"] for i in range(more))
    losses = np.frombuffer(zlib.decompress(base64.b64decode(packed)), np.float32)
    return described, Trial(
        Network(**described["network"]),
        Member(**described["member"]),
        losses,
        described["seconds"],
        described["flops"],
        described["diverged_at"],
    )


def _distributions(settings: SweepSettings) -> dict[str, Any]:
    """Optuna's distribution of each hyperparameter that varies in a study; a seed is none."""
    from optuna import distributions as kinds

    found: dict[str, Any] = {}
    for key in ("parametrization", "activation"):
        if len(getattr(settings, key)) > 1:
            found[key] = kinds.CategoricalDistribution(getattr(settings, key))
    for key in ("width", "depth"):
        if len(values := getattr(settings, key)) > 1:
            found[key] = kinds.IntDistribution(min(values), max(values))
    for key in ("log2_lr", "log2_block_multiplier", "weight_decay"):
        values = getattr(settings, key)
        if key in settings.searched:
            found[key] = search_distribution(key, settings)
        elif len(values) > 1:
            found[key] = kinds.FloatDistribution(values[0], values[-1])
    return found


def search_distribution(key: str, settings: SweepSettings):
    """Optuna's distribution of a setting that is a range; decays are searched by their logarithm."""
    from optuna.distributions import FloatDistribution

    values = settings.searched[key]
    return FloatDistribution(values.low, values.high, log=key == "weight_decay" and values.low > 0)
