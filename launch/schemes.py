"""Hooks, confidence functions and optimizers by name, and the one place that turns options into them."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from statistics import fmean
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from distsign import (
    AdaptiveConfidence,
    FixedConfidence,
    RMSConfidence,
    SignAdam,
    SignAdamPP,
    SignSGD,
    Signum,
    SignVoteState,
    TargetDensity,
    sign_vote_hook,
)
from distsign.confidence import Confidence
from distsign.traffic import ring_all_reduce_bytes

if TYPE_CHECKING:
    from launch.options import TrainOptions


@dataclass(frozen=True)
class Traffic:
    """What a rank's gradients cost on the link so far, and what the usual ways would have cost.

    Of one rank as a hook returns it; `mean` makes one of those of all ranks.

    Attributes:
        sent_bytes: by this rank.
        received_bytes: by this rank.
        fp32_bytes: sent and received in a ring all-reduce of as many float32.
        bf16_bytes: sent and received in a ring all-reduce of as many bfloat16.
        kind: `counted` where the collectives are called, or by `formula` for the ring all-reduce.
        ballot_density: share of components that voted; None without a vote.
        verdict_density: share of components with a verdict; None without a vote.
    """

    sent_bytes: float
    received_bytes: float
    fp32_bytes: float
    bf16_bytes: float
    kind: str
    ballot_density: float | None = None
    verdict_density: float | None = None

    @staticmethod
    def mean(of_ranks: "Sequence[Traffic]") -> "Traffic":
        """Return the mean over the ranks, whose kind is the same; where one knows no density, neither does the mean."""
        columns = {field.name: [getattr(each, field.name) for each in of_ranks] for field in fields(Traffic)}
        kind = columns.pop("kind")[0]
        means = {name: None if None in column else fmean(column) for name, column in columns.items()}
        return Traffic(kind=kind, **means)  # type: ignore[arg-type]


class Combiner(Protocol):
    """A registered hook: what it has sent, and what it must keep for a resumed run."""

    def traffic(self, num_steps: int) -> Traffic:
        """Return the traffic of `num_steps` steps."""

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's state; empty where there is none."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""

    def close(self) -> None:
        """Give back what it holds of the process group; nothing else may be asked of it afterwards."""


class AllReduce:
    """Gradients averaged by a ring all-reduce; its bytes follow from the shapes alone.

    Args:
        num_elements: of all gradients together.
        bytes_per_element: on the wire.
        world_size: number of ranks.
    """

    def __init__(self, num_elements: int, bytes_per_element: int, world_size: int) -> None:
        self._per_step, self._fp32, self._bf16 = (
            ring_all_reduce_bytes(num_elements, width, world_size) for width in (bytes_per_element, 4, 2)
        )

    def traffic(self, num_steps: int) -> Traffic:
        """See `Combiner`."""
        total = self._per_step * num_steps
        return Traffic(total // 2, total - total // 2, self._fp32 * num_steps, self._bf16 * num_steps, "formula")

    def state_dict(self) -> dict[str, Any]:
        """See `Combiner`."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Combiner`."""
        if state:
            raise ValueError(f"an all-reduce keeps nothing between steps, got state {sorted(state)}")

    def close(self) -> None:
        """See `Combiner`."""


