"""The engine of studies: what is done is kept, whatever happens; errors say what is wrong."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from depthnet import cli
from depthnet.cli.studies import run_study
from depthnet.reproduce.registry import STUDIES, Entry
from depthnet.reproduce.study import Findings, Job, Study, Verdict, run, state
from depthnet.sweep.worker import Interrupted


@dataclass(frozen=True)
class Toy(Study):
    """Jobs write their names to `log` when they start, and call `hook` with each part done."""

    name: ClassVar[str] = "toy"
    title: ClassVar[str] = "Random numbers"
    log: ClassVar[Path | None] = None
    hook: ClassVar = staticmethod(lambda job, part: None)

    scale: float = 1.0
    sizes: tuple[int, ...] = (30, 20, 10)
    verdicts: int = 1
    rows: int = 3

    def jobs(self):
        def of(size):
            def work(tick):
                if Toy.log is not None:
                    with open(Toy.log, "a") as log:
                        log.write(f"{size}\n")
                for step in range(10):
                    Toy.hook(size, step / 10)
                    tick((step + 1) / 10)
                return {"values": self.scale * np.random.default_rng(size).normal(size=size)}

            return work

        return [Job(f"size{size}", size, of(size)) for size in self.sizes]

    def findings(self, results):
        from matplotlib.figure import Figure

        means = [(name, float(arrays["values"].mean())) for name, arrays in results.items()]
        return Findings(
            rows=[{"job": name, "mean": mean} for name, mean in means][: self.rows],
            header=("job", "mean of the job's values"),
            lines=means,
            verdicts=[Verdict("means are small", True, "see the table")] * self.verdicts,
            figure=Figure(),
        )


def written(out: Path) -> list:
    """What a study found, without the time that it took."""
    summary = json.loads((out / "summary.json").read_text())
    assert summary.pop("seconds") >= 0
    return [summary, *((out / name).read_bytes() for name in ("results.csv", "toy.png"))]


@pytest.fixture
def log(tmp_path, monkeypatch):
    monkeypatch.setattr(Toy, "log", tmp_path / "log")
    return lambda: Toy.log.read_text().split() if Toy.log.exists() else []


def failing(at_job, at_part):
    def hook(job, part):
        if (job, part) == (at_job, at_part):
            raise ZeroDivisionError("in the middle")

    return staticmethod(hook)


def test_findings_and_progress(tmp_path):
    parts = []
    findings = run(Toy(), tmp_path, progress=lambda job, part: parts.append(part))
    assert [row["job"] for row in findings.rows] == ["size30", "size20", "size10"]
    assert parts == sorted(parts)
    assert parts[0] == 0
    assert parts[-1] == 1
    assert (tmp_path / "results.csv").read_text().splitlines()[0] == "job,mean"


def test_going_on_after_an_exception(tmp_path, monkeypatch, log):
    run(Toy(), tmp_path / "straight")
    straight = log()
    monkeypatch.setattr(Toy, "hook", failing(20, 0.5))
    with pytest.raises(ZeroDivisionError) as held:  # holds the frames, as a notebook does
        run(Toy(), tmp_path / "failed")
    monkeypatch.undo()
    monkeypatch.setattr(Toy, "log", tmp_path / "log")
    run(Toy(), tmp_path / "failed")
    assert held.tb is not None
    assert log() == [*straight, "30", "20", "20", "10"]
    assert written(tmp_path / "straight") == written(tmp_path / "failed")
    run(Toy(), tmp_path / "failed")
    assert len(log()) == 7  # nothing is left to do


def test_a_job_that_is_done_is_kept_when_asked_to_stop(tmp_path, log):
    """Stopping is asked for in the last tick of the first job."""
    parts = []
    with pytest.raises(Interrupted):
        run(
            Toy(),
            tmp_path / "out",
            progress=lambda job, part: parts.append(part),
            stop=lambda: parts[-1] >= 0.5,
        )
    assert log() == ["30"]
    run(Toy(), tmp_path / "out")
    assert log() == ["30", "20", "10"]


def start(out: Path, log: Path) -> subprocess.Popen:
    """A process of this file that runs the study, some 0.4 s a job; returns when a job has begun."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    before = log.read_text() if log.exists() else ""
    process = subprocess.Popen(
        [sys.executable, __file__, str(out), str(log)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and (not log.exists() or log.read_text() == before):
        time.sleep(0.01)
    return process


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_going_on_after_a_signal(tmp_path, number):
    out, log = tmp_path / "out", tmp_path / "log"
    run(Toy(), tmp_path / "straight")
    random.seed(0)
    for _ in range(2):
        finished = {path.stem for path in (out / "jobs").glob("*.npz")}
        seen = len(log.read_text().split()) if log.exists() else 0
        process = start(out, log)
        time.sleep(random.uniform(0.0, 0.6))
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode in (130 if number == signal.SIGINT else -number, 0), errors
        if process.returncode == 130:
            assert errors == f"stopped; the same command goes on from {out}\n"
        begun = {f"size{size}" for size in log.read_text().split()[seen:]}
        assert not finished & begun
    run(Toy(), out)
    assert written(tmp_path / "straight") == written(out)


def test_other_settings_are_refused_with_the_difference(tmp_path):
    run(Toy(), tmp_path)
    with pytest.raises(ValueError, match=r"remove it:\n  scale: 1\.0 there, 2\.0 now$"):
        run(Toy(scale=2.0), tmp_path)

    class Other(Toy):
        name: ClassVar[str] = "other"

    with pytest.raises(ValueError, match="study: 'toy' there, 'other' now"):
        run(Other(), tmp_path)


def test_a_broken_result_is_named(tmp_path):
    run(Toy(), tmp_path)
    path = tmp_path / "jobs" / "size20.npz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=re.escape(f"{path} is broken")):
        run(Toy(), tmp_path)
    path.unlink()
    run(Toy(), tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("name", ["jobs/.size20.npz", ".results.csv", ".toy.png"])
def test_a_full_disk(tmp_path, name, capsys):
    """What is written beside its place goes to a device that is always full."""
    run(Toy(), tmp_path / "straight")
    out = tmp_path / "out"
    (out / "jobs").mkdir(parents=True)
    (out / f"{name}.{os.getpid()}.tmp").symlink_to("/dev/full")
    with pytest.raises(ValueError, match=r"cannot be written .*No space left on device"):
        run(Toy(), out)
    run(Toy(), out)
    assert written(tmp_path / "straight") == written(out)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=re.escape(f"out: {tmp_path / 'file' / 'out'} cannot be")):
        run(Toy(), tmp_path / "file" / "out")


def test_empty_findings(tmp_path, capsys):
    assert run_study(Toy(sizes=(), verdicts=0, rows=0), tmp_path) == 0
    assert (tmp_path / "results.csv").read_text().strip() == ""
    assert "mean of the job's values" in capsys.readouterr().out


def test_nothing_is_cut_in_a_narrow_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "24")
    monkeypatch.setenv("FORCE_COLOR", "1")  # what makes rich take a file for a terminal
    assert run_study(Toy(), tmp_path) == 0
    printed = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().out)
    table = printed[printed.index("job ") :]
    assert "…" not in table
    assert max(len(line) for line in table.splitlines()) <= 24
    for word in ("size30", "Means", "small", "yes"):
        assert word in table


