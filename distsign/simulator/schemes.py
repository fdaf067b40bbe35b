"""Ways to combine gradients, by name: their options, and the plan of a step under each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from distsign import plan
from distsign.layout import Shape
from distsign.plan import Part, exchange_groups, part_of
from distsign.simulator.cluster import Cluster
from distsign.simulator.models import Bucket, Model
from distsign.simulator.plans import (
    Job,
    Kernel,
    Plan,
    node_collectives,
    ring,
    ring_all_reduce,
    vote_collectives,
)
from distsign.simulator.profile import FEW_TENSORS
from distsign.simulator.units import nearest
from distsign.sizes import density_for
from distsign.traffic import (
    ExchangeBytes,
    GroupMessages,
    all_gather_bytes,
    power_sgd_elements,
    ring_all_reduce_bytes,
    top_k_slots,
)

__all__ = ["SCHEMES", "Kind", "Scheme", "default_schemes", "plan_step"]


@dataclass(frozen=True)
class Scheme:
    """A scheme and its options.

    Args:
        name: one of `SCHEMES`.
        options: such as `rank`, `density`, `bits`; see there.

    Raises:
        ValueError: if name or option is unknown, or a value out of range.

    Example:
        >>> Scheme.parse("sparse:bits=0.1")
        Scheme(name='sparse', options={'bits': 0.1})
        >>> Scheme.parse("powersgd:2").label
        'powersgd:rank=2'
    """

    name: str
    options: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kind = SCHEMES.get(self.name)
        if kind is None:
            raise ValueError(nearest("scheme", self.name, SCHEMES))
        for key, value in self.options.items():
            if key not in kind.options:
                raise ValueError(nearest(f"option of {self.name}", key, kind.options or ["none"]))
            _require_range(self.name, key, value)
        missing = [group for group in kind.required if not any(key in self.options for key in group)]
        if missing or {"bits", "density"} <= self.options.keys():
            wanted = " or ".join(f"{self.name}:{key}={_RANGES[key][2]}" for key in (missing or kind.required)[0])
            raise ValueError(f"the scheme {self.name} needs one option: {wanted}")

    @property
    def rank(self) -> int:
        """PowerSGD's; 1 for others, of which a measured factor has no rank."""
        return int(self.options.get("rank", 1))

    @classmethod
    def parse(cls, text: str) -> Scheme:
        """Return the scheme of `NAME`, `NAME:KEY=VALUE,...`, or `NAME:VALUE` where it has one main option."""
        name, _, rest = text.strip().partition(":")
        if name not in SCHEMES:
            raise ValueError(nearest("scheme", name, SCHEMES))
        options = {}
        for part in filter(None, rest.split(",")):
            key, equals, value = part.partition("=")
            if not equals:
                key, value = next(iter(SCHEMES[name].options), ""), part
            try:
                options[key] = float(value)
            except ValueError:
                raise ValueError(f"cannot read {part!r} in the scheme {text!r}: expected KEY=NUMBER") from None
        return cls(name, options)

    @property
    def label(self) -> str:
        """Name and options, as `parse` reads them."""
        return self.name + "".join(f"{':,'[k > 0]}{key}={v:g}" for k, (key, v) in enumerate(self.options.items()))

    @property
    def compresses(self) -> bool:
        """Whether it sends less than 16 bits a component."""
        return self.name not in _WIDTH


@dataclass(frozen=True)
class Kind:
    """What there is to know of a scheme by its name.

    Args:
        plan: makes the step's plan.
        options: that it takes, the main one first.
        required: of each group one is needed.
        summary: for `--help`.
    """

    plan: Callable[[Scheme, Model, list[Bucket], Cluster], Plan]
    summary: str
    options: tuple[str, ...] = ()
    required: tuple[tuple[str, ...], ...] = ()


_WIDTH = {"fp32": 4, "bf16": 2, "fp16": 2}
_RANGES: dict[str, tuple[float, float, str]] = {
    "rank": (1, 4096, "2"),
    "density": (1e-9, 1, "0.01"),
    "bits": (1e-9, 2, "0.1"),
    "gather": (0, 1, "1"),
}


