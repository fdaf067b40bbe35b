"""A study file in TOML, read and checked as far as it can be without its program.

Every error is one line that names the place, what was expected and what came.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distsign.simulator.units import nearest, parse_bandwidth
from distsign.study.plan import RANKS, Layer, Reach, Scheme, Study

__all__ = ["load_study", "parse_study"]

DEFAULT_PROGRAM = "-m launch.train"
DEFAULT_BANDWIDTHS = ("10mbit", "100mbit", "1gbit")
OF_THE_STUDY = {
    "seed": "give the whole study seeds = [0, 1, 2]",
    "metrics": "the study itself says where results go",
    "checkpoint": "a study keeps no checkpoints: a cell that was broken off starts anew",
    "checkpoint-every": "a study keeps no checkpoints",
    "resume": "a study keeps no checkpoints",
    "stop-after": "a study runs each cell to its end; shorten it with steps or epochs",
}
"""Options that no study file may set, and what to do instead."""

_TOP = ("name", "about", "program", "ranks", "seeds", "defaults", "tasks", "settings", "schemes", "report")
_REPORT = ("bandwidths", "reach")
BEST = "best"
_REACH = ("target", "count", "task", "name", "source", "published")
COUNTS = ("epochs", "steps", "bytes")


def load_study(path: Path) -> Study:
    """Read a study file.

    Raises:
        ValueError: it cannot be read, or something in it cannot be; one line that names the place.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        what = error.strerror if isinstance(error, OSError) else "it is no text in UTF-8"
        raise ValueError(f"cannot read the study {path}: {what}") from error
    try:
        return parse_study(text, path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def parse_study(text: str, path: Path = Path("study.toml")) -> Study:
    """Read a study from its text; see `load_study`.

    Example:
        >>> study = parse_study('''
        ... name = "tiny"
        ... seeds = [0, 1]
        ... [[tasks]]
        ... task = "digits"
        ... [[schemes]]
        ... name = "adam"
        ... lr = [1e-3, 2e-3]
        ... ''')
        >>> [cell.label for cell in study.cells()]  # doctest: +NORMALIZE_WHITESPACE
        ['digits, adam, lr 0.001, seed 0', 'digits, adam, lr 0.001, seed 1',
         'digits, adam, lr 0.002, seed 0', 'digits, adam, lr 0.002, seed 1']
    """
    table = tomllib.loads(text)
    _known("key", table, _TOP, "")
    tasks = tuple(_layer(*each) for each in _named(table, "task"))
    schemes = tuple(_scheme(*each, tasks) for each in _named(table, "scheme"))
    defaults = dict(_table(table, "defaults"))
    if RANKS in table:
        defaults.setdefault(RANKS, table[RANKS])
    report = _table(table, "report")
    _known("key", report, _REPORT, "[report]: ")
    bandwidths = report.get("bandwidths", list(DEFAULT_BANDWIDTHS))
    if not isinstance(bandwidths, list) or not all(isinstance(each, str) for each in bandwidths):
        raise ValueError(f'[report]: bandwidths must be a list such as ["100mbit", "1gbit"], got {bandwidths!r}')
    return Study(
        name=_string(table, "name", path.stem),
        about=_string(table, "about", ""),
        program=_string(table, "program", DEFAULT_PROGRAM),
        seeds=_seeds(table.get("seeds", [0])),
        defaults=_layer("", defaults, "[defaults]"),
        tasks=tasks,
        settings=tuple(_layer(*each) for each in _named(table, "setting")) or (Layer("", {}, "no setting"),),
        schemes=schemes,
        bandwidths={each: parse_bandwidth(each) for each in bandwidths},
        reach=tuple(_reach(entry, tasks, schemes) for entry in _tables(report, "reach")),
        text=text,
        path=path,
    )


def _known(what: str, given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for name in given:
        if name not in known:
            raise ValueError(f"{where}{nearest(what, name, known)}")


def _string(table: Mapping[str, Any], key: str, default: str, where: str = "") -> str:
    value = table.get(key, default)
    if not isinstance(value, str):
        raise ValueError(f"{where}{key} must be a text in quotes, got {value!r}")
    return value


def _table(table: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = table.get(key, {})
    if not isinstance(value, dict):
        raise ValueError(f"{key} must be a table, [{key}], got {value!r}")
    return value


def _tables(table: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    value = table.get(key, [])
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise ValueError(f"{key} must be tables, each begun by [[{key}]], got {value!r}")
    return value


def _named(table: Mapping[str, Any], kind: str) -> list[tuple[str, dict[str, Any], str]]:
    """Return the tables of a kind: the name that each has alone, its options, and how errors call it."""
    found: dict[str, tuple[str, dict[str, Any], str]] = {}
    for number, entry in enumerate(_tables(table, f"{kind}s"), 1):
        where, options = f"{kind} {number}", dict(entry)
        if kind == "task" and "task" not in options:
            raise ValueError(f'{where}: what is trained is not said: expected task = "NAME"')
        if kind != "task" and "name" not in options:
            raise ValueError(f'{where} has no name: expected name = "..."')
        name = _string(options, "name", str(options.get("task")), f"{where}: ")
        options.pop("name", None)
        if not name.strip():
            raise ValueError(f"{where}: name must not be empty")
        if name in found:
            raise ValueError(f"two {kind}s are called {name!r}: give one of them another name")
        found[name] = name, options, f"{kind} {name!r}"
    if not found and kind != "setting":
        raise ValueError(f"there is no {kind}: add at least one table [[{kind}s]]")
    return list(found.values())


def _layer(name: str, options: Mapping[str, Any], where: str) -> Layer:
    for option, value in options.items():
        if option in OF_THE_STUDY:
            raise ValueError(f"{where}: {option} is no option of a study: {OF_THE_STUDY[option]}")
        _check_value(option, value, where)
    return Layer(name, options, where)


def _check_value(option: str, value: Any, where: str) -> None:
    if value == []:
        raise ValueError(f"{where}: {option} is an empty grid: give at least one value, or leave it out")
    values = value if isinstance(value, list) else [value]
    for index, each in enumerate(values):
        if not isinstance(each, str | int | float):
            raise ValueError(f"{where}: {option} must be a text, a number, true, false or a list of them, got {each!r}")
        if each in values[:index]:
            raise ValueError(f"{where}: {option} has {each!r} twice in its grid: leave one out")
        if option == RANKS and (not isinstance(each, int) or isinstance(each, bool) or each < 1):
            raise ValueError(f"{where}: ranks must be a whole number, 1 or more, got {each!r}")


def _scheme(name: str, options: dict[str, Any], where: str, tasks: Sequence[Layer]) -> Scheme:
    on = options.pop("on", {})
    if not isinstance(on, dict) or not all(isinstance(each, dict) for each in on.values()):
        raise ValueError(f"{where}: on must have a table of options for each task it names, got {on!r}")
    _known("task", on, [task.name for task in tasks], f"{where}: on: ")
    own = _layer(name, options, where)
    return Scheme(name, own.options, where, {task: _layer(task, on[task], f"{where} on {task!r}") for task in on})


def _seeds(value: Any) -> tuple[int, ...]:
    seeds = value if isinstance(value, list) else [value]
    if not seeds:
        raise ValueError("seeds is an empty list: give at least one, such as seeds = [0, 1, 2]")
    for index, seed in enumerate(seeds):
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            raise ValueError(f"seeds must be whole numbers, 0 or more, got {seed!r}")
        if seed in seeds[:index]:
            raise ValueError(f"seeds has {seed} twice: leave one out")
    return tuple(seeds)


def _reach(entry: Mapping[str, Any], tasks: Sequence[Layer], schemes: Sequence[Layer]) -> Reach:
    where = "[[report.reach]]: "
    _known("key", entry, _REACH, where)
    target = entry.get("target")
    if target != BEST and (not isinstance(target, int | float) or isinstance(target, bool)):
        raise ValueError(f'{where}target must be a number, a value of the task\'s metric, or "{BEST}", got {target!r}')
    count = _string(entry, "count", "epochs", where)
    _known("count", {count: None}, COUNTS, where)
    task = _string(entry, "task", "", where) or None
    if task is not None:
        _known("task", {task: None}, [each.name for each in tasks], where)
    published = _table(entry, "published")
    _known("scheme", published, [each.name for each in schemes], f"{where}published: ")
    for name, value in published.items():
        if not isinstance(value, str | int | float):
            raise ValueError(f"{where}published: {name} must be a number or a text, got {value!r}")
    value = None if target == BEST else float(target)
    name = _string(entry, "name", f"{BEST} ({count})" if value is None else f"{count} to {value:g}", where)
    return Reach(value, count, task, name, _string(entry, "source", "", where), published)
