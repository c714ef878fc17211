"""Freed memory stays with a process that asks for it."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from depthnet.training.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(64 << 20, dtype=torch.uint8)  # freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

anew = [faults() for _ in range(3)][-1]
keep_freed_memory()
kept = [faults() for _ in range(3)][-1]
print(anew, kept)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this system has no glibc")
def test_the_second_time_nothing_is_cleared():
    """In a process of its own, since it stays that way."""
    printed = subprocess.run(
        [sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True
    ).stdout
    anew, kept = map(int, printed.split())
    assert anew >= 64 << 20 >> 21  # a fault for each page, which may be as large as 2 MiB
    assert kept <= 4
