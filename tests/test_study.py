"""Study files and what a study keeps: bad input is named before anything is trained, and good rows survive a crash."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from distsign.cli import main
from distsign.study.program import key_of
from distsign.study.reading import parse_study
from distsign.study.statistics import mean_and_interval, pareto_front
from distsign.study.store import Result, Store

GOOD = """
name = "tiny"
ranks = 2
seeds = [0, 1]
[defaults]
steps = 6
[[tasks]]
task = "fashion-mnist-lenet"
[[schemes]]
name = "adam"
optimizer = "adam"
lr = [1e-3, 2e-3]
"""


def test_a_list_is_a_grid() -> None:
    cells = parse_study(GOOD).cells()
    assert len({cell.label for cell in cells}) == len(cells) == 4


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("seeds = [0, 1]", "sedes = [0]", "seeds"),
        ("seeds = [0, 1]", "seeds = []", "seeds is an empty list"),
        ("seeds = [0, 1]", "seeds = [1, 1]", "seeds has 1 twice"),
        ("seeds = [0, 1]", "seeds = [-1]", "seeds must be whole numbers"),
        ("ranks = 2", "ranks = 0", "ranks must be a whole number"),
        ("steps = 6", "seed = 6", "seed is no option of a study"),
        ("lr = [1e-3, 2e-3]", "lr = []", "lr is an empty grid"),
        ("lr = [1e-3, 2e-3]", "lr = [1e-3, 1e-3]", "twice in its grid"),
        ('name = "adam"', "", "scheme 1 has no name"),
        ('task = "fashion-mnist-lenet"', "", "what is trained is not said"),
        ("[[tasks]]", '[[tasks]]\ntask = "fashion-mnist-lenet"\n[[tasks]]', "two tasks are called"),
    ],
)
def test_a_bad_study_is_refused(old: str, new: str, words: str) -> None:
    assert old in GOOD
    with pytest.raises(ValueError, match=words):
        parse_study(GOOD.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('task = "fashion-mnist-lenet"', 'task = "fashion-mnist-lenett"', "fashion-mnist-lenett"),
        ("steps = 6", "stepps = 6", "stepps"),
        ("lr = [1e-3, 2e-3]", "lr = -1", "--lr must be"),
    ],
)
def test_the_program_refuses_what_it_does_not_know(
    old: str, new: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.toml").write_text(GOOD.replace(old, new))
    assert exit_code(["study", str(tmp_path / "bad.toml"), "--dry-run"]) == 2
    said = capsys.readouterr().err.strip()
    assert words in said
    assert not (tmp_path / "tiny").exists()


def exit_code(arguments: list[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as ended:
        return int(ended.code or 0)


def test_keys_do_not_depend_on_the_order() -> None:
    assert key_of({"a": 1, "b": [2]}) == key_of({"b": [2], "a": 1}) != key_of({"a": 1, "b": [3]})


def row(number: int) -> Result:
    configuration = {"lr": number}
    return Result(key_of(configuration), configuration, "1.0", "2026-01-01T00:00:00+00:00", 1.0, 1, error="no")


def keys(store: Store) -> list[str]:
    return [result.key for result in store.results]


def test_rows_before_a_crash_are_kept(tmp_path: Path) -> None:
    with Store(tmp_path / "out") as store:
        store.add(row(1))
        store.add(row(2))
    whole = store.path.read_bytes()
    store.path.write_bytes(whole[:-20])  # killed in the middle of a line
    with Store(tmp_path / "out") as again:
        assert keys(again) == [row(1).key]
        assert "line 2 was cut short" in again.notes[0]
        again.add(row(3))
    with Store(tmp_path / "out") as last:
        assert keys(last) == [row(1).key, row(3).key]


def test_a_damaged_row_is_named(tmp_path: Path) -> None:
    with Store(tmp_path / "out") as store:
        store.add(row(1))
        store.add(row(2))
    lines = store.path.read_text().splitlines()
    lines[0] = json.dumps({**json.loads(lines[0]), "configuration": {"lr": 7}})
    store.path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=r"line 1 is damaged \(the key is not that of the configuration\)"):
        Store(tmp_path / "out")


def test_the_interval_is_students() -> None:
    found = mean_and_interval([2.0, 4.0, 6.0])
    assert found.mean == 4.0
    assert found.half_width == pytest.approx(4.302652730 * 2.0 / math.sqrt(3))  # t(0.975, 2), from a table
    assert mean_and_interval([5.0]).half_width is None


def test_the_front_has_what_nothing_beats() -> None:
    costs, values = [1.0, 1.0, 2.0, 3.0, 4.0], [0.5, 0.4, 0.5, 0.9, math.nan]
    assert pareto_front(costs, values, higher_is_better=True) == [True, False, False, True, False]
    assert pareto_front([1.0, 2.0], [2.0, 1.0], higher_is_better=False) == [True, True]
