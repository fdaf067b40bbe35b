"""The CUDA kernels, compiled to machine code as `kernels.cuda` launches them; no GPU is needed for that.

`test_kernels_cuda` runs this file in a process of its own, where Triton is not its interpreter. What is launched is
compiled for each architecture instead, and the code is held to what bit equality with the reference asks for.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from distsign.kernels import CarryRule, Memory, Spans, SparseCode, cuda  # noqa: E402
from distsign.kernels.triton_bits import OPTIONS  # noqa: E402

ARCHITECTURES = (75, 80, 90)
TYPES = {
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
}


def type_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32" if abs(value) < 2**31 else "i64"


@dataclass
class Launches:
    """Takes the place of `cuda._launch`: the code of each kernel in each form that was asked for."""

    ptx: dict[tuple[str, ...], str] = field(default_factory=dict)
    count: int = 0

    def __call__(self, kernel: Any, num_programs: int, *args: Any, **constants: Any) -> None:
        assert num_programs > 0
        self.count += 1
        names = kernel.arg_names[: len(args)]
        signature = {name: type_of(value) for name, value in zip(names, args, strict=True)}
        signature |= dict.fromkeys(constants, "constexpr")
        assert list(signature) == kernel.arg_names
        for architecture in ARCHITECTURES:
            key = (kernel.__name__, str(architecture), *map(str, constants.items()), *signature.values())
            if key not in self.ptx:
                source = ASTSource(kernel, signature, {(kernel.arg_names.index(k),): v for k, v in constants.items()})
                made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=OPTIONS)
                assert made.asm["cubin"]
                self.ptx[key] = made.asm["ptx"]


@pytest.fixture(scope="module")
def launches() -> Launches:
    return Launches()


LENGTHS = [700, 5, 4096]
NUM_BYTES = sum(-(-length // 8) for length in LENGTHS)


def pieces() -> Spans:
    whole = Spans.whole(LENGTHS)
    num_bytes = np.asarray([-(-length // 8) for length in LENGTHS])
    mask_at = np.cumsum(num_bytes) - num_bytes
    return Spans(whole.start, whole.length, whole.row, mask_at, mask_at + NUM_BYTES, whole.start)


def floats(*shape: int) -> Tensor:
    return torch.zeros(shape or ())


def longs(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)


def planes(*rows: int) -> Tensor:
    return torch.zeros(*rows, 2 * NUM_BYTES, dtype=torch.uint8)


def pack_carry(*, dtype: torch.dtype, square: bool, correct: bool, clear: bool) -> None:
    rule = CarryRule(floats(3), torch.ones(3, dtype=torch.bool), floats(), floats(3) if correct else None, 0.9)
    size = sum(LENGTHS)
    memory = Memory(floats(2, size).to(dtype), floats(2, size).to(dtype) if square else None, longs())
    cuda.pack_carry(floats(size), pieces(), rule, memory, planes(), clear=clear)


NUM_ELEMENTS, LIMITS, STARTS = sum(LENGTHS), torch.ones(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
CODES = (SparseCode(8 * NUM_BYTES, 40), SparseCode(8 * NUM_BYTES, 900))
CALLS: dict[str, Callable[[], object]] = {
    "moments": lambda: cuda.moments(floats(NUM_ELEMENTS), pieces()),
    "pack": lambda: cuda.pack(floats(NUM_ELEMENTS), pieces(), floats(3), planes()),
    "active": lambda: cuda.active(floats(NUM_ELEMENTS), pieces()),
    "carry": lambda: pack_carry(dtype=torch.float32, square=False, correct=False, clear=True),
    "carry, kept": lambda: pack_carry(dtype=torch.float32, square=False, correct=False, clear=False),
    "carry in bfloat16": lambda: pack_carry(dtype=torch.bfloat16, square=False, correct=False, clear=True),
    "RMS": lambda: pack_carry(dtype=torch.float32, square=True, correct=True, clear=True),
    "RMS, kept": lambda: pack_carry(dtype=torch.float32, square=True, correct=True, clear=False),
    "RMS in bfloat16": lambda: pack_carry(dtype=torch.bfloat16, square=True, correct=True, clear=True),
    "unpack": lambda: cuda.unpack(planes(), pieces(), floats(), floats(NUM_ELEMENTS)),
    "tally": lambda: cuda.tally(planes(3), 0, NUM_BYTES, 1, planes()),
    "standing": lambda: cuda.tally_standing(planes(3), 0, NUM_BYTES, 1, planes(2, 3), longs(), planes()),
    "tally with a carry": lambda: cuda.tally_carry(
        planes(3), 0, pieces(), 2, torch.zeros(2, NUM_ELEMENTS, dtype=torch.int16), longs(), planes()
    ),
    "settle": lambda: cuda.settle_carry(planes(), pieces(), LIMITS, STARTS, None),
    "settle a carry": lambda: cuda.settle_carry(
        planes(), pieces(), LIMITS, STARTS, Memory(floats(2, NUM_ELEMENTS), None, longs())
    ),
    "settle a carry in bfloat16": lambda: cuda.settle_carry(
        planes(), pieces(), LIMITS, STARTS, Memory(floats(2, NUM_ELEMENTS).bfloat16(), None, longs())
    ),
    "settle votes": lambda: cuda.settle_votes(
        planes(), pieces(), LIMITS, STARTS, 2, torch.zeros(2, NUM_ELEMENTS, dtype=torch.int16), longs(), forget=True
    ),
    "settle standing": lambda: cuda.settle_standing(planes(), pieces(), LIMITS, STARTS, planes(2, 3), longs()),
    "encode": lambda: [
        cuda.encode_sparse(planes(), NUM_BYTES, code, torch.zeros(code.num_bytes, dtype=torch.uint8)) for code in CODES
    ],
    "decode": lambda: [
        cuda.decode_sparse(torch.zeros(code.num_bytes, dtype=torch.uint8), code, NUM_BYTES, planes()) for code in CODES
    ],
}


@pytest.mark.parametrize("name", CALLS)
def test_it_compiles_and_rounds_as_the_reference_does(
    name: str, launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "_launch", launches)
    monkeypatch.setitem(TYPES, torch.bfloat16, "*bf16")
    before, count = set(launches.ptx), launches.count
    CALLS[name]()
    assert launches.count > count, "nothing was launched"
    made = {key: code for key, code in launches.ptx.items() if key not in before}
    for key, code in made.items():
        words = set(re.findall(r"^\s+(?:@\S+ )?([a-z0-9_.]+\.f(?:32|64))\b", code, re.MULTILINE))
        fused = {word for word in words if word.startswith("fma")}
        # A root may flush: what it is taken of is above 1e-30.
        flushing = {word for word in words if ".ftz" in word and not word.startswith("sqrt")}
        inexact = {word for word in words if "approx" in word or re.match(r"(div|sqrt)\.full", word)}
        assert not fused | flushing | inexact, (key, fused, flushing, inexact)
        if key[0] == "carry_kernel" and "('SQUARE', True)" in key:
            assert "div.rn.f32" in code and re.search(r"sqrt\.rn\S*\.f32", code), key


def test_numbers_that_move_from_step_to_step_compile_nothing_anew() -> None:
    from distsign.kernels import triton_sparse, triton_voter

    sizes = {"num_slots", "num_high_bits", "low_bits", "num_bytes", "num_bits"}
    for kernel, free, unaligned in (
        (triton_sparse.encode_kernel, sizes, set()),
        (triton_sparse.decode_kernel, {*sizes, "sign_at"}, {"body"}),
        (triton_sparse.padding_kernel, {"num_bytes", "last", "num_high_bits", "width"}, {"body"}),
        (triton_sparse.ones_kernel, {"num_bits"}, {"source"}),
        (triton_voter.carry_kernel, {"dither"}, set()),
    ):
        assert {param.name for param in kernel.params if param.do_not_specialize} == free
        assert {param.name for param in kernel.params if param.do_not_specialize_on_alignment} == unaligned
