"""What all ranks derive alike from what they have seen."""

from __future__ import annotations

import torch

from distsign import FixedConfidence, RMSConfidence
from distsign.steering import Steering

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
