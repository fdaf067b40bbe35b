"""Whose ballots an owner counts, without ranks: votes counted by the body's own bits, and who floods with poison."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distsign import FixedConfidence, SignVoteState, TargetDensity
from distsign.admission import Admission
from distsign.kernels import Kernels, SparseCode, cpu, reference
from distsign.payload import Opened

NUM_BYTES = 40


def opened(votes: list[list[int]], code: SparseCode | None, kernels: Kernels) -> Opened:
    """Return payloads whose senders vote, alternately for and against, at these bits of their planes."""
    planes = torch.zeros(len(votes), 2 * NUM_BYTES, dtype=torch.uint8)
    for row, places in zip(planes, votes, strict=True):
        for number, place in enumerate(places):
            row[place // 8] |= 1 << place % 8
            row[NUM_BYTES + place // 8] |= (number % 2) << place % 8
    crowded = torch.ones(len(votes), 2, dtype=torch.bool)
    if code is None:
        return Opened(planes, 0, NUM_BYTES, None, crowded, torch.zeros(len(votes), 0))
    bodies = torch.zeros(len(votes), code.num_bytes, dtype=torch.uint8)
    for row, body in zip(planes, bodies, strict=True):
        assert kernels.encode_sparse(row, NUM_BYTES, code, body)
    return Opened(bodies, 0, NUM_BYTES, code, crowded, torch.zeros(len(votes), 0))


@pytest.mark.parametrize("kernels", [reference, cpu], ids=["reference", "cpu"])
@pytest.mark.parametrize("code", [None, SparseCode(8 * NUM_BYTES, 20)], ids=["planes", "sparse"])
def test_a_ballot_denser_than_the_cap_becomes_abstentions(kernels: Kernels, code: SparseCode | None) -> None:
    votes = [[3, 70, 319], [*range(0, 320, 16)], [], [*range(10)]]
    ballots = opened(votes, code, kernels)
    assert ballots.num_votes(kernels).tolist() == [3, 20, 0, 10]
    kept = Admission(4, max_density=0.03).admit(ballots, 10, kernels)  # so many is just allowed
    assert kept.num_votes(kernels).tolist() == [3, 0, 0, 10]
    assert kept.crowded is not None and kept.crowded[:, 0].tolist() == [True, False, True, True]
    rows, at, ok = kept.planes(kernels)
    before = opened(votes, None, kernels).rows
    assert bool(ok.all()) and torch.equal(rows[[0, 2, 3], at:], before[[0, 2, 3]]) and not rows[1, at:].any()


@pytest.mark.parametrize(("num_slots", "is_counted"), [(20, False), (21, True)])
def test_ballots_with_no_room_to_be_too_dense_are_not_counted(
    monkeypatch: pytest.MonkeyPatch, num_slots: int, is_counted: bool
) -> None:
    ballots = opened([[3], [*range(20)]], SparseCode(8 * NUM_BYTES, num_slots), cpu)
    counts: list[int] = []
    count = Opened.num_votes
    monkeypatch.setattr(Opened, "num_votes", lambda self, kernels: [counts.append(1), count(self, kernels)][1])
    kept = Admission(2, max_density=0.0625).admit(ballots, 20, cpu)
    assert bool(counts) == is_counted
    assert count(kept, cpu).tolist() == [1, 20]


def test_a_malformed_body_is_not_hidden_by_the_cap() -> None:
    code = SparseCode(8 * NUM_BYTES, 20)
    ballots = opened([[1], [2]], code, cpu)
    ballots.rows[1] = 255
    _, _, ok = Admission(2, max_density=0.001).admit(ballots, 0, cpu).planes(cpu)
    assert ok.tolist() == [True, False]


@given(
    steps=st.lists(st.lists(st.booleans(), min_size=5, max_size=5), max_size=40),
    streak=st.integers(min_value=1, max_value=4),
)
def test_who_is_left_out_follows_from_the_scores(steps: list[list[bool]], streak: int) -> None:
    """Against the rule in plain Python, over steps in which fewer than half send poison."""
    admission = Admission(5, max_poison_streak=streak)
    out, scores, most = [False] * 5, [0] * 5, streak * streak
    for sent in steps:
        admission.begin_step()
        assert admission.numbers() == tuple(k for k in range(5) if out[k])
        stops = admission.poison(torch.tensor(sent))
        assert bool(stops) == any(s and not o for s, o in zip(sent, out, strict=True))
        admission.commit(admission.seen)
        if sum(sent) > 2:
            continue
        for k in range(5):
            scores[k] = min(scores[k] + streak, most) if sent[k] else max(scores[k] - 1, 0)
            if scores[k] in (most, most - streak):
                out[k] = scores[k] == most
        again = Admission(5, max_poison_streak=streak)
        again.load_state_dict(admission.state_dict())
        admission = again


@pytest.mark.parametrize("streak", [1, 2, 3, 10])
def test_so_many_in_a_row_decide_and_a_relapse_at_once(streak: int) -> None:
    admission = Admission(3, max_poison_streak=streak)

    def out_after(sent: bool) -> bool:
        admission.commit(torch.tensor([False, sent, False]))
        return admission.numbers() == (1,)

    assert [out_after(True) for _ in range(streak + 5)] == [False] * (streak - 1) + [True] * 6
    assert [out_after(False) for _ in range(streak)] == [True] * (streak - 1) + [False]
    assert out_after(True)


@pytest.mark.parametrize("streak", [1, 4, 20])
@pytest.mark.parametrize("pause_every", [2, 3, 20, None])
@pytest.mark.parametrize("num_liars", [1, 2])
def test_pauses_do_not_let_a_flood_stop_more_than_a_few_steps(
    streak: int, pause_every: int | None, num_liars: int
) -> None:
    """Two take turns: each of them stops one step in `streak` and one, and what its score lets it do beforehand."""
    admission, stopped, num_steps = Admission(7, max_poison_streak=streak), 0, 4000
    num_sent = torch.zeros(7)
    for step in range(num_steps):
        admission.begin_step()
        sent = torch.zeros(7, dtype=torch.bool)
        turn = step // (pause_every or 1) % num_liars
        sent[turn] = pause_every is None or (step + 1) % pause_every != 0
        num_sent += sent
        stopped += int(admission.poison(sent))
        admission.commit(admission.seen)
    assert num_sent[:num_liars].min() >= num_steps / num_liars / 2 - 20
    assert streak <= stopped <= num_liars * (num_steps / (streak + 1) + 2 * streak)


def test_what_was_held_under_another_streak_begins_anew() -> None:
    before = Admission(3, max_poison_streak=3)
    for _ in range(3):
        before.commit(torch.tensor([False, True, False]))
    assert before.numbers() == (1,)
    for streak, expected in ((3, (1,)), (4, ()), (None, ())):
        after = Admission(3, max_poison_streak=streak)
        after.load_state_dict(before.state_dict())
        assert after.numbers() == expected
        assert after.state_dict()["score"] == ([0, 9, 0] if expected else [0, 0, 0])


def test_it_is_said_once_who_is_left_out_and_who_counts_again(caplog: pytest.LogCaptureFixture) -> None:
    admission = Admission(3, max_poison_streak=2)
    caplog.set_level(logging.WARNING, "distsign")
    for sent in [True] * 5 + [False] * 4:
        admission.begin_step()
        admission.commit(torch.tensor([False, sent, False]))
    assert [record.getMessage() for record in caplog.records] == [
        "rank 1 sends poison (NaN or infinity) step after step: its ballots are left out until it has sent none for 2 "
        "steps in a row",
        "the ballots of rank 1, free of poison again, count again",
    ]


def test_the_mean_blames_a_number_too_large_for_a_sum() -> None:
    admission = Admission(3, max_poison_streak=1)
    raw = torch.tensor([[1.0], [3e38], [2e38]])
    assert admission.mean(raw).isinf().all() and admission.seen.tolist() == [False, True, True]
    admission = Admission(3, max_poison_streak=1)
    admission.commit(torch.tensor([False, True, False]))
    admission.begin_step()
    raw = torch.tensor([[1.0], [float("nan")], [2.0]])
    assert admission.mean(raw).tolist() == [1.5] and not admission.seen.any()


@pytest.mark.parametrize("value", [0, -0.1, 1.5, True, "1", float("nan")])
def test_a_density_out_of_range_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"max_density must be a share of the components in \(0, 1\], or None, got"):
        SignVoteState(confidence=FixedConfidence(0.1), max_density=value)  # type: ignore[arg-type]


def test_a_confidence_function_that_steers_above_the_cap_is_refused() -> None:
    with pytest.raises(ValueError, match="max_density=0.05 is below what TargetDensity"):
        SignVoteState(confidence=TargetDensity(0.1), max_density=0.05)


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "3"])
def test_a_streak_that_is_no_number_of_steps_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="max_poison_streak must be a number of steps of at least 1, or None, got"):
        SignVoteState(confidence=FixedConfidence(0.1), max_poison_streak=value)  # type: ignore[arg-type]
