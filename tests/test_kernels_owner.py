"""What an owner keeps between steps: all backends against transcriptions of the rule, over several steps in a row."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distsign.kernels import Kernels, Spans, SparseCode, cpu, plane_bytes, reference

BACKENDS: list[Kernels] = [reference, cpu]
every_backend = pytest.mark.parametrize("kernels", BACKENDS, ids=["reference", "cpu"])

FILL = 0xA5
SIZES = (0, 1, 7, 8, 9, 31, 32, 33, 511, 512, 513, 1024, 1025, 4095, 4096, 4097, 5000)
MOST = 32767

Votes = npt.NDArray[np.int64]


def bit_order(length: int) -> npt.NDArray[np.int64]:
    """Return the element that each bit of a plane stands for, as the package's docstring has it."""
    in_blocks = length // 512 * 512
    order = []
    for bit in range(length):
        block, place = divmod(bit, 512)
        word, i = divmod(place, 32)
        order.append(512 * block + 16 * i + word if bit < in_blocks else bit)
    return np.array(order, dtype=np.int64)


def planes(votes: Votes) -> tuple[bytes, bytes]:
    """Return the mask plane and the sign plane of one piece."""
    in_order = votes[bit_order(votes.size)]
    return tuple(np.packbits(bits, bitorder="little").tobytes() for bits in (in_order != 0, in_order < 0))  # type: ignore[return-value]


@every_backend
@pytest.mark.parametrize("num_bytes", [0, 1, 7, 8, 9, 63, 64, 65, 1000])
def test_votes_of_each_row_are_counted(kernels: Kernels, num_bytes: int) -> None:
    """Whatever lies before the plane, and behind it, is none."""
    rows = np.random.default_rng(num_bytes).integers(0, 256, (3, 5 + num_bytes + 9), dtype=np.uint8)
    rows[1] = 255
    expected = [int.from_bytes(row[5 : 5 + num_bytes].tobytes(), "little").bit_count() for row in rows]
    counts = kernels.count_votes(torch.from_numpy(rows), 5, num_bytes)
    assert counts.dtype == torch.int64
    assert counts.tolist() == expected


@dataclass(frozen=True)
class Pieces:
    """Pieces with their planes' places in a body, which `num_bytes` bytes of masks begin and as many of signs end."""

    spans: Spans
    num_bytes: int
    num_homes: int

    @property
    def lengths(self) -> list[int]:
        return [int(n) for n in self.spans.length]

    def write(self, votes: list[Votes], into: npt.NDArray[np.uint8]) -> None:
        for piece, mask_at, sign_at in zip(votes, self.spans.mask_at, self.spans.sign_at, strict=True):
            for at, plane in zip((mask_at, sign_at), planes(piece), strict=True):
                into[at : at + len(plane)] = np.frombuffer(plane, dtype=np.uint8)

    def body(self, votes: list[Votes], fill: int) -> npt.NDArray[np.uint8]:
        body = np.full(2 * self.num_bytes, fill, dtype=np.uint8)
        self.write(votes, body)
        return body

    def homes(self) -> list[slice]:
        return [slice(int(h), int(h + n)) for h, n in zip(self.spans.home, self.spans.length, strict=True)]


def pieces_of(lengths: list[int], gaps: list[int], order: list[int]) -> Pieces:
    """Lay out pieces with gaps between them, their homes in another order than their planes."""
    at, mask_at = 0, []
    for length, gap in zip(lengths, gaps, strict=True):
        mask_at.append(at + gap)
        at += gap + plane_bytes(length)
    home, end = [0] * len(lengths), 0
    for k in order:
        home[k] = end + gaps[k]
        end += gaps[k] + lengths[k]
    table = np.array([mask_at, home, lengths], dtype=np.int64)
    unused = np.full(len(lengths), -1, dtype=np.int64)
    row = np.arange(len(lengths), dtype=np.int64)
    return Pieces(Spans(unused, table[2], row, table[0], table[0] + at, table[1]), at, end + 3)


