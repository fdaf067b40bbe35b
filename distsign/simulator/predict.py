"""From a plan to time: the tasks of one worker's step, run on the event core."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from distsign.simulator.cluster import Cluster
from distsign.simulator.events import Resource, Simulation, Task
from distsign.simulator.models import Model, load_model
from distsign.simulator.plans import Collective, Kernel, Plan
from distsign.simulator.profile import InStep, Profile
from distsign.simulator.schemes import Scheme, plan_step
from distsign.traffic import ExchangeBytes, ring_all_reduce_bytes

__all__ = ["Prediction", "Step", "break_even", "simulate"]

FORWARD_SHARE = 1 / 3
"""Of a step's compute: backward multiplies twice where forward does once."""

LEAST_BYTES_PER_S, MOST_BYTES_PER_S = 1e4, 1e13


@dataclass(frozen=True)
class Prediction:
    """What a step of one scheme costs.

    Attributes:
        scheme: name and options.
        sent_bytes: by a rank in a step, mean over the ranks.
        received_bytes: likewise.
        node_bytes: that leave a node in a step, of all its ranks together.
        ratio_to_fp32: how many times fewer bytes than a ring all-reduce in float32.
        ratio_to_bf16: likewise in bfloat16.
        exchange_s: while anything of the exchange was under way.
        hidden_s: of it, beside backward.
        exposed_s: of it, after backward.
        step_s: a whole step.
        kernel_s: time of all kernels of the scheme, had they the processor for themselves; the optimizer left out.
        work_s: core-seconds of a worker for all but forward and backward: kernels, optimizer, collectives. On a device,
            of its kernels and of the core beside it.
    """

    scheme: str
    sent_bytes: float
    received_bytes: float
    node_bytes: float
    ratio_to_fp32: float
    ratio_to_bf16: float
    exchange_s: float
    hidden_s: float
    exposed_s: float
    step_s: float
    kernel_s: float
    work_s: float


class Step:
    """A step of one scheme, planned once and timed on links of any bandwidth.

    Args:
        model: the model.
        cluster: the workers; the bandwidth of its link may be replaced in `on`.
        scheme: the scheme.
        compute_s: forward and backward of one batch on one worker, measured with as many workers to a machine as there
            will be, without any exchange.
        profile: what was calibrated; None: only the wire takes time.
        bucket_mb: DDP's `bucket_cap_mb`; None is its default.

    Raises:
        ValueError: if `compute_s` is no time.
    """

    def __init__(
        self,
        model: Model,
        cluster: Cluster,
        scheme: Scheme,
        *,
        compute_s: float,
        profile: Profile | None = None,
        bucket_mb: float | None = None,
    ) -> None:
        if not 0 <= compute_s < math.inf:
            raise ValueError(f"compute_s must be zero seconds or more, got {compute_s!r}")
        self.model, self.cluster, self.scheme = model, cluster, scheme
        self.plan: Plan = plan_step(model, cluster, scheme, bucket_mb)
        self.profile = profile or Profile.ideal()
        self.compute_s, self.bucket_mb = compute_s, bucket_mb

    def bytes_of_rank(self, rank: int) -> ExchangeBytes:
        """Return what one rank sends and receives in a step as the hook counts it; by formula in all-reduces."""
        return self.plan.bytes_of_rank(rank)

    @property
    def _measured_as(self) -> str:
        """The scheme whose factors within steps hold: ranks without nodes have measured no hierarchical vote."""
        name = self.scheme.name
        if name == "hierarchical" and name not in self.profile.in_step:
            return "planes" if self.scheme.options.keys().isdisjoint(("bits", "density")) else "sparse"
        return name

    def on(self, bandwidth_bytes_per_s: float | None = None, *, in_step: InStep | None = None) -> Prediction:
        """Return the prediction, for another bandwidth of the link or other factors than the profile's if given."""
        cluster = self.cluster
        if bandwidth_bytes_per_s is not None:
            cluster = replace(cluster, link=replace(cluster.link, bandwidth_bytes_per_s=bandwidth_bytes_per_s))
        in_step = in_step or self.profile.in_step_of(self._measured_as, self.model.num_elements, self.scheme.rank)
        return _Timeline(self, cluster, in_step).prediction()


