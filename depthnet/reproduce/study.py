"""A study: jobs that are run once each and kept, and what their results show."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
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
    """

    name: ClassVar[str]
    title: ClassVar[str]

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
    settings = {**asdict(study), "study": study.name, "source": study.data_source()}
    jobs = study.jobs()
    total, done = sum(job.cost for job in jobs), 0.0
    results = {}
    with Store(out, {**settings, "versions": versions()}) as store:
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
        _write(study, findings, seconds, store.out)
    return findings


def _write(study: Study, findings: Findings, seconds: float, out: Path) -> None:
    write_rows(out / "results.csv", findings.rows)
    summary = {
        "title": study.title,
        "settings": json.loads((out / "settings.json").read_text()),
        "machine": machine(),
        "seconds": round(seconds, 1),
        "verdicts": [asdict(verdict) for verdict in findings.verdicts],
        "notes": findings.notes,
    }
    write_json(out / "summary.json", summary)
    write_figure(out / f"{study.name}.png", findings.figure)
