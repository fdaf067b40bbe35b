"""Which faults a soak plants, when and on whom: all of it drawn from a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

NAN, INF = "NaN in a gradient", "Inf in a gradient"
KILL, FREEZE = "kill -9", "SIGSTOP"
CUT, SLOW = "link down beyond the timeout", "link at 1 % for a while"
WIRE, FLIP = "payload damaged on the wire", "flipped bit of a parameter"
DAMAGE, TRUNCATE = "checkpoint file damaged", "checkpoint file cut short"
KILL_WRITING = "kill -9 while a checkpoint is written"
KILL_STARTING = "kill -9 before the first step"

WEIGHTS = {
    KILL: 5,
    FREEZE: 1,
    CUT: 1,
    SLOW: 1,
    NAN: 1,
    INF: 1,
    WIRE: 2,
    FLIP: 2,
    DAMAGE: 1,
    TRUNCATE: 1,
    KILL_WRITING: 2,
    KILL_STARTING: 1,
}
"""How often each kind is drawn, beside the others."""
POISON = (NAN, INF)
OF_LINKS = (CUT, SLOW)
"""Need the lab."""

WAYS = {
    "standing ballots": ("--owner-carry", "standing"),
    "a budget": ("--bits-per-param", "0.5", "--carry", "bf16", "--owner-carry", "plain"),
    "guards": ("--owner-carry", "standing", "--max-density", "0.3", "--max-poison-streak", "20"),
    "all-gather": ("--owner-carry", "standing", "--exchange", "all_gather"),
}
"""Options of `launch.train` under which the ranks of a round vote."""

STEPS_PER_FAULT = 7
FIRST_STEP = 10
"""Two checkpoints lie behind it, so that the previous one is there when the last is damaged."""
LAST_STEPS = 24
"""So many steps without a fault end a round: a fault that comes late on a busy machine still meets a run."""


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        kind: one of `WEIGHTS`.
        rank: on whom.
        step: planted as soon as all ranks have done so many steps; a gradient is poisoned in just this step.
        delay_s: and so much later.
        draws: in [0, 1): whatever else there is to choose, such as which bit.
    """

    kind: str
    rank: int
    step: int
    delay_s: float
    draws: tuple[float, float, float]


@dataclass(frozen=True)
class Round:
    """A run of `num_steps` steps with faults, compared with the same run without all but the poison.

    Attributes:
        seed: of the training.
        faults: in the order of their steps.
        way: of `WAYS`.
    """

    seed: int
    num_steps: int
    faults: list[Fault] = field(default_factory=list)
    way: str = "standing ballots"

    @property
    def poison(self) -> dict[int, Fault]:
        """Gradients to poison, by step, in both runs: whether a step is skipped is a matter of the step alone."""
        return {fault.step: fault for fault in self.faults if fault.kind in POISON}

    @property
    def planted(self) -> list[Fault]:
        """The faults of the faulty run alone."""
        return [fault for fault in self.faults if fault.kind not in POISON]


def draw_round(seed: int, number: int, num_faults: int, num_ranks: int, *, links: bool) -> Round:
    """Draw round `number` of a soak, with so many faults; those of links only where there are some."""
    draw = random.Random(f"distsign soak {seed} {number}")
    weights = {kind: weight for kind, weight in WEIGHTS.items() if links or kind not in OF_LINKS}
    last = FIRST_STEP + STEPS_PER_FAULT * num_faults
    steps = sorted(draw.sample(range(FIRST_STEP, last), num_faults))
    faults = []
    for step in steps:
        [kind] = draw.choices(list(weights), list(weights.values()))
        rank = 0 if kind == KILL_WRITING else draw.randrange(num_ranks)
        draws = (draw.random(), draw.random(), draw.random())
        delay_s = draw.uniform(0, 0.5 if kind == KILL_STARTING else 0.05)
        faults.append(Fault(kind, rank, step, delay_s, draws))
    return Round(draw.randrange(2**31), last + LAST_STEPS, faults, draw.choice([*WAYS]))
