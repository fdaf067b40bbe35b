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
        [torch.zeros(int(sys.argv[3]) << 18) for _ in range(int(sys.argv[4]))]
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def run():
    global taken
    zeros(12)  # glibc finds aligned blocks again when seven small pieces between them are in the thread's cache
    before = faults()
    zeros(5)
    taken = faults() - before
if sys.argv[2] == "main":
    run()
else:
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
print(taken if able else "unable")
"""


def _faults(how: str, thread: str, mebibytes: int, blocks: int) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    command = [sys.executable, "-c", FAULTS, how, thread, str(mebibytes), str(blocks)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


# Of blocks below 32 MiB glibc keeps some by itself, which ones is chance; a thread's own heap has room for 64.
@pytest.mark.parametrize(("thread", "mebibytes", "blocks"), [("main", 40, 1), ("other", 40, 3), ("other", 80, 1)])
def test_freed_memory_is_taken_again(thread: str, mebibytes: int, blocks: int) -> None:
    kept = _faults("keep", thread, mebibytes, blocks)
    if kept == "unable":
        pytest.skip("this C library cannot be told to keep memory")
    assert 10 * int(kept) < int(_faults("leave", thread, mebibytes, blocks))
