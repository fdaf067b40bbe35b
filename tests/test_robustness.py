"""`distsign.robustness`: what liars can do to a vote, and what they cannot, over many steps and every attack."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distsign import FixedConfidence, RMSConfidence, SignAdamPP
from distsign.robustness import (
    ATTACKS,
    RULES,
    AllVotes,
    Attack,
    Averages,
    Collusion,
    Electorate,
    Honest,
    LyingOwners,
    Malformed,
    PoisonFlood,
    SignFlip,
    View,
    train,
)
from distsign.wire.header import PayloadError

SHAPE = [6000, 77, 1]
NUM_ELEMENTS = sum(SHAPE)
W = 8


def gradients(step: int, num_workers: int = W) -> Tensor:
    """Return noisy copies of one drift, so that workers agree on some components and not on others."""
    draw = torch.Generator().manual_seed(step)
    drift = torch.linspace(-200, 200, NUM_ELEMENTS).sin()
    return drift + 0.5 * torch.randn(num_workers, NUM_ELEMENTS, generator=draw)


def ballots_of(rows: Tensor, alpha: float) -> Tensor:
    return torch.where(rows.abs() > alpha, rows.sign(), 0.0)


def electorate(attack: Attack, num_liars: int, alpha: float = 0.5, **options: Any) -> Electorate:
    return Electorate(SHAPE, W, num_liars, attack, FixedConfidence(alpha), carry=False, **options)


@pytest.mark.parametrize("margin", [1, 2, 5])
def test_honest_workers_vote_as_the_definition_says(margin: int) -> None:
    vote = electorate(Honest(), 0, margin=margin)
    for step in range(3):
        tally = ballots_of(gradients(step), 0.5).sum(0)
        assert torch.equal(vote.combine(gradients(step)).direction, torch.where(tally.abs() >= margin, tally.sign(), 0))


@pytest.mark.parametrize("name", ATTACKS)
def test_what_an_attack_sends(name: str) -> None:
    rows = gradients(0)
    cast = ballots_of(rows, 0.5).to(torch.int8)
    attack = ATTACKS[name]()
    view = View(0, cast[5:], rows[5:], cast[:5], rows[:5], cast[0], torch.Generator().manual_seed(0))
    sent = attack.ballots(view)
    assert sent.shape == (3, NUM_ELEMENTS) and sent.dtype == torch.int8 and set(sent.unique().tolist()) <= {-1, 0, 1}
    assert attack.gradients(view).shape == (3, NUM_ELEMENTS)
    changed = {"sign-flip", "random", "all-votes", "collusion", "targeted", "adaptive"}
    assert torch.equal(sent, cast[5:]) == (name not in changed)


@pytest.mark.parametrize("owner_carry", [False, "standing"])
@pytest.mark.parametrize("num_liars", [1, 2, 3])
@pytest.mark.parametrize(
    "name", [n for n in ATTACKS if n not in {"none", "malformed", "poison", "pulsed-poison", "lying-owners"}]
)
def test_above_the_number_of_liars_no_verdict_is_theirs_alone(name: str, num_liars: int, owner_carry: Any) -> None:
    """At margin f + 1 an honest vote of that sign stands behind each verdict; over steps, a standing one."""
    vote = electorate(ATTACKS[name](), num_liars, margin=num_liars + 1, owner_carry=owner_carry)
    standing = torch.zeros(W - num_liars, NUM_ELEMENTS)
    num_verdicts = 0
    for step in range(12):
        rows = gradients(step)
        honest = ballots_of(rows[: W - num_liars], 0.5)
        # A worker's last vote stands until there is a verdict on the component.
        standing = torch.where(honest != 0, honest, standing) if owner_carry else honest
        found = vote.combine(rows).direction
        assert not (found.ne(0) & standing.eq(found).logical_not().all(0)).any()
        num_verdicts += int(found.count_nonzero())
        standing = torch.where(found != 0, 0.0, standing)
    # What all honest workers agree on is blocked where fewer than f + margin of them are left (SECURITY.md).
    assert num_verdicts > 0 or W - num_liars < 2 * num_liars + 1


@pytest.mark.parametrize(("owner_carry", "holds"), [(False, True), ("standing", True), (True, False)])
def test_whether_votes_can_be_saved_up(owner_carry: Any, holds: bool) -> None:
    """One liar votes on what nobody else votes on: a plain carry adds it up until it passes the margin."""
    vote = electorate(AllVotes(), 1, alpha=9.0, margin=2, owner_carry=owner_carry)
    moved = sum(int(vote.combine(gradients(step)).direction.count_nonzero()) for step in range(6))
    assert (moved == 0) == holds


def test_a_cap_on_the_density_leaves_liars_out_who_vote_on_everything() -> None:
    rows, alpha = gradients(0), 1.2
    honest = ballots_of(rows[:5], alpha).sum(0)
    assert 0 < ballots_of(rows[:5], alpha).ne(0).float().mean() < 0.2
    capped = electorate(AllVotes(), 3, alpha, margin=1, max_density=0.4).combine(rows).direction
    assert torch.equal(capped, honest.sign())
    free = electorate(AllVotes(), 3, alpha, margin=1).combine(rows).direction
    assert free.count_nonzero() > 1.5 * capped.count_nonzero()


def test_a_flood_of_poison_stops_all_steps_or_so_many() -> None:
    free, bounded = electorate(PoisonFlood(), 2), electorate(PoisonFlood(), 2, max_poison_streak=3)
    assert all(free.combine(gradients(step)).poisoned for step in range(8))
    assert [bounded.combine(gradients(step)).poisoned for step in range(8)] == [True] * 3 + [False] * 5
    pulsed = electorate(ATTACKS["pulsed-poison"](), 2, max_poison_streak=3)  # its score: 3 6 5 8 9
    assert [pulsed.combine(gradients(step)).poisoned for step in range(6)] == [True, True, False, True, True, False]


@pytest.mark.parametrize("kind", ["noise", "oversized", "version"])
def test_what_is_no_payload_is_an_error_that_names_its_sender(kind: str) -> None:
    vote = Electorate(SHAPE, W, 1, Malformed(kind), RMSConfidence(k=2), margin=1, bits_per_param=2.0)
    with pytest.raises(PayloadError, match=f"rank {W - 1}"):
        vote.combine(gradients(0))


def test_owners_lie_about_their_shards_unless_everyone_counts() -> None:
    honest = electorate(Honest(), 0).combine(gradients(0)).direction
    lied = electorate(LyingOwners(), 3).combine(gradients(0)).direction
    assert torch.equal(lied.abs(), honest.abs())
    assert 0.3 < (lied != honest).sum() / honest.count_nonzero() < 0.45  # 3 of 8 shards
    assert torch.equal(electorate(LyingOwners(), 3, exchange="all_gather").combine(gradients(0)).direction, honest)


@pytest.mark.parametrize("rule", RULES)
def test_averages_and_what_liars_can_do_to_them(rule: str) -> None:
    """A mean goes anywhere; the others stay between honest values, where liars are fewer than half."""
    rows = gradients(0)
    assert torch.allclose(Averages(RULES[rule], W, 0, Honest()).combine(rows).direction, RULES[rule](rows, 0))
    found = Averages(RULES[rule], W, 3, Collusion()).combine(1e3 * rows).direction
    low, high = 1e3 * rows[:5].amin(0), 1e3 * rows[:5].amax(0)
    assert ((found >= low) & (found <= high)).all() == (rule != "mean")


def test_three_liars_of_eight_stop_an_average_and_not_a_vote() -> None:
    target = torch.randn(64, generator=torch.Generator().manual_seed(1))

    def distance_after(combiner: Electorate | Averages, optimizer: Any, lr: float) -> float:
        torch.manual_seed(0)
        model = nn.Linear(64, 1, bias=False)
        with torch.no_grad():
            model.weight.zero_()

        def batch(step: int, worker: int) -> Tensor:
            return torch.randn(16, 64, generator=torch.Generator().manual_seed(10 * step + worker))

        def loss(model: nn.Module, x: Tensor) -> Tensor:
            return (model(x).squeeze(1) - x @ target).square().mean()

        outcome = train(model, optimizer(model.named_parameters(), lr=lr), combiner, batch, loss, 200)
        assert outcome.error is None and outcome.num_steps == 200
        with torch.no_grad():
            return float((model.weight - target).norm() / target.norm())

    vote = Electorate([64], W, 3, SignFlip(), FixedConfidence(0.0), margin=1, carry=False)
    assert distance_after(vote, SignAdamPP, 0.02) < 0.2
    plain = Averages(RULES["mean"], W, 3, SignFlip())
    assert distance_after(plain, lambda named, lr: torch.optim.Adam([p for _, p in named], lr=lr), 0.02) > 1.0


@pytest.mark.parametrize("options", [{"margin": 9}, {"wire": "planes"}, {"max_density": 2.0}])
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        electorate(Honest(), 0, **options)


def test_liars_must_be_fewer_than_workers() -> None:
    with pytest.raises(ValueError, match="num_liars=8"):
        electorate(Honest(), W)
