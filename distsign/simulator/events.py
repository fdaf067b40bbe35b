"""The discrete-event core: tasks wait for each other, queue, and share what they need of links and cores.

All workers do the same, so one of them is followed, and a shared resource has the capacity that falls to it. A task
is a number of rounds alike; each takes a fixed delay and some work on one or more resources. Between two events every
task advances at a steady rate, and no event is made for a round: a ring of thousands of workers costs no more than one
of two. The same input gives the same result, to the last bit.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

__all__ = ["Resource", "Simulation", "Task"]

_DONE = 1e-9
"""Share of a round that counts as none: what rounding leaves over."""


@dataclass(frozen=True)
class Resource:
    """Something that tasks share, each getting an equal part of it or as much as it can use.

    Args:
        capacity: units of work per second.
        per_task: most that one task gets: a thread cannot use more than one core.
    """

    capacity: float
    per_task: float = math.inf

    @property
    def alone(self) -> float:
        """Work per second of a task that need not wait: a thread has a whole core in turn, a message all of a link."""
        return self.capacity if self.per_task == math.inf else self.per_task


@dataclass(eq=False)
class Task:
    """Something that takes time.

    Args:
        name: for pictures and errors.
        after: tasks that must be done before.
        rounds: how often the following is done, one after the other.
        delay_s: fixed time of a round.
        work: units of work of a round by resource, done at the same time.
        queue: tasks of a queue begin in the order in which they become ready, no more at once than it has slots.

    Attributes:
        start_s: when it began.
        end_s: when it was done.
    """

    name: str
    after: Sequence[Task] = ()
    rounds: float = 1.0
    delay_s: float = 0.0
    work: Mapping[str, float] = field(default_factory=dict)
    queue: str | None = None
    start_s: float = math.nan
    end_s: float = math.nan


class Simulation:
    """Run tasks to their end.

    Args:
        resources: by name.
        queues: slots by name.

    Example:
        >>> simulation = Simulation({"link": Resource(100.0)})
        >>> first = simulation.add(Task("a", work={"link": 100.0}))
        >>> second = simulation.add(Task("b", rounds=2, delay_s=0.5, work={"link": 50.0}, after=[first]))
        >>> simulation.run()
        3.0
        >>> second.start_s, second.end_s
        (1.0, 3.0)
    """

    def __init__(self, resources: Mapping[str, Resource], queues: Mapping[str, int] | None = None) -> None:
        self._resources = {name: each for name, each in resources.items() if each.alone < math.inf}
        self._free = dict(queues or {})
        self._waiting: dict[str, deque[Task]] = {name: deque() for name in self._free}
        self._tasks: list[Task] = []
        self._active: dict[Task, float] = {}  # rounds left
        self._full: dict[Task, float] = {}  # rounds per second where nobody else is about
        self._blocked: dict[Task, int] = {}
        self._dependents: dict[Task, list[Task]] = {}
        self.now_s = 0.0

    def add(self, task: Task) -> Task:
        """Add a task, after those that it waits for; return it."""
        self._tasks.append(task)
        return task

    def run(self) -> float:
        """Run all tasks; return when the last one ends, in seconds."""
        self._blocked = {task: len(task.after) for task in self._tasks}
        self._dependents = {task: [] for task in self._tasks}
        for task in self._tasks:
            for other in task.after:
                self._dependents[other].append(task)
        for task in self._tasks:
            if self._blocked[task] == 0:
                self._ready(task)
        while self._active:
            self._advance()
        stuck = [task.name for task in self._tasks if math.isnan(task.end_s)]
        assert not stuck, f"tasks that wait for each other: {stuck[:3]}"
        return self.now_s

    def _ready(self, task: Task) -> None:
        if task.queue is None:
            self._begin(task)
        elif self._free[task.queue] > 0:
            self._free[task.queue] -= 1
            self._begin(task)
        else:
            self._waiting[task.queue].append(task)

    def _begin(self, task: Task) -> None:
        task.start_s = self.now_s
        duration = self._round_s(task)
        self._active[task] = task.rounds
        self._full[task] = math.inf if duration * task.rounds == 0 else 1 / duration

    def _round_s(self, task: Task) -> float:
        """Return the time of a round where nobody else is about."""
        times = [work / self._resources[name].alone for name, work in task.work.items() if name in self._resources]
        return task.delay_s + max(times, default=0.0)

    def _rates(self) -> dict[Task, float]:
        """Return each active task's rounds per second: equal parts of what is short, to who can use them."""
        rates = {task: self._full[task] for task in self._active}
        for name, resource in self._resources.items():
            wanted = [(rates[t] * t.work[name], t) for t in self._active if t.work.get(name, 0.0) > 0]
            if sum(amount for amount, _ in wanted) <= resource.capacity:
                continue
            wanted.sort(key=lambda pair: pair[0])
            left = resource.capacity
            for k, (amount, task) in enumerate(wanted):
                part = min(amount, left / (len(wanted) - k))
                left -= part
                rates[task] = min(rates[task], part / task.work[name])
        return rates

    def _advance(self) -> None:
        """Go on to the next end of a task, or of several."""
        instant = [task for task, rate in self._full.items() if rate == math.inf]
        if instant:
            self._end(instant)
            return
        rates = self._rates()
        step_s = min(left / rates[task] for task, left in self._active.items())
        self.now_s += step_s
        ended = []
        for task, rate in rates.items():
            self._active[task] -= rate * step_s
            if self._active[task] <= _DONE * task.rounds:
                ended.append(task)
        self._end(ended)

    def _end(self, tasks: Sequence[Task]) -> None:
        for task in tasks:
            task.end_s = self.now_s
            del self._active[task], self._full[task]
        for task in tasks:
            if task.queue is not None:
                if self._waiting[task.queue]:
                    self._begin(self._waiting[task.queue].popleft())
                else:
                    self._free[task.queue] += 1
        for task in tasks:
            for other in self._dependents[task]:
                self._blocked[other] -= 1
                if self._blocked[other] == 0:
                    self._ready(other)
