"""The simulator: its messages against the traffic they make, what costs come to, and its advice."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from distsign.simulator import Cluster, Link, Model, Profile, Scheme, Step, break_even, load_model, simulate
from distsign.simulator.plans import Collective
from distsign.simulator.profile import CollectiveCost, InStep, KernelCost
from distsign.simulator.report import compare, draw
from distsign.simulator.schemes import plan_step
from distsign.traffic import ring_all_reduce_bytes

SCHEMES = ("fp32", "bf16", "fp16", "powersgd:2", "topk:0.01", "planes", "planes:gather=1", "sparse:bits=0.1")
BANDWIDTH = 1e8


# ------------------------------------------------------------------------------------------------------------- schemes


@pytest.mark.parametrize("text", SCHEMES)
@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_the_messages_carry_the_bytes_that_are_counted(text: str, workers: int) -> None:
    """Bytes come from `traffic` alone; what is put on the link is what the busiest rank sends of them."""
    model = Model.of([5000, 300, 64, 100_000, 7])
    plan = plan_step(model, Cluster(workers, Link(BANDWIDTH)), Scheme.parse(text), bucket_mb=0.05)
    assert len(plan.buckets) > 1
    each = [plan.bytes_of_rank(rank) for rank in range(workers)]
    assert sum(one.received_bytes for one in each) == pytest.approx(plan.total_bytes, abs=workers)
    assert sum(one.sent_bytes for one in each) == pytest.approx(plan.total_bytes, abs=workers)
    on_link = [stage for job in plan.jobs for stage in job.stages if isinstance(stage, Collective)]
    sent = sum(stage.sent_bytes for stage in on_link)
    assert sent == pytest.approx(sum(stage.between_bytes * stage.rounds for stage in on_link))
    most = max((one.sent_bytes for one in each), default=0)
    assert plan.total_bytes / workers * (1 - 1e-3) <= sent <= 2 * most


def test_hierarchical_bytes_add_up() -> None:
    cluster = Cluster(12, Link(BANDWIDTH), workers_per_node=3)
    plan = plan_step(Model.of([5000, 300, 64, 100_000]), cluster, Scheme.parse("hierarchical:bits=0.2"))
    each = [plan.bytes_of_rank(rank) for rank in range(12)]
    assert sum(one.sent_bytes for one in each) == sum(one.received_bytes for one in each) == plan.total_bytes


def test_ratios_are_to_what_all_reduces_send() -> None:
    found = simulate("resnet18", Cluster(8, Link(BANDWIDTH)), "bf16", compute_s=0.1)
    assert (found.ratio_to_fp32, found.ratio_to_bf16) == (2, 1)
    assert found.sent_bytes == ring_all_reduce_bytes(load_model("resnet18").num_elements, 2, 8) / 2


def test_thousands_of_workers_and_billions_of_parameters() -> None:
    cluster = Cluster(4096, Link.parse("100gbit", "5us"), workers_per_node=8, node_link=Link.parse("400gbit"))
    found = simulate("llama-7b", cluster, "planes", compute_s=1.0)
    small = simulate("llama-7b", replace(cluster, num_workers=64), "planes", compute_s=1.0)
    assert found.sent_bytes == pytest.approx(small.sent_bytes, rel=0.03), "bytes per rank stay flat"
    assert 15.5 < found.ratio_to_fp32 < 16
    assert simulate("llama-7b", cluster, "fp32", compute_s=1.0).step_s > found.step_s


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("fp23", "unknown scheme 'fp23': did you mean fp32"),
        ("powersgd", "needs one option: powersgd:rank=2"),
        ("powersgd:1.5", "rank of the scheme powersgd must be a whole number"),
        ("sparse:dnsity=0.1", "unknown option of sparse 'dnsity': did you mean density"),
        ("sparse:bits=0.1,density=0.1", "needs one option"),
        ("topk:2", "density of the scheme topk must be above 0"),
        ("topk:many", "cannot read 'many'"),
        ("fp32:1", "unknown option of fp32"),
    ],
)
def test_schemes_that_are_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Scheme.parse(text)


def test_an_impossible_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="bits_per_param=1e-06"):
        simulate("lenet", Cluster(4, Link(BANDWIDTH)), "sparse:bits=1e-6", compute_s=0.1)


# ---------------------------------------------------------------------------------------------------- costs and advice


def profile(**kernels: KernelCost) -> Profile:
    ideal = Profile.ideal()
    return replace(ideal, kernels={**ideal.kernels, **kernels})


def steps(texts: list[str], cluster: Cluster, compute_s: float, chosen: Profile | None = None) -> list[Step]:
    model = load_model("resnet18")
    return [Step(model, cluster, Scheme.parse(text), compute_s=compute_s, profile=chosen) for text in texts]


def test_exchange_hides_behind_backward() -> None:
    cluster = Cluster(4, Link.parse("10gbit"))
    found = simulate("resnet18", cluster, "fp32", compute_s=10.0)
    assert found.hidden_s > 0.6 * found.exchange_s
    assert found.step_s == pytest.approx(10.0 + found.exposed_s)


def test_ranks_that_share_cores_slow_each_other_down() -> None:
    """Casting 1 ms of work on half a core a rank takes 2 ms; forward and backward were measured that way."""
    costs = replace(profile(to_half=KernelCost.linear(1e-3)), cores=2.0)
    cluster = Cluster(4, Link(math.inf), workers_per_machine=4)
    model = Model.of([1000])
    assert simulate(model, cluster, "fp32", compute_s=0.1, profile=costs).step_s == pytest.approx(0.1)
    assert simulate(model, cluster, "bf16", compute_s=0.1, profile=costs).step_s == pytest.approx(0.102)
    alone = replace(costs, cores=8.0)
    assert simulate(model, cluster, "bf16", compute_s=0.1, profile=alone).step_s == pytest.approx(0.101)


@pytest.mark.parametrize(("world_size", "times"), [(2, 1.0), (3, 1.5), (8, 1.5)])
def test_bytes_take_longer_where_several_ranks_send_to_one(world_size: int, times: float) -> None:
    costs = profile()
    costs = replace(costs, collectives={**costs.collectives, "all_to_all": CollectiveCost(incast=1.5)})
    cluster, model = Cluster(world_size, Link(BANDWIDTH)), Model.of([32 * 64 * world_size])
    found = simulate(model, cluster, "planes", compute_s=0.0, profile=costs)
    assert found.step_s == pytest.approx(times * found.sent_bytes / BANDWIDTH)


def test_break_even_is_where_the_times_meet() -> None:
    cluster = Cluster(4, Link(BANDWIDTH))
    slow = profile(cast_planes=KernelCost.linear(0.05))
    fp32, planes = steps(["fp32", "planes"], cluster, 0.1, slow)
    even = break_even(planes, [fp32])
    assert even is not None
    assert planes.on(even).step_s == pytest.approx(fp32.on(even).step_s, rel=1e-2)
    assert planes.on(even / 2).step_s < fp32.on(even / 2).step_s
    assert planes.on(even * 2).step_s > fp32.on(even * 2).step_s
    hopeless = steps(["planes"], cluster, 0.1, profile(cast_planes=KernelCost.linear(1e9)))[0]
    assert break_even(hopeless, [fp32]) is None


def test_top_k_chooses_tensor_by_tensor() -> None:
    """One of four times as many components costs eight times as much here; four tensors cost what each does."""
    costs = profile(top_k_encode=KernelCost(((4.0, 0.0), (4e6, 1.0), (16e6, 8.0))))
    cluster, scheme = Cluster(2, Link(math.inf)), Scheme.parse("topk:0.001")
    large, small = (
        Step(Model.of(sizes), cluster, scheme, compute_s=0.0, profile=costs, bucket_mb=1e4).on().kernel_s
        for sizes in ([4_000_000], [1_000_000] * 4)
    )
    assert large == pytest.approx(2.0) and small == pytest.approx(1.0)


def test_who_sends_more_pays_nowhere_below() -> None:
    """At 4,096 workers an all-gather of 0.1 % has four times the bytes of fp32, but half of its rounds."""
    cluster = Cluster(4096, Link.parse("10gbit", "50us"))
    top_k, fp32 = steps(["topk:0.001", "fp32"], cluster, 0.0)
    assert top_k.on(1e13).step_s < fp32.on(1e13).step_s
    assert break_even(top_k, [fp32]) is None
    # Planes of large parameters spare both, everywhere. Of small ones, owned whole, their owners send more than a ring.
    model = Model.of([1 << 26])
    even, ring = (Step(model, cluster, Scheme.parse(text), compute_s=0.0) for text in ("planes", "fp32"))
    assert break_even(even, [ring]) == math.inf
    assert break_even(steps(["planes"], cluster, 0.0)[0], [fp32]) is None


def test_advice() -> None:
    slow, fast = Cluster(4, Link.parse("100mbit")), Cluster(4, Link.parse("100gbit"))
    costly = profile(cast_planes=KernelCost.linear(0.05), power_sgd=KernelCost.linear(0.1))
    baselines = ["fp32", "bf16"]

    def advice(cluster: Cluster, texts: list[str], compute_s: float = 0.1) -> str:
        return compare(steps(texts, cluster, compute_s, costly), steps(baselines, cluster, compute_s, costly)).advice()

    assert re.fullmatch(
        r"fastest here: planes, [3-9]\.\d+ times as fast as bf16, the faster of fp32 and bf16", advice(slow, ["planes"])
    )
    assert advice(slow, ["planes"], 5.0).startswith("fastest here: planes, by ")
    assert "gains less (--compute)" in advice(slow, ["planes"], 0.0)
    assert advice(fast, ["planes"], 0.0).startswith("do not compress: bf16 takes")
    assert "--compute" not in advice(fast, ["planes"], 0.0)  # where nothing gains, nothing gains less
    assert "its kernels cost 150 ms more" in advice(fast, ["planes"], 0.0)
    assert "hides behind backward" in advice(fast, ["planes"], 10.0)
    assert advice(slow, ["fp32", "bf16"]).startswith("fastest here: bf16, by")
    assert "by 0.053 % only" in advice(Cluster(4, Link.parse("1gbit")), ["sparse:bits=0.1"], 180.0)
    assert "one worker" in advice(Cluster(1, Link(BANDWIDTH)), ["planes"])


def test_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw(steps(["fp32", "planes"], Cluster(8, Link(BANDWIDTH)), 0.1), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="cannot draw"):
        draw(steps(["fp32"], Cluster(2, Link(BANDWIDTH)), 0.1), tmp_path / "picture.strange")


def test_factors_of_steps_hold_for_their_scheme_alone() -> None:
    costs = profile(cast_planes=KernelCost.linear(0.05), to_half=KernelCost.linear(0.05))
    longer = replace(costs, in_step={"planes": (InStep(1e6, work=2.0, wire=3.0),)})
    planes, bf16 = steps(["planes", "bf16"], Cluster(2, Link(1e7)), 0.0, costs)
    planes_longer, bf16_longer = steps(["planes", "bf16"], Cluster(2, Link(1e7)), 0.0, longer)
    assert planes_longer.on().kernel_s == pytest.approx(2 * planes.on().kernel_s)
    assert planes_longer.on().work_s == pytest.approx(2 * planes.on().work_s)
    assert planes.on(in_step=InStep(1e6, wire=3.0)).exchange_s == pytest.approx(3 * planes.on().exchange_s)
    assert bf16_longer.on() == bf16.on()


def test_a_hierarchical_vote_that_was_not_trained_takes_the_factors_of_one_without_nodes() -> None:
    longer = replace(profile(cast_sparse=KernelCost.linear(0.05)), in_step={"sparse": (InStep(1e6, work=2.0),)})
    cluster = Cluster(4, Link(1e7), workers_per_node=2)
    found = [step.on().kernel_s for step in steps(["hierarchical:bits=0.1"], cluster, 0.0, longer)]
    alone = [step.on(in_step=InStep(1e6)).kernel_s for step in steps(["hierarchical:bits=0.1"], cluster, 0.0, longer)]
    assert found == pytest.approx([2 * each for each in alone])
