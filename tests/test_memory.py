"""Does a process that keeps freed memory take it again without asking the kernel?"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, threading, torch
from distsign.memory import keep_freed_memory
able = sys.argv[1] == "leave" or keep_freed_memory()
def zeros(times):
    for _ in range(times):
        torch.zeros(int(sys.argv[3]) << 18)
def run(times):
    if sys.argv[2] == "main":
        return zeros(times)
    thread = threading.Thread(target=zeros, args=[times])
    thread.start()
    thread.join()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
run(12)  # glibc begins to find aligned blocks again when seven small pieces between them are in its cache
before = faults()
run(5)
print(faults() - before if able else "unable")
"""


def _faults(how: str, thread: str, mebibytes: int) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    command = [sys.executable, "-c", FAULTS, how, thread, str(mebibytes)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


# Below 32 MiB glibc learns to keep the main thread's blocks by itself; of other threads' 64 is another border.
@pytest.mark.parametrize(("thread", "mebibytes"), [("main", 40), ("other", 20), ("other", 80)])
def test_freed_memory_is_taken_again(thread: str, mebibytes: int) -> None:
    kept = _faults("keep", thread, mebibytes)
    if kept == "unable":
        pytest.skip("this C library cannot be told to keep memory")
    assert 10 * int(kept) < int(_faults("leave", thread, mebibytes))
