"""Hooks by name: ways to combine the ranks' gradients, and the one place that turns options into them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from statistics import fmean
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from distsign import SignVoteState, reshard, sign_vote_hook
from distsign.rivals import RIVALS, Rival
from distsign.traffic import ring_all_reduce_bytes
from launch.schemes import make_confidence
from launch.specs import make_from_spec

if TYPE_CHECKING:
    from launch.options import TrainOptions

SIGN_VOTE = "sign-vote"
HOOKS = (SIGN_VOTE, *RIVALS)
"""Ways to combine gradients by the name that `--hook` knows: the vote, which has options of its own, and the rivals."""

_ONE_BUCKET_MB = 1e4


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
    def mean(of_ranks: Sequence[Traffic]) -> Traffic:
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

    def reshard(self, states: list[dict[str, Any]], world_size: int) -> list[dict[str, Any]]:
        """Return states for another number of ranks, made of those of all ranks that there were.

        Raises:
            ValueError: if there is no way to.
        """

    def close(self) -> None:
        """Give back what it holds of the process group; nothing else may be asked of it afterwards."""


class RivalCombiner:
    """Gradients combined by a rival.

    Args:
        rival: registered with the model.
        num_elements: of all gradients together.
    """

    def __init__(self, rival: Rival, num_elements: int) -> None:
        self._rival = rival
        world_size = dist.get_world_size()
        self._fp32, self._bf16 = (ring_all_reduce_bytes(num_elements, width, world_size) for width in (4, 2))

    def traffic(self, num_steps: int) -> Traffic:
        """See `Combiner`."""
        found = self._rival.traffic(num_steps)
        return Traffic(
            found.sent_bytes, found.received_bytes, self._fp32 * num_steps, self._bf16 * num_steps, self._rival.counts
        )

    def state_dict(self) -> dict[str, Any]:
        """See `Combiner`."""
        return self._rival.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Combiner`."""
        self._rival.load_state_dict(state)

    def reshard(self, states: list[dict[str, Any]], world_size: int) -> list[dict[str, Any]]:
        """See `Combiner`."""
        if any(states):
            raise ValueError(f"the checkpoint was written by {len(states)} ranks, start as many, not {world_size}")
        return [{} for _ in range(world_size)]

    def close(self) -> None:
        """See `Combiner`."""
        self._rival.close()


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

    def reshard(self, states: list[dict[str, Any]], world_size: int) -> list[dict[str, Any]]:
        """See `Combiner`."""
        return reshard(states, world_size, self.state.ranks_per_node)

    def close(self) -> None:
        """See `Combiner`."""
        self.state.close()


CARRIES: dict[str, bool | torch.dtype | None] = {
    "auto": None,
    "none": False,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
}
"""What a rank keeps of the ballots that it did not cast, by name; `auto` is what the library takes."""

OWNER_CARRIES: dict[str, bool | str | None] = {"auto": None, "none": False, "plain": "plain", "standing": "standing"}
"""What owners keep of the votes that decided nothing, by name."""


def make_vote_state(options: TrainOptions) -> SignVoteState:
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


def make_rival(spec: str) -> Rival:
    """Make a rival from `NAME` or `NAME:KEY=VALUE,...`.

    Raises:
        ValueError: the name or a key is unknown, a value is no number or out of range; or it is the vote.

    Example:
        >>> make_rival("top-k:density=0.01").density
        0.01
    """
    if spec.startswith(f"{SIGN_VOTE}:"):
        raise ValueError(
            f"{SIGN_VOTE} has options of its own and no values: leave out {spec.removeprefix(SIGN_VOTE)!r}"
        )
    rival: Rival = make_from_spec("hook", spec, RIVALS, others=(SIGN_VOTE,))
    return rival


def bucket_cap_mb(options: TrainOptions, device: torch.device) -> float:
    """Return DDP's bucket size, in MiB: what was asked for, but for a hook that on Gloo needs all in one bucket."""
    needs_one = options.hook != SIGN_VOTE and make_rival(options.hook).one_bucket and device.type == "cpu"
    return _ONE_BUCKET_MB if needs_one else options.bucket_cap_mb


def register_hook(model: DistributedDataParallel, options: TrainOptions) -> Combiner:
    """Make the hook that the options name and register it on the model.

    Raises:
        ValueError: the library refuses a value.
    """
    if options.hook == SIGN_VOTE:
        state = make_vote_state(options)
        state.track(model.named_parameters())
        state.require_budget()
        model.register_comm_hook(state, sign_vote_hook)
        return SignVote(state)
    rival = make_rival(options.hook)
    rival.register(model)
    return RivalCombiner(rival, sum(p.numel() for p in model.parameters() if p.requires_grad))
