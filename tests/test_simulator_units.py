"""What the simulator is told of a cluster: bandwidths and times as people write them, links and workers."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distsign.simulator import Cluster, Link
from distsign.simulator.units import format_bandwidth, parse_bandwidth, parse_seconds


@pytest.mark.parametrize(
    ("text", "bytes_per_s"),
    [
        ("1gbit", 125e6),
        ("1Gbit/s", 125e6),
        ("1 Gbps", 125e6),
        ("25Gb/s", 3.125e9),
        ("100MB/s", 1e8),
        ("100Mbyte/s", 1e8),
        ("1MiB/s", 2.0**20),
        ("2.5e3kbit", 312_500.0),
        ("8bit", 1.0),
    ],
)
def test_bandwidths(text: str, bytes_per_s: float) -> None:
    assert parse_bandwidth(text) == bytes_per_s


@pytest.mark.parametrize(
    "text", ["", "1", "gbit", "1 gbot", "1gbit per second", "0gbit", "-1gbit", "1e999gbit", "nanbit"]
)
def test_bandwidths_that_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="bandwidth"):
        parse_bandwidth(text)


@pytest.mark.parametrize("text", ["", "1", "-1ms", "1 h", "ms"])
def test_times_that_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="time"):
        parse_seconds(text)


@given(st.floats(1e3, 1e13))
def test_a_bandwidth_that_is_shown_can_be_read(bytes_per_s: float) -> None:
    assert parse_bandwidth(format_bandwidth(bytes_per_s)) == pytest.approx(bytes_per_s, rel=6e-3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_workers": 0}, "at least 1 worker"),
        ({"num_workers": 4, "workers_per_node": 8}, "8 workers per node, but only 4"),
        ({"num_workers": 6, "workers_per_node": 4}, "do not divide"),
        ({"num_workers": 4, "workers_per_machine": 5}, "workers_per_machine"),
    ],
)
def test_clusters_that_are_refused(options: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Cluster(link=Link(1e8), **options)


@pytest.mark.parametrize(("bandwidth", "latency"), [(0, 0), (-1, 0), (math.nan, 0), (1, -1), (1, math.inf)])
def test_links_that_are_refused(bandwidth: float, latency: float) -> None:
    with pytest.raises(ValueError, match="must be"):
        Link(bandwidth, latency)