class _Timeline:
    """The tasks of one worker's step.

    Resources: `link`, that of its node, and `node_link`; and `core`, its part of the machine's cores, or `device`.
    """

    def __init__(self, step: Step, cluster: Cluster, in_step: InStep) -> None:
        self.step, self.cluster, self.profile = step, cluster, step.profile
        self.longer = in_step
        on_cpu = self.profile.device == "cpu"
        self.part = self.profile.cores / cluster.sharing
        self.unit = "core" if on_cpu else "device"
        self.simulation = Simulation(
            {
                "core": Resource(self.part, 1.0),
                "device": Resource(1.0, 1.0),
                "link": Resource(cluster.link.bandwidth_bytes_per_s * self.profile.efficiency),
                "node_link": Resource(cluster.node_link.bandwidth_bytes_per_s),
            },
            {"collectives": self.profile.concurrent},
        )
        # What a worker's own core would take: measured while others had their part of the cores.
        self.compute = step.compute_s * (min(1.0, self.part) if on_cpu else 1.0)
        self.exchanging: list[Task] = []
        self.kernels: list[float] = []
        self.others: list[float] = []

    def prediction(self) -> Prediction:
        plan, add = self.step.plan, self.simulation.add
        last = add(Task("forward", work={self.unit: FORWARD_SHARE * self.compute}))
        by_bucket = {job.last_bucket: job for job in plan.jobs}
        done, before = 0.0, None
        ends: list[Task] = []
        for number, bucket in enumerate(plan.buckets):
            share = (1 - FORWARD_SHARE) * (bucket.ready - done) * self.compute
            done = bucket.ready
            last = add(Task(f"backward {number}", [last], work={self.unit: share}))
            job = by_bucket.get(number)
            if job is None:
                continue
            for kernel in job.hook:
                last = self._kernel(kernel, [last])
            after = [last] if before is None or not plan.in_order else [last, before]
            for stage in job.stages:
                task = self._kernel(stage, after) if isinstance(stage, Kernel) else self._collective(stage, after)
                self.exchanging.append(task)
                after = [task]
            before = after[-1]
            ends.append(before)
        backward = last
        model = self.step.model
        alone = self.profile.kernels[plan.step_kernel].seconds(model.num_elements, len(model.parameters))
        end = add(Task("optimizer", [backward, *ends], work={self.unit: self.longer.work * alone}))
        self.others.append(self.longer.work * alone)
        self.simulation.run()
        return self._summary(backward, end)

    def _kernel(self, kernel: Kernel, after: Sequence[Task]) -> Task:
        seconds = (
            self.longer.work * kernel.times * self.profile.kernels[kernel.name].seconds(kernel.elements, kernel.tensors)
        )
        self.kernels.append(seconds)
        return self.simulation.add(Task(kernel.name, after, work={self.unit: seconds}))

    def _collective(self, each: Collective, after: Sequence[Task]) -> Task:
        cost, rounds = self.profile.collectives[each.kind], each.rounds
        if not rounds or not each.sent_bytes:
            return self.simulation.add(Task(each.kind, after, rounds=0))
        leaves = each.between_bytes > 0
        latency_s = (self.cluster.link if leaves else self.cluster.node_link).latency_s
        cpu = self.longer.work * (
            cost.call_cpu_s + cost.message_cpu_s * each.messages + cost.byte_cpu_s * each.sent_bytes
        )
        self.others.append(cpu)
        wire = self.longer.wire * cost.wire * (cost.incast if each.messages > rounds else 1.0)
        between, within = wire * each.between_bytes, wire * each.within_bytes
        task = Task(
            each.kind,
            after,
            rounds=rounds,
            delay_s=self.longer.wire * (latency_s + (cost.call_s + cost.message_s * each.messages) / rounds),
            work={"link": between, "node_link": within, "core": cpu / rounds},
            queue="collectives",
        )
        return self.simulation.add(task)

    def _summary(self, backward: Task, end: Task) -> Prediction:
        spans = sorted((task.start_s, task.end_s) for task in self.exchanging if task.end_s > task.start_s)
        busy_s, until_s = 0.0, 0.0
        for start_s, end_s in spans:
            busy_s += max(0.0, end_s - max(start_s, until_s))
            until_s = max(until_s, end_s)
        exposed_s = max(0.0, until_s - backward.end_s)
        exposed_s = min(exposed_s, busy_s)
        step, world_size = self.step, self.cluster.num_workers
        each = step.plan.total_bytes / world_size
        fp32, bf16 = (ring_all_reduce_bytes(step.model.num_elements, width, world_size) / 2 for width in (4, 2))
        return Prediction(
            scheme=step.scheme.label,
            sent_bytes=each,
            received_bytes=each,
            node_bytes=step.plan.node_bytes,
            ratio_to_fp32=fp32 / each if each else 1.0,
            ratio_to_bf16=bf16 / each if each else 1.0,
            exchange_s=busy_s,
            hidden_s=busy_s - exposed_s,
            exposed_s=exposed_s,
            step_s=end.end_s,
            kernel_s=sum(self.kernels),
            work_s=sum(self.kernels) + sum(self.others),
        )


