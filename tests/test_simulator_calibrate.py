"""Fits, held to times that were made from known costs; and kernels, each of which must run at any size."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from distsign.simulator import Cluster, Link, Model, Profile, Scheme, Step
from distsign.simulator.calibrate import kernel_sizes
from distsign.simulator.fit import bandwidth_of, fit_collectives, non_negative_fit
from distsign.simulator.kernel_probe import BITS, MANY_TENSORS, probes, vote_probes
from distsign.simulator.probe import Call, Timing
from distsign.simulator.profile import COLLECTIVES, FEW_TENSORS, KERNELS, CollectiveCost, InStep, KernelCost
from distsign.simulator.step_probe import likeliest

SIZES = (1 << 10, 1 << 15, 1 << 18, 1 << 20, 1 << 22)


@given(
    st.lists(st.floats(0, 10).map(lambda x: x if x > 1e-3 else 0.0), min_size=2, max_size=3).filter(
        lambda costs: costs[0] > 0
    )
)
def test_exact_times_give_exact_costs(costs: list[float]) -> None:
    features = np.array([[1.0, k % 3 + 1.0, k**2][: len(costs)] for k in range(6)])
    found = non_negative_fit(features, features @ np.array(costs))
    assert found == pytest.approx(costs, abs=1e-6)


def test_no_cost_is_below_zero() -> None:
    found = non_negative_fit(np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]]), np.array([3.0, 2.0, 1.0]))
    assert (found >= 0).all()


def made(
    bandwidth: float, cpu_byte_s: float, *, latency_s: float = 1e-4, stretch: float = 2.0, incast: float = 1.0
) -> list[Call]:
    """Return calls whose times follow from the costs, the wire and the processor at work at the same time."""
    found = []
    for kind in COLLECTIVES:
        for ranks in (2, 4):
            for size in SIZES:
                messages = ranks - 1 if kind in ("all_to_all", "all_gather") else 2 * (ranks - 1)
                delays = 1 if kind == "all_to_all" else messages
                cpu = 2e-4 + cpu_byte_s * size
                wire = incast * size if kind == "all_to_all" and ranks > 2 else size
                wall = delays * latency_s + stretch * 2e-4 + max(wire / bandwidth, stretch * cpu_byte_s * size)
                found.append(Call(kind, messages, size, float(size), Timing(wall, cpu)))
    return found


def of_two(calls: list[Call]) -> list[Call]:
    return [call for call in calls if call.messages <= (1 if call.kind in ("all_to_all", "all_gather") else 2)]


def test_a_slow_link_is_found() -> None:
    calls = made(1.2e8, 1e-9)
    fit = fit_collectives(calls, 2.0, bandwidth_of(of_two(calls)), nominal_bytes_per_s=1.25e8)
    assert fit.is_limit
    assert fit.bandwidth_bytes_per_s == pytest.approx(1.2e8, rel=0.02)
    assert fit.latency_s == pytest.approx(1e-4, rel=0.1)
    for cost in fit.collectives.values():
        assert cost.byte_cpu_s == pytest.approx(1e-9, rel=0.02)
        assert cost.call_cpu_s == pytest.approx(2e-4, rel=0.05)
        assert cost.wire == pytest.approx(1, abs=0.05)


def test_what_is_lost_where_several_send_to_one_is_told_from_the_link() -> None:
    calls = made(1.2e8, 1e-9, incast=1.4)
    fit = fit_collectives(calls, 2.0, bandwidth_of(of_two(calls)), nominal_bytes_per_s=1.25e8)
    for kind, cost in fit.collectives.items():
        assert cost.wire == pytest.approx(1, abs=0.05)
        assert cost.incast == pytest.approx(1.4 if kind == "all_to_all" else 1, rel=0.05)


def test_a_fast_link_says_nothing_of_its_bandwidth() -> None:
    """The processor is the limit at 250 MB/s; the link's own figure is taken for what it is said to be."""
    calls = made(1e12, 2e-9)
    fit = fit_collectives(calls, 2.0, bandwidth_of(of_two(calls)), nominal_bytes_per_s=1.25e9)
    assert not fit.is_limit
    assert fit.bandwidth_bytes_per_s == 1.25e9
    for cost in fit.collectives.values():
        assert cost.byte_cpu_s == pytest.approx(2e-9, rel=0.02)


