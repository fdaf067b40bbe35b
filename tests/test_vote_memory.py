"""What a vote leaves to the next step: which states it goes on from, and which it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from distsign import AdaptiveConfidence, RMSConfidence
from distsign.options import VoteOptions
from distsign.vote_memory import VoteMemory

LENGTHS = [5000, 7]
NAMES = {"weight": 0, "bias": 1}


def memory(num_voters: int, *, confidence: Any = None, **options: Any) -> VoteMemory:
    made = VoteMemory(VoteOptions.check(confidence=confidence or RMSConfidence(k=4), **options))
    made.meet(num_voters)
    made.grow(LENGTHS, torch.device("cpu"))
    return made


def test_a_state_comes_back() -> None:
    before = memory(3, owner_carry=True)
    before.voter.memory.carry[:] = torch.randn(before.voter.memory.carry.shape)  # type: ignore[union-attr]
    before.owner.keep({(0, 1664, 1664): torch.ones(1664, dtype=torch.int16)}, torch.device("cpu"))
    state = before.state_dict(NAMES)
    after = memory(3, owner_carry=True)
    after.load_state_dict(state, NAMES, LENGTHS)
    again = after.state_dict(NAMES)
    assert state["voter"].keys() == again["voter"].keys() == NAMES.keys()
    for name, kept in state["voter"].items():
        assert all(torch.equal(kept[key], again["voter"][name][key]) for key in kept)
    assert [*again["owner"]] == [("weight", 1664, 1664)]
    assert again["owner"]["weight", 1664, 1664].all()


def test_another_number_of_voters_must_not_be_met_in_the_middle() -> None:
    made = memory(1)
    with pytest.raises(
        ValueError, match=r"a vote among 1 has left, and now there are 4 voters: load .* after init_pro"
    ):
        made.meet(4)
    made.meet(1)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            {"num_voters": 2},
            r"written by 2 ranks, and owners keep undecided votes.* now there are 3: .*states, 3\) first",
        ),
        ({"ranks_per_node": 2}, r"by 3 nodes of 2 ranks, and each keeps its share, but now there are 3: .*states, 3\)"),
        ({"exchange": "all_gather"}, "written with exchange='all_gather'.* elsewhere with exchange='two_phase'"),
    ],
)
def test_states_that_are_refused(changed: dict[str, Any], words: str) -> None:
    before = memory(3, owner_carry=True)
    before.owner.keep({(0, 0, 1664): torch.ones(1664, dtype=torch.int16)}, torch.device("cpu"))
    with pytest.raises(ValueError, match=words):
        memory(3, owner_carry=True).load_state_dict({**before.state_dict(NAMES), **changed}, NAMES, LENGTHS)


def test_a_state_of_an_earlier_version_is_taken() -> None:
    state = memory(3).state_dict(NAMES)
    for key in ("ranks_per_node", "exchange", "carry", "owner_carry", "admission"):
        del state[key]
    memory(3).load_state_dict(state, NAMES, LENGTHS)


def test_nodes_are_named_where_they_are_others() -> None:
    state = memory(3).state_dict(NAMES)
    made = memory(2, exchange="hierarchical", ranks_per_node=2)
    with pytest.raises(
        ValueError, match=r"by 3 ranks, .* there are 2 nodes of 2: .*reshard\(states, 4, ranks_per_node=2"
    ):
        made.load_state_dict(state, NAMES, LENGTHS)


@pytest.mark.parametrize(
    ("then", "now", "words"),
    [
        (
            {"carry": True},
            {"carry": False},
            "written with carry=True, but here carry is None: what was kept would be lost",
        ),
        ({"carry": False}, {"carry": True}, "written with carry=False, but here carry is torch.float32"),
        ({"owner_carry": "plain"}, {}, "written with owner_carry='plain', but here owner_carry is None"),
        (
            {"owner_carry": "plain"},
            {"owner_carry": "standing"},
            "owner_carry='plain', but here owner_carry is 'standing'",
        ),
        (
            {"owner_carry": "standing"},
            {"owner_carry": "plain"},
            "owner_carry='standing', but here owner_carry is 'plain'",
        ),
    ],
)
def test_a_state_of_other_carries_is_refused(then: dict[str, Any], now: dict[str, Any], words: str) -> None:
    """Else what they hold would be lost without a word."""
    kinds = {"plain": torch.ones(1664, dtype=torch.int16), "standing": torch.ones(3, 2, 208, dtype=torch.uint8)}
    before, after = (
        memory(3, confidence=AdaptiveConfidence(), **{"wire": "planes", "carry": True, **options})
        for options in (then, now)
    )
    owns_nothing = before.state_dict(NAMES)
    if "owner_carry" in then:
        before.owner.keep({(0, 0, 1664): kinds[then["owner_carry"]]}, torch.device("cpu"))
    state = before.state_dict(NAMES)
    earlier = {key: value for key, value in state.items() if key not in ("carry", "owner_carry")}
    for each in (state, earlier, owns_nothing):
        with pytest.raises(ValueError, match=words):
            after.load_state_dict(each, NAMES, LENGTHS)
        before.load_state_dict(each, NAMES, LENGTHS)


def test_a_state_of_other_sizes_is_refused() -> None:
    state = memory(3).state_dict(NAMES)
    with pytest.raises(ValueError, match="keeps 7 components of 'bias', but this rank votes on 8: load"):
        memory(3).load_state_dict(state, NAMES, [5000, 8])


@pytest.mark.parametrize(
    ("piece", "value"),
    [
        (("weight", 0, 1650), torch.ones(1650, dtype=torch.int16)),  # of a smaller parameter
        (("weight", 1664, 1664), torch.ones(1663, dtype=torch.int16)),
        (("bias", 0, 8), torch.ones(8, dtype=torch.int16)),
    ],
)
def test_undecided_votes_on_other_pieces_are_refused(piece: tuple[str, int, int], value: torch.Tensor) -> None:
    """Without a carry of the voter's nothing else shows that the parameters were of other sizes."""
    after = memory(3, confidence=AdaptiveConfidence(), wire="planes", owner_carry=True)
    state = {**after.state_dict(NAMES), "owner": {piece: value}}
    with pytest.raises(
        ValueError, match=r"keeps undecided votes of '\w+', .* which is no piece of the .*: load the check"
    ):
        after.load_state_dict(state, NAMES, LENGTHS)


def test_standing_ballots_of_other_workers_are_refused() -> None:
    before, after = (memory(3, owner_carry="standing") for _ in range(2))
    before.owner.keep({(1, 0, 7): torch.ones(2, 2, 1, dtype=torch.uint8)}, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"undecided votes of 'bias', \(2, 2, 1\) on 7 components from 0 on"):
        after.load_state_dict(before.state_dict(NAMES), NAMES, LENGTHS)
