"""The simulator's event core: whole steps against closed forms, and any graph of tasks against its bounds."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distsign.simulator import Cluster, Link, Model, simulate
from distsign.simulator.events import Resource, Simulation, Task

BANDWIDTH, LATENCY = 1e8, 1e-4


def ring_by_messages(world_size: int, chunk_bytes: float, rounds: int) -> float:
    """Follow every message of a ring: it leaves when its sender has the chunk and its link is free."""
    has = [0.0] * world_size  # since when each rank has what it sends next
    free = [0.0] * world_size
    for _ in range(rounds):
        sent = [max(has[rank], free[rank]) + chunk_bytes / BANDWIDTH for rank in range(world_size)]
        free = sent
        has = [sent[rank - 1] + LATENCY for rank in range(world_size)]
    return max(has)


@given(st.integers(2, 12), st.integers(1, 100_000))
def test_a_ring_takes_what_its_messages_take(world_size: int, num_elements: int) -> None:
    cluster = Cluster(world_size, Link(BANDWIDTH, LATENCY))
    found = simulate(Model.of([num_elements]), cluster, "fp32", compute_s=0.0).step_s
    closed = 2 * (world_size - 1) * (LATENCY + 4 * num_elements / world_size / BANDWIDTH)
    by_messages = ring_by_messages(world_size, 4 * num_elements / world_size, 2 * (world_size - 1))
    assert by_messages == pytest.approx(closed)
    # The formula of `traffic` rounds down to a whole byte.
    assert found == pytest.approx(closed, abs=2 / BANDWIDTH)


@given(st.integers(2, 12))
def test_two_phases_take_two_latencies_and_the_bytes(world_size: int) -> None:
    cluster = Cluster(world_size, Link(BANDWIDTH, LATENCY))
    model = Model.of([32 * 64 * world_size])  # shards alike, so that all ranks are
    found = simulate(model, cluster, "planes", compute_s=0.0)
    assert found.step_s == pytest.approx(2 * LATENCY + found.sent_bytes / BANDWIDTH)
    assert found.exposed_s == found.exchange_s == pytest.approx(found.step_s)


def test_nodes_share_their_link() -> None:
    model = Model.of([1 << 20])
    apart = simulate(model, Cluster(8, Link(BANDWIDTH, LATENCY)), "planes", compute_s=0.0)
    shared = simulate(model, Cluster(8, Link(BANDWIDTH, LATENCY), workers_per_node=4), "planes", compute_s=0.0)
    # Four of seven messages leave the node, of four ranks.
    assert shared.step_s - 2 * LATENCY == pytest.approx(4 * 4 / 7 * (apart.step_s - 2 * LATENCY))
    ring = simulate(model, Cluster(8, Link(BANDWIDTH, LATENCY), workers_per_node=4), "fp32", compute_s=0.0)
    assert ring.step_s == pytest.approx(14 * (LATENCY + 4 * (1 << 20) / 8 / BANDWIDTH))


def test_hierarchical_by_hand() -> None:
    """Two nodes of two: half of the gradient to the neighbour, a quarter of the planes to the other node, and back."""
    n = 1 << 20
    cluster = Cluster(4, Link(BANDWIDTH, LATENCY), workers_per_node=2, node_link=Link(10 * BANDWIDTH))
    found = simulate(Model.of([n]), cluster, "hierarchical", compute_s=0.0)
    payload = 8 + 2 * n // 2 // 2 // 8  # of one owner: half of a column, which is half of the gradient
    between_s = 2 * (LATENCY + 2 * payload / BANDWIDTH)
    within_s = (4 * n / 2 + 2 * payload) / (10 * BANDWIDTH)
    assert found.step_s == pytest.approx(between_s + within_s)


def test_what_is_shared_goes_in_equal_parts_to_who_can_use_it() -> None:
    simulation = Simulation({"core": Resource(1.0, 1.0)})
    busy = simulation.add(Task("busy", work={"core": 1.0}))
    # Waits most of the time, so it has its part whenever it wants it, and the other has the rest.
    idle = simulation.add(Task("idle", rounds=10, delay_s=0.09, work={"core": 0.01}))
    assert simulation.run() == pytest.approx(1.1)
    assert idle.end_s == pytest.approx(1.0)
    assert busy.end_s == pytest.approx(1.1)


def test_a_queue_lets_in_as_many_as_it_has_slots() -> None:
    simulation = Simulation({"link": Resource(1.0)}, {"two": 2})
    tasks = [simulation.add(Task(str(k), work={"link": 1.0}, queue="two")) for k in range(3)]
    simulation.run()
    assert [(task.start_s, task.end_s) for task in tasks] == [(0, 2), (0, 2), (2, 3)]


def test_works_of_a_round_overlap() -> None:
    simulation = Simulation({"link": Resource(1.0), "core": Resource(1.0)})
    simulation.add(Task("both", work={"link": 2.0, "core": 1.0}))
    assert simulation.run() == 2.0


@st.composite
def graphs(draw: st.DrawFn) -> list[tuple[float, float, float, list[int]]]:
    size = draw(st.integers(1, 12))
    number = st.floats(0, 10, allow_subnormal=False)
    return [
        (draw(number), draw(number), draw(number), draw(st.lists(st.integers(0, k - 1), max_size=2)) if k else [])
        for k in range(size)
    ]


@settings(max_examples=100)
@given(graphs())
def test_no_run_beats_its_bounds_and_the_same_again_is_the_same(
    graph: list[tuple[float, float, float, list[int]]],
) -> None:
    def run() -> tuple[float, list[Task]]:
        simulation = Simulation({"core": Resource(1.5, 1.0), "link": Resource(2.0)}, {"queue": 1})
        tasks: list[Task] = []
        for k, (delay, core, link, after) in enumerate(graph):
            queue = "queue" if k % 3 == 0 else None
            before = [tasks[j] for j in sorted(set(after))]
            work = {"core": core, "link": link}
            tasks.append(simulation.add(Task(str(k), before, delay_s=delay, work=work, queue=queue)))
        return simulation.run(), tasks

    end_s, tasks = run()
    path: list[float] = []
    for task in tasks:
        alone = task.delay_s + max(task.work["core"], task.work["link"] / 2)
        path.append(max((path[int(other.name)] for other in task.after), default=0.0) + alone)
        assert all(task.start_s >= other.end_s for other in task.after)
    assert end_s >= max(path) * (1 - 1e-6)
    assert end_s >= sum(task.work["core"] for task in tasks) / 1.5 * (1 - 1e-6)
    assert end_s >= sum(task.work["link"] for task in tasks) / 2 * (1 - 1e-6)
    assert run()[0] == end_s
