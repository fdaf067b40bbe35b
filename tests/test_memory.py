"""Does a process that keeps freed memory take it again without asking the kernel?"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

FAULTS = """
import ctypes, resource, sys, torch
from launch.memory import keep_freed_memory
kept = sys.argv[1] == "keep" and keep_freed_memory()
# 40 MiB are more than glibc ever keeps by itself, and than its older versions can be told to keep.
able = kept and ctypes.CDLL(None).mallopt(-3, 1 << 30)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(12):  # glibc begins to find aligned blocks again when seven small pieces between them are in its cache
    torch.zeros(10 << 20)
before = faults()
for _ in range(5):
    torch.zeros(10 << 20)
print(faults() - before if able or sys.argv[1] == "leave" else "unable")
"""


def _faults(how: str) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    command = [sys.executable, "-c", FAULTS, how]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


def test_freed_memory_is_taken_again() -> None:
    kept = _faults("keep")
    if kept == "unable":
        pytest.skip("this C library cannot be told to keep blocks of 40 MiB")
    assert 10 * int(kept) < int(_faults("leave"))
