"""What all ranks derive alike from what they have seen."""

from __future__ import annotations

import math

import torch

from distsign import FixedConfidence, RMSConfidence
from distsign.steering import DensityLadder, Steering

CLEAN, POISONED = torch.tensor(False), torch.tensor(True)
ROWS = torch.tensor([0, 1])


def test_a_warm_up_counts_clean_steps_only() -> None:
    steering = Steering(RMSConfidence(k=16, start=4, warmup_steps=2), budgeted=False)
    steering.grow(2, torch.device("cpu"))
    seen = []
    for poisoned in (CLEAN, POISONED, CLEAN, CLEAN):
        steering.begin_step()
        seen.append((steering.of(ROWS).tolist(), float(steering.lr_scale)))
        steering.commit(poisoned)
    assert seen == [([0.25] * 2, 0.25), ([0.5] * 2, 0.5), ([0.5] * 2, 0.5), ([1.0] * 2, 1.0)]


def test_under_a_budget_k_stays_and_the_learning_rate_ramps() -> None:
    steering = Steering(RMSConfidence(k=16, ramp_steps=4), budgeted=True)
    steering.grow(2, torch.device("cpu"))
    rates = []
    for _ in range(6):
        steering.begin_step()
        assert steering.of(ROWS).tolist() == [1.0, 1.0]
        rates.append(float(steering.lr_scale))
        steering.observe(ROWS, torch.tensor([9, 9]), torch.tensor([9, 9]), torch.tensor([True, True]))
        steering.commit(CLEAN)
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_thresholds_in_gradient_units_fill_a_budget() -> None:
    """Votes are exponential in alpha: the factor must settle where eight of ten slots are used, per parameter."""
    steering = Steering(FixedConfidence(1.0), budgeted=True)
    steering.grow(2, torch.device("cpu"))
    scale, slots = torch.tensor([0.3, 5.0]), torch.tensor([100, 100])
    for _ in range(400):
        steering.begin_step()
        wanted = (10_000 * torch.exp(-steering.of(ROWS) / scale)).round().long()
        steering.observe(ROWS, wanted.minimum(slots), slots, wanted > slots)
        steering.commit(CLEAN)
    assert ((wanted > 70) & (wanted < 90)).all(), wanted
    before = steering.factors.clone()
    steering.begin_step()
    steering.observe(ROWS, slots, slots, torch.tensor([True, True]))
    steering.commit(POISONED)
    assert torch.equal(steering.factors, before)


def test_a_ladder_finds_the_density_and_follows_it() -> None:
    ladder = DensityLadder()
    elements = torch.tensor([100_000])
    waiting = 0.0
    for step in range(400):
        density = 0.2 if step < 10 else 0.004
        ladder.begin_step()
        slots = int(ladder.density * 100_000)
        wanted = waiting + density * 100_000
        waiting = max(0.0, wanted - slots)
        sent = torch.tensor([int(min(wanted, slots))])
        ladder.observe(sent, torch.tensor([slots]), elements * (wanted > slots), elements)
        ladder.commit(CLEAN)
        if step in (9, 399):
            assert 0.7 * density < ladder.density < 1.6 * density or step == 9 and ladder.density >= 0.2, step
    assert waiting < 3 * 0.004 * 100_000, "what waits is a few steps old"


def test_most_slots_are_used_where_the_votes_come_and_go() -> None:
    """Votes that double and halve within a few steps, as in training, must not leave half of each payload empty."""
    generator = torch.Generator().manual_seed(0)
    ladder, elements = DensityLadder(), torch.tensor([100_000])
    waiting = level = 0.0
    sent_in_all = slots_in_all = 0
    for step in range(600):
        level = 0.9 * level + 0.2 * float(torch.randn((), generator=generator))
        ladder.begin_step()
        slots = int(ladder.density * 100_000)
        wanted = waiting + 400 * math.exp(level)
        sent = int(min(wanted, slots))
        waiting = wanted - sent
        ladder.observe(torch.tensor([sent]), torch.tensor([slots]), elements * (wanted > slots), elements)
        ladder.commit(CLEAN)
        if step >= 20:
            sent_in_all, slots_in_all = sent_in_all + sent, slots_in_all + slots
    assert 0.7 < sent_in_all / slots_in_all < 0.95
    assert waiting < 3 * 400


def test_a_ladder_ignores_poisoned_steps_and_survives_a_checkpoint() -> None:
    ladder = DensityLadder()
    for poisoned in (CLEAN, POISONED, CLEAN):
        ladder.begin_step()
        before = ladder.rung
        ladder.observe(*(torch.tensor([n]) for n in (0, 10, 0, 10)))
        ladder.commit(poisoned)
    twin = DensityLadder()
    twin.load_state_dict(ladder.state_dict())
    assert before == 8 and twin.rung == ladder.rung == 16