class SignVote:
    """Gradients combined by the vote; its bytes are counted.

    Args:
        state: the hook's state.
    """

    def __init__(self, state: SignVoteState) -> None:
        self.state = state

    def traffic(self, num_steps: int) -> Traffic:
        """See `Combiner`; the library counts by itself, from the start or from what was loaded."""
        counted = self.state.traffic()
        assert counted.num_steps == num_steps, f"the hook has seen {counted.num_steps} steps, expected {num_steps}"
        return Traffic(
            counted.sent_bytes,
            counted.received_bytes,
            counted.fp32_bytes,
            counted.bf16_bytes,
            "counted",
            counted.ballot_density,
            counted.verdict_density,
        )

    def state_dict(self) -> dict[str, Any]:
        """See `Combiner`."""
        return dict(self.state.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Combiner`."""
        self.state.load_state_dict(state)

    def close(self) -> None:
        """See `Combiner`."""
        self.state.close()


# Annotations are evaluated in this file: DDP compares those of a hook with the classes themselves.
def _bf16_hook(group: dist.ProcessGroup, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    # DDP refuses torch's bf16 hook by its name where there is no NCCL, although Gloo reduces bf16 as well.
    return default_hooks.bf16_compress_hook(group, bucket)


def _register_none(model: DistributedDataParallel, options: "TrainOptions") -> Combiner:
    del options
    return _all_reduce(model, bytes_per_element=4)


def _register_bf16(model: DistributedDataParallel, options: "TrainOptions") -> Combiner:
    del options
    model.register_comm_hook(None, _bf16_hook)
    return _all_reduce(model, bytes_per_element=2)


def _register_fp16(model: DistributedDataParallel, options: "TrainOptions") -> Combiner:
    del options
    model.register_comm_hook(None, default_hooks.fp16_compress_hook)
    return _all_reduce(model, bytes_per_element=2)


def _register_sign_vote(model: DistributedDataParallel, options: "TrainOptions") -> Combiner:
    state = make_vote_state(options)
    model.register_comm_hook(state, sign_vote_hook)
    return SignVote(state)


def _all_reduce(model: nn.Module, bytes_per_element: int) -> AllReduce:
    num_elements = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return AllReduce(num_elements, bytes_per_element, dist.get_world_size())


HOOKS: dict[str, Callable[[DistributedDataParallel, "TrainOptions"], Combiner]] = {
    "none": _register_none,
    "bf16": _register_bf16,
    "fp16": _register_fp16,
    "sign-vote": _register_sign_vote,
}
"""Ways to combine gradients: each registers its hook on the model. `none` is DDP's own float32 all-reduce."""


CARRIES: dict[str, bool | torch.dtype | None] = {
    "auto": None,
    "none": False,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
}
"""What a rank keeps of the ballots that it did not cast, by name; `auto` is what the library takes."""

OWNER_CARRIES: dict[str, bool | str | None] = {"auto": None, "none": False, "plain": "plain", "standing": "standing"}
"""What owners keep of the votes that decided nothing, by name."""


def make_vote_state(options: "TrainOptions") -> SignVoteState:
    """Make the hook's state from the options: the only place that knows which option is which argument.

    Raises:
        ValueError: the library refuses a value.
    """
    assert options.confidence is not None
    return SignVoteState(
        confidence=make_confidence(options.confidence),
        margin=options.margin,
        carry=CARRIES[options.carry],
        owner_carry=OWNER_CARRIES[options.owner_carry],
        exchange=options.exchange,
        wire=options.wire,
        bits_per_param=options.bits_per_param,
        l2=options.l2,
        checksum=options.checksum,
        max_density=options.max_density,
        max_poison_streak=options.max_poison_streak,
    )


@dataclass(frozen=True)
class ConfidenceEntry:
    """A confidence function by name, with an example of its values."""

    make: Callable[..., Confidence]
    example: str


CONFIDENCES = {
    "fixed": ConfidenceEntry(FixedConfidence, "alpha=5e-4"),
    "adaptive": ConfidenceEntry(AdaptiveConfidence, "beta1=0.9,beta2=1"),
    "rms": ConfidenceEntry(RMSConfidence, "k=24"),
    "target-density": ConfidenceEntry(TargetDensity, "density=0.05"),
}
"""Confidence functions by the name that `--confidence` knows."""


def make_confidence(spec: str) -> Confidence:
    """Make a confidence function from `NAME` or `NAME:KEY=VALUE,...`.

    Raises:
        ValueError: the name or a key is unknown, a value is no number or out of range.

    Example:
        >>> make_confidence("adaptive:beta2=2")
        AdaptiveConfidence(beta1=0.9, beta2=2.0)
    """
    name, _, values = spec.partition(":")
    entry = CONFIDENCES.get(name)
    if entry is None:
        raise ValueError(f"unknown confidence function {name!r}: expected one of {', '.join(CONFIDENCES)}")
    known = inspect.signature(entry.make).parameters
    arguments: dict[str, float] = {}
    for item in filter(None, values.split(",")):
        key, _, text = item.partition("=")
        if key not in known:
            raise ValueError(f"{name} has no {key!r}: expected {', '.join(known)}, as in {name}:{entry.example}")
        try:
            arguments[key] = float(text)
        except ValueError as error:
            raise ValueError(f"{key} must be a number, got {text!r}, as in {name}:{entry.example}") from error
    return entry.make(**arguments)


@dataclass(frozen=True)
class OptimizerEntry:
    """An optimizer by name.

    Attributes:
        make: its class.
        momentum: which of its arguments `--momentum` is; None where it has none.
        own: whether it is one of distsign's, which take `vote_state` and `confidence`.
        l2: whether its weight decay is added to the gradient, which under a vote is a verdict.
    """

    make: Callable[..., Optimizer]
    momentum: str | None = None
    own: bool = False
    l2: bool = False


OPTIMIZERS = {
    "sign-adam-pp": OptimizerEntry(SignAdamPP, momentum="momentum", own=True),
    "sign-adam": OptimizerEntry(SignAdam, momentum="betas", own=True),
    "sign-sgd": OptimizerEntry(SignSGD, own=True),
    "signum": OptimizerEntry(Signum, momentum="momentum", own=True),
    "adam": OptimizerEntry(torch.optim.Adam, momentum="betas", l2=True),
    "adamw": OptimizerEntry(torch.optim.AdamW, momentum="betas"),
    "sgd": OptimizerEntry(torch.optim.SGD, momentum="momentum", l2=True),
}
"""Optimizers by the name that `--optimizer` knows."""


def make_optimizer(model: nn.Module, options: "TrainOptions", combiner: Combiner) -> Optimizer:
    """Make the optimizer of a run, and give the hook its parameters' names.

    Args:
        model: the model as DDP wraps it.
        options: those of the run.
        combiner: the registered hook.

    Raises:
        ValueError: the optimizer refuses a value.
    """
    entry = OPTIMIZERS[options.optimizer]
    vote_state = combiner.state if isinstance(combiner, SignVote) else None
    arguments: dict[str, Any] = {"lr": options.lr, "weight_decay": options.weight_decay}
    if options.momentum is not None:
        assert entry.momentum is not None
        arguments[entry.momentum] = options.momentum if entry.momentum != "betas" else (options.momentum, 0.999)
    if entry.own:
        arguments["vote_state"] = vote_state
        if vote_state is None and options.confidence is not None:
            arguments["confidence"] = make_confidence(options.confidence)
    elif vote_state is not None:
        vote_state.track(model.named_parameters())
    return entry.make(model.named_parameters(), **arguments)
