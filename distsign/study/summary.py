"""Results of a study as rows, one a scheme, task and setting: means over seeds, bytes, times and what is worth it."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from distsign.study.plan import Cell, Reach, Study
from distsign.study.program import Checked
from distsign.study.statistics import Interval, mean_and_interval, pareto_front
from distsign.study.store import Result

__all__ = ["Curve", "Reached", "Row", "Summary", "summarize"]


STANDS_IN = " in place of "
"""A program that trains on other data than those it is asked for says so by these words in its start line's `data`."""


@dataclass(frozen=True)
class Curve:
    """Means over the seeds at each test that all of them had; lists of one length.

    Attributes:
        steps: since the start.
        epochs: likewise.
        sent_and_received_bytes: of a rank by then, mean over ranks.
        metric: of the test.
        train_loss: since the test before; None where the program does not say.
    """

    steps: Sequence[int]
    epochs: Sequence[float]
    sent_and_received_bytes: Sequence[float]
    metric: Sequence[float]
    train_loss: Sequence[float | None]


@dataclass(frozen=True)
class Reached:
    """When a target was reached, or the best value of the run.

    Attributes:
        mean: of those seeds that reached it, in the target's count; None where none did.
        num_seeds: that reached it.
        published: by others, for this scheme; None where nothing is known.
        best: mean of the best values, where these are what is asked for, else None.
    """

    mean: float | None
    num_seeds: int
    published: str | float | None
    best: float | None = None


@dataclass(frozen=True)
class Row:
    """One scheme on one task and setting.

    Attributes:
        task: name.
        setting: name, with values of grids; may be empty.
        scheme: name, with values of grids.
        base_scheme: name alone.
        seeds: that have a result.
        num_missing: seeds that have none.
        metric: what the test measures.
        higher_is_better: which way it goes.
        value: mean of the last test, and its 95 % interval.
        num_parameters: of the model; None where the program does not say.
        num_steps: of the run.
        sent_bytes: by a rank in the whole run: mean over ranks and seeds.
        received_bytes: likewise.
        ratio_to_fp32: how many times fewer bytes than a ring all-reduce of float32; None where none travel.
        bytes_are: `counted`, or by `formula`.
        ballot_density: share of components that voted; None without a vote.
        verdict_density: likewise.
        step_s: median step as it was measured, mean over seeds, exchange within the machine included.
        simulated_s: by bandwidth as written, the length of the run on such a link.
        is_on_front: whether no other row of this task and setting is as good for as few bytes.
        reached: by name of the target.
        curve: of the run.
    """

    task: str
    setting: str
    scheme: str
    base_scheme: str
    seeds: Sequence[int]
    num_missing: int
    metric: str
    higher_is_better: bool
    value: Interval
    num_parameters: int | None
    num_steps: int
    sent_bytes: float
    received_bytes: float
    ratio_to_fp32: float | None
    bytes_are: str
    ballot_density: float | None
    verdict_density: float | None
    step_s: float | None
    simulated_s: Mapping[str, float | None]
    is_on_front: bool
    reached: Mapping[str, Reached]
    curve: Curve

    @property
    def total_bytes(self) -> float:
        """Sent and received."""
        return self.sent_bytes + self.received_bytes

    @property
    def group(self) -> str:
        """Task and setting, within which rows are compared."""
        return ", ".join(filter(None, (self.task, self.setting)))


@dataclass(frozen=True)
class Summary:
    """All that a report says.

    Attributes:
        rows: in the order of the study.
        num_cells: of the study.
        failed: cells that have failed, with their errors.
        num_missing: cells without a result, those that failed not counted.
        versions: of the code, with the number of results that each has.
        notes: what a reader must know before comparing rows.
        machines: that the results are from.
    """

    rows: Sequence[Row]
    num_cells: int
    failed: Sequence[tuple[Cell, str]]
    num_missing: int
    versions: Mapping[str, int]
    notes: Sequence[str]
    machines: Sequence[str]

    def groups(self) -> dict[str, list[Row]]:
        """Return the rows that are compared with each other, by task and setting."""
        return _by_group(self.rows)