def test_ranks_of_one_machine_say_nothing_of_the_link_that_is_named() -> None:
    """Loopback carries 1.6 GB/s where 1 Gbit/s was named: a cluster's links are not predicted as fast as that."""
    calls = made(1.6e9, 1e-10)
    fit = fit_collectives(calls, 2.0, bandwidth_of(of_two(calls)), nominal_bytes_per_s=1.25e8)
    assert not fit.is_limit
    assert fit.bandwidth_bytes_per_s == 1.25e8


@pytest.mark.parametrize("world_size", [2, 14, 16, 33, 64])
def test_votes_of_many_ranks_are_timed_at_sizes_that_a_budget_allows(world_size: int) -> None:
    sizes, size_of_many = kernel_sizes(world_size)
    for size, num_tensors in ((sizes[0], FEW_TENSORS), (size_of_many, MANY_TENSORS)):
        lengths = [size // num_tensors] * num_tensors
        for probe in vote_probes(torch.randn(sum(lengths)), lengths, world_size, BITS):
            probe.run()


@pytest.mark.parametrize("world_size", [2, 1000, 4096, 100_000])
def test_a_cost_has_two_points_or_more(world_size: int) -> None:
    sizes, _ = kernel_sizes(world_size)
    assert len(sizes) > 1 and sorted({*sizes}) == [*sizes]


@pytest.fixture
def alone() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("num_elements", [4096, 10_007])
def test_every_kernel_has_a_probe_that_runs(num_elements: int, alone: dist.ProcessGroup) -> None:
    found = probes(num_elements, 3, torch.device("cpu"), alone)
    assert {probe.name for probe in found} | {"power_sgd_rank"} == set(KERNELS)
    for probe in found:
        assert probe.elements > 0
        probe.run()
        probe.run()


def _step(bandwidth_bytes_per_s: float) -> Step:
    """Return a step with as much work as backward, on a link."""
    kernels = {name: KernelCost.linear(1e-3, 1e-8) for name in KERNELS}
    collectives = {name: CollectiveCost(call_cpu_s=1e-3, byte_cpu_s=1e-9) for name in COLLECTIVES}
    cluster = Cluster(4, Link(bandwidth_bytes_per_s), workers_per_machine=4)
    costs = Profile(collectives, kernels, cores=2.0)
    return Step(Model.of([1 << 20] * 4), cluster, Scheme.parse("planes"), compute_s=0.1, profile=costs, bucket_mb=4)


@pytest.mark.parametrize(("bandwidth", "work", "wire"), [(1e12, 1.0, 1.0), (1e12, 1.7, 1.0), (1e5, 1.0, 1.3)])
def test_what_longer_steps_are_put_down_to(bandwidth: float, work: float, wire: float) -> None:
    """On a fast link nothing is said of the wire, and on a slow one the processor's time alone speaks for work."""
    step = _step(bandwidth)
    elements = float(step.model.num_elements)
    seen = step.on(in_step=InStep(elements, work, wire))
    found = likeliest(step, seen.step_s, seen.work_s)
    assert found.work == pytest.approx(work, rel=0.02)
    assert found.wire == pytest.approx(wire, rel=0.02)
    assert step.on(in_step=found).step_s == pytest.approx(seen.step_s, rel=0.01)


def test_a_step_that_took_longer_than_its_processors_worked() -> None:
    """What the kernel does is charged to no process: on a fast link it is work all the same."""
    step = _step(1e12)
    seen = step.on(in_step=InStep(1.0, work=1.3))
    found = likeliest(step, seen.step_s, seen.work_s / 1.3)
    assert found.work == pytest.approx(1.3, rel=0.02) and found.wire == pytest.approx(1, abs=0.01)
    assert likeliest(step, step.on().step_s, 0.0).work > 0.1
