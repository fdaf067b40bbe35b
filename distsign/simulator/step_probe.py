"""Whole steps of small models on real ranks: how much longer work takes among other work than it took alone.

Between two calls of a kernel a step does everything else: caches are cold, threads of collectives run, and of several
ranks one is always the last. Alone none of this is seen. On a virtual Xeon of two cores a 0.1-bit vote's work took 0.9
to 2.0 times as long in steps as alone, PowerSGD's 1.2 to 2.2 times (profiles in `benchmarks/results/simulator`).
"""

# Annotations are evaluated in this file: DDP compares those of a hook with the classes themselves.
import gc
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer

from distsign.confidence import RMSConfidence
from distsign.hook import SignVoteState, sign_vote_hook
from distsign.optim import SignAdamPP
from distsign.rivals import make_rival
from distsign.simulator.cluster import Cluster
from distsign.simulator.fit import Array
from distsign.simulator.kernel_probe import POWER_RANKS
from distsign.simulator.models import Model
from distsign.simulator.predict import Step
from distsign.simulator.probe import Ranks, Timing
from distsign.simulator.profile import InStep, Profile
from distsign.simulator.schemes import Scheme

__all__ = ["in_step_factors", "likeliest", "no_exchange", "num_steps_timed"]

_BUCKET_MB, _ONE_BUCKET_MB = 4.0, 1e4
_WALL_SPREAD, _SPREADS = 0.02, np.array([0.15, 0.15])
"""Standard deviations, in logarithms: of a step's time; of work beside the processor's time, and of the wire."""
_ROUNDS, _NUDGE = 6, 0.05
_LEAST_WIRE, _MOST = math.log(0.9), math.log(3)
"""Bytes hardly pass a link faster in steps than alone; and no factor is beyond this one, in logarithms."""


@dataclass(frozen=True)
class _Net:
    """Linear layers and GELU, on normal numbers.

    Args:
        layers: how many.
        width: of each.
        batch: samples; as many as let forward and backward take a time that is usual beside the exchange.
    """

    layers: int
    width: int
    batch: int

    def make(self) -> nn.Module:
        """Return the model."""
        pairs = [(nn.Linear(self.width, self.width), nn.GELU()) for _ in range(self.layers)]
        return nn.Sequential(*(part for pair in pairs for part in pair))


_NETS = (_Net(3, 384, 384), _Net(4, 1088, 96), _Net(10, 1184, 16))
"""Of 0.4, 4.7 and 14 M parameters."""
_SCHEMES = (
    *("fp32", "bf16", "fp16", "topk:0.001", "planes", "sparse:bits=0.1"),
    *(f"powersgd:{rank}" for rank in POWER_RANKS),
)
_RIVALS = {
    "fp32": ("none", ""),
    "bf16": ("bf16", ""),
    "fp16": ("fp16", ""),
    "powersgd": ("power-sgd", "rank"),
    "topk": ("top-k", "density"),
}
"""Name and option of those that are behind `make_rival`."""
_STEPS, _ENOUGH_S = 3, 2.5
"""That are timed for each repeat of a kernel, fewer where they and forward and backward beside them take longer than
this. Of 5 steps in all, PowerSGD's factor on two ranks came to 1.9, 3.0 and 4.2."""
_BATCHES, _WARM_UP = 8, 3
"""Different batches, in turn; and steps before those that `Ranks.time` does not count: PowerSGD begins with two plain
ones, DDP parts its buckets anew after the first, and until memory lies where the next step finds it, more go by."""


def num_steps_timed(ranks: Ranks) -> int:
    """Return how many times `in_step_factors` says that it has got on."""
    return len(_NETS) * len(_schemes(ranks))


def in_step_factors(
    ranks: Ranks, profile: Profile, repeats: int, longest_s: float, advance: Callable[[], object]
) -> dict[str, tuple[InStep, ...]]:
    """Return `Profile.in_step`, from steps of models of several sizes under each scheme.

    On CPUs only: on a device nothing has been measured that a factor could be held to.

    Args:
        ranks: see there.
        profile: of the same ranks, without factors.
        repeats: of each kernel; steps are three times as many.
        longest_s: of a predicted step; beyond, only the smallest model is trained.
        advance: called after each scheme and model.
    """
    found: dict[str, list[InStep]] = {}
    for net in _NETS:
        with torch.device("meta"):
            model = Model.of(net.make())
        with _training(net, None, ranks) as forward_and_backward:
            compute_s = ranks.time(forward_and_backward, repeats).wall_s
            for text in _schemes(ranks):
                scheme = Scheme.parse(text)
                predicted = _step(model, scheme, ranks, profile, compute_s)
                if predicted is None:
                    pass  # on many ranks a small model is too small for a budget
                elif net is _NETS[0] or ranks.agreed(predicted.on().step_s) <= longest_s:
                    alone, whole = _timed(forward_and_backward, net, scheme, ranks, repeats)
                    predicted.compute_s = alone.wall_s
                    factors = likeliest(predicted, whole.wall_s, whole.cpu_s - alone.cpu_s)
                    found.setdefault(scheme.name, []).append(factors)
                advance()
    return {name: tuple(sorted(points, key=lambda p: (p.rank, p.elements))) for name, points in found.items()}


