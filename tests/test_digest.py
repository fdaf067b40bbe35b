"""Digests: every bit counts, on both ways to take one; and what lies beside the tensor does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from distsign import digest as module
from distsign.digest import _multilinear, checksums, digest, find_damaged, write_checksums
from distsign.wire.header import CHECKSUM_BYTES

WAYS = {"xxh3": digest, "multilinear": lambda t: _multilinear(t.contiguous().reshape(-1).view(torch.uint8))}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
BLOCK = module._COLUMNS * module._ROWS

Way = Callable[[Tensor], Tensor]


@every_way
@pytest.mark.parametrize("num_bytes", [1, 3, 4, 5, 16, 4 * module._COLUMNS - 1, 4 * module._COLUMNS + 4])
def test_each_bit_changes_the_digest(way: Way, num_bytes: int) -> None:
    data = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    want = way(data)
    bits = range(8 * num_bytes) if num_bytes < 100 else range(0, 8 * num_bytes, 997)
    for bit in bits:
        data[bit // 8] ^= 1 << bit % 8
        assert way(data) != want, bit
        data[bit // 8] ^= 1 << bit % 8
    assert way(data) == want


@every_way
def test_several_blocks(way: Way) -> None:
    data = torch.zeros(2 * BLOCK + 5)
    seen = {int(way(data))}
    places = [0, 1, module._COLUMNS, BLOCK - 1, BLOCK, 2 * BLOCK - 1, 2 * BLOCK, 2 * BLOCK + 4]
    for at in places:
        data[at] = -0.0
        seen.add(int(way(data)))
        data[at] = 0.0
    assert len(seen) == len(places) + 1


@every_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool])
def test_dtypes_strides_and_offsets(way: Way, dtype: torch.dtype) -> None:
    values = torch.randint(0, 2, (7, 9), generator=torch.Generator().manual_seed(2)).to(dtype)
    assert way(values.t()) == way(values.t().clone(memory_format=torch.contiguous_format))
    assert way(values[1:]) == way(values[1:].clone())
    assert way(values.reshape(-1)[1:]) == way(values.reshape(-1)[1:].clone())
    assert way(values[0, 0]) == way(values[0, 0].clone())
    assert way(torch.empty(0, dtype=dtype)) == way(torch.empty(0, dtype=dtype))


def test_moved_and_exchanged_words_are_seen() -> None:
    """Those that a plain sum would miss."""
    generator = torch.Generator().manual_seed(3)
    data = torch.randn(3 * module._COLUMNS, generator=generator)
    seen = {int(WAYS["multilinear"](data))}
    for _ in range(500):
        seen.add(int(WAYS["multilinear"](data[torch.randperm(data.numel(), generator=generator)])))
    for shift in range(1, 500):
        seen.add(int(WAYS["multilinear"](data.roll(shift))))
    assert len(seen) == 1000


def test_the_constants_are_splitmix64() -> None:
    columns, _ = module._weights(torch.device("cpu"))
    # Of seed 0: the published generator's first numbers, made odd.
    first = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [int(value) & (2**64 - 1) for value in columns[:3]] == [value | 1 for value in first]


Writing = Callable[[Tensor, Sequence[int]], None]
Finding = Callable[[Tensor, Sequence[int], range], Tensor]
every_writing = pytest.mark.parametrize("write", [write_checksums, module._write_by_tensors], ids=["quick", "tensors"])
every_finding = pytest.mark.parametrize("find", [find_damaged, module._find_by_tensors], ids=["quick", "tensors"])


@every_writing
@every_finding
@pytest.mark.parametrize("num_bytes", [0, 1, 17, 240, 100_001])
def test_a_payload_and_its_checksum(write: Writing, find: Finding, num_bytes: int) -> None:
    """Both ways to write them and both to look at them come to the same."""
    draw = torch.Generator().manual_seed(num_bytes)
    payloads = torch.randint(0, 256, (3, num_bytes + CHECKSUM_BYTES), dtype=torch.uint8, generator=draw)
    write(payloads.view(-1), [num_bytes + CHECKSUM_BYTES] * 3)
    assert torch.equal(payloads[:, num_bytes:], checksums(payloads[:, :num_bytes]))
    assert not find(payloads, [num_bytes + CHECKSUM_BYTES], range(0)).any()
    payloads[1, num_bytes // 2] ^= 4
    assert find(payloads, [num_bytes + CHECKSUM_BYTES], range(0)).tolist() == [[False], [True], [False]]


@every_writing
@every_finding
@pytest.mark.parametrize(("own", "expected"), [(range(0), [0, 10]), (range(2), [10]), (range(8, 12), [0])])
def test_payloads_of_several_sizes_in_a_row(write: Writing, find: Finding, own: range, expected: list[int]) -> None:
    """What never left this rank is not looked at."""
    sizes = [5, 70, 4, 33]
    rows = torch.randint(0, 256, (3, sum(sizes)), dtype=torch.uint8)
    for row in rows:
        write(row, sizes)
    assert not find(rows, sizes, own).any()
    rows[0, 3] ^= 1  # of the first payload
    rows[2, 75] ^= 128  # the checksum of the third, which has nothing else
    assert find(rows, sizes, own).flatten().nonzero().flatten().tolist() == expected
