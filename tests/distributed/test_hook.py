"""The hook on real ranks: every verdict against the oracle, in every way that DDP can call it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from distsign import AdaptiveConfidence, Confidence, FixedConfidence, RMSConfidence, TargetDensity, VoteError

from . import hook_jobs as jobs
from .oracle import Case
from .ranks import WORLD_SIZES, RankPool

Pools = Callable[[int], RankPool]

CASES = {
    "many buckets": Case(ddp={"bucket_cap_mb": 0.01}),
    "one bucket": Case(ddp={}),
    "margin 2": Case(options={"margin": 2}),
    "all-gather": Case(options={"exchange": "all_gather", "margin": 2}),
    "fixed confidence": Case(confidence=FixedConfidence(1e-3)),
    "alpha 0": Case(confidence=FixedConfidence(0.0), options={"margin": 2}),
    "target density": Case(confidence=TargetDensity(0.05), num_steps=8),
    "l2": Case(options={"l2": 0.01}),
    "no_sync": Case(num_accumulated=3),
    "find_unused_parameters": Case(ddp={"bucket_cap_mb": 0.2, "find_unused_parameters": True}, branch=True),
    "static_graph": Case(ddp={"bucket_cap_mb": 0.2, "static_graph": True}),
    # Not with no_sync before the first synchronised backward: torch's own assertion fails there, hook or not.
    "static_graph, view": Case(ddp={"bucket_cap_mb": 0.2, "static_graph": True, "gradient_as_bucket_view": True}),
    "gradient_as_bucket_view": Case(ddp={"bucket_cap_mb": 0.2, "gradient_as_bucket_view": True}),
    "view, no_sync": Case(ddp={"gradient_as_bucket_view": True}, num_accumulated=2),
    "bf16": Case(dtype=torch.bfloat16),
    "fp16": Case(dtype=torch.float16),
    "fp32 and bf16": Case(half_the_model=True),
}


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_verdicts_equal_the_oracle_at_every_world_size(rank_pool: Pools, world_size: int) -> None:
    results = rank_pool(world_size).run(jobs.train_against_oracle, Case(options={"margin": min(2, world_size)}))
    assert len({digest for digest, _ in results}) == 1


@pytest.mark.parametrize("name", CASES)
def test_verdicts_equal_the_oracle_however_ddp_is_set_up(rank_pool: Pools, name: str) -> None:
    results = rank_pool(3).run(jobs.train_against_oracle, CASES[name])
    assert len({digest for digest, _ in results}) == 1


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_parameters_are_bit_identical_after_50_steps(rank_pool: Pools, world_size: int) -> None:
    assert len(set(rank_pool(world_size).run(jobs.train_long, 50))) == 1


@pytest.mark.parametrize("exchange", ["two_phase", "all_gather"])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_counted_bytes_equal_the_formula(rank_pool: Pools, world_size: int, exchange: str) -> None:
    rank_pool(world_size).run(jobs.count_traffic, exchange)


@pytest.mark.parametrize("confidence", [FixedConfidence(1e-3), AdaptiveConfidence(), TargetDensity(0.1)], ids=repr)
def test_one_rank_equals_the_optimizer_alone(rank_pool: Pools, confidence: object) -> None:
    rank_pool(1).run(jobs.equals_single_worker, confidence)


def test_process_subgroup(rank_pool: Pools) -> None:
    results = rank_pool(4).run(jobs.train_in_subgroup, [0, 2, 3])
    assert results[1] is None
    assert len(set(results)) == 2


@pytest.mark.parametrize("together", [False, True])
def test_two_models_in_one_process(rank_pool: Pools, together: bool) -> None:
    results = rank_pool(3).run(jobs.train_two_models, together=together)
    assert results[0] == results[1] == results[2]
    assert results[0][0] != results[0][1]


def test_uneven_inputs_under_join(rank_pool: Pools) -> None:
    results = rank_pool(3).run(jobs.train_uneven)
    digests, before, after = (set(column) for column in zip(*results, strict=True))
    assert len(digests) == 1
    assert len(before) > 1, "all ranks had the same momentum, so that the test shows nothing"
    assert len(after) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_poison_reaches_all_ranks_and_leaves_no_trace(rank_pool: Pools, value: float) -> None:
    assert len(set(rank_pool(3).run(jobs.poison_some, value, 1))) == 1


@pytest.mark.parametrize(
    "confidence", [FixedConfidence(1e-3), AdaptiveConfidence(), RMSConfidence(k=1.2, start=0.5)], ids=repr
)
def test_loss_scaling_changes_nothing(rank_pool: Pools, confidence: object) -> None:
    scaled = rank_pool(2).run(jobs.train_scaled, confidence, True)
    plain = rank_pool(2).run(jobs.train_scaled, confidence, False)
    assert len({*scaled, *plain}) == 1


@pytest.mark.parametrize(
    ("confidence", "told", "refused"),
    [(FixedConfidence(1e-3), None, True), (FixedConfidence(1e-3), 1.0, False), (AdaptiveConfidence(), None, False)],
    ids=repr,
)
def test_a_threshold_in_raw_units_needs_to_know_the_scale(
    rank_pool: Pools, confidence: object, told: float | None, refused: bool
) -> None:
    """Parameters that are averaged are not told apart from scaled ones, and say nothing of it."""
    assert rank_pool(2).run(jobs.train_scaled_without_a_word, confidence, told) == [refused] * 2


@pytest.mark.parametrize("confidence", [FixedConfidence(1e-3), AdaptiveConfidence()], ids=repr)
def test_clipped_verdicts_are_not_taken_for_scaled_ones(rank_pool: Pools, confidence: Confidence) -> None:
    assert rank_pool(2).run(jobs.train_clipped, confidence) == [True] * 2


def test_a_gradient_that_was_not_exchanged_is_not_stepped_along(rank_pool: Pools) -> None:
    words = "VoteError: the optimizer has a gradient that the hook has not voted on, of parameter alien: build the"
    rank_pool(2).run_expecting(words, jobs.step_on_a_stranger)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_overflow_on_one_rank_skips_the_step_on_all(rank_pool: Pools, dtype: torch.dtype, scaled: bool) -> None:
    ends = rank_pool(3).run(jobs.overflow, dtype, scaled)
    assert len(set(ends)) == 1
    assert ends[0][1] == (2.0**5 if scaled else 1.0), "the scaler must back off on the ranks that saw no overflow, too"


def test_resumed_run_repeats_the_unbroken_one(rank_pool: Pools) -> None:
    rank_pool(3).run(jobs.resume)


@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("zero", ["to none", "to zero"])
def test_either_way_to_zero_gradients_is_fine(rank_pool: Pools, view: bool, zero: str) -> None:
    rank_pool(2).run(jobs.train_zeroing, view, zero)


@pytest.mark.parametrize("view", [False, True])
def test_second_backward_into_a_verdict_is_refused(rank_pool: Pools, view: bool) -> None:
    rank_pool(2).run_expecting(r"VoteError: a second backward.*zero_grad.*no_sync", jobs.train_zeroing, view, "not")


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("margin", r"ValueError: .*margin is 1 on ranks 0 and 2, but 2 on rank 1"),
        ("confidence", r"confidence is AdaptiveConfidence\(.*\) on ranks 0 and 2, but .*beta2=3.0\) on rank 1"),
        ("loss_scale", r"loss_scale is None on ranks 0 and 2, but 8.0 on rank 1"),
        ("unreachable margin", r"margin is 1 on ranks 0 and 2, but 9 on rank 1"),
    ],
)
def test_ranks_with_different_options_are_named(rank_pool: Pools, option: str, words: str) -> None:
    rank_pool(3).run_expecting(words, jobs.one_step, option, 1, in_step=True)


def test_margin_that_no_vote_can_reach(rank_pool: Pools) -> None:
    rank_pool(3).run_expecting(
        "ValueError: margin must be at most the number of voters, 3, got 4",
        jobs.train_against_oracle,
        Case(options={"margin": 4}),
    )


def test_a_rank_in_one_group_more(rank_pool: Pools) -> None:
    assert len(set(rank_pool(3).run(jobs.vote_after_an_odd_group, deadline_s=30))) == 1


@pytest.mark.parametrize(
    ("what", "words"),
    [("complex", "ValueError: gradients must be float32"), ("fp16", "ValueError: .*set state.loss_scale")],
)
def test_gradients_that_cannot_be_voted_on(rank_pool: Pools, what: str, words: str) -> None:
    rank_pool(2).run_expecting(words, jobs.vote_on, what, in_step=True)


def test_a_store_that_does_not_answer_is_an_error_in_time(rank_pool: Pools) -> None:
    found = rank_pool(2).run(jobs.vote_without_a_store)
    for said, seconds in found:
        assert "ranks [0, 1] could not make a process group: no answer from the store within 3.5 s" in said
        assert 3.4 < seconds < 15


def test_an_absent_rank_is_an_error_in_time(rank_pool: Pools) -> None:
    rank_pool(3).run_expecting(VoteError, jobs.skip_a_step, 1, 3.0, ranks=[0, 2], deadline_s=30.0)


def test_a_hook_that_was_not_registered(rank_pool: Pools) -> None:
    rank_pool(2).run_expecting("VoteError: .*register_comm_hook", jobs.unregistered)
