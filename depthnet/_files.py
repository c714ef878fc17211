"""Files that are whole or not there."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path):
    """Yield a temporary path beside `path` that takes its place when the block ends well."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # others may write the same file
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