def likeliest(step: Step, whole_s: float, work_s: float) -> InStep:
    """Return the factors, of a scheme's work and of the wire, that best explain a step.

    Work is seen by the processor's time. Where the whole step then takes longer than predicted, or less long, it is
    put down to both as far as either matters and could be wrong: on a slow link to the wire, on a fast one to work, of
    which the kernel does a part that no process is charged with.

    Args:
        step: on a profile without factors.
        whole_s: what the step took.
        work_s: of the processor's time, what forward and backward did not take; at least a tenth of what was predicted
            counts.
    """
    alone_s, elements = step.on().work_s, float(step.model.num_elements)
    seen = max(work_s, 0.1 * alone_s) / alone_s
    off = np.zeros(2)

    def longer(logs: Array) -> InStep:
        return InStep(elements, seen * math.exp(logs[0]), math.exp(logs[1]), step.scheme.rank)

    def gap(logs: Array) -> float:
        return math.log(whole_s / step.on(in_step=longer(logs)).step_s)

    for _ in range(_ROUNDS):
        here = gap(off)
        slopes = np.array([(here - gap(off + nudge)) / _NUDGE for nudge in _NUDGE * np.eye(2)])
        # Of all that explain the gap, the nearest to where we began, each by its own measure; what the wire's bounds
        # leave is work's.
        whole, reach = here + slopes @ off, _SPREADS**2 * slopes
        wire = float(np.clip(reach[1] * whole / (_WALL_SPREAD**2 + reach @ slopes), _LEAST_WIRE, _MOST))
        work = reach[0] * (whole - slopes[1] * wire) / (_WALL_SPREAD**2 + reach[0] * slopes[0])
        off = np.array([np.clip(work, -_MOST, _MOST), wire])
    return longer(off)


def _schemes(ranks: Ranks) -> tuple[str, ...]:
    several = 1 < ranks.per_node < ranks.world_size
    return (*_SCHEMES, "hierarchical:bits=0.1") if several else _SCHEMES


def _step(model: Model, scheme: Scheme, ranks: Ranks, profile: Profile, compute_s: float) -> Step | None:
    """Return the step as it is predicted; None where the scheme is not possible, which all ranks find alike."""
    assert profile.link is not None
    cluster = Cluster(ranks.world_size, profile.link, ranks.per_node, profile.node_link, ranks.per_machine)
    try:
        return Step(model, cluster, scheme, compute_s=compute_s, profile=profile, bucket_mb=_bucket_mb(scheme))
    except ValueError:
        return None


def _bucket_mb(scheme: Scheme | None) -> float:
    return _ONE_BUCKET_MB if scheme is not None and scheme.name == "powersgd" else _BUCKET_MB


def _timed(alone: Callable[[], object], net: _Net, scheme: Scheme, ranks: Ranks, repeats: int) -> list[Timing]:
    """Time forward and backward `alone` and whole steps in turn.

    What the exchange's work is of a step's is the difference of both, and machines of others change by more than that
    within a minute.
    """
    with _training(net, scheme, ranks) as step:
        for _ in range(_WARM_UP):
            step()
        found = ranks.time_in_turn([alone, step], _STEPS * repeats, enough_s=_ENOUGH_S)
    gc.collect()  # a model and its hook hold each other
    return found


@contextmanager
def _training(net: _Net, scheme: Scheme | None, ranks: Ranks) -> Iterator[Callable[[], object]]:
    """Yield what goes one step on under a scheme; without one, forward and backward."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = net.make().to(ranks.device)
        # As in training, gradients differ from rank to rank and from step to step: votes on one gradient again and
        # again took planes three quarters of the time.
        torch.manual_seed(1 + ranks.rank)
        batches = itertools.cycle(torch.randn(_BATCHES, 2, net.batch, net.width).to(ranks.device))
    model = DistributedDataParallel(made, bucket_cap_mb=_bucket_mb(scheme), init_sync=False)
    optimizer, close = _attach(model, scheme, ranks)

    def step() -> None:
        inputs, wanted = next(batches)
        model.zero_grad()
        nn.functional.mse_loss(model(inputs), wanted).backward()  # type: ignore[no-untyped-call]
        if optimizer is not None:
            optimizer.step()

    try:
        yield step
    finally:
        close()


def _attach(
    model: DistributedDataParallel, scheme: Scheme | None, ranks: Ranks
) -> tuple[Optimizer | None, Callable[[], object]]:
    """Register a scheme's hook; return the optimizer, and what gives back what the hook holds."""
    if scheme is None:
        model.register_comm_hook(None, no_exchange)
        return None, lambda: None
    if scheme.name in _RIVALS:
        name, option = _RIVALS[scheme.name]
        rival = make_rival(name, **{option: scheme.options[option]} if option else {})
        rival.register(model)
        return SGD(model.parameters(), lr=1e-6), rival.close
    bits, nested = scheme.options.get("bits"), scheme.name == "hierarchical"
    state = SignVoteState(
        confidence=RMSConfidence(),
        wire="planes" if bits is None else "auto",
        bits_per_param=bits,
        exchange="hierarchical" if nested else "two_phase",
        ranks_per_node=ranks.per_node if nested else None,
    )
    model.register_comm_hook(state, sign_vote_hook)
    return SignAdamPP(model.named_parameters(), lr=1e-6, momentum=0.0, vote_state=state), state.close


def no_exchange(state: object, bucket: GradBucket) -> Future[Tensor]:
    """Leave each rank its own gradient: what a step takes where links are endless and codecs free; a hook of DDP's."""
    del state
    future: Future[Tensor] = Future()
    future.set_result(bucket.buffer())
    return future