def summarize(study: Study, found: Sequence[tuple[Checked, Result | None]]) -> Summary:
    """Make the rows of a study from its cells' results.

    Args:
        study: whose targets and bandwidths are wanted.
        found: each cell with the result that counts for it, None where there is none.
    """
    good = [(checked.cell, result) for checked, result in found if result is not None and result.error is None]
    rows = []
    for names, cells in itertools.groupby(found, key=lambda each: _names(each[0].cell)):
        of_seeds = list(cells)
        results = [(checked.cell, each) for checked, each in of_seeds if each is not None and each.error is None]
        if results:
            rows.append(_row(study, names, results, len(of_seeds) - len(results)))
    results_alone = [result for _, result in good]
    rows = _with_fronts(rows)
    return Summary(
        rows=rows,
        num_cells=len(found),
        failed=[(checked.cell, each.error) for checked, each in found if each is not None and each.error is not None],
        num_missing=sum(result is None for _, result in found),
        versions=Counter(result.version for result in results_alone),
        notes=[*_notes(good), *_notes_of_curves(rows)],
        machines=list(Counter(str(result.start.get("machine", "unknown")) for result in results_alone)),
    )


def _names(cell: Cell) -> tuple[str, str, str, str]:
    return cell.task, cell.setting, cell.scheme, cell.base_scheme


def _row(
    study: Study, names: tuple[str, str, str, str], results: Sequence[tuple[Cell, Result]], num_missing: int
) -> Row:
    task, setting, scheme, base_scheme = names
    start, ends = results[0][1].start, [result.end for _, result in results]
    metric = str(start["metric"])
    sent, received = _mean(ends, "sent_bytes") or 0.0, _mean(ends, "received_bytes") or 0.0
    fp32, step_s = _mean(ends, "fp32_bytes"), _mean(ends, "median_step_s")
    wanted = [each for each in study.reach if each.task in (None, task)]
    higher = bool(start.get("higher_is_better", True))
    return Row(
        *(task, setting, scheme, base_scheme, [cell.seed for cell, _ in results], num_missing, metric, higher),
        value=mean_and_interval([end[metric] for end in ends]),
        num_parameters=start.get("num_parameters"),
        num_steps=start["num_steps"],
        sent_bytes=sent,
        received_bytes=received,
        ratio_to_fp32=fp32 / (sent + received) if fp32 and sent + received else None,
        bytes_are=str(ends[0].get("kind", "unknown")),
        ballot_density=_mean(ends, "ballot_density"),
        verdict_density=_mean(ends, "verdict_density"),
        step_s=step_s,
        simulated_s={
            name: simulated_s(start["num_steps"], step_s, sent, received, bandwidth)
            for name, bandwidth in study.bandwidths.items()
        },
        is_on_front=False,
        reached={each.name: _reached(each, [result for _, result in results], higher, base_scheme) for each in wanted},
        curve=_curve([result.tests for _, result in results], metric),
    )


def simulated_s(
    num_steps: int, step_s: float | None, sent_bytes: float, received_bytes: float, bytes_per_s: float
) -> float | None:
    """Return how long a run would take on a link: every step as it was measured, and its bytes on the link after it.

    Both directions of a link carry at once; nothing hides behind backward, and latency is left out. So a scheme with
    many bytes comes out a little too slow on fast links: `distsign simulate` knows more, and needs to be told more.

    Example:
        >>> simulated_s(100, 0.01, 5e6, 5e6, 1.25e6)
        5.0
    """
    return None if step_s is None else num_steps * step_s + max(sent_bytes, received_bytes) / bytes_per_s


