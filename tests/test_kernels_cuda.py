"""Runs `kernels_cuda_cases` in Triton's interpreter, and on a device where there is one.

Each in a process of its own, because Triton decides once, when it is imported, and no other test may get its
interpreter.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import distsign.kernels
from distsign.kernels import kernels_for, reference

CASES = Path(__file__).with_name("kernels_cuda_cases.py")
COMPILED = Path(__file__).with_name("kernels_compiled_cases.py")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: the CUDA kernels are not tested"
)


class Cases:
    """Cases that run in a process of their own."""

    def __init__(self, folder: Path, cases: Path = CASES, *, interpreted: bool) -> None:
        environment = os.environ | {"TRITON_INTERPRET": "1" if interpreted else "0"}
        # The interpreter computes with numpy, which warns of the overflows and NaNs that the cases are about.
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-W", "ignore::RuntimeWarning", "-p", "no:cacheprovider"]
        self._said = folder / f"{cases.stem}.txt"
        with self._said.open("w") as said:
            self.process = subprocess.Popen(
                [*command, str(cases)], env=environment, cwd=cases.parent.parent, stdout=said, stderr=said
            )

    def require(self) -> None:
        assert self.process.wait() == 0, self._said.read_text()[-10_000:]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Cases]]:
    """In the interpreter, and compiled: at the same time, since each takes one core and a minute."""
    folder = tmp_path_factory.mktemp("cases")
    made = {"interpreted": Cases(folder, interpreted=True), "compiled": Cases(folder, COMPILED, interpreted=False)}
    yield made
    for each in made.values():
        each.process.kill()
        each.process.wait()


@needs_triton
@pytest.mark.timeout(600)
def test_the_kernels_in_the_interpreter(both: dict[str, Cases]) -> None:
    both["interpreted"].require()


@needs_triton
@pytest.mark.timeout(600)
def test_the_kernels_compile_without_a_device(both: dict[str, Cases]) -> None:
    both["compiled"].require()


@needs_triton
@pytest.mark.cuda
@pytest.mark.timeout(600)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_kernels_on_a_device(tmp_path: Path) -> None:
    Cases(tmp_path, interpreted=False).require()


@needs_triton
def test_cuda_gets_the_triton_kernels_and_the_cpu_does_without() -> None:
    code = (
        "import sys, distsign, distsign.kernels as k\n"
        "assert k.kernels_for('cpu') and 'triton' not in sys.modules\n"
        "assert k.kernels_for('cuda:1').__name__ == 'distsign.kernels.cuda'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=CASES.parent.parent)


def test_a_missing_triton_is_said_in_the_log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [
        name for name in sys.modules if name.startswith(("triton", "distsign.kernels.cuda", "distsign.kernels.triton_"))
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(distsign.kernels, "cuda", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    distsign.kernels._load.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, logger="distsign"):
            assert kernels_for("cuda") is reference
    finally:
        distsign.kernels._load.cache_clear()
    assert "pip install triton" in caplog.text and "tens of passes" in caplog.text