@st.composite
def some_pieces(draw: st.DrawFn, gaps: bool = True) -> Pieces:
    lengths = draw(st.lists(st.one_of(st.sampled_from(SIZES), st.integers(0, 1100)), min_size=1, max_size=4))
    skip = [draw(st.integers(0, 3)) if gaps else 0 for _ in lengths]
    return pieces_of(lengths, skip, list(draw(st.permutations(range(len(lengths))))))


def cast(pieces: Pieces, world_size: int, rng: np.random.Generator, share: float) -> list[Votes]:
    """Return ballots of each piece, `[world_size, length]`."""
    shares = [share / 2, 1 - share, share / 2]
    return [rng.choice(np.array([-1, 0, 1]), (world_size, n), p=shares) for n in pieces.lengths]


def payloads_of(pieces: Pieces, ballots: list[Votes], body_at: int) -> Tensor:
    rows = [pieces.body([piece[w] for piece in ballots], FILL) for w in range(ballots[0].shape[0])]
    edge = np.full(body_at, FILL, dtype=np.uint8)
    return torch.from_numpy(np.stack([np.concatenate([edge, row, edge[:3]]) for row in rows]))


def keep(votes: Votes, cap: int, start: int) -> Votes:
    """Keep `cap` votes in the order of the plane's bits from byte `start` on, and around."""
    bits = bit_order(votes.size)
    turn = np.concatenate([bits[8 * start :], bits[: 8 * start]])
    kept = turn[votes[turn] != 0][:cap]
    out = np.zeros_like(votes)
    out[kept] = votes[kept]
    return out


