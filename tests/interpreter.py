"""Tests in Triton's interpreter, in a process of their own: it must be on before a kernel is defined, and
ordinary tests must not run in it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_in_interpreter(tests: str, keyword: str = "") -> None:
    """Run tests, named as pytest names them, of which `keyword` selects some; one at least must pass."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests, "-k", keyword]
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout, run.stdout
