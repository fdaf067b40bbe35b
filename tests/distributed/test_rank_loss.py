"""A rank is killed or frozen, or its link is cut: all others end by themselves in time and say what did not come."""

from __future__ import annotations

import random
import re
import signal
import sys
from pathlib import Path

import pytest

from launch.netlab import Lab
from tests.test_netlab import PREFIX, needs_lab

from .losing import ANSWER_S, ENDLESS, SMALL, VOTE, end, last_words, start_ranks, wait_until_training

TIMEOUT_S = 6.0
PHASES = r"(ballots to their owners|verdicts to all ranks) did not get through among ranks \[0, 1, 2\]"
BUCKET = r"the vote on \d+ bucket\(s\), \S+ to \S+ \(\d+ parameters, [\d,]+ elements\) failed in step \d+"


def argv(tmp_path: Path, *more: str) -> list[str]:
    return [*ENDLESS, "--timeout", str(TIMEOUT_S), "--metrics", str(tmp_path / "metrics.jsonl"), *more]


@pytest.mark.parametrize(("number", "victim", "seed"), [(signal.SIGKILL, 0, 1), (signal.SIGSTOP, 2, 2)])
def test_a_killed_or_frozen_rank(tmp_path: Path, number: int, victim: int, seed: int) -> None:
    job = start_ranks(argv(tmp_path, *VOTE), 3)
    try:
        wait_until_training(job, tmp_path / "metrics.jsonl", random.Random(seed).random())
        job.ranks[victim].signal(number)
        for words in last_words(job, victim, TIMEOUT_S + ANSWER_S):
            assert re.search(BUCKET, words), words
            assert re.search(PHASES, words), words
            assert "(timeout 6 s)" in words
    finally:
        end(job)


def test_a_frozen_rank_of_an_all_reduce(tmp_path: Path) -> None:
    job = start_ranks(argv(tmp_path, "--hook", "none", "--optimizer", "adam"), 2)
    try:
        wait_until_training(job, tmp_path / "metrics.jsonl", 0.2)
        job.ranks[0].signal(signal.SIGSTOP)
        [words] = last_words(job, 0, TIMEOUT_S + ANSWER_S)
        # A hundred steps take half a second here, and the next test may have begun.
        assert re.search(r"rank 1 of 2 (training|testing), after step \d+, waited in vain for another rank", words)
    finally:
        end(job)


@needs_lab
def test_a_cut_link_ends_the_run_and_a_slow_one_does_not(tmp_path: Path) -> None:
    """At 1 % of 100 Mbit/s the votes of a LeNet still get through in time."""
    metrics = tmp_path / "metrics.jsonl"
    with Lab(3, "100mbit", prefix=PREFIX) as lab:
        command = [sys.executable, "-m", "launch.train", *SMALL, *argv(tmp_path, *VOTE)]
        job = lab.start(command)
        wait_until_training(job, metrics, 1)
        lab.set_rate(1, "1mbit")
        before = lab.counters()[1].tx_bytes
        wait_until_training(job, metrics, TIMEOUT_S + 2)
        assert all(rank.returncode is None for rank in job.ranks)
        assert lab.counters()[1].tx_bytes - before > 100_000
        lab.link_down(1)
        for words in last_words(job, -1, TIMEOUT_S + ANSWER_S):
            assert re.search(BUCKET, words), words
            assert re.search(PHASES, words), words


@needs_lab
def test_a_link_too_slow_for_the_timeout(tmp_path: Path) -> None:
    """At 1 % of 10 Mbit/s no part of an all-reduce gets through in time.

    Gloo's timeout is one of each message, not of the collective: it cuts 977 kB among two ranks in four, and each part
    of 244 kB takes 20 s at 100 kbit/s. (Of the usual LeNet a part takes 5 s: such a run may go on for ever.)
    """
    wider = ["--width", "2", "--eval-every", "5"]
    with Lab(2, "10mbit", prefix=PREFIX) as lab:
        command = [sys.executable, "-m", "launch.train", *SMALL]
        job = lab.start([*command, *argv(tmp_path, "--hook", "none", "--optimizer", "adam"), *wider])
        wait_until_training(job, tmp_path / "metrics.jsonl", 1)
        lab.set_rate(0, "100kbit")
        for words in last_words(job, -1, TIMEOUT_S + ANSWER_S):
            assert "waited in vain for another rank" in words