def test_a_file_has_no_width(tmp_path, monkeypatch, capsys):
    """Where there is no terminal, a row of a table is a line, however wide."""
    monkeypatch.setenv("COLUMNS", "24")
    assert run_study(Toy(), tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["job", *["mean", "of", "the", "job's", "values"]] for line in lines)


def test_reproduce_lists_all_studies(capsys, monkeypatch):
    monkeypatch.setitem(STUDIES, "lacking", Entry("no_such_module:Study", "Nothing."))
    for arguments in (["reproduce"], ["reproduce", "--list"]):
        assert cli.main(arguments) == 0
        printed = capsys.readouterr().out
        for name in STUDIES:
            assert f"\n  {name} " in printed


def test_how_far_a_study_is(tmp_path, monkeypatch):
    assert state(Toy, tmp_path) == "not run"
    monkeypatch.setattr(Toy, "hook", failing(20, 0.5))
    with pytest.raises(ZeroDivisionError):
        run(Toy(sizes=(30, 20)), tmp_path)
    assert state(Toy, tmp_path) == "1 of 2 jobs done"  # of its settings, not of the defaults
    monkeypatch.undo()
    run(Toy(sizes=(30, 20), verdicts=2), tmp_path / "done")
    assert re.fullmatch(r"done \d{4}-\d\d-\d\d: 2 yes", state(Toy, tmp_path / "done"))
    (tmp_path / "done" / "settings.json").write_text("{")
    assert state(Toy, tmp_path / "done") == "settings cannot be read"


def test_the_list_says_how_far_studies_are(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setitem(STUDIES, "toy", Entry("", "Nothing."))
    monkeypatch.setattr(Entry, "load", lambda entry: Toy)
    run(Toy(), "runs/toy")
    assert cli.main(["reproduce", "--list"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert "1 yes" in lines["toy"]
    assert "not run" in lines["fig8"]


@pytest.mark.parametrize("name", STUDIES)
def test_registered_names_are_the_studies_own(name):
    kind = STUDIES[name].load()
    assert kind.name == name
    assert kind.title
    names = [job.name for job in kind().jobs()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", STUDIES)
def test_a_quick_run_is_a_smaller_one(name):
    kind = STUDIES[name].load()
    whole, quick = (sum(job.cost for job in study.jobs()) for study in (kind(), kind(**kind.quick)))
    assert quick < whole or not kind.quick


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["famly"], "study='famly' is not one of phase, .* did you mean 'family'?"),
        (["family", "--set", "step", "10"], "set='step' is not one of .* did you mean 'steps'?"),
        (["family", "--set", "steps", "ten"], "set: steps takes int, got ten"),
        (["coord-check", "--set", "lr", "fast"], "set: lr takes float, got fast"),
        (["coord-check", "--set", "blocks_alone", "yes"], "set: blocks_alone takes bool, got yes"),
        (["family", "--set", "steps", "10", "20"], "set: steps takes one value"),
        (["family", "--set", "angles", "0"], "angles must .* -45, 0 and 45 among them"),
        (["fig10", "--quick", "--full"], "quick: not together with --full"),
    ],
)
def test_reproduce_refuses(arguments, message, capsys):
    assert cli.main(["reproduce", *arguments]) == 2
    errors = capsys.readouterr().err
    assert re.fullmatch(f"depthnet reproduce: {message}.*\n", errors, re.DOTALL), errors


if __name__ == "__main__":
    Toy.log = Path(sys.argv[2])
    Toy.hook = staticmethod(lambda job, part: time.sleep(0.04))
    sys.exit(run_study(Toy(), sys.argv[1]))
