"""How slots follow what pieces need: by one controller each, alike on all ranks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from distsign import RMSConfidence
from distsign.ladder import DensityLadder

CLEAN, POISONED = torch.tensor(False), torch.tensor(True)


class Demand:
    """Pieces whose votes wait until there is a slot."""

    def __init__(self, ladder: DensityLadder, lengths: list[int], num_params: int = 1) -> None:
        self.ladder, self.lengths = ladder, np.asarray(lengths)
        ladder.grow(num_params)
        self.waiting = np.zeros(len(lengths))

    def step(self, arrivals: np.ndarray, poisoned: torch.Tensor = CLEAN) -> tuple[np.ndarray, np.ndarray]:
        """Return the votes sent, and the slots that there were."""
        self.ladder.begin_step()
        slots = np.maximum(1, np.floor(self.ladder.densities[: self.lengths.size] * self.lengths))
        wanted = self.waiting + arrivals
        sent = np.minimum(np.floor(wanted), slots)
        self.waiting = wanted - sent
        full = self.lengths * (wanted > slots)
        seen = torch.from_numpy(np.stack([sent, slots, full, self.lengths]).astype(np.int64))
        self.ladder.observe(np.arange(sent.size), seen)
        self.ladder.commit(poisoned)
        return sent, slots


def test_each_piece_gets_what_it_needs() -> None:
    """One votes a hundred times as densely as the other; neither waits long, and slots are mostly used."""
    demand = Demand(DensityLadder(1, 2), [100_000, 100_000])
    arrivals = np.asarray([20_000.0, 200.0])
    found = [demand.step(arrivals) for _ in range(300)]
    sent, slots = (np.sum(each[-100:], axis=0) for each in zip(*found, strict=True))
    assert (sent >= 0.98 * 100 * arrivals).all()
    assert (sent / slots > 0.85).all(), sent / slots
    assert (demand.waiting < 3 * arrivals).all(), demand.waiting / arrivals


def test_a_sudden_rise_is_met_within_steps() -> None:
    demand = Demand(DensityLadder(1, 1), [1_000_000])
    for _ in range(200):
        demand.step(np.asarray([1000.0]))
    slots, num_steps = 0.0, 0
    while slots < 16_000 and num_steps < 100:
        slots = demand.step(np.asarray([16_000.0]))[1][0]
        num_steps += 1
    assert 5 < num_steps < 20, "sixteen times as many are four octaves, an octave a step after the first steps"


def test_most_slots_are_used_where_votes_come_and_go() -> None:
    """Votes that double and halve within a few steps, as in training, must not leave half of each payload empty."""
    generator = torch.Generator().manual_seed(0)
    demand = Demand(DensityLadder(1, 1), [100_000])
    level, sent_in_all, slots_in_all = 0.0, 0.0, 0.0
    for step in range(600):
        level = 0.9 * level + 0.2 * float(torch.randn((), generator=generator))
        sent, slots = demand.step(np.asarray([400 * math.exp(level)]))
        if step >= 100:
            sent_in_all, slots_in_all = sent_in_all + sent[0], slots_in_all + slots[0]
    assert sent_in_all / slots_in_all > 0.75, sent_in_all / slots_in_all
    assert demand.waiting[0] < 8 * 400


def test_nobody_goes_below_a_single_slot() -> None:
    """A small piece that is silent for long must not have far to climb when it votes again."""
    demand = Demand(DensityLadder(1, 1), [96])
    for _ in range(500):
        demand.step(np.zeros(1))
    assert 0.5 <= demand.ladder.densities[0] * 96 <= 1


def test_silence_costs_no_slots_and_ends_in_time() -> None:
    """No slots before the carries can pass their threshold; all of them then, or as soon as somebody is crowded."""
    silent_steps = RMSConfidence(k=16, start=4.0).silent_steps
    assert silent_steps == 3 and RMSConfidence(k=16, warmup_steps=0).silent_steps == 15
    patient, crowded = (Demand(DensityLadder(1, 1, silent_steps), [1000]) for _ in range(2))
    slots = [float(patient.step(np.zeros(1))[1][0]) for _ in range(4)]
    assert slots == [1, 1, 1, 1000]
    slots = [float(crowded.step(np.full(1, 5.0))[1][0]) for _ in range(2)]
    assert slots == [1, 1000]


def test_a_ladder_ignores_poisoned_steps_and_survives_a_checkpoint() -> None:
    names, arrivals = {"a": 0, "b": 1}, np.asarray([300.0, 10.0, 4.0, 0.0])
    demand = Demand(DensityLadder(1, 2), [1000, 1000, 1000, 1000], num_params=2)
    for _ in range(20):
        demand.step(arrivals)
    demand.ladder.begin_step()
    before = demand.ladder.densities
    demand.step(arrivals, POISONED)
    demand.ladder.begin_step()
    assert np.array_equal(demand.ladder.densities, before)
    demand.step(arrivals)
    twin = DensityLadder(1, 2)
    twin.load_state_dict(demand.ladder.state_dict(names), names)
    other = Demand(twin, [1000, 1000, 1000, 1000], num_params=2)
    other.waiting = demand.waiting.copy()
    for _ in range(10):
        assert all(np.array_equal(a, b) for a, b in zip(demand.step(arrivals), other.step(arrivals), strict=True))


@pytest.mark.parametrize("cut", [(1, 3), (2, 1)], ids=["other ranks", "nodes"])
def test_cut_into_other_pieces_a_parameter_begins_from_its_densest(cut: tuple[int, int]) -> None:
    """Shares that a small parameter does not have say nothing, though they have been crowded by nobody."""
    demand = Demand(DensityLadder(1, 2), [1000, 1000])
    for _ in range(40):
        demand.step(np.asarray([200.0, 5.0]))
    small = Demand(DensityLadder(1, 2), [100])
    small.ladder.grow(1)
    for _ in range(40):
        small.step(np.asarray([1.0]))
    for ladder in (demand.ladder, small.ladder):
        state, densest = ladder.state_dict({"a": 0}), ladder.densities[ladder.densities < 1].max()
        other = DensityLadder(*cut)
        other.load_state_dict(state, {"a": 0})
        assert np.array_equal(other.densities, np.full(cut[0] * cut[1], densest))