def _require_range(name: str, key: str, value: float) -> None:
    low, high, _ = _RANGES[key]
    whole = key in ("rank", "gather")
    if not low <= value <= high or (whole and value != int(value)):
        what = f"a whole number from {low:g} to {high:g}" if whole else f"above 0 and at most {high:g}"
        raise ValueError(f"{key} of the scheme {name} must be {what}, got {value:g}")


def plan_step(model: Model, cluster: Cluster, scheme: Scheme, bucket_mb: float | None = None) -> Plan:
    """Return what a step of this scheme computes and sends.

    Args:
        model: its parameters are float32.
        cluster: the workers.
        scheme: the scheme.
        bucket_mb: DDP's `bucket_cap_mb`; None is its default.

    Raises:
        ValueError: if the scheme cannot be used on this model or cluster.
    """
    return SCHEMES[scheme.name].plan(scheme, model, model.buckets(bucket_mb), cluster)


def _plan_all_reduce(scheme: Scheme, model: Model, buckets: list[Bucket], cluster: Cluster) -> Plan:
    width = _WIDTH[scheme.name]
    jobs = []
    for number, bucket in enumerate(buckets):
        reduced = ring_all_reduce(f"all_reduce_{scheme.name}", bucket.num_elements, width, cluster)
        to, back = Kernel("to_half", bucket.num_elements), Kernel("from_half", bucket.num_elements)
        jobs.append(Job(number, (), (reduced,)) if width == 4 else Job(number, (to,), (reduced, back)))
    return _reduced(buckets, jobs, ring_all_reduce_bytes(model.num_elements, width, cluster.num_workers), cluster)


