"""The compiled bodies of the CUDA tallies: all workers' planes in, the verdicts' planes out.

`payloads` is where the first worker's masks (or bodies) begin, `stride` the bytes from one worker to the next.
"""

from __future__ import annotations

import triton
import triton.language as tl

from distsign.kernels.triton_bits import (
    BLOCK_ELEMENTS,
    HOME,
    LENGTH,
    MASK_AT,
    SIGN_AT,
    TAIL_BYTES,
    WORDS,
    WORDS_PER_BLOCK,
    chunk_field,
    element_of_word,
    load_word,
    store_word,
)

__all__ = ["TALLY_BYTES", "tally_carry_kernel", "tally_kernel"]

TALLY_BYTES = 512
"""Bytes of a plane for one program."""

MOST = tl.constexpr(32767)


@triton.jit
def _ballots(mask, sign, bit):
    """Return the ballots of words as int32, one row a bit: -1, 0, 1; a sign without a vote is none."""
    yes = ((mask & ~sign)[None, :] >> bit) & 1
    no = ((mask & sign)[None, :] >> bit) & 1
    return yes.to(tl.int32) - no.to(tl.int32)


@triton.jit
def _verdicts(lead, margin, bit):
    """Return mask and sign bits of the leads that reach the margin, ORed over the first axis."""
    yes = tl.sum((lead >= margin).to(tl.uint32) << bit, axis=0)
    no = tl.sum((lead <= -margin).to(tl.uint32) << bit, axis=0)
    return yes | no, no


@triton.jit
def tally_kernel(
    payloads, stride, num_bytes, margin, standing, live, half, out,
    WORLD_SIZE: tl.constexpr, STANDING: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """Count planes byte by byte; with `STANDING`, each worker's new ballot joins its standing one and that counts.

    `half` is the number of bytes of a half of `standing`.
    """
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    there = byte < num_bytes
    bit = tl.arange(0, 8).to(tl.uint32)[:, None]
    lead = tl.zeros((8, BYTES), tl.int32)
    mask_at = payloads + byte
    sign_at = mask_at + num_bytes
    if STANDING:
        stride_standing = half // WORLD_SIZE
        old = standing + tl.load(live) * half + byte
        new = standing + (1 - tl.load(live)) * half + byte
    for _ in range(WORLD_SIZE):
        mask = tl.load(mask_at, mask=there, other=0).to(tl.uint32)
        sign = tl.load(sign_at, mask=there, other=0).to(tl.uint32) & mask
        if STANDING:
            old_mask = tl.load(old, mask=there, other=0).to(tl.uint32)
            old_sign = tl.load(old + num_bytes, mask=there, other=0).to(tl.uint32) & old_mask
            opposite = mask & old_mask & (sign ^ old_sign)
            mask = (mask | old_mask) & ~opposite
            sign = (sign | old_sign) & ~opposite
            tl.store(new, mask.to(tl.uint8), mask=there)
            tl.store(new + num_bytes, sign.to(tl.uint8), mask=there)
            old += stride_standing
            new += stride_standing
        lead += _ballots(mask, sign, bit)
        mask_at += stride
        sign_at += stride
    mask, sign = _verdicts(lead, margin, bit)
    tl.store(out + byte, mask.to(tl.uint8), mask=there)
    tl.store(out + num_bytes + byte, sign.to(tl.uint8), mask=there)


@triton.jit
def _add(old, lead):
    return tl.minimum(tl.maximum(old.to(tl.int32) + lead, -MOST), MOST)


@triton.jit
def tally_carry_kernel(
    payloads, stride, table, margin, undecided, live, half, out, WORLD_SIZE: tl.constexpr
):  # fmt: skip
    """`payloads` is what the places of the pieces count from; `half` is the number of elements of a half."""
    length = chunk_field(table, LENGTH).to(tl.int32)
    mask_at = chunk_field(table, MASK_AT)
    sign_at = chunk_field(table, SIGN_AT)
    home = chunk_field(table, HOME)
    old = undecided + tl.load(live) * half + home
    new = undecided + (1 - tl.load(live)) * half + home
    num_full = length // BLOCK_ELEMENTS
    if num_full > 0:
        word = tl.arange(0, WORDS)
        bit = tl.arange(0, 32)
        there = word < num_full * WORDS_PER_BLOCK
        lead = tl.zeros((32, WORDS), tl.int32)
        body = payloads
        for _ in range(WORLD_SIZE):
            mask = load_word(body + mask_at, word, there)
            sign = load_word(body + sign_at, word, there)
            lead += _ballots(mask, sign, bit.to(tl.uint32)[:, None])
            body += stride
        element = element_of_word(word[None, :], bit[:, None])
        lead = _add(tl.load(old + element, mask=there[None, :], other=0), lead)
        tl.store(new + element, lead.to(tl.int16), mask=there[None, :])
        mask, sign = _verdicts(lead, margin, bit.to(tl.uint32)[:, None])
        store_word(out + mask_at, word, mask, there)
        store_word(out + sign_at, word, sign, there)
    done = num_full * BLOCK_ELEMENTS
    if length > done:
        byte = tl.arange(0, TAIL_BYTES)
        bit8 = tl.arange(0, 8)
        element8 = done + 8 * byte[None, :] + bit8[:, None]
        inside = done + 8 * byte < length
        at = done // 8 + byte
        lead8 = tl.zeros((8, TAIL_BYTES), tl.int32)
        tail = payloads
        for _ in range(WORLD_SIZE):
            mask8 = tl.load(tail + mask_at + at, mask=inside, other=0).to(tl.uint32)
            sign8 = tl.load(tail + sign_at + at, mask=inside, other=0).to(tl.uint32)
            lead8 += _ballots(mask8, sign8, bit8.to(tl.uint32)[:, None])
            tail += stride
        lead8 = _add(tl.load(old + element8, mask=element8 < length, other=0), lead8)
        # Bits beyond the end, which only a liar sets, are no ballots.
        lead8 = tl.where(element8 < length, lead8, 0)
        tl.store(new + element8, lead8.to(tl.int16), mask=element8 < length)
        mask8, sign8 = _verdicts(lead8, margin, bit8.to(tl.uint32)[:, None])
        tl.store(out + mask_at + at, mask8.to(tl.uint8), mask=inside)
        tl.store(out + sign_at + at, sign8.to(tl.uint8), mask=inside)
