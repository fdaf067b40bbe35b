"""A study, tasks x settings x schemes x seeds, and the cells that it stands for.

Options of the training program may stand in `[defaults]` and in every table; the more particular place wins:

    defaults  <  task  <  setting  <  scheme  <  scheme.on.TASK

A list is a grid.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Cell", "Layer", "Reach", "Scheme", "Study"]

Value = str | int | float | bool

RANKS = "ranks"
"""The one option that is torchrun's and not the program's."""


@dataclass(frozen=True)
class Layer:
    """One table of the file: options under a name, where a list is a grid.

    Attributes:
        name: as reports call it.
        options: by their name on the command line, without dashes.
        where: for errors, such as `scheme 'adam'`.
    """

    name: str
    options: Mapping[str, Value | list[Value]]
    where: str


@dataclass(frozen=True)
class Scheme(Layer):
    """A scheme, and the options that it has on some tasks alone: by task's name."""

    on: Mapping[str, Layer]


@dataclass(frozen=True)
class Cell:
    """One run, which the study asks for.

    Attributes:
        task: its name.
        setting: name of the setting and the values of grids outside the scheme; empty where there are none.
        scheme: name of the scheme and the values of its grids.
        base_scheme: the scheme's name alone.
        ranks: number of processes.
        seed: of this run.
        options: all that the file says, but for ranks and seed.
    """

    task: str
    setting: str
    scheme: str
    base_scheme: str
    ranks: int
    seed: int
    options: Mapping[str, Value]

    @property
    def label(self) -> str:
        """The cell in words."""
        return ", ".join(filter(None, (self.task, self.setting, self.scheme, f"seed {self.seed}")))

    def arguments(self) -> list[str]:
        """Return the program's command line, but for files.

        Example:
            >>> Cell("t", "", "s", "s", 2, 7, {"lr": 0.1, "quick": True, "slow": False}).arguments()
            ['--lr=0.1', '--quick', '--seed=7']
        """
        given = [(f"--{name}" if value is True else f"--{name}={value}", value) for name, value in self.options.items()]
        return [*(text for text, value in given if value is not False), f"--seed={self.seed}"]


@dataclass(frozen=True)
class Reach:
    """How long a scheme takes to reach a value of the task's metric, or its best, beside what others have published.

    Attributes:
        target: the value, in the metric's unit (accuracies as a share, 0.9); None for the best of the run.
        count: `epochs`, `steps` or `bytes` (sent and received).
        task: name of the task; None for all.
        name: the column's.
        source: where the published numbers are from.
        published: by name of the scheme; a number, or a word such as `never`.
    """

    target: float | None
    count: str
    task: str | None
    name: str
    source: str
    published: Mapping[str, str | float]


@dataclass(frozen=True)
class Study:
    """What a study file says; `distsign.study.reading` makes it.

    Attributes:
        name: above the report.
        about: a few words for the report.
        program: what torchrun starts: a file, or `-m MODULE`.
        seeds: each cell is run with each of them.
        defaults: options of all cells.
        tasks: what is trained.
        settings: further sets of options, crossed with all tasks and schemes; one without options where none is given.
        schemes: what is compared.
        bandwidths: links of the simulated times: as written, and in bytes per second.
        reach: targets of the report.
        text: the file itself.
        path: where it was read.
    """

    name: str
    about: str
    program: str
    seeds: tuple[int, ...]
    defaults: Layer
    tasks: tuple[Layer, ...]
    settings: tuple[Layer, ...]
    schemes: tuple[Scheme, ...]
    bandwidths: Mapping[str, float]
    reach: tuple[Reach, ...]
    text: str
    path: Path

    def layers(self) -> Iterator[Layer]:
        """Return all tables that have options of the program."""
        yield self.defaults
        yield from (*self.tasks, *self.settings, *self.schemes)
        yield from (layer for scheme in self.schemes for layer in scheme.on.values())

    def cells(self) -> list[Cell]:
        """Return every cell, in the order of the file; seeds change first."""
        crossed = itertools.product(self.tasks, self.settings, self.schemes)
        return [cell for task, setting, scheme in crossed for cell in self._cells(task, setting, scheme)]

    def _cells(self, task: Layer, setting: Layer, scheme: Scheme) -> Iterator[Cell]:
        outer = {**self.defaults.options, **task.options, **setting.options}
        inner = {**scheme.options, **(scheme.on[task.name].options if task.name in scheme.on else {})}
        merged = {**outer, **inner}
        grids = {name: value if isinstance(value, list) else [value] for name, value in merged.items()}
        for values in itertools.product(*grids.values()):
            chosen = dict(zip(grids, values, strict=True))
            varied = {name: value for name, value in chosen.items() if isinstance(merged[name], list)}
            ranks = chosen.pop(RANKS, 1)
            assert isinstance(ranks, int)
            for seed in self.seeds:
                yield Cell(
                    task.name,
                    _label(setting.name, {name: value for name, value in varied.items() if name not in inner}),
                    _label(scheme.name, {name: value for name, value in varied.items() if name in inner}),
                    scheme.name,
                    ranks,
                    seed,
                    chosen,
                )


def _label(name: str, varied: Mapping[str, Value]) -> str:
    return ", ".join(filter(None, (name, *(f"{option} {value}" for option, value in varied.items()))))