def simulate(
    model: Model | str,
    cluster: Cluster,
    scheme: Scheme | str,
    *,
    compute_s: float,
    profile: Profile | None = None,
    bucket_mb: float | None = None,
) -> Prediction:
    """Predict a training step under one scheme.

    Args:
        model: a `Model`, or what `load_model` reads: `"resnet50"`, `"12*1049600"`, `"package.module:function"`.
        cluster: the workers and their links.
        scheme: a `Scheme`, or what `Scheme.parse` reads: `"bf16"`, `"powersgd:2"`, `"sparse:bits=0.1"`.
        compute_s: forward and backward of one batch on one worker, measured with as many workers to a machine as there
            will be, without any exchange.
        profile: what `distsign calibrate` found; None: only the wire takes time, and kernels are free.
        bucket_mb: DDP's `bucket_cap_mb`; None is its default.

    Raises:
        ValueError: if a name is unknown or a number out of range.

    Example:
        >>> from distsign.simulator import Cluster, Link, simulate
        >>> cluster = Cluster(num_workers=16, link=Link.parse("1gbit", "50us"))
        >>> round(simulate("resnet50", cluster, "fp32", compute_s=0.1).step_s, 2)
        1.57
        >>> round(simulate("resnet50", cluster, "planes", compute_s=0.1).ratio_to_fp32, 2)
        16.0
    """
    return Step(
        load_model(model) if isinstance(model, str) else model,
        cluster,
        Scheme.parse(scheme) if isinstance(scheme, str) else scheme,
        compute_s=compute_s,
        profile=profile,
        bucket_mb=bucket_mb,
    ).on()


def break_even(step: Step, rivals: Sequence[Step]) -> float | None:
    """Return the bandwidth, in bytes per second, below which a scheme is always faster than the fastest of its rivals.

    Args:
        step: the scheme.
        rivals: uncompressed schemes on the same cluster.

    Returns:
        None where it is not faster even on the slowest links; infinity where it is faster on all.
    """

    def gains(bandwidth: float) -> bool:
        return step.on(bandwidth).step_s < min(rival.on(bandwidth).step_s for rival in rivals)

    # From below, by a factor of ten, then closer: a scheme that spares waiting but not bytes gains on fast links only.
    grid = [LEAST_BYTES_PER_S * 10**k for k in range(round(math.log10(MOST_BYTES_PER_S / LEAST_BYTES_PER_S)) + 1)]
    first = next((k for k, bandwidth in enumerate(grid) if not gains(bandwidth)), None)
    if first is None:
        return math.inf
    if first == 0:
        return None
    low, high = grid[first - 1], grid[first]
    for _ in range(12):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if gains(middle) else (low, middle)
    return math.sqrt(low * high)
