"""The faults of a soak that strike from outside, and what must come of each."""

from __future__ import annotations

import re
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launch import checkpoint
from tests import soak_plan as kinds
from tests.soak_life import POLL_S, SLACK_S, Life, trouble_of_loss, trouble_of_words
from tests.soak_plan import Fault
from tests.soak_rank import ORDER_FLIP, ORDER_WIRE, PLANTED, WRITE_NS, WRITING

RATE, SLOW_RATE = "1gbit", "10mbit"
SLOW_S = 0.5


@dataclass(frozen=True)
class Strike:
    """A fault, and what came of it.

    Attributes:
        kind: see `soak_plan`.
        rank: on whom.
        step: that all ranks had done when it struck.
        ends_life: whether the ranks must be started again.
        why: what went otherwise than it must; None where nothing did.
        hangs: whether that is a rank that did not end by itself.
        detected_s: until the last rank had raised that another is lost.
        ended_s: until the last rank had ended.
        hit: whether a kill meant for the writing of a checkpoint came while that lasted.
        went_on: whether the run went on over a slow link.
    """

    kind: str
    rank: int
    step: int
    ends_life: bool = True
    why: str | None = None
    hangs: bool = False
    detected_s: float | None = None
    ended_s: float | None = None
    hit: bool | None = None
    went_on: bool | None = None

    def as_line(self) -> dict[str, Any]:
        """Return it for JSON, without what says nothing."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def strike(life: Life, fault: Fault, file: Path, timeout_s: float) -> Strike:
    """Let a fault strike, and wait for what must come of it."""
    return Striker(life, fault, file, timeout_s).strike()


class Striker:
    """One fault and its ranks; see `strike`."""

    def __init__(self, life: Life, fault: Fault, file: Path, timeout_s: float) -> None:
        self.life, self.fault, self.file = life, fault, file
        self.within_s = timeout_s + SLACK_S
        self.step = life.done
        self.hit: bool | None = None
        self.went_on: bool | None = None

    def strike(self) -> Strike:
        ways: dict[str, Callable[[], Strike]] = {
            kinds.KILL: lambda: self._lose_by(signal.SIGKILL),
            kinds.KILL_STARTING: lambda: self._lose_by(signal.SIGKILL),
            kinds.FREEZE: lambda: self._lose_by(signal.SIGSTOP),
            kinds.CUT: self._cut,
            kinds.SLOW: self._slow,
            kinds.FLIP: self._flip,
            kinds.WIRE: self._damage_wire,
            kinds.DAMAGE: self._damage_file,
            kinds.TRUNCATE: self._damage_file,
            kinds.KILL_WRITING: self._kill_writing,
        }
        return ways[self.fault.kind]()

    def _result(self, troubles: list[str | None], *, ends_life: bool = True, since: float | None = None) -> Strike:
        found = [trouble for trouble in troubles if trouble is not None]
        ended_s = detected_s = None
        if since is not None:
            ended_s = round(time.monotonic() - since, 3)
            lost_at = self.life.lost_at()
            detected_s = round(max(lost_at) - since, 3) if lost_at else None
        return Strike(
            self.fault.kind,
            self.fault.rank,
            self.step,
            ends_life=ends_life,
            why="; ".join(found) or None,
            hangs=any(trouble.endswith("hangs") for trouble in found),
            detected_s=detected_s,
            ended_s=ended_s,
            hit=self.hit,
            went_on=self.went_on,
        )

    def _lose_by(self, number: int) -> Strike:
        since = time.monotonic()
        self.life.signal(self.fault.rank, number)
        ends = self.life.ends(self.within_s, but=[self.fault.rank])
        return self._result([trouble_of_loss(end) for end in ends], since=since)

    def _cut(self) -> Strike:
        assert self.life.lab is not None
        since = time.monotonic()
        self.life.lab.link_down(self.fault.rank)
        try:
            ends = self.life.ends(self.within_s)
            return self._result([trouble_of_loss(end) for end in ends], since=since)
        finally:
            self.life.kill()  # before the link is mended: a rank that hangs shall not go on
            self.life.lab.link_up(self.fault.rank)

    def _slow(self) -> Strike:
        """The run must go on and do a step meanwhile, or, where the link cannot carry it in time, end as by a loss.

        Ballots get through in milliseconds, but each checkpoint gathers all carries on rank 0.
        """
        assert self.life.lab is not None
        since = time.monotonic()
        self.life.lab.set_rate(self.fault.rank, SLOW_RATE)
        try:
            before = self.life.furthest
            time.sleep(SLOW_S)
            self.went_on = self.life.wait_until(before + 1)
            ends = [] if self.went_on else self.life.ends(self.within_s)
        finally:
            self.life.lab.set_rate(self.fault.rank, RATE)
        if self.went_on or all(end.code == 0 for end in ends):
            self.went_on = True
            return self._result([], ends_life=False)
        return self._result([trouble_of_loss(end) for end in ends], since=since)

    def _order(self, what: int) -> None:
        self.life.board.order(self.fault.rank, what, self.fault.draws)
        until = time.monotonic() + self.within_s
        while not self.life.board.get(self.fault.rank, PLANTED) and self.life.running and time.monotonic() < until:
            time.sleep(POLL_S)

    def _flip(self) -> Strike:
        """All ranks must name the parameter and the rank."""
        self._order(ORDER_FLIP)
        ends = self.life.ends(self.within_s)
        flipped = re.search(r"soak: flipped bit \d+ of (\S+)\[", self.life.words(self.fault.rank))
        name = re.escape(flipped[1]) if flipped else "nothing was flipped"
        wanted = rf"the replicas differ.*parameter '{name}' on rank {self.fault.rank}\b"
        return self._result([trouble_of_words(end, wanted) for end in ends])

    def _damage_wire(self) -> Strike:
        """The rank that got it must name who wrote the payload; the others have lost that rank."""
        self._order(ORDER_WIRE)
        ends = self.life.ends(self.within_s)
        damaged = re.search(r"soak: flipped bit \d+ of the \w+ that (rank \d+) wrote", self.life.words(self.fault.rank))
        sender = damaged[1] if damaged else "nothing was damaged"
        wanted = f"a payload that {sender} wrote did not reach rank {self.fault.rank} as it was written"
        return self._result(
            [trouble_of_words(end, wanted) if end.rank == self.fault.rank else trouble_of_loss(end) for end in ends]
        )

    def _damage_file(self) -> Strike:
        """All ranks are killed and the file is damaged: what must come of it is seen at the next start."""
        self.life.kill()
        if not self.file.exists():  # killed between two renames: there is the previous one alone, which must stay good
            shutil.copyfile(checkpoint.previous_of(str(self.file)), self.file)
        data = bytearray(self.file.read_bytes())
        at = int(self.fault.draws[0] * len(data))
        if self.fault.kind == kinds.TRUNCATE:
            data = data[:at]
        else:
            data[at] ^= 1 << int(self.fault.draws[1] * 8)
        self.file.write_bytes(data)
        try:
            checkpoint.read(str(self.file))
        except checkpoint.UnusableError:
            return self._result([])
        return self._result(["the damage was not seen"])

    def _kill_writing(self) -> Strike:
        """Kill rank 0 at a random moment while it writes a checkpoint."""
        board = self.life.board
        until = time.monotonic() + self.within_s
        while not board.get(0, WRITING) and 0 in self.life.running and time.monotonic() < until:
            pass  # the write takes milliseconds
        time.sleep(self.fault.draws[0] * board.get(0, WRITE_NS) / 1e9)
        self.hit = bool(board.get(0, WRITING))
        return self._lose_by(signal.SIGKILL)
