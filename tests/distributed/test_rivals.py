"""Rivals on real ranks: what comes back is what their papers say, and bytes are those of the formulas."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from . import rival_jobs as jobs
from .ranks import RankPool

Pools = Callable[[int], RankPool]

COUNTED = {
    "one-bit-sgd": {},
    "terngrad": {},
    "ef-sign-sgd": {},
    "sign-sgd": {},
    "signum": {},
    "lion": {},
    "top-k": {"density": 0.01},
    "dgc": {"density": 0.01, "warmup_steps": 4},
    "one-bit-adam": {"warmup_steps": 2},
}
KEEPING = {**COUNTED, "qsgd": {}}


@pytest.mark.parametrize("name", jobs.ORACLES)
def test_what_comes_back_is_what_the_paper_says(rank_pool: Pools, name: str) -> None:
    assert len(set(rank_pool(4).run(jobs.equal_the_oracle, name, 7))) == 1


@pytest.mark.parametrize("world_size", [1, 3])
def test_with_other_numbers_of_ranks(rank_pool: Pools, world_size: int) -> None:
    for name in ("sign-sgd", "one-bit-adam", "top-k"):
        assert len(set(rank_pool(world_size).run(jobs.equal_the_oracle, name, 5))) == 1


@pytest.mark.parametrize("name", COUNTED)
def test_counted_bytes_are_those_of_the_formula(rank_pool: Pools, name: str) -> None:
    rank_pool(4).run(jobs.count_bytes, name, COUNTED[name], 5)


def test_counted_bytes_are_those_of_what_qsgd_has_drawn(rank_pool: Pools) -> None:
    rank_pool(4).run(jobs.count_drawn_bytes, 3)


@pytest.mark.parametrize(
    ("name", "values"), [("terngrad", {"clip": 0}), ("qsgd", {"levels": 2}), ("qsgd", {"chunk": 7})]
)
def test_stochastic_rounding_is_unbiased(rank_pool: Pools, name: str, values: dict[str, float]) -> None:
    num_steps = 150
    for result in rank_pool(4).run(jobs.mean_of_draws, name, values, num_steps):
        for parameter, (of_mean, of_one) in result.items():
            # Independent errors of mean 0 shrink by the root of their number; a bias would stay.
            assert of_mean < 3 * of_one / num_steps**0.5 + 1e-6, parameter


def test_power_sgd_is_torchs_own(rank_pool: Pools) -> None:
    rank_pool(4).run(jobs.power_sgd, 5)


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_half_precision(rank_pool: Pools, name: str) -> None:
    rank_pool(4).run(jobs.half, name)


@pytest.mark.parametrize("name", KEEPING)
def test_a_resumed_run_repeats_an_unbroken_one(rank_pool: Pools, name: str) -> None:
    rank_pool(2).run(jobs.resume, name, KEEPING[name])


def test_an_error_on_the_thread_reaches_backward(rank_pool: Pools) -> None:
    rank_pool(2).run(jobs.break_one, "top-k")
