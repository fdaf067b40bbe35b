"""One worker's side of the vote, without a vote: ballots, counts, and what is remembered when."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distsign import AdaptiveConfidence, Confidence, FixedConfidence, RMSConfidence, TargetDensity
from distsign.ballots import cast_ballots
from distsign.kernels import Kernels, cpu, reference
from distsign.layout import Layout, Shape, caps_at
from distsign.voter import Voter, _Planes
from distsign.wire.header import HEADER_BYTES

EVERY = [FixedConfidence(0.3), AdaptiveConfidence(), TargetDensity(0.1)]
every_function = pytest.mark.parametrize("confidence", EVERY, ids=lambda c: type(c).__name__)
every_backend = pytest.mark.parametrize("kernels", [reference, cpu], ids=["reference", "cpu"])

CLEAN, POISONED = torch.tensor(False), torch.tensor(True)
BUCKETS = [[Shape(0, 3000), Shape(1, 70), Shape(2, 1)], [Shape(3, 1025), Shape(4, 512)]]
NUM_PARAMS = 5


@dataclasses.dataclass
class Cast:
    ballots: list[Tensor]  # per parameter
    out: Tensor
    count: int
    finite: bool


class Worker:
    """A voter with a layout and room for its ballots."""

    def __init__(
        self,
        confidence: Confidence,
        buckets: Sequence[Sequence[Shape]] = BUCKETS,
        *,
        world_size: int = 3,
        kernels: Kernels = cpu,
        carry: torch.dtype | None = None,
    ) -> None:
        self.voter = Voter(confidence, carry)
        self.voter.grow([3000, 70, 1, 1025, 512], torch.device("cpu"))
        homes = {shape.index: self.voter.home(shape.index) for bucket in buckets for shape in bucket}
        self.buckets = [[dataclasses.replace(shape, home=homes[shape.index]) for shape in each] for each in buckets]
        self.layout = Layout.build(self.buckets, world_size)
        self.rows = torch.tensor([shape.index for bucket in buckets for shape in bucket], dtype=torch.int64)
        self.kernels = kernels

    def gradient(self, step: int, spread: float = 1.0) -> list[Tensor]:
        """Return a flat gradient a bucket; each parameter has a scale of its own."""
        generator = torch.Generator().manual_seed(step)
        return [
            torch.cat([torch.randn(s.num_elements, generator=generator) * spread * (1 + s.index) for s in bucket])
            for bucket in self.buckets
        ]

    def cast(self, grads: Sequence[Tensor], scale: float = 1.0) -> Cast:
        out = torch.zeros(self.layout.buffer_bytes, dtype=torch.uint8)
        before = [grad.clone() for grad in grads]
        cast = self.voter.cast(
            grads,
            self.layout,
            self.rows,
            scale=torch.tensor(scale, dtype=torch.float64),
            kernels=self.kernels,
            out=out,
            step=0,
        )
        assert all(torch.equal(a, b) or not b.isfinite().all() for a, b in zip(grads, before, strict=True))
        ballots: list[Tensor] = []
        for bucket, pieces, grad in zip(self.buckets, self.layout.pieces, grads, strict=True):
            flat = torch.empty_like(grad)
            reference.unpack(out, pieces, torch.tensor(1.0), flat)
            ballots += flat.split([shape.num_elements for shape in bucket])
        return Cast(ballots, out, int(cast.num_ballots), bool(cast.finite))


# --------------------------------------------------------------------------------------------------------------- cast


@every_function
@every_backend
@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_ballots_are_those_of_each_parameter_alone(confidence: Confidence, kernels: Kernels, world_size: int) -> None:
    """Twenty steps of the whole group against twenty steps of each parameter by itself."""
    worker = Worker(confidence, world_size=world_size, kernels=kernels)
    stats = [confidence.init_stats(1)[0] for _ in range(NUM_PARAMS)]
    for step in range(20):
        grads = worker.gradient(step)
        cast = worker.cast(grads)
        worker.voter.commit(CLEAN)
        params = [g for b, grad in zip(BUCKETS, grads, strict=True) for g in grad.split([s.num_elements for s in b])]
        expected = []
        for row, grad in enumerate(params):
            ballots, stats[row] = cast_ballots(confidence, grad, stats[row])
            expected.append(ballots)
        assert all(torch.equal(a, b) for a, b in zip(cast.ballots, expected, strict=True)), step
        assert cast.count == sum(int(ballots.count_nonzero()) for ballots in expected)
        assert cast.finite
        assert torch.equal(worker.voter.stats, torch.stack(stats))


@every_function
def test_stats_are_kept_by_row_whatever_the_buckets(confidence: Confidence) -> None:
    """DDP rebuilds its buckets after the first step; here each step deals the parameters out anew."""
    deals = [
        BUCKETS,
        [[Shape(4, 512), Shape(3, 1025)], [Shape(2, 1), Shape(1, 70)], [Shape(0, 3000)]],
        [[Shape(1, 70), Shape(4, 512), Shape(0, 3000), Shape(2, 1), Shape(3, 1025)]],
    ]
    fixed, dealt = Worker(confidence), Worker(confidence)
    for step in range(9):
        grads = fixed.gradient(step)
        cast = fixed.cast(grads)
        fixed.voter.commit(CLEAN)
        by_index = dict(
            zip(
                range(NUM_PARAMS),
                [g for b, grad in zip(BUCKETS, grads, strict=True) for g in grad.split([s.num_elements for s in b])],
                strict=True,
            )
        )
        deal = deals[step % 3]
        worker = Worker(confidence, deal)
        worker.voter = dealt.voter
        again = worker.cast([torch.cat([by_index[shape.index] for shape in bucket]) for bucket in deal])
        dealt.voter.commit(CLEAN)
        order = [shape.index for bucket in deal for shape in bucket]
        assert all(torch.equal(b, cast.ballots[i]) for i, b in zip(order, again.ballots, strict=True))
        assert torch.equal(dealt.voter.stats, fixed.voter.stats)
        assert again.count == cast.count


@pytest.mark.parametrize("confidence", [FixedConfidence(-0.0), AdaptiveConfidence(beta2=-0.0)])
def test_an_alpha_of_minus_zero_lets_all_but_zeros_vote(confidence: Confidence) -> None:
    worker = Worker(confidence)
    grads = worker.gradient(0)
    grads[1][::3] = 0.0
    cast = worker.cast(grads)
    assert torch.equal(torch.cat(cast.ballots), torch.cat(grads).sign())
    assert cast.count == sum(int(grad.count_nonzero()) for grad in grads)


@every_function
@every_backend
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_number_anywhere_is_said(confidence: Confidence, kernels: Kernels, bad: float) -> None:
    worker = Worker(confidence, kernels=kernels)
    for bucket, at in [(0, 0), (0, 3070), (1, 1024), (1, 1536)]:
        grads = worker.gradient(1)
        grads[bucket][at] = bad
        assert not worker.cast(grads).finite
    worker.voter.begin_step()
    assert worker.cast(worker.gradient(1)).finite


@every_function
def test_headers_are_left_alone(confidence: Confidence) -> None:
    worker = Worker(confidence)
    out = torch.full((worker.layout.buffer_bytes,), 0x5A, dtype=torch.uint8)
    scale = torch.ones((), dtype=torch.float64)
    worker.voter.cast(
        worker.gradient(0), worker.layout, worker.rows, scale=scale, kernels=worker.kernels, out=out, step=0
    )
    for offset in worker.layout.offsets:
        assert out[offset : offset + 8].eq(0x5A).all()


# ------------------------------------------------------------------------------------------------------------- commit


@every_function
def test_nothing_is_remembered_before_commit(confidence: Confidence) -> None:
    worker = Worker(confidence)
    worker.cast(worker.gradient(0))
    worker.voter.commit(CLEAN)
    before = worker.voter.stats.clone()
    first = worker.cast(worker.gradient(1))
    assert torch.equal(worker.voter.stats, before)
    second = worker.cast(worker.gradient(1))
    assert torch.equal(first.out, second.out), "and so the same gradient casts the same ballots"
    worker.voter.begin_step()
    worker.voter.commit(CLEAN)
    assert torch.equal(worker.voter.stats, before), "what is forgotten is not committed"


@pytest.mark.parametrize("confidence", EVERY[1:], ids=lambda c: type(c).__name__)
def test_commit_remembers_every_parameter(confidence: Confidence) -> None:
    worker = Worker(confidence)
    before = worker.voter.stats.clone()
    worker.cast(worker.gradient(0))
    worker.voter.commit(CLEAN)
    changed = (worker.voter.stats != before).any(1)
    # Adaptive: a parameter of one element has no spread, so that its deviation stays 0.
    assert changed.tolist() == [True, True, isinstance(confidence, TargetDensity), True, True]
    worker.voter.stats += 1.0  # a checkpoint is loaded
    after = worker.voter.stats.clone()
    worker.voter.commit(CLEAN)
    assert torch.equal(worker.voter.stats, after), "once"


@every_function
@pytest.mark.parametrize("bad", [None, math.nan, math.inf])
def test_a_poisoned_step_changes_nothing(confidence: Confidence, bad: float | None) -> None:
    """Whoever poisoned it: this rank or, with a clean gradient here, another one."""
    worker, spared = Worker(confidence), Worker(confidence)
    for step in range(6):
        if step % 2:
            grads = worker.gradient(100 + step)
            if bad is not None:
                grads[0][17] = bad
            before = worker.voter.stats.clone()
            worker.cast(grads)
            worker.voter.commit(POISONED)
            assert torch.equal(worker.voter.stats, before)
        a, b = worker.cast(worker.gradient(step)), spared.cast(spared.gradient(step))
        assert torch.equal(a.out, b.out)
        worker.voter.commit(CLEAN)
        spared.voter.commit(CLEAN)
    assert torch.equal(worker.voter.stats, spared.voter.stats)


@pytest.mark.parametrize("poisoned", [False, True])
def test_the_groups_of_a_step_are_committed_together(poisoned: bool) -> None:
    """A step exchanges its buckets in several groups; all of them count, or none."""
    confidence = TargetDensity(0.1)
    together = Worker(confidence)
    before = together.voter.stats.clone()
    groups = [Worker(confidence, [bucket]) for bucket in BUCKETS]
    groups[1].voter = groups[0].voter
    grads = together.gradient(0)
    together.cast(grads)
    for worker, grad in zip(groups, grads, strict=True):
        worker.cast([grad])
    assert torch.equal(groups[0].voter.stats, before)
    together.voter.commit(torch.tensor(poisoned))
    groups[0].voter.commit(torch.tensor(poisoned))
    assert torch.equal(groups[0].voter.stats, together.voter.stats)
    assert torch.equal(together.voter.stats, before) == poisoned


# ------------------------------------------------------------------------------------------------------------ idleness


@every_function
def test_a_parameter_without_a_gradient_keeps_its_stats_and_does_not_vote(confidence: Confidence) -> None:
    worker = Worker(confidence)
    for step in range(3):
        worker.cast(worker.gradient(step))
        worker.voter.commit(CLEAN)
    before = worker.voter.stats.clone()
    grads = worker.gradient(3)
    grads[0][3000:3070] = 0.0  # parameter 1
    grads[1][:1025] = -0.0  # parameter 3
    cast = worker.cast(grads)
    worker.voter.commit(CLEAN)
    assert not cast.ballots[1].any() and not cast.ballots[3].any()
    assert cast.ballots[0].any() and cast.ballots[4].any()
    assert torch.equal(worker.voter.stats[[1, 3]], before[[1, 3]])
    if confidence.uses_moments:
        assert (worker.voter.stats[[0, 4]] != before[[0, 4]]).all()


@every_function
def test_a_rank_that_has_joined_leaves_no_trace(confidence: Confidence) -> None:
    worker = Worker(confidence)
    worker.cast(worker.gradient(0))
    worker.voter.commit(CLEAN)
    before = worker.voter.stats.clone()
    cast = worker.cast([torch.zeros_like(grad) for grad in worker.gradient(0)])
    worker.voter.commit(CLEAN)
    assert cast.count == 0 and cast.finite
    assert torch.equal(worker.voter.stats, before)


@every_function
def test_parameters_of_no_elements(confidence: Confidence) -> None:
    worker = Worker(confidence, [[Shape(0, 0), Shape(1, 40), Shape(2, 0)], [Shape(3, 0)]])
    before = worker.voter.stats.clone()
    for step in range(3):
        cast = worker.cast(worker.gradient(step))
        worker.voter.commit(CLEAN)
        assert cast.finite and cast.count > 0
        assert worker.voter.stats.isfinite().all()
    assert torch.equal(worker.voter.stats[[0, 2, 3]], before[[0, 2, 3]])


# ---------------------------------------------------------------------------------------------------------- loss scale


@every_function
@pytest.mark.parametrize("scale", [2.0**16, 2.0**-10])
def test_a_loss_scale_changes_no_ballot(confidence: Confidence, scale: float) -> None:
    """The gradient comes multiplied by it, alpha and stats are in true units. Powers of two lose no bit."""
    plain, scaled = Worker(confidence), Worker(confidence)
    for step in range(20):
        grads = plain.gradient(step, spread=0.01 * (1 + step))
        a = plain.cast(grads)
        b = scaled.cast([grad * scale for grad in grads], scale)
        assert torch.equal(a.out, b.out), step
        assert (a.count, a.finite) == (b.count, b.finite)
        plain.voter.commit(CLEAN)
        scaled.voter.commit(CLEAN)
        assert torch.equal(plain.voter.stats, scaled.voter.stats), step


@every_function
def test_a_loss_scale_may_change_between_steps(confidence: Confidence) -> None:
    plain, scaled = Worker(confidence), Worker(confidence)
    for step in range(20):
        scale = 2.0 ** ((7 * step) % 17)
        grads = plain.gradient(step, spread=0.01)
        assert torch.equal(plain.cast(grads).out, scaled.cast([grad * scale for grad in grads], scale).out), step
        plain.voter.commit(CLEAN)
        scaled.voter.commit(CLEAN)
    assert torch.equal(plain.voter.stats, scaled.voter.stats)


def test_an_unknown_loss_scale_would_change_the_ballots() -> None:
    """So that the two tests above can fail."""
    plain, scaled = Worker(FixedConfidence(0.3)), Worker(FixedConfidence(0.3))
    grads = plain.gradient(0)
    assert plain.cast(grads).count < scaled.cast([grad * 2.0**16 for grad in grads]).count


# ---------------------------------------------------------------------------------------------------------------- grow


@every_function
def test_growing_keeps_what_is_there(confidence: Confidence) -> None:
    voter = Voter(confidence)
    assert voter.stats.shape == (0, confidence.num_stats)
    voter.grow([3, 4], torch.device("cpu"))
    voter.stats += 0.5
    voter.grow([3, 4, 1, 1, 1], torch.device("cpu"))
    voter.grow([3, 4, 5, 6, 7], torch.device("cpu"))
    assert voter.stats.dtype == torch.float64
    assert torch.equal(voter.stats, torch.cat([confidence.init_stats(2) + 0.5, confidence.init_stats(3)]))


@pytest.mark.parametrize("confidence", [FixedConfidence(1.0), RMSConfidence(k=0.5)], ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("share", [0.02, 0.2, 0.55, 0.8, 1.0])
def test_clearing_at_once_leaves_what_settling_vote_by_vote_leaves(share: float, confidence: Confidence) -> None:
    """Whatever pieces are expected to be crowded: planes, counts and memory are the same bits."""
    found = []
    for expected in (None, False, True):
        worker = Worker(confidence, carry=torch.float32)
        caps = caps_at(share, worker.layout.all_pieces.length)
        trace = []
        for step in range(6):
            if expected is not None:
                worker.voter._crowded[worker.layout] = np.full(caps.size, expected)
            out = torch.zeros(worker.layout.buffer_bytes, dtype=torch.uint8)
            cast = worker.voter.cast(
                worker.gradient(step),
                worker.layout,
                worker.rows,
                scale=torch.ones((), dtype=torch.float64),
                kernels=cpu,
                out=out,
                step=step,
                caps=caps,
            )
            worker.voter.commit(CLEAN)
            crowded = torch.zeros(caps.size, dtype=torch.bool) if cast.crowded is None else cast.crowded
            parts = enumerate(torch.split(out, list(worker.layout.sizes)))
            masks = [cpu.count_votes(part[None], HEADER_BYTES, worker.layout.plane_bytes(k)) for k, part in parts]
            assert cast.num_ballots == sum(masks)
            kept = [each for row in range(NUM_PARAMS) for each in worker.voter.kept(row).values()]
            trace.append([out, cast.num_ballots, cast.finite, crowded, *kept])
        found.append(trace)
        crowded = torch.stack([step[3] for step in trace])
        assert crowded.any() == (share < 1) and not crowded.all()
    for steps in zip(*found, strict=True):
        for one, other, vote_by_vote in zip(*steps, strict=True):
            assert torch.equal(one, vote_by_vote) and torch.equal(other, vote_by_vote)


def test_only_crowded_pieces_are_packed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    ways, pack = [], _Planes.pack_carry

    def packing(self: _Planes, *args: Any, clear: bool, which: Any) -> Any:
        ways[-1].append((clear, which if which is None else which.nonzero()[0].tolist()))
        return pack(self, *args, clear=clear, which=which)

    monkeypatch.setattr(_Planes, "pack_carry", packing)
    worker = Worker(FixedConfidence(1.0), carry=torch.float32)
    length = worker.layout.all_pieces.length
    for step in range(5):
        ways.append([])
        caps = caps_at(1.0, length)
        if 1 <= step <= 2:
            caps[2] = 1
        worker.voter.cast(
            worker.gradient(step),
            worker.layout,
            worker.rows,
            scale=torch.ones((), dtype=torch.float64),
            kernels=cpu,
            out=torch.zeros(worker.layout.buffer_bytes, dtype=torch.uint8),
            step=step,
            caps=caps,
        )
        worker.voter.commit(CLEAN)
    others = [piece for piece in range(length.size) if piece != 2]
    assert ways == [
        [(True, None)],
        [(True, None), (False, [2])],
        [(True, others), (False, [2])],
        [(True, others), (False, [2])],
        [(True, None)],
    ]


def test_what_float32_kept_is_finite_in_bfloat16() -> None:
    """Largest squares, rounded to the nearest, would be infinite; all else is what bfloat16 has nearest to it."""
    wide, narrow = (Worker(RMSConfidence(k=2.0), carry=dtype).voter for dtype in (torch.float32, torch.bfloat16))
    kept = wide.kept(1)
    kept["square"] = torch.linspace(0.0, 1.0, 70)
    kept["square"][3] = torch.finfo(torch.float32).max
    narrow.keep(1, kept)
    found = narrow.kept(1)["square"]
    kept["square"][3] = torch.finfo(torch.bfloat16).max
    assert found.dtype == torch.bfloat16 and torch.equal(found, kept["square"].bfloat16())
