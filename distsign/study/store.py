"""Results as JSON lines: a row is appended whole when its cell has ended, and read again with every suspicion."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from distsign.study.program import key_of

__all__ = ["Result", "Store"]

FORMAT = 1
RESULTS, DAMAGED = "results.jsonl", "damaged.txt"


@dataclass(frozen=True)
class Result:
    """What became of a cell.

    Attributes:
        key: of the configuration.
        configuration: see `distsign.study.program.Checked`.
        version: of the code, see `distsign.study.version`.
        ended: when, in ISO 8601 and UTC.
        wall_s: how long it took, start of the processes included.
        jobs: how many cells might run beside it: with more than one, times are not those of a quiet machine.
        metrics: the lines that the program wrote; none where it failed.
        error: the last lines of what it said where it failed, else None.
    """

    key: str
    configuration: Mapping[str, Any]
    version: str
    ended: str
    wall_s: float
    jobs: int
    metrics: Sequence[Mapping[str, Any]] = ()
    error: str | None = None
    format: int = field(default=FORMAT, kw_only=True)

    @property
    def start(self) -> Mapping[str, Any]:
        """The program's first line: task, data and machine."""
        return self.metrics[0]

    @property
    def tests(self) -> list[Mapping[str, Any]]:
        """The lines of the tests, in order of the step."""
        return [line for line in self.metrics if line["event"] == "test"]

    @property
    def end(self) -> Mapping[str, Any]:
        """The program's last line: what was reached, and what it cost."""
        return self.metrics[-1]


class Store:
    """The folder of a study's results; one process at a time may hold it.

    A last line without its end was being written when the runner was killed: it is moved to `damaged.txt` and named in
    `notes`, and its cell counts as not run. Any other line that cannot be read is an error, since no crash of ours does
    that.

    Args:
        folder: made where it is missing, but none above it.

    Raises:
        ValueError: there is no folder to make it in, another process holds it, or results are damaged.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with Store(Path(folder)) as store:
        ...         store.add(Result(key_of({}), {}, "distsign 0.1", "2026-01-01T00:00:00+00:00", 1.0, 1, error="no"))
        ...     with Store(Path(folder)) as store:
        ...         [result.error for result in store.results]
        ['no']
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / RESULTS
        self.notes: list[str] = []
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise ValueError(f"cannot make the folder of results {folder}: {error.strerror}") from error
        self._lock = FileLock(folder / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"another study is at work in {folder}: wait for it, or name another folder") from None
        try:
            self._keep_damaged_end()
            self.results: list[Result] = self._read()
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def add(self, result: Result) -> None:
        """Append a row; it is on the disk when this returns."""
        self.results.append(result)
        line = json.dumps(asdict(result), allow_nan=True) + "\n"
        with self.path.open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())

    def of(self, key: str, version: str, *, same_version: bool = False) -> Result | None:
        """Return the result of a configuration that counts: a good one before a failed, this version's before others.

        Args:
            key: of the configuration.
            version: of the code as it is now.
            same_version: take no result of another version.
        """
        found = [each for each in self.results if each.key == key and (each.version == version or not same_version)]
        ranked = sorted(
            found, key=lambda each: (each.error is None, each.version == version)
        )  # stable: later is better
        return ranked[-1] if ranked else None

    def _keep_damaged_end(self) -> None:
        if not self.path.exists():
            return
        raw = self.path.read_bytes()
        whole = raw.rfind(b"\n") + 1
        if whole == len(raw):
            return
        number = raw.count(b"\n") + 1
        with (self.folder / DAMAGED).open("ab") as file:
            file.write(raw[whole:] + b"\n")
        with self.path.open("r+b") as file:
            file.truncate(whole)
        self.notes.append(
            f"{self.path}: line {number} was cut short by a crash: it is kept in {DAMAGED}, its cell counts as missing"
        )

    def _read(self) -> list[Result]:
        lines = self.path.read_bytes().splitlines() if self.path.exists() else []
        return [self._row(number, line) for number, line in enumerate(lines, 1) if line.strip()]

    def _row(self, number: int, line: bytes) -> Result:
        where = f"{self.path}: line {number}"
        try:
            values = json.loads(line)
        except ValueError:
            values = None
        if isinstance(values, dict) and values.get("format", FORMAT) != FORMAT:
            raise ValueError(
                f"{where} has format {values['format']}, this version reads {FORMAT}: name another folder with --out"
            )
        problem = _problem(values)
        if problem is not None:
            raise ValueError(f"{where} is damaged ({problem}): remove the line, and its cell will be run again")
        return Result(**values)


def _problem(values: Any) -> str | None:
    """Return what is wrong with a row, None where nothing is."""
    if not isinstance(values, dict):
        return "it is no JSON object"
    kinds: dict[str, type | tuple[type, ...]] = {
        "key": str,
        "configuration": dict,
        "version": str,
        "ended": str,
        "wall_s": (int, float),
        "jobs": int,
        "metrics": list,
        "error": (str, type(None)),
        "format": int,
    }
    for name, kind in kinds.items():
        if not isinstance(values.get(name), kind):
            return f"{name} is missing or of another kind"
    if values.keys() - kinds.keys():
        return f"it has an unknown {min(values.keys() - kinds.keys())!r}"
    if key_of(values["configuration"]) != values["key"]:
        return "the key is not that of the configuration"
    return None if values["error"] is not None else problem_of_metrics(values["metrics"])


def problem_of_metrics(metrics: Sequence[Any]) -> str | None:
    """Return what is missing in the lines that a program has written, None where they are those of a whole run.

    Example:
        >>> problem_of_metrics([{"event": "test"}])
        'its metrics do not begin with a start'
    """
    if not metrics or not all(isinstance(line, dict) and "event" in line for line in metrics):
        return "it has no metrics"
    if metrics[0]["event"] != "start" or not {"metric", "num_steps"} <= metrics[0].keys():
        return "its metrics do not begin with a start"
    needed = {"step", "epoch", "sent_bytes", "received_bytes", metrics[0]["metric"]}
    for line in metrics[1:]:
        if not needed <= line.keys():
            return f"a line of its metrics lacks {min(needed - line.keys())}"
    return None if metrics[-1]["event"] == "end" else "its metrics have no end"
