"""Does a process that keeps freed memory take it again without asking the kernel?"""

from __future__ import annotations

import subprocess
import sys

import pytest

from launch.memory import keep_freed_memory

FAULTS = """
import resource, sys, torch
from launch.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(12):  # glibc begins to find aligned blocks again when seven small pieces between them are in its cache
    torch.zeros(10 << 20)  # 40 MiB: more than glibc ever keeps by itself
before = faults()
for _ in range(5):
    torch.zeros(10 << 20)
print(faults() - before)
"""


def _faults(how: str) -> int:
    command = [sys.executable, "-c", FAULTS, how]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_freed_memory_is_taken_again() -> None:
    if not keep_freed_memory():
        pytest.skip("this C library cannot be told to")
    assert 10 * _faults("keep") < _faults("leave")
