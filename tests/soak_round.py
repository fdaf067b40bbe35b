"""One round of a soak: a run that is struck by faults and started again, held to the same run without them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch import checkpoint
from launch.netlab import Lab
from tests.distributed.checkpoint_jobs import paths
from tests.distributed.losing import SMALL, VOTE
from tests.soak_faults import Strike, strike
from tests.soak_life import SLACK_S, Life
from tests.soak_plan import KILL_STARTING, WAYS, Fault, Round

CHECKPOINT_EVERY = 4
CHECK_REPLICAS = 3
MAX_LIVES_MORE = 10
"""Lives that end without a fault, before a round is given up."""


@dataclass(frozen=True)
class Setting:
    """What is the same in all rounds."""

    num_ranks: int
    timeout_s: float
    lab: Lab | None


@dataclass
class Lives:
    """What came of a run, over all its lives.

    Attributes:
        strikes: what came of each fault.
        strays: ends of lives that no fault explains, and restarts from another step than the last whole checkpoint's.
        num_lives: how often the ranks were started.
        steps_lost: steps that had to be repeated.
        not_met: faults for which the run was over too soon.
    """

    strikes: list[Strike] = field(default_factory=list)
    strays: list[str] = field(default_factory=list)
    num_lives: int = 0
    steps_lost: int = 0
    not_met: list[str] = field(default_factory=list)


class Run:
    """A run of a round's steps, with or without the faults that end it.

    Args:
        setting: of the soak.
        plan: the round.
        folder: its own; for the checkpoint and what ranks write.
    """

    def __init__(self, setting: Setting, plan: Round, folder: Path) -> None:
        self.setting, self.plan, self.folder = setting, plan, folder
        self.file = folder / "run.pt"
        self.lives = Lives()
        folder.mkdir(parents=True)

    def argv(self) -> list[str]:
        """Return the options of `launch.train`."""
        # With momentum the optimizer has a state of its own to lose, and both ends of the vote have carries.
        ends = ["--momentum", "0.9", *WAYS[self.plan.way], "--checksum", "--lr", "0.02", "--eval-every", "50"]
        steps = ["--steps", str(self.plan.num_steps), "--seed", str(self.plan.seed)]
        watch = ["--timeout", str(self.setting.timeout_s), "--check-replicas", str(CHECK_REPLICAS)]
        kept = ["--checkpoint", str(self.file), "--checkpoint-every", str(CHECKPOINT_EVERY), "--resume", "if-there"]
        return [*SMALL, *VOTE, *ends, *steps, *watch, *kept]

    def go(self, faults: list[Fault], struck: Callable[[Strike], None] = lambda strike: None) -> Lives:
        """Train to the end, through all faults; `struck` hears of each."""
        queue = list(faults)
        while True:
            before = self._step_to_go_on_from()
            with Life(
                self.plan, self.lives.num_lives, self.setting.num_ranks, self.argv(), self.folder, self.setting.lab
            ) as life:
                self.lives.num_lives += 1
                is_over = self._live(life, before, queue, struck)
                furthest = life.furthest
                if life.first_step not in (before, None):
                    self.lives.strays.append(f"went on from step {life.first_step}, expected {before}")
            if is_over:
                self.lives.not_met = [fault.kind for fault in queue]
                return self.lives
            self.lives.steps_lost += max(0, furthest - self._step_to_go_on_from())
            if len(self.lives.strays) > MAX_LIVES_MORE:
                raise RuntimeError(f"lives end without a fault: {self.lives.strays[-1]}")

    def _live(self, life: Life, before: int, queue: list[Fault], struck: Callable[[Strike], None]) -> bool:
        """Strike until the life ends, and return whether that was the end of the run."""
        has_begun = False
        while fault := _next(queue, has_begun):
            is_early, has_begun = fault.kind == KILL_STARTING, True
            if not life.wait_until(-1 if is_early else max(fault.step, before)):
                break
            time.sleep(fault.delay_s)
            if len(life.running) < life.num_ranks:
                break
            queue.remove(fault)
            found = strike(life, fault, self.file, self.setting.timeout_s)
            self.lives.strikes.append(found)
            struck(found)
            if found.ends_life:
                return False
        life.wait_until(self.plan.num_steps + 1)  # to some rank's end
        ends = life.ends(self.setting.timeout_s + SLACK_S)
        if all(end.code == 0 for end in ends):
            return True
        bad = next(end for end in ends if end.code != 0)
        self.lives.strays.append(f"rank {bad.rank} ended with {bad.code}: {bad.words[-2000:]}")
        return False

    def _step_to_go_on_from(self) -> int:
        """Return the step of the checkpoint that a start must take: the last whole one."""
        for path in (str(self.file), checkpoint.previous_of(str(self.file))):
            try:
                return int(checkpoint.read(path)["shared"]["step"])
            except (FileNotFoundError, checkpoint.UnusableError):
                continue
        return 0


def _next(queue: list[Fault], has_begun: bool) -> Fault | None:
    """Return the fault to wait for; one that strikes before the first step can only be a life's first."""
    possible = [fault for fault in queue if not (has_begun and fault.kind == KILL_STARTING)]
    return possible[0] if possible else None


def run_round(
    setting: Setting, plan: Round, folder: Path, struck: Callable[[Strike], None] = lambda strike: None
) -> dict[str, Any]:
    """Run a round; return its line of the report's file."""
    began = time.monotonic()
    clean, faulty = Run(setting, plan, folder / "fault-free"), Run(setting, plan, folder / "faulty")
    clean_lives = clean.go([])
    lives = faulty.go(plan.planted, struck)
    wanted, found = checkpoint.read(str(clean.file)), checkpoint.read(str(faulty.file))
    different = paths(wanted, found)
    poisoned = {rank["hook"]["counts"]["totals"][0] for rank in found["ranks"]}
    skipped = poisoned == {len(plan.poison)}
    for fault in plan.poison.values():
        why = None if skipped else f"{poisoned} steps were skipped, expected {len(plan.poison)}"
        lives.strikes.append(Strike(fault.kind, fault.rank, fault.step, ends_life=False, why=why))
        struck(lives.strikes[-1])
    return {
        "seed": plan.seed,
        "way": plan.way,
        "num_steps": plan.num_steps,
        "equal": not different and found["shared"]["step"] == plan.num_steps,
        "different": different[:5],
        "has_trained": wanted["ranks"][0]["hook"]["counts"]["totals"][4] > 0,
        "faults": [each.as_line() for each in lives.strikes],
        "not_met": lives.not_met,
        "strays": [*clean_lives.strays, *lives.strays],
        "lives": lives.num_lives,
        "steps_lost": lives.steps_lost,
        "seconds": round(time.monotonic() - began, 1),
    }
