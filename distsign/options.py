"""What a user chooses for a vote, checked as far as it can be before the first step."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from distsign.confidence import Confidence, TargetDensity
from distsign.exchange import EXCHANGES
from distsign.owner import OWNER_CARRIES
from distsign.vote import require_margin

__all__ = ["VoteOptions"]

_WIRES = ("auto", "planes", "sparse")
_CARRY_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class VoteOptions:
    """The options of a `SignVoteState`, which says what they mean.

    Attributes:
        carry: dtype of the carry; None where there is none.
        owner_carry: see `owner.OWNER_CARRIES`.
    """

    confidence: Confidence
    margin: int
    carry: torch.dtype | None
    owner_carry: str | None
    exchange: str
    wire: str
    bits_per_param: float | None
    l2: float
    exclude: tuple[str, ...]
    ranks_per_node: int
    checksum: bool = False
    max_density: float | None = None
    max_poison_streak: int | None = None

    @property
    def capped(self) -> bool:
        """Whether payloads have a fixed number of slots, and what does not fit stays in the carries."""
        return self.carry is not None and self.wire != "planes"

    @property
    def forgets(self) -> bool:
        """Whether what does not fit is dropped, at the voter and at the owner, instead of kept for the next step."""
        return self.bits_per_param is not None and not self.confidence.fills_budget

    @classmethod
    def check(
        cls,
        *,
        confidence: object,
        margin: object = 1,
        carry: object = None,
        owner_carry: object = None,
        exchange: object = "two_phase",
        wire: object = "auto",
        bits_per_param: object = None,
        l2: object = 0.0,
        exclude: object = None,
        ranks_per_node: object = None,
        is_subgroup: bool = False,
        checksum: object = False,
        max_density: object = None,
        max_poison_streak: object = None,
    ) -> VoteOptions:
        """Return the options with their defaults filled in.

        Raises:
            ValueError: if one is out of range, or two do not go together.
        """
        if not isinstance(confidence, Confidence):
            raise ValueError(
                f"confidence must be a confidence function such as AdaptiveConfidence(), got {confidence!r}"
            )
        if exchange not in EXCHANGES:
            raise ValueError(f"exchange must be one of {', '.join(EXCHANGES)}, got {exchange!r}")
        if wire not in _WIRES:
            raise ValueError(f"wire must be one of {', '.join(_WIRES)}, got {wire!r}")
        if isinstance(l2, bool) or not (isinstance(l2, (int, float)) and 0.0 <= l2 < math.inf):
            raise ValueError(f"l2 must be a number of at least 0, got {l2!r}")
        if bits_per_param is not None and (
            isinstance(bits_per_param, bool)
            or not (isinstance(bits_per_param, (int, float)) and 0.0 < bits_per_param < math.inf)
        ):
            raise ValueError(f"bits_per_param must be a number above 0, or None, got {bits_per_param!r}")
        if bits_per_param is not None and wire == "planes":
            raise ValueError("bits_per_param fixes the size of sparse payloads: leave wire='planes' out")
        if not isinstance(checksum, bool):
            raise ValueError(f"checksum must be True or False, got {checksum!r}")
        kept = _carry_dtype(carry, confidence, bits_per_param)
        owner_kept = _owner_carry(owner_carry, bits_per_param)
        if wire == "sparse" and kept is None:
            raise ValueError(
                "wire='sparse' has a fixed number of slots, and what does not fit needs a carry: set carry=True"
            )
        return cls(
            confidence,
            require_margin(margin),
            kept,
            owner_kept,
            str(exchange),
            str(wire),
            None if bits_per_param is None else float(bits_per_param),
            float(l2),
            _names(exclude),
            _ranks_per_node(ranks_per_node, exchange, is_subgroup=is_subgroup),
            checksum,
            _max_density(max_density, confidence),
            _max_poison_streak(max_poison_streak),
        )


def _carry_dtype(carry: object, confidence: Confidence, bits_per_param: object) -> torch.dtype | None:
    if carry is None:
        carry = confidence.requires_carry or bits_per_param is not None
    if carry is True:
        carry = torch.float32
    if carry is not False and carry not in _CARRY_DTYPES:
        raise ValueError(f"carry must be True, False, torch.float32 or torch.bfloat16, got {carry!r}")
    if carry is False and confidence.requires_carry:
        raise ValueError(
            f"{confidence!r} requires a carry: a single gradient never passes its threshold, and no parameter would "
            "ever move. Leave carry=False out"
        )
    if carry is False and bits_per_param is not None:
        raise ValueError(
            "bits_per_param needs carry=True: ballots that do not fit into the budget would be lost. Leave carry=False "
            "out"
        )
    return carry if isinstance(carry, torch.dtype) else None


def _owner_carry(owner_carry: object, bits_per_param: object) -> str | None:
    if owner_carry is None:
        owner_carry = bits_per_param is not None
    if isinstance(owner_carry, bool):
        if bits_per_param is not None and not owner_carry:
            raise ValueError(
                "bits_per_param needs owner_carry=True or 'standing': voters have cleared what an owner could not send "
                "within the budget. Leave owner_carry=False out"
            )
        return "plain" if owner_carry else None
    if not isinstance(owner_carry, str) or owner_carry not in OWNER_CARRIES:
        known = ", ".join(repr(kind) for kind in OWNER_CARRIES if kind is not None)
        raise ValueError(f"owner_carry must be True, False, or one of {known}, got {owner_carry!r}")
    return owner_carry


def _max_density(value: object, confidence: Confidence) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not (isinstance(value, (int, float)) and 0.0 < value <= 1.0):
        raise ValueError(f"max_density must be a share of the components in (0, 1], or None, got {value!r}")
    if isinstance(confidence, TargetDensity) and confidence.density > value:
        raise ValueError(
            f"max_density={value:g} is below what {confidence!r} steers to, which it would never reach: raise it, or "
            "lower the confidence function's density"
        )
    return float(value)


def _max_poison_streak(value: object) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"max_poison_streak must be a number of steps of at least 1, or None, got {value!r}")
    return value


def _names(exclude: object) -> tuple[str, ...]:
    if exclude is None:
        return ()
    if isinstance(exclude, str) or not isinstance(exclude, Iterable):
        raise ValueError(f"exclude must be names of parameters in a list, got {exclude!r}")
    names = tuple(exclude)
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"exclude must be names of parameters, as in model.named_parameters(), got {names!r}")
    return tuple(sorted(set(names)))


def _ranks_per_node(value: object, exchange: object, *, is_subgroup: bool) -> int:
    if exchange != "hierarchical":
        if value is not None:
            raise ValueError(
                f"ranks_per_node is an option of exchange='hierarchical', got exchange={exchange!r}: leave it out"
            )
        return 1
    if value is None:
        if is_subgroup:
            raise ValueError(
                "exchange='hierarchical' in a process group of its own needs ranks_per_node: how many consecutive "
                "ranks of the group share a node"
            )
        value = int(os.environ.get("LOCAL_WORLD_SIZE", "0")) or None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(
            f"ranks_per_node must be a number of ranks of at least 1, got {value!r}: torchrun sets LOCAL_WORLD_SIZE, "
            "which is taken where it is left out"
        )
    return value
