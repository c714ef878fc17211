"""Files that are whole or not there, and folders that one process writes to."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # not on Windows: two processes in one folder are then not noticed
    fcntl = None


def locked(folder: Path, doing: str) -> IO:
    """Make a folder and take its lock, until the file that is returned is closed.

    Raises:
        ValueError: it cannot be written, or another process holds the lock, `doing` that there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115 (the caller closes it)
    except OSError as error:
        raise ValueError(f"out: {folder} cannot be written ({error})") from None
    if fcntl is not None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise ValueError(f"out: another process is {doing} in {folder}") from None
    return lock


@contextmanager
def replacing(path: Path, argument: str = "out"):
    """Yield a temporary path beside `path` that takes its place when the block ends well."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # others may write the same file
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save says RuntimeError when the disk is full
        raise ValueError(f"{argument}: {path} cannot be written ({error})") from error
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
