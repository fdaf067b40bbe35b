"""What ranks do before they have a process group."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
from torch._C._distributed_c10d import HashStore, Store

from launch.runtime import RankLostError, Ranks, meet, watch

WITHIN = timedelta(seconds=20)


def meet_all(stores: dict[int, Store]) -> dict[int, Store]:
    """Let one thread a rank meet the others."""
    met: dict[int, Store] = {}

    def run(rank: int) -> None:
        met[rank] = meet(stores[rank], rank, len(stores), WITHIN)

    threads = [threading.Thread(target=run, args=[rank], daemon=True) for rank in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WITHIN.total_seconds())
    assert met.keys() == stores.keys()
    return met


def test_lives_do_not_see_each_other() -> None:
    store = HashStore()
    for life in range(3):
        met = meet_all(dict.fromkeys(range(3), store))
        assert not met[0].check(["address"]), "an earlier life's"
        met[0].set("address", str(life))
        assert [met[rank].get("address") for rank in range(3)] == [str(life).encode()] * 3


def test_the_dead_are_not_taken_for_arrived() -> None:
    """A life that ended before all had come leaves names behind, of rank 0's partner and of rank 0 itself."""
    store = HashStore()
    for rank in (0, 1):
        with pytest.raises(RankLostError):
            meet(store, rank, 2, timedelta(seconds=0.1))
    with pytest.raises(RankLostError, match=r"rank 0 of 2 waited in vain for rank\(s\) \[1\] to start"):
        meet(store, 0, 2, timedelta(seconds=0.1))
    met = meet_all(dict.fromkeys(range(2), store))
    met[0].set("key", "value")
    assert met[1].get("key") == b"value"


def test_a_life_of_another_size() -> None:
    store = HashStore()
    meet_all(dict.fromkeys(range(4), store))
    met = meet_all(dict.fromkeys(range(2), store))
    met[0].set("key", "value")
    assert met[1].get("key") == b"value"


def test_a_rank_lost_before_the_first_step_is_said_in_our_words() -> None:
    """Making the process group and the model takes collectives too."""
    ranks = Ranks(1, 3, 0, 1)
    words = r"^rank 1 of 3 starting, waited in vain for another rank: Connection closed by peer$"
    with pytest.raises(RankLostError, match=words), watch(ranks):
        raise RuntimeError("Connection closed by peer")
    with pytest.raises(RuntimeError, match="^another trouble$"), watch(ranks):
        raise RuntimeError("another trouble")
