"""The command `distsign study`: check everything, run what is missing, report."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from distsign.simulator.units import format_seconds
from distsign.study.plan import Study
from distsign.study.program import Checked, Program, ask
from distsign.study.reading import load_study
from distsign.study.report import describe, write_report
from distsign.study.runner import Runner
from distsign.study.store import Result, Store
from distsign.study.summary import Summary, summarize
from distsign.study.version import code_version

if TYPE_CHECKING:
    from tqdm import tqdm

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options, and `run` as what they are for."""
    add = parser.add_argument
    add("study", type=Path, metavar="FILE", help="the study, in TOML")
    add("--out", type=Path, metavar="DIR", help="folder of the results (beside the file, with its name)")
    add("--jobs", type=int, default=1, metavar="N", help="cells at once (1: then times are those of a quiet machine)")
    add("--minutes", type=float, help="end after so long; what is missing is run the next time")
    add(
        "--same-version",
        action="store_true",
        help="take only results of the code as it is now, and run the others again",
    )
    add("--dry-run", action="store_true", help="check everything and list the cells")
    add("--report-only", action="store_true", help="run nothing, report what is there")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run a study; return the exit code: 0, 1 where cells have failed, 130 where it was interrupted.

    Raises:
        ValueError: something in the study or among its results cannot be; nothing has been trained then.
    """
    if options.jobs < 1:
        raise ValueError(f"--jobs must be 1 or more, got {options.jobs}")
    if options.minutes is not None and not options.minutes > 0:
        raise ValueError(f"--minutes must be above 0, got {options.minutes:g}")
    study = load_study(options.study)
    program, cells = ask(study)
    with Store(options.out or options.study.with_suffix("")) as store:
        for note in store.notes:
            sys.stderr.write(f"distsign: {note}\n")
        return _Session(study, program, cells, store, options).run()


class _Session:
    """One call of the command, which holds the folder of results."""

    def __init__(
        self, study: Study, program: Program, cells: Sequence[Checked], store: Store, options: argparse.Namespace
    ) -> None:
        self._study, self._program, self._cells, self._store, self._options = study, program, cells, store, options

    def run(self) -> int:
        if self._options.dry_run:
            return self._list()
        missing = [] if self._options.report_only else [cell for cell, result in self._found() if not _is_good(result)]
        interrupted = False
        if missing:
            interrupted = self._train(missing)
        summary = summarize(self._study, self._found())
        self._report(summary)
        return 130 if interrupted else 1 if summary.failed else 0

    def _found(self) -> list[tuple[Checked, Result | None]]:
        """Return each cell with the result that counts for it."""
        version = code_version(self._program.file)
        same = self._options.same_version
        return [(cell, self._store.of(cell.key, version, same_version=same)) for cell in self._cells]

    def _list(self) -> int:
        states = []
        for checked, result in self._found():
            state = "missing" if result is None else "failed" if result.error is not None else "done"
            states.append(state)
            sys.stdout.write(f"{checked.key}  {state:7}  {checked.cell.label}, {checked.cell.ranks} ranks\n")
        counts = ", ".join(f"{states.count(state)} {state}" for state in ("done", "failed", "missing"))
        sys.stdout.write(f"{len(states)} cells: {counts}\n")
        return 0

    def _train(self, missing: Sequence[Checked]) -> bool:
        """Run cells under a progress bar; return whether the user has interrupted that."""
        minutes = self._options.minutes
        sys.stderr.write(f"distsign: running {len(missing)} of {len(self._cells)} cells\n")
        with _bar(len(self._cells), len(self._cells) - len(missing)) as bar:

            def ended(checked: Checked, result: Result) -> None:
                bar.write(_line(checked, result), file=sys.stderr)
                bar.update()

            def waited(seconds: float | None) -> None:
                left = "" if seconds is None else f"about {format_seconds(seconds)} left"
                bar.set_postfix_str(left, refresh=False)
                bar.update(0)

            runner = Runner(
                self._program,
                self._store,
                jobs=self._options.jobs,
                deadline=None if minutes is None else time.monotonic() + 60 * minutes,
                on_end=ended,
                on_wait=waited,
            )
            try:
                runner.run(missing)
            except KeyboardInterrupt:
                bar.write("distsign: interrupted; what has ended is kept: the same command goes on", file=sys.stderr)
                return True
        return False

    def _report(self, summary: Summary) -> None:
        write = sys.stdout.write
        if summary.rows:
            files = write_report(self._study, summary, self._store.folder)
            write(f"\n{describe(self._study, summary)}\n\n")
            write("".join(f"{file.suffix[1:]:5} {file}\n" for file in files))
        version = code_version(self._program.file)
        if summary.versions and version not in summary.versions:
            write(f"note: all results are of another version of the code than this one, {version}\n")
        for cell, error in summary.failed:
            write(f"failed: {cell.label}: {_last_line(error)}\n")
        if summary.num_missing:
            write(f"{summary.num_missing} of {summary.num_cells} cells are missing: the same command runs them\n")


def _is_good(result: Result | None) -> bool:
    return result is not None and result.error is None


def _bar(total: int, done: int) -> tqdm[NoReturn]:
    try:
        from tqdm import tqdm
    except ImportError:
        raise ValueError("a study needs tqdm: pip install 'distsign[launch]'") from None
    # A terminal gets a bar; a log has the line of each cell that has ended.
    style = "{l_bar}{bar}| {n_fmt}/{total_fmt} cells [{elapsed}{postfix}]"
    return tqdm(total=total, initial=done, bar_format=style, disable=None, mininterval=0.5, miniters=0)


def _line(checked: Checked, result: Result) -> str:
    label, wall = checked.cell.label, format_seconds(result.wall_s)
    if result.error is not None:
        return f"failed  {label}, after {wall}: {_last_line(result.error)}"
    metric = result.start["metric"]
    return f"done    {label}: {metric.replace('_', ' ')} {result.end[metric]:.4f}, {wall}"


def _last_line(error: str) -> str:
    return error.splitlines()[-1]
