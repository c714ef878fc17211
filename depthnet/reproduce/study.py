"""A study: jobs that are run once each and kept, and what their results show."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from depthnet.data import Dataset, load
from depthnet.report.files import write_figure, write_json, write_rows
from depthnet.report.machine import machine
from depthnet.reproduce.store import Store
from depthnet.sweep.study import versions
from depthnet.sweep.worker import Interrupted

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Job:
    """A piece of a study, kept on disk when it is done.

    name: of its file, unique in the study. cost: its running time, relative to the other jobs'.
    run: does the work; it calls its argument with the part done, from 0 to 1, now and then, which may
        raise Interrupted, and returns arrays.
    """

    name: str
    cost: float
    run: Callable[[Callable[[float], None]], Arrays]


@dataclass(frozen=True)
class Verdict:
    """What the data say of a claim: holds is None where they do not decide."""

    claim: str
    holds: bool | None
    words: str


@dataclass
class Findings:
    """rows: for results.csv, all with the same keys. header, lines: a table to print, of numbers and text.
    figure: a matplotlib Figure."""

    rows: list[dict[str, Any]]
    header: tuple[str, ...]
    lines: list[tuple]
    verdicts: list[Verdict]
    figure: Any
    notes: list[str] = field(default_factory=list)


class Study(ABC):
    """A dataclass of settings with these.

    name: of its folder and picture. title: one line for lists and headings.
    shared: None, or what stands for `name` in the name of the folder of its jobs, which it then shares
        with other studies of the same settings: what one has trained the others need not.
    device: of torch, that it runs on.
    quick: the settings that make a run of a minute, too small to decide much; none if the defaults do.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    shared: ClassVar[str | None] = None
    device: ClassVar[str] = "cpu"
    quick: ClassVar[dict[str, Any]] = {}

    @classmethod
    def full(cls) -> dict[str, Any]:
        """The settings of the paper's own run that are not the defaults.

        Raises:
            ValueError: there is no other run than the default one.
        """
        raise ValueError(f"full: {cls.name} has no larger run than that of its defaults")

    def data_source(self) -> dict[str, Any] | None:
        """Where the data came from, to be recorded; None for a study without data."""
        return None

    @abstractmethod
    def jobs(self) -> list[Job]: ...

    @abstractmethod
    def findings(self, results: dict[str, Arrays]) -> Findings:
        """What the results of all jobs, by their names, show."""


class DataStudy(Study):
    """A study with the settings `data` and `data_dir`, as for depthnet.data.load."""

    data: str
    data_dir: str | None

    @cached_property
    def dataset(self) -> Dataset:
        return load(self.data, self.data_dir)

    def data_source(self) -> dict[str, Any]:
        return self.dataset.source


def run(
    study: Study,
    out: str | Path,
    *,
    progress: Callable[[str, float], Any] = lambda job, part: None,
    stop: Callable[[], bool] = lambda: False,
) -> Findings:
    """Run what is not yet done of a study, and write results.csv, summary.json and NAME.png to `out`.

    A study that was stopped, or killed, goes on after the last finished job when it is run again with
    the same settings and folder.

    Args:
        progress: called with a job's name and the part of the whole study that is done, from 0 to 1.
        stop: asked whenever a job reports; if true, Interrupted is raised.

    Raises:
        Interrupted: `stop` said so; finished jobs are kept.
        ValueError: the folder cannot be written or holds a study with other settings.
    """
    settings = {
        **asdict(study),
        "study": study.shared or study.name,
        "source": study.data_source(),
        "versions": versions(),
    }
    jobs = study.jobs()
    total, done = sum(job.cost for job in jobs), 0.0
    results = {}
    with Store(_store(study, out), settings) as store:
        for job in jobs:

            def tick(part: float, job=job, done=done) -> None:
                progress(job.name, (done + part * job.cost) / total)
                if part < 1 and stop():  # a job that is done is kept first
                    raise Interrupted

            arrays = store.finished(job.name)
            if arrays is None:
                tick(0.0)
                started = time.monotonic()
                arrays = job.run(tick)
                arrays = {**arrays, "seconds": np.array(time.monotonic() - started)}
                store.finish(job.name, **arrays)
            results[job.name] = arrays
            done += job.cost
            progress(job.name, done / total)
        findings = study.findings(results)
        seconds = sum(float(arrays["seconds"]) for arrays in results.values())
        _write(study, findings, settings, seconds, Path(out))
    return findings


def _store(study: Study | type[Study], out: str | Path) -> Path:
    """The folder of a study's jobs, such as runs/SHARED-full beside runs/NAME-full."""
    out = Path(out)
    return out.with_name(out.name.replace(study.name, study.shared)) if study.shared else out


def state(kind: type[Study], out: str | Path) -> str:
    """How far the study in a folder is: what its verdicts were, or how many of its jobs are done."""
    folder = _store(kind, out)
    try:
        settings = _json(folder / "settings.json")
        if settings is None:
            return "not run"
        summary = _json(Path(out) / "summary.json")
        if summary is not None and summary["settings"] == settings:
            return _judged(summary)
        chosen = {field.name: settings[field.name] for field in fields(kind)}
        tuples = {key: tuple(value) for key, value in chosen.items() if isinstance(value, list)}
        jobs = kind(**{**chosen, **tuples}).jobs()
    except (OSError, ValueError, TypeError, KeyError):  # another version's, or its data is gone
        return "settings cannot be read"
    done = sum((folder / "jobs" / f"{job.name}.npz").exists() for job in jobs)
    return f"{done} of {len(jobs)} jobs done" if done else "not run"


def _judged(summary: dict) -> str:
    counts = Counter(verdict["holds"] for verdict in summary["verdicts"])
    marks = {True: "yes", False: "no", None: "undecided"}
    found = ", ".join(f"{counts[holds]} {mark}" for holds, mark in marks.items() if counts[holds])
    return f"done {summary['machine']['date']}: {found}"


def _json(path: Path) -> dict | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _write(study: Study, findings: Findings, settings: dict, seconds: float, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)  # a study that shares its jobs has no folder yet
    write_rows(out / "results.csv", findings.rows)
    summary = {
        "title": study.title,
        "settings": settings,
        "machine": machine(study.device.partition(":")[0]),
        "seconds": round(seconds, 1),
        "verdicts": [asdict(verdict) for verdict in findings.verdicts],
        "notes": findings.notes,
    }
    write_json(out / "summary.json", summary)
    write_figure(out / f"{study.name}.png", findings.figure)