def _reduced(buckets: list[Bucket], jobs: list[Job], both_bytes: int, cluster: Cluster) -> Plan:
    """Return the plan of all-reduces of which each rank sends and receives so much, added up."""
    each = ExchangeBytes(both_bytes // 2, both_bytes - both_bytes // 2)
    return Plan(buckets, jobs, False, "step_mean", lambda _: each, cluster.num_workers * both_bytes / 2)


def _plan_power_sgd(scheme: Scheme, model: Model, buckets: list[Bucket], cluster: Cluster) -> Plan:
    rank = int(scheme.options["rank"])
    jobs, total = [], 0
    for number, bucket in enumerate(buckets):
        shapes = [model.parameters[row].shape for row in bucket.rows]
        whole, p, q = power_sgd_elements(shapes, rank)
        matrices = sum(power_sgd_elements([shape], rank)[1] > 0 for shape in shapes)
        compressed = bucket.num_elements - whole
        reduced = [ring_all_reduce("all_reduce_fp32", n, 4, cluster) for n in (whole, p, q)]
        # The hook passes over the gradient six times: the error is added, the sum copied, a product gives P; another
        # gives Q; a third decompresses, and the new error is the difference. Each further column costs the products.
        further = Kernel("power_sgd_rank", compressed, times=(rank - 1) / 3)
        before, between, after = ((Kernel("power_sgd", compressed, matrices, n / 6), further) for n in (3, 1, 2))
        jobs.append(Job(number, before, (reduced[0], reduced[1], *between, reduced[2], *after)))
        total += sum(ring_all_reduce_bytes(n, 4, cluster.num_workers) for n in (whole, p, q))
    return _reduced(buckets, jobs, total, cluster)


def _plan_top_k(scheme: Scheme, model: Model, buckets: list[Bucket], cluster: Cluster) -> Plan:
    jobs, total = [], ExchangeBytes()
    for number, bucket in enumerate(buckets):
        sizes, tensors = [model.parameters[row].num_elements for row in bucket.rows], len(bucket.rows)
        slots = sum(top_k_slots(size, scheme.options["density"]) for size in sizes)
        cost = all_gather_bytes(8 * slots, cluster.num_workers)
        # A choice among the components of one large tensor takes longer than among those of several small ones. Beyond
        # 4 M components it is extrapolated.
        encoded = [Kernel("top_k_encode", FEW_TENSORS * size, times=1 / FEW_TENSORS) for size in sizes]
        gathered = ring("all_gather", cluster.num_workers - 1, cost.sent_bytes, cluster)
        decoded = Kernel("top_k_decode", slots, tensors, times=cluster.num_workers)
        jobs.append(Job(number, (), (*encoded, gathered, decoded)))
        total += cost
    return Plan(buckets, jobs, True, "step_mean", lambda _: total, cluster.num_workers * total.sent_bytes)


def _plan_vote(scheme: Scheme, model: Model, buckets: list[Bucket], cluster: Cluster) -> Plan:
    per_node = cluster.workers_per_node if scheme.name == "hierarchical" else 1
    exchange = "all_gather" if scheme.options.get("gather") else "two_phase"
    num_voters = cluster.num_workers // per_node
    bits, density = scheme.options.get("bits"), scheme.options.get("density")
    if bits is not None:
        # As the pipeline has it: the first column's share stands for all.
        parts = [part_of(Part(s.index, s.num_elements, voted=True), 0, per_node) for s in model.shapes]
        density = density_for(bits, [Shape(p.row, p.length) for p in parts], num_voters, plan.COALESCE_BYTES)
    coded = "planes" if density is None else "sparse"
    jobs, messages = [], []
    for group in exchange_groups([bucket.num_elements for bucket in buckets], bits):
        shapes = [model.shapes[row] for number in group for row in buckets[number].rows]
        found = GroupMessages.build(
            shapes,
            cluster.num_workers,
            exchange,
            density=density,
            owner_carry=bits is not None,
            ranks_per_node=per_node,
        )
        messages.append(found)
        n = sum(shape.num_elements for shape in shapes)
        counted = n * num_voters if exchange == "all_gather" else n
        tensors = len(shapes)
        cast = Kernel(f"cast_{coded}", n / per_node, tensors)
        count = Kernel(f"count_{coded}", counted / per_node, tensors)
        read = Kernel(f"read_{coded}", n, tensors)
        if per_node == 1:
            wire = vote_collectives(found, cluster)
            jobs.append(Job(group[-1], (cast,), (wire[0], count, *wire[1:], read)))
        else:
            mean, up, down, share = node_collectives(found, cluster)
            average = Kernel("node_mean", n)
            jobs.append(Job(group[-1], (), (mean, average, cast, up, count, down, share, read)))

    def bytes_of_rank(rank: int) -> ExchangeBytes:
        return sum((each.of_rank(rank) for each in messages), ExchangeBytes())

    total_bytes = sum(each.total_bytes for each in messages)
    return Plan(buckets, jobs, True, f"step_{coded}", bytes_of_rank, total_bytes)


SCHEMES: dict[str, Kind] = {
    "fp32": Kind(_plan_all_reduce, "ring all-reduce, what DDP does by itself"),
    "bf16": Kind(_plan_all_reduce, "the same in bfloat16"),
    "fp16": Kind(_plan_all_reduce, "the same in float16"),
    "powersgd": Kind(_plan_power_sgd, "torch's PowerSGD hook: powersgd:2", ("rank",), (("rank",),)),
    "topk": Kind(_plan_top_k, "largest components, all-gather: topk:0.01", ("density",), (("density",),)),
    "planes": Kind(_plan_vote, "sign votes in two bit planes; planes:gather=1 for the all-gather", ("gather",)),
    "sparse": Kind(
        _plan_vote,
        "sign votes in few slots: sparse:bits=0.1 or sparse:density=0.01",
        ("bits", "density", "gather"),
        (("bits", "density"),),
    ),
    "hierarchical": Kind(_plan_vote, "average in a node, vote between nodes: as sparse or planes", ("bits", "density")),
}
"""Schemes by name."""


def default_schemes(cluster: Cluster) -> Sequence[Scheme]:
    """Return what is compared where no scheme is named."""
    texts = ["fp32", "bf16", "powersgd:1", "powersgd:4", "topk:0.001", "planes", "sparse:bits=0.1"]
    if cluster.workers_per_node > 1:
        texts.append("hierarchical:bits=0.1")
    return [Scheme.parse(text) for text in texts]