def draw_cuts(data: st.DataObject, verdicts: list[Votes]) -> tuple[Tensor, Tensor]:
    """Draw caps (none, one, exactly all, one fewer, more) and starts."""
    caps, starts = [], []
    for piece in verdicts:
        n = int(np.count_nonzero(piece))
        caps.append(data.draw(st.sampled_from([0, 1, n, max(0, n - 1), n // 2, n + 1, piece.size])))
        starts.append(data.draw(st.integers(0, max(0, plane_bytes(piece.size) - 1))))
    return torch.tensor(caps), torch.tensor(starts)


# ----------------------------------------------------------------------------------------------------- undecided votes


@settings(max_examples=60, deadline=None)
@given(st.data(), some_pieces(), st.sampled_from([1, 2, 3, 5, 8, 17]), st.integers(0, 2**32 - 1))
def test_undecided_votes_follow_the_rule(data: st.DataObject, pieces: Pieces, world_size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    margin = data.draw(st.integers(1, world_size + 1))
    body_at = data.draw(st.integers(0, 9))
    memory = rng.integers(-2 * world_size, 2 * world_size + 1, (2, pieces.num_homes)).astype(np.int16)
    extreme = rng.random(memory.shape) < 0.1
    memory[extreme] = rng.choice(np.array([-MOST, MOST, 1 - MOST, MOST - 1], dtype=np.int16), int(extreme.sum()))
    memories = [torch.from_numpy(memory.copy()) for _ in BACKENDS]
    live = data.draw(st.integers(0, 1))
    for _ in range(3):
        ballots = cast(pieces, world_size, rng, data.draw(st.sampled_from([0.05, 0.5, 1.0])))
        payloads = payloads_of(pieces, ballots, body_at)
        expected = memory.copy()
        wanted = []
        for home, piece in zip(pieces.homes(), ballots, strict=True):
            votes = (memory[live, home].astype(np.int64) + piece.sum(0)).clip(-MOST, MOST)
            expected[1 - live, home] = votes
            wanted.append(np.sign(votes) * (np.abs(votes) >= margin))
        caps, starts = draw_cuts(data, wanted)
        sent = [keep(v, int(c), int(s)) for v, c, s in zip(wanted, caps, starts, strict=True)]
        forget = data.draw(st.booleans())
        for kernels, found in zip(BACKENDS, memories, strict=True):
            out = torch.full((2 * pieces.num_bytes,), FILL, dtype=torch.uint8)
            where = torch.tensor(live)
            kernels.tally_carry(payloads, body_at, pieces.spans, margin, found, where, out)
            assert np.array_equal(found.numpy(), expected)
            assert np.array_equal(out.numpy(), pieces.body(wanted, FILL))
            counts = kernels.settle_votes(out, pieces.spans, caps, starts, margin, found, where, forget=forget)
            assert counts.dtype == torch.int64
            assert counts.tolist() == [np.count_nonzero(v) for v in wanted]
            assert np.array_equal(out.numpy(), pieces.body(sent, FILL))
        for home, piece, verdicts, cap in zip(pieces.homes(), sent, wanted, caps, strict=True):
            votes = expected[1 - live, home]
            votes -= (margin * piece).astype(np.int16)
            if forget and np.count_nonzero(verdicts) > cap:
                votes[np.abs(votes) >= margin] = 0
        for found in memories:
            assert np.array_equal(found.numpy(), expected), "both halves, and what lies between the pieces"
        memory = expected
        live = 1 - live  # a clean step; a poisoned one would leave it


@st.composite
def neighbours(draw: st.DrawFn) -> Pieces:
    """Pieces as an owner has them: one behind the other in its planes."""
    lengths = draw(st.lists(st.one_of(st.sampled_from(SIZES), st.integers(0, 1100)), min_size=1, max_size=4))
    order = draw(st.permutations(range(len(lengths))))
    num_bytes, length = np.array([plane_bytes(n) for n in lengths]), np.array(lengths)
    mask_at, home = np.cumsum(num_bytes) - num_bytes, np.zeros(len(lengths), dtype=np.int64)
    home[order] = np.cumsum(length[order]) - length[order]
    total, row = int(num_bytes.sum()), np.arange(len(lengths))
    return Pieces(Spans(row, length, row, mask_at, mask_at + total, home), total, sum(lengths))


@settings(max_examples=80, deadline=None)
@given(st.data(), neighbours(), st.sampled_from([1, 2, 3, 8]), st.integers(0, 2**32 - 1))
def test_sparse_bodies_are_tallied_as_their_planes_are(
    data: st.DataObject, pieces: Pieces, world_size: int, seed: int
) -> None:
    """Through steps that are clean, poisoned or malformed."""
    rng = np.random.default_rng(seed)
    margin = data.draw(st.integers(1, world_size + 1))
    before = rng.integers(-margin - 1, margin + 2, (2, pieces.num_homes)).astype(np.int16)
    before[rng.random(before.shape) < 0.05] = data.draw(st.sampled_from([MOST, -MOST, MOST - 1]))
    memories = [torch.from_numpy(before.copy()) for _ in BACKENDS]
    live = torch.tensor(data.draw(st.integers(0, 1)))
    for _ in range(6):
        ballots = cast(pieces, world_size, rng, data.draw(st.sampled_from([0.0, 0.02, 0.3])))
        rows = payloads_of(pieces, ballots, 0)[:, : 2 * pieces.num_bytes].contiguous()
        num_votes = max(sum(int(np.count_nonzero(piece[w])) for piece in ballots) for w in range(world_size))
        code = SparseCode(8 * pieces.num_bytes, min(8 * pieces.num_bytes, num_votes + data.draw(st.integers(0, 9))))
        payloads = torch.full((world_size, 5 + code.num_bytes + 3), FILL, dtype=torch.uint8)
        for row, payload in zip(rows, payloads, strict=True):
            assert reference.encode_sparse(row, pieces.num_bytes, code, payload[5 : 5 + code.num_bytes])
        caps, starts = draw_cuts(data, [piece[0] for piece in ballots])
        kind = data.draw(st.sampled_from(["clean", "clean", "poisoned", "malformed"]))
        liar = data.draw(st.integers(0, world_size - 1))
        if kind == "malformed":
            payloads[liar, 5 : 5 + code.num_bytes] = 255
        forget = data.draw(st.booleans())
        found = []
        for kernels, memory in zip(BACKENDS, memories, strict=True):
            out = torch.full((2 * pieces.num_bytes,), FILL, dtype=torch.uint8)
            ok = kernels.tally_sparse(payloads, 5, code, pieces.spans, margin, memory, live, out)
            if ok.all():
                counts = kernels.settle_votes(out, pieces.spans, caps, starts, margin, memory, live, forget=forget)
                kept = [memory[1 - live, home] for home in pieces.homes()]
                found.append((ok.tolist(), out.tolist(), counts.tolist(), torch.cat(kept).tolist()))
            else:
                assert kind == "malformed"
                found.append((ok.tolist(), [], [], []))
        assert found[0] == found[1]
        if kind != "poisoned" and all(found[0][0]):
            live = 1 - live


@every_backend
@pytest.mark.parametrize("margin", [1, 2, 3, 5])
def test_nothing_is_lost_or_made_up(kernels: Kernels, margin: int) -> None:
    """Over many capped steps: what was cast is what was decided, `margin` votes a verdict, and what is still there."""
    rng = np.random.default_rng(margin)
    pieces = pieces_of([1300, 70], [1, 2], [1, 0])
    memory = torch.zeros(2, pieces.num_homes, dtype=torch.int16)
    cast_votes = [np.zeros(n, dtype=np.int64) for n in pieces.lengths]
    decided = [np.zeros(n, dtype=np.int64) for n in pieces.lengths]
    for step in range(30):
        live = torch.tensor(step % 2)
        ballots = cast(pieces, 4, rng, 0.6)
        out = torch.zeros(2 * pieces.num_bytes, dtype=torch.uint8)
        kernels.tally_carry(payloads_of(pieces, ballots, 8), 8, pieces.spans, margin, memory, live, out)
        starts = torch.tensor([(7 * step) % 160, step % 9])
        kernels.settle_votes(out, pieces.spans, torch.tensor([90, 5]), starts, margin, memory, live)
        bits = np.unpackbits(out.numpy().reshape(2, -1), axis=1, bitorder="little").astype(np.int64)
        verdicts = bits[0] * (1 - 2 * bits[1])
        for k, (at, n) in enumerate(zip(pieces.spans.mask_at, pieces.lengths, strict=True)):
            decided[k][bit_order(n)] += verdicts[8 * at : 8 * at + n]
            cast_votes[k] += ballots[k].sum(0)
            rest = memory[1 - int(live)].numpy()[pieces.homes()[k]]
            assert np.array_equal(cast_votes[k], margin * decided[k] + rest)
    assert all(np.abs(d).sum() > 30 for d in decided), "something was decided"


@every_backend
def test_undecided_votes_saturate(kernels: Kernels) -> None:
    pieces = pieces_of([600], [0], [0])
    memory = torch.zeros(2, pieces.num_homes, dtype=torch.int16)
    memory[0, :300], memory[0, 300:600] = MOST - 1, 1 - MOST
    ballots = [np.repeat(np.array([[1] * 300 + [-1] * 300]), 5, axis=0)]
    out = torch.zeros(2 * pieces.num_bytes, dtype=torch.uint8)
    for _ in range(2):
        kernels.tally_carry(payloads_of(pieces, ballots, 8), 8, pieces.spans, 5, memory, torch.tensor(0), out)
        assert memory[1].tolist() == [MOST] * 300 + [-MOST] * 300 + [0] * 3
        memory[0] = memory[1]


@every_backend
def test_the_largest_margin_can_be_reached(kernels: Kernels) -> None:
    pieces = pieces_of([520], [0], [0])
    memory = torch.full((2, pieces.num_homes), MOST - 1, dtype=torch.int16)
    ballots = [np.array([[1, 0] * 260])]
    out = torch.zeros(2 * pieces.num_bytes, dtype=torch.uint8)
    kernels.tally_carry(payloads_of(pieces, ballots, 0), 0, pieces.spans, MOST, memory, torch.tensor(0), out)
    counts = kernels.settle_votes(
        out, pieces.spans, torch.tensor([520]), torch.tensor([0]), MOST, memory, torch.tensor(0)
    )
    assert counts.tolist() == [260]
    assert memory[1, :520].tolist() == [0, MOST - 1] * 260


@every_backend
def test_a_poisoned_step_leaves_no_trace(kernels: Kernels) -> None:
    """The halves keep their roles, and the step after writes over all that it had written."""
    rng = np.random.default_rng(3)
    pieces = pieces_of([700, 20], [0, 1], [0, 1])
    spare = rng.integers(-99, 99, (2, pieces.num_homes)).astype(np.int16)
    memory = torch.from_numpy(np.stack([spare[0], spare[1]]))
    clean = torch.from_numpy(np.stack([spare[0], spare[0]]))
    outs = []
    for found, poisoned in ((memory, True), (clean, False)):
        for step in (0, 1) if poisoned else (1,):
            ballots = cast(pieces, 3, np.random.default_rng(step), 0.7)
            out = torch.zeros(2 * pieces.num_bytes, dtype=torch.uint8)
            kernels.tally_carry(payloads_of(pieces, ballots, 0), 0, pieces.spans, 2, found, torch.tensor(0), out)
            kernels.settle_votes(
                out, pieces.spans, torch.tensor([50, 3]), torch.tensor([3, 1]), 2, found, torch.tensor(0)
            )
        outs.append(out)
    assert torch.equal(outs[0], outs[1])
    assert all(torch.equal(memory[1, home], clean[1, home]) for home in pieces.homes())


# ---------------------------------------------------------------------------------------------------- standing ballots


@settings(max_examples=50, deadline=None)
@given(st.data(), some_pieces(gaps=False), st.sampled_from([1, 2, 3, 5, 8]), st.integers(0, 2**32 - 1))
def test_standing_ballots_follow_the_rule(data: st.DataObject, pieces: Pieces, world_size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    margin = data.draw(st.integers(1, world_size + 1))
    body_at = data.draw(st.integers(0, 9))
    live = data.draw(st.integers(0, 1))
    untouched = rng.integers(0, 256, (world_size, 2 * pieces.num_bytes)).astype(np.uint8)
    pending = cast(pieces, world_size, rng, 0.3)

    def memory(votes: list[Votes]) -> npt.NDArray[np.uint8]:
        return np.stack([pieces.body([piece[w] for piece in votes], 0) for w in range(world_size)])

    memories = []
    for _ in BACKENDS:
        halves = np.stack([untouched, untouched])
        halves[live] = memory(pending)
        memories.append(torch.from_numpy(halves))
    for _ in range(3):
        before = memory(pending)
        ballots = cast(pieces, world_size, rng, data.draw(st.sampled_from([0.05, 0.5, 1.0])))
        payloads = payloads_of(pieces, ballots, body_at)
        # A new ballot takes the place of a 0, adds nothing to its like, and wipes out its opposite.
        pending = [
            np.where(old == 0, new, np.where(new == -old, 0, old)) for old, new in zip(pending, ballots, strict=True)
        ]
        leads = [piece.sum(0) for piece in pending]
        wanted = [np.sign(lead) * (np.abs(lead) >= margin) for lead in leads]
        caps, starts = draw_cuts(data, wanted)
        sent = [keep(v, int(c), int(s)) for v, c, s in zip(wanted, caps, starts, strict=True)]
        tallied = memory(pending)
        pending = [piece * (verdicts == 0) for piece, verdicts in zip(pending, sent, strict=True)]
        for kernels, found in zip(BACKENDS, memories, strict=True):
            out = torch.full((2 * pieces.num_bytes,), FILL, dtype=torch.uint8)
            where = torch.tensor(live)
            kernels.tally_standing(payloads, body_at, pieces.num_bytes, margin, found, where, out)
            assert np.array_equal(found[1 - live].numpy(), tallied)
            assert np.array_equal(out.numpy(), pieces.body(wanted, 0))
            counts = kernels.settle_standing(out, pieces.spans, caps, starts, found, where)
            assert counts.dtype == torch.int64
            assert counts.tolist() == [np.count_nonzero(v) for v in wanted]
            assert np.array_equal(out.numpy(), pieces.body(sent, 0))
            assert np.array_equal(found[1 - live].numpy(), memory(pending))
            assert np.array_equal(found[live].numpy(), before), "the half that is read"
        live = 1 - live


@every_backend
@pytest.mark.parametrize("num_liars", [1, 2, 3])
def test_liars_alone_never_win(kernels: Kernels, num_liars: int) -> None:
    """With a margin of one more than there are of them, whatever they send and however long; one more voter can."""
    rng = np.random.default_rng(num_liars)
    num_bytes, world_size, margin = 130, num_liars + 3, num_liars + 1
    standing = torch.zeros(2, world_size, 2 * num_bytes, dtype=torch.uint8)
    zero = np.zeros(1, dtype=np.int64)
    spans = Spans(zero, np.array([8 * num_bytes]), zero, zero, np.array([num_bytes]), zero)
    payloads = torch.zeros(world_size, 2 * num_bytes, dtype=torch.uint8)
    out = torch.zeros(2 * num_bytes, dtype=torch.uint8)

    def step(number: int) -> int:
        live = torch.tensor(number % 2)
        kernels.tally_standing(payloads, 0, num_bytes, margin, standing, live, out)
        counts = kernels.settle_standing(out, spans, torch.tensor([8 * num_bytes]), torch.tensor([0]), standing, live)
        return int(counts[0])

    for number in range(40):
        payloads[:num_liars] = 0 if number % 5 == 4 else 255
        if number % 3 == 0:
            lies = rng.integers(0, 256, (num_liars, 2 * num_bytes)).astype(np.uint8)
            payloads[:num_liars] = torch.from_numpy(lies)
        assert step(number) == 0
    payloads[: num_liars + 1] = 255
    assert sum(step(number) for number in range(40, 44)) >= 8 * num_bytes


@every_backend
def test_what_stands_behind_the_last_element_is_no_verdict(kernels: Kernels) -> None:
    """A worker that votes on a plane's padding must not use up the owner's cap."""
    pieces = pieces_of([9], [0], [0])
    payloads = torch.full((2, 4), 255, dtype=torch.uint8)
    payloads[:, 0] = 1  # mask: element 0, not 1 to 7, and 8 with the padding
    standing = torch.zeros(2, 2, 4, dtype=torch.uint8)
    out = torch.zeros(4, dtype=torch.uint8)
    live = torch.tensor(0)
    kernels.tally_standing(payloads, 0, 2, 2, standing, live, out)
    counts = kernels.settle_standing(out, pieces.spans, torch.tensor([2]), torch.tensor([1]), standing, live)
    assert counts.tolist() == [2]
    assert out.tolist() == [1, 1, 1, 1]
    memory = torch.zeros(2, pieces.num_homes, dtype=torch.int16)
    kernels.tally_carry(payloads, 0, pieces.spans, 2, memory, live, out)
    assert out.tolist() == [1, 1, 1, 1]
    assert memory[1].tolist() == [-2] + [0] * 7 + [-2] + [0] * 3


@every_backend
def test_a_sign_without_a_ballot_is_an_abstention(kernels: Kernels) -> None:
    payloads = torch.zeros(3, 2 * 70, dtype=torch.uint8)
    payloads[:, 70:] = 255
    standing = torch.zeros(2, 3, 2 * 70, dtype=torch.uint8)
    out = torch.full((140,), FILL, dtype=torch.uint8)
    kernels.tally_standing(payloads, 0, 70, 1, standing, torch.tensor(1), out)
    assert not out.any() and not standing.any()
    memory = torch.full((2, 560), 1, dtype=torch.int16)
    pieces = pieces_of([557], [0], [0])
    kernels.tally_carry(payloads, 0, pieces.spans, 2, memory, torch.tensor(1), out)
    assert not out.any() and memory.eq(1).all()


@every_backend
def test_no_pieces_are_fine(kernels: Kernels) -> None:
    none = np.zeros(0, dtype=np.int64)
    spans = Spans(none, none, none, none, none, none)
    nothing, empty = torch.zeros(0, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64)
    votes, standing = torch.zeros(2, 0, dtype=torch.int16), torch.zeros(2, 3, 0, dtype=torch.uint8)
    live, payloads = torch.tensor(0), torch.zeros(3, 8, dtype=torch.uint8)
    kernels.tally_carry(payloads, 8, spans, 1, votes, live, nothing)
    assert kernels.settle_votes(nothing, spans, empty, empty, 1, votes, live).shape == (0,)
    kernels.tally_standing(payloads, 8, 0, 1, standing, live, nothing)
    assert kernels.settle_standing(nothing, spans, empty, empty, standing, live).shape == (0,)
