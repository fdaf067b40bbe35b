"""The simulator beside the hook on real ranks: the same bytes, exactly; and a calibration that comes to its end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from . import simulator_jobs as jobs
from .ranks import RankPool

Pools = Callable[[int], RankPool]

CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "planes": (3, {"wire": "planes"}),
    "sparse:bits=0.3": (3, {"bits_per_param": 0.3}),
    "planes:gather=1": (3, {"wire": "planes", "exchange": "all_gather"}),
    "sparse:bits=0.3,gather=1": (3, {"bits_per_param": 0.3, "exchange": "all_gather"}),
    "hierarchical": (4, {"wire": "planes", "exchange": "hierarchical", "ranks_per_node": 2}),
    "hierarchical:bits=0.3": (4, {"bits_per_param": 0.3, "exchange": "hierarchical", "ranks_per_node": 2}),
}


@pytest.mark.parametrize("text", CASES)
@pytest.mark.parametrize("bucket_mb", [0.05, 2.0])
def test_counted_bytes_are_those_predicted(rank_pool: Pools, text: str, bucket_mb: float) -> None:
    world_size, options = CASES[text]
    rank_pool(world_size).run(jobs.count_beside_prediction, text, options, bucket_mb)


@pytest.mark.parametrize(
    ("text", "name", "options", "bucket_mb"),
    [
        ("topk:0.01", "top-k", {"density": 0.01}, 0.05),
        ("topk:0.01", "top-k", {"density": 0.01}, 2.0),
        ("powersgd:2", "power-sgd", {"rank": 2}, 1000.0),
        ("bf16", "bf16", {}, 0.05),
        ("fp16", "fp16", {}, 2.0),
        ("fp32", "none", {}, 0.05),
    ],
)
def test_counted_bytes_of_rivals_are_those_predicted(
    rank_pool: Pools, text: str, name: str, options: dict[str, Any], bucket_mb: float
) -> None:
    rank_pool(3).run(jobs.count_rival_beside_prediction, text, name, options, bucket_mb)


def test_calibrate_on_ranks(rank_pool: Pools) -> None:
    found = rank_pool(4).run(jobs.calibrated, deadline_s=150)[0]
    assert 0 < found["cores"] <= 4
    assert found["bandwidth"] > 0
    assert set(found["in_step"]) == {"fp32", "bf16", "fp16", "powersgd", "topk", "planes", "sparse", "hierarchical"}
    for points in found["in_step"].values():
        assert all(0.01 < point["work"] < 100 and 0.89 < point["wire"] < 3.1 for point in points)


def test_calibrate_without_whole_steps(rank_pool: Pools) -> None:
    found = rank_pool(4).run(jobs.calibrated, False, deadline_s=150)[0]
    assert found["bandwidth"] > 0
    assert not found["in_step"]


def test_calls_do_not_count_while_any_rank_takes_new_pages(rank_pool: Pools) -> None:
    for count, (quick_s, other_s) in rank_pool(2).run(jobs.timed_while_memory_is_new, 7, 10.0):
        assert count == 7 + 5  # the first three in any case
        assert quick_s < 0.02 <= other_s


def test_new_pages_without_end_are_waited_for_no_longer_than_is_enough(rank_pool: Pools) -> None:
    for count, (quick_s, _) in rank_pool(2).run(jobs.timed_while_memory_is_new, 1000, 0.2):
        assert 3 + 3 <= count < 3 + 5 + 5
        assert quick_s > 0.05
