"""Tests in Triton's interpreter, in a process of their own: it must be on before a kernel is defined, and
ordinary tests must not run in it.

Such a process takes minutes of one core.  It runs beside the tests of this process, of which those that
report what it found come last."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
Run = tuple[str, str]  # tests, as pytest names them, and the keyword that selects some of them


class InterpreterRuns:
    """Runs of tests in the interpreter, one after another; what they print is written to `folder`."""

    def __init__(self, wanted: list[Run], folder: Path):
        self._waiting, self._folder = list(wanted), folder
        self._started: dict[Run, tuple[subprocess.Popen, Path]] = {}

    def go_on(self) -> None:
        """Start the next run, unless one has not ended yet."""
        if self._waiting and all(p.poll() is not None for p, _ in self._started.values()):
            run = self._waiting.pop(0)
            self._started[run] = self._start(*run)

    def check(self, tests: str, keyword: str) -> None:
        """Wait for a run; one of its tests at least must have passed, and none failed."""
        while (tests, keyword) in self._waiting:
            for process, _ in self._started.values():
                process.wait()
            self.go_on()
        process, output = self._started[tests, keyword]
        process.wait()
        printed = output.read_text()
        assert process.returncode == 0, printed
        assert " passed" in printed, printed

    def stop(self) -> None:
        for process, _ in self._started.values():
            process.kill()
            process.wait()

    def _start(self, tests: str, keyword: str) -> tuple[subprocess.Popen, Path]:
        output = self._folder / f"{len(self._started)}.txt"
        pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        with output.open("w") as file:
            process = subprocess.Popen(
                ["nice", "-n", "19", *pytest, tests, "-k", keyword],  # others have time limits
                cwd=ROOT,
                env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        return process, output
