"""A study's folder: settings, one file for each finished job, the checkpoint of the running one.

Everything is written beside its place and renamed into it, so that a process killed at any point
leaves whole files only.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

try:
    import fcntl
except ImportError:  # not on Windows: two runs in one folder are then not noticed
    fcntl = None


@contextmanager
def replacing(path: Path):
    """Yield a temporary path beside `path` that takes its place when the block ends well."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save says RuntimeError when the disk is full
        raise ValueError(f"out: {path} cannot be written ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def reading(path: Path):
    """Say which file it is that cannot be read, and what to do."""
    try:
        yield
    except Exception as error:  # what a parser makes of a broken file can be anything
        raise ValueError(
            f"out: {path} is broken ({error}); remove it to train that again"
        ) from error


class Store:
    """The folder `out` of a study with the given settings.

    Raises:
        ValueError: the folder cannot be written, holds a study with other settings (the differences
            are shown), or another process is running it.
    """

    def __init__(self, out: str | Path, settings: dict):
        self.out = Path(out)
        try:
            (self.out / "jobs").mkdir(parents=True, exist_ok=True)
            self._lock = open(self.out / ".lock", "w")  # noqa: SIM115 (held while the store is open)
        except OSError as error:
            raise ValueError(f"out: {self.out} cannot be written ({error})") from None
        if fcntl is not None:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ValueError(
                    f"out: another process is running the study in {self.out}"
                ) from None
        settings = json.loads(json.dumps(settings))
        path = self.out / "settings.json"
        # A start that failed before its first checkpoint holds nothing that other settings could spoil.
        try:
            if any((self.out / "jobs").glob("*.npz")) or (self.out / "checkpoint.pt").exists():
                self._refuse_others(path, settings)
            self.write_text("settings.json", json.dumps(settings, indent=2) + "\n")
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
        keys = [key for key in {**there, **settings} if there.get(key) != settings.get(key)]
        if keys:
            differences = "".join(
                f"\n  {key}: {there.get(key)!r} there, {settings.get(key)!r} now" for key in keys
            )
            raise ValueError(
                f"out: {self.out} holds a study with other settings; name another folder or remove "
                f"it:{differences}"
            )

    def write_text(self, name: str, text: str) -> None:
        with replacing(self.out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def write_rows(self, name: str, rows: list[dict]) -> None:
        """A CSV file of rows that have the same keys."""
        table = io.StringIO()
        writer = csv.DictWriter(table, list(rows[0] if rows else ()), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        self.write_text(name, table.getvalue())

    def write_json(self, name: str, value) -> None:
        """A JSON file, which has no infinity and no NaN: they become the text "inf" and null."""
        self.write_text(name, json.dumps(_plain(value), indent=2) + "\n")

    def write_figure(self, name: str, figure) -> None:
        """A PNG file of a matplotlib Figure."""
        with replacing(self.out / name) as temporary:
            figure.savefig(temporary, format="png", dpi=150)

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
        (self.out / "checkpoint.pt").unlink(missing_ok=True)

    def save_checkpoint(self, job: str, state: dict) -> None:
        with replacing(self.out / "checkpoint.pt") as temporary:
            torch.save({"job": job, "state": state}, temporary)

    def load_checkpoint(self, job: str, load: Callable[[dict], None]) -> None:
        """Call `load` with the state that `job` was last saved in, if there is one."""
        path = self.out / "checkpoint.pt"
        if path.exists():
            with reading(path):
                checkpoint = torch.load(path, weights_only=True)
                if checkpoint["job"] == job:
                    load(checkpoint["state"])


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "inf" if value > 0 else "-inf"
    return value
