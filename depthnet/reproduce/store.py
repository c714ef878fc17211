"""A study's folder: its settings and one file for each finished job."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from depthnet._checks import differences
from depthnet._files import locked, reading, replacing
from depthnet.report.files import write_text


class Store:
    """The folder `out` of a study with the given settings.

    Raises:
        ValueError: the folder cannot be written, holds a study with other settings (the differences
            are shown), or another process is running it.
    """

    def __init__(self, out: str | Path, settings: dict):
        self.out = Path(out)
        self._lock = locked(self.out, "running the study")
        settings = json.loads(json.dumps(settings))
        path = self.out / "settings.json"
        # A start that failed before its first job was done holds nothing that other settings could spoil.
        try:
            (self.out / "jobs").mkdir(exist_ok=True)
            if any((self.out / "jobs").glob("*.npz")):
                self._refuse_others(path, settings)
            write_text(path, json.dumps(settings, indent=2) + "\n")
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exception) -> None:
        """Let other processes, and other stores of this one, open the folder."""
        self._lock.close()

    def _refuse_others(self, path: Path, settings: dict) -> None:
        try:
            there = json.loads(path.read_text())
        except (OSError, ValueError):
            there = None
        if not isinstance(there, dict):
            raise ValueError(
                f"out: {self.out} holds jobs of a study, but {path} is not its settings; name another "
                "folder"
            )
        found = differences(there, settings)
        if found:
            raise ValueError(
                f"out: {self.out} holds a study with other settings; name another folder or remove "
                f"it:{found}"
            )

    def finished(self, job: str) -> dict[str, np.ndarray] | None:
        """The arrays of a finished job, or None."""
        path = self.out / "jobs" / f"{job}.npz"
        if not path.exists():
            return None
        with reading(path), np.load(path) as file:
            return dict(file)

    def finish(self, job: str, **arrays: np.ndarray) -> None:
        with (
            replacing(self.out / "jobs" / f"{job}.npz") as temporary,
            open(temporary, "wb") as file,
        ):
            np.savez_compressed(file, **arrays)