def _mean(lines: Iterable[Mapping[str, Any]], name: str) -> float | None:
    """Return the mean of a number; None where a line does not have it."""
    values = [line.get(name) for line in lines]
    known = [float(value) for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None


def _reached(reach: Reach, results: Sequence[Result], higher_is_better: bool, scheme: str) -> Reached:
    counts, best = [], []
    for result in results:
        metric = result.start["metric"]
        lines = [line for line in (*result.tests, result.end) if math.isfinite(line[metric])]
        target = reach.target
        if target is None and lines:
            target = (max if higher_is_better else min)(line[metric] for line in lines)
            best.append(target)
        for line in lines:
            if (line[metric] >= target) if higher_is_better else (line[metric] <= target):
                values = {"epochs": line["epoch"], "steps": line["step"]}
                counts.append(float(values.get(reach.count, line["sent_bytes"] + line["received_bytes"])))
                break
    published = reach.published.get(scheme)
    return Reached(fmean(counts) if counts else None, len(counts), published, fmean(best) if best else None)


def _curve(tests: Sequence[Sequence[Mapping[str, Any]]], metric: str) -> Curve:
    by_step = [{line["step"]: line for line in lines} for lines in tests]
    steps = sorted(set.intersection(*map(set, by_step)))
    points = [[lines[step] for lines in by_step] for step in steps]
    return Curve(
        steps,
        [fmean(line["epoch"] for line in lines) for lines in points],
        [fmean(line["sent_bytes"] + line["received_bytes"] for line in lines) for lines in points],
        [fmean(line[metric] for line in lines) for lines in points],
        [_mean(lines, "train_loss") for lines in points],
    )


def has_curves(rows: Sequence[Row]) -> bool:
    """Return whether any of some rows has been tested more than once on its way."""
    return any(len(row.curve.steps) > 1 for row in rows)


def _by_group(rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.group, []).append(row)
    return found


def _notes_of_curves(rows: Sequence[Row]) -> list[str]:
    without = [name for name, members in _by_group(rows).items() if not has_curves(members)]
    return [f"tested once a run, so that there are no curves: {'; '.join(without)}"] if without else []


def _with_fronts(rows: Sequence[Row]) -> list[Row]:
    is_on_front: dict[int, bool] = {}
    for group in {row.group for row in rows}:
        members = [row for row in rows if row.group == group]
        costs = [row.total_bytes for row in members]
        values = [row.value.mean for row in members]
        front = pareto_front(costs, values, higher_is_better=members[0].higher_is_better)
        is_on_front |= {id(row): each for row, each in zip(members, front, strict=True)}
    return [replace(row, is_on_front=is_on_front[id(row)]) for row in rows]


def _notes(results: Sequence[tuple[Cell, Result]]) -> list[str]:
    """Say what makes rows hard to compare: other code, other data, other machines, cells that ran side by side."""
    notes = []
    versions = Counter(result.version for _, result in results)
    if len(versions) > 1:
        each = ", ".join(f"{version}: {count}" for version, count in versions.items())
        notes.append(
            f"results of {len(versions)} versions of the code are mixed ({each}); --same-version takes one only"
        )
    sources: dict[str, list[str]] = {}
    for cell, result in results:
        source = str(result.start.get("data"))
        if source not in sources.setdefault(cell.task, []):
            sources[cell.task].append(source)
    notes += [
        f"{task} has results on different data: {', '.join(each)}" for task, each in sources.items() if len(each) > 1
    ]
    notes += [f"{task}: {each}" for task, all_of in sources.items() for each in all_of if STANDS_IN in each]
    if len({result.start.get("machine") for _, result in results}) > 1:
        notes.append("results are from several machines, or numbers of cores: times are not comparable")
    jobs = max((result.jobs for _, result in results), default=1)
    if jobs > 1:
        notes.append(f"up to {jobs} cells ran side by side: times are longer than on a quiet machine")
    if any(not math.isfinite(result.end[result.start["metric"]]) for _, result in results):
        notes.append("some results are not finite numbers: their runs have diverged")
    return notes
