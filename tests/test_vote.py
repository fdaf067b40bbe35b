"""The rule of the vote, and the agreement of the ranks before it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distsign.agreement import require_agreement
from distsign.vote import majority_vote, require_margin

Rows = list[list[int]]


@st.composite
def elections(draw: st.DrawFn, max_voters: int = 9) -> Rows:
    num_voters, num_components = draw(st.integers(1, max_voters)), draw(st.integers(0, 12))
    row = st.lists(st.sampled_from([-1, 0, 1]), min_size=num_components, max_size=num_components)
    return draw(st.lists(row, min_size=num_voters, max_size=num_voters))


def vote(rows: Rows, margin: int) -> list[int]:
    verdicts = majority_vote(torch.tensor(rows, dtype=torch.int8).reshape(len(rows), -1), margin)
    assert verdicts.dtype == torch.int8
    result: list[int] = verdicts.tolist()
    return result


@given(elections(), st.integers(1, 10))
def test_majority_counted_by_hand(rows: Rows, margin: int) -> None:
    expected = []
    for component in range(len(rows[0])):
        yes = sum(row[component] == 1 for row in rows)
        no = sum(row[component] == -1 for row in rows)
        expected.append(1 if yes - no >= margin else -1 if no - yes >= margin else 0)
    assert vote(rows, margin) == expected


@given(elections(), st.integers(1, 5), st.randoms(use_true_random=False))
def test_the_order_of_the_voters_does_not_matter(rows: Rows, margin: int, random: Any) -> None:
    shuffled = list(rows)
    random.shuffle(shuffled)
    assert vote(shuffled, margin) == vote(rows, margin)


@given(elections(), st.integers(1, 5))
def test_opposite_ballots_give_opposite_verdicts(rows: Rows, margin: int) -> None:
    assert vote([[-ballot for ballot in row] for row in rows], margin) == [-v for v in vote(rows, margin)]


@given(elections(), st.integers(0, 4), st.data())
def test_margin_f_plus_one_needs_an_honest_vote(honest: Rows, num_liars: int, data: st.DataObject) -> None:
    width = len(honest[0])
    lie = st.lists(st.sampled_from([-1, 0, 1]), min_size=width, max_size=width)
    lies = data.draw(st.lists(lie, min_size=num_liars, max_size=num_liars))
    for component, verdict in enumerate(vote(honest + lies, num_liars + 1)):
        assert verdict == 0 or any(row[component] == verdict for row in honest)


def test_a_tie_is_zero_and_the_margin_is_reached_at_equality() -> None:
    assert vote([[1, 1, 1, -1], [-1, 1, 0, -1], [0, 0, 1, -1]], margin=1) == [0, 1, 1, -1]
    assert vote([[1, 1, 1, -1], [-1, 1, 0, -1], [0, 0, 1, -1]], margin=2) == [0, 1, 1, -1]
    assert vote([[1, 1, 1, -1], [-1, 1, 0, -1], [0, 0, 1, -1]], margin=3) == [0, 0, 0, -1]


def test_more_voters_than_int8_can_count() -> None:
    assert vote([[1, -1, 1]] * 200 + [[1, -1, -1]] * 199, margin=1) == [1, -1, 1]
    assert vote([[1, -1, 1]] * 256, margin=256) == [1, -1, 1]


@pytest.mark.parametrize("margin", [0, -1, 1.0, 1.5, True, None, "1"])
def test_margins_that_mean_nothing(margin: Any) -> None:
    with pytest.raises(ValueError, match="margin must be an integer of at least 1, got .*a tie is 0"):
        require_margin(margin)
    with pytest.raises(ValueError, match="margin must be an integer"):
        majority_vote(torch.zeros(1, 1, dtype=torch.int8), margin)


def test_a_margin_that_no_lead_can_reach() -> None:
    assert require_margin(4, world_size=4) == 4
    with pytest.raises(ValueError, match="at most the number of voters, 4, got 5: .*no parameter would ever move"):
        require_margin(5, world_size=4)
    assert require_margin(5) == 5


# ----------------------------------------------------------------------------------------------------------- agreement


def test_ranks_that_agree_pass() -> None:
    require_agreement([])
    require_agreement([{"margin": 1}])
    require_agreement([{"margin": 1, "l2": 0.0}, {"l2": 0.0, "margin": 1}])


def test_what_differs_is_named_with_rank_and_value() -> None:
    with pytest.raises(ValueError) as error:
        require_agreement([{"margin": 1}, {"margin": 2}, {"margin": 1}, {"margin": 1}])
    assert "margin is 1 on ranks 0, 2 and 3, but 2 on rank 1." in str(error.value)


def test_all_that_differs_is_named_and_nothing_else() -> None:
    with pytest.raises(ValueError) as error:
        require_agreement([{"margin": 1, "l2": 0.0, "wire": "auto"}, {"margin": 3, "l2": 0.5, "wire": "auto"}])
    assert "margin is 1 on rank 0, but 3 on rank 1; l2 is 0.0 on rank 0, but 0.5 on rank 1" in str(error.value)
    assert "wire" not in str(error.value)


def test_an_option_that_one_rank_lacks() -> None:
    with pytest.raises(ValueError, match="l2 is missing on rank 0, but 0.5 on rank 1"):
        require_agreement([{"margin": 1}, {"margin": 1, "l2": 0.5}])


def test_values_of_another_type_differ() -> None:
    with pytest.raises(ValueError, match="margin is 1 on rank 0, but '1' on rank 1"):
        require_agreement([{"margin": 1}, {"margin": "1"}])
