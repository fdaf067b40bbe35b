"""What a study runs and when: in parallel, after a kill, after Ctrl-C; and that its report can be looked at."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from distsign.cli import main
from distsign.study import tied
from tests.distributed.ranks import REPOSITORY

PROGRAM = Path(__file__).with_name("study_program.py")
STUDY = """
name = "made up"
program = "program.py"
seeds = [0]
[defaults]
task = "easy"
{defaults}
[[tasks]]
task = "easy"
[[schemes]]
name = "a"
lr = [1, 2, 3, 4, 5]
"""
DEADLINE_S = 60.0


class Folder:
    """A study file with its program, what it has written and what has been run."""

    def __init__(self, path: Path, defaults: str = "hold-from = 3") -> None:
        self.path, self.file, self.out = path, path / "study.toml", path / "study"
        shutil.copy(PROGRAM, path / "program.py")
        self.write(STUDY.format(defaults=defaults))

    def write(self, text: str) -> None:
        self.file.write_text(text)

    def run(self, *options: str) -> int:
        return main(["study", str(self.file), *options])

    def start(self, *options: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "distsign", "study", str(self.file), *options]
        return subprocess.Popen(
            [sys.executable, tied.__file__, str(os.getpid()), *command],  # should this test be killed itself
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def journal(self, word: str) -> list[tuple[str, int]]:
        """Return lr/seed and process of each line that begins with a word."""
        path = self.path / "journal"
        lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
        return [(cell, int(pid)) for said, cell, pid in lines if said == word]

    def started(self) -> Counter[str]:
        return Counter(cell for cell, _ in self.journal("start"))

    def results(self) -> list[dict[str, object]]:
        path = self.out / "results.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def most_at_once(self) -> int:
        now = most = 0
        for line in (self.path / "journal").read_text().splitlines():
            now += 1 if line.startswith("start") else -1
            most = max(most, now)
        return most


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """Say whether a process runs; one that has ended and whose parent has not asked does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def held(tmp_path: Path) -> Folder:
    """A study whose third cell and those after it wait while there is a file `hold`."""
    folder = Folder(tmp_path)
    (tmp_path / "hold").touch()
    return folder


def goes_on(folder: Folder, *, broken_off: set[str]) -> None:
    """Run the same study again: only the missing cells run, and the report has all five."""
    (folder.path / "hold").unlink()
    before = folder.started()
    assert folder.run() == 0
    again = folder.started() - before
    assert again == Counter({"3/0", "4/0", "5/0"})
    assert {cell for cell, count in folder.started().items() if count > 1} == broken_off
    assert len({result["key"] for result in folder.results()}) == len(folder.results()) == 5
    with (folder.out / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["scheme"] for row in rows] == [f"a, lr {lr}" for lr in range(1, 6)]
    assert float(rows[3]["mean"]) == pytest.approx(1 - 4 / 30)


@pytest.mark.parametrize("jobs", [1, 3])
def test_cells_run_in_parallel_up_to_the_limit(jobs: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Folder(tmp_path, "work-s = 0.5")
    assert folder.run(f"--jobs={jobs}") == 0
    assert folder.most_at_once() == jobs
    cores = [int(line) for line in (tmp_path / "cores").read_text().split()]
    mine = len(os.sched_getaffinity(0))
    assert {*cores} <= {max(1, mine // jobs), max(1, -(-mine // jobs))}, "cells side by side have cores of their own"
    assert folder.started() == Counter(f"{lr}/0" for lr in range(1, 6))
    assert {result["jobs"] for result in folder.results()} == {jobs}
    said = (folder.out / "report.html").read_text()
    assert ("cells ran side by side" in said) == (jobs > 1)
    capsys.readouterr()
    assert folder.run("--dry-run") == 0
    assert "5 cells: 5 done, 0 failed, 0 missing" in capsys.readouterr().out


def test_a_killed_study_goes_on(held: Folder) -> None:
    study = held.start()
    try:
        until(lambda: len(held.results()) == 2 and len(held.journal("start")) == 3)
        (_, cell) = held.journal("start")[-1]
        assert is_alive(cell)
    finally:
        study.kill()
        study.communicate()
    until(lambda: not is_alive(cell))
    assert len(held.results()) == 2
    goes_on(held, broken_off={"3/0"})


def test_ctrl_c_ends_the_cells_and_the_study_goes_on(held: Folder) -> None:
    study = held.start("--jobs=2")
    try:
        until(lambda: len(held.results()) == 2 and len(held.journal("start")) == 4)
        cells = [pid for _, pid in held.journal("start")[-2:]]
        assert all(map(is_alive, cells))
        study.send_signal(signal.SIGINT)
        out, err = study.communicate(timeout=DEADLINE_S)
    finally:
        study.kill()
        study.communicate()
    assert study.returncode == 130
    assert not any(map(is_alive, cells))
    assert err.count("interrupted; what has ended is kept") == 1 and "Traceback" not in err
    assert "3 of 5 cells are missing: the same command runs them" in out
    assert not (held.out / "running").exists()
    goes_on(held, broken_off={"3/0", "4/0"})


def test_a_deadline_ends_the_cells_that_run(held: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    assert held.run("--minutes=0.05") == 0
    assert not any(is_alive(pid) for _, pid in held.journal("start"))
    assert "3 of 5 cells are missing" in capsys.readouterr().out
    goes_on(held, broken_off={"3/0"})


def test_one_study_at_a_time_in_a_folder(held: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    study = held.start()
    try:
        until(lambda: len(held.journal("start")) == 3)
        assert held.run() == 2
        assert "another study is at work in" in capsys.readouterr().err
    finally:
        study.kill()
        study.communicate()


@pytest.mark.parametrize(
    ("ending", "words"),
    [("by-error", "exit code 3\nthe last words of a cell"), ("without-end", "its metrics have no end")],
)
def test_a_failed_cell_is_said_and_run_again(
    ending: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Folder(tmp_path)
    folder.write(STUDY.format(defaults="") + f'[[schemes]]\nname = "b"\nlr = 9\nending = "{ending}"\n')
    assert folder.run() == 1
    (failed,) = [result for result in folder.results() if result["error"] is not None]
    assert failed["error"] == words and failed["metrics"] == []
    assert f"failed: easy, b, seed 0: {words.splitlines()[-1]}" in capsys.readouterr().out
    assert words.splitlines()[-1] in (folder.out / "report.html").read_text()
    assert folder.run() == 1
    assert folder.started() == Counter({**{f"{lr}/0": 1 for lr in range(1, 6)}, "9/0": 2})


def test_results_of_two_versions_are_not_mixed_silently(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Folder(tmp_path)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "program.py"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    assert folder.run() == 0
    (first,) = {result["version"] for result in folder.results()}
    with (tmp_path / "program.py").open("a") as file:
        file.write("# changed\n")
    folder.write(folder.file.read_text().replace("seeds = [0]", "seeds = [0, 1]"))
    capsys.readouterr()
    assert folder.run() == 0
    versions = Counter(result["version"] for result in folder.results())
    (second,) = versions.keys() - {first}
    assert versions == {first: 5, second: 5} and str(second).startswith(f"{first}+")
    note = f"results of 2 versions of the code are mixed ({first}: 5, {second}: 5)"
    assert note in capsys.readouterr().out and note in (folder.out / "report.html").read_text()
    assert folder.run("--same-version") == 0
    assert Counter(result["version"] for result in folder.results()) == {first: 5, second: 10}
    assert "versions of the code are mixed" not in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------- the report

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ASKS_EACH_IMAGE = """<script>
const seen = [...document.images].map(image => image.complete && image.naturalWidth > 0 && image.naturalHeight > 0);
const asked = performance.getEntriesByType("resource").filter(each => !each.name.startsWith("data:")).length;
document.body.dataset.seen = `${seen.filter(Boolean).length} of ${seen.length} images, ${asked} requests`;
</script>
</body>"""


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Folder(tmp_path_factory.mktemp("reported"))
    folder.write(
        STUDY.format(defaults="").replace("seeds = [0]", "seeds = [0, 1]") + '[[tasks]]\ntask = "hard"\n'
        '[[report.reach]]\nname = "epochs to 0.9"\ntarget = 0.9\nsource = "paper"\npublished = { a = 12 }\n'
        '[[report.reach]]\ntarget = "best"\nsource = "Table 3"\npublished = { a = "97.1 (278)" }\n'
    )
    assert folder.run("--jobs=4") == 0
    return folder.out


def test_pictures_are_there_and_not_empty(reported: Path) -> None:
    names = sorted(path.name for path in (reported / "pictures").iterdir())
    assert names == [f"{task}-{kind}.svg" for task in ("easy", "hard") for kind in ("bytes", "time", "training")]
    for name in names:
        root = ElementTree.parse(reported / "pictures" / name).getroot()
        lines = [each for each in root.iter() if (each.get("id") or "").startswith("line2d_")]
        assert root.tag.endswith("svg") and len(lines) > 20, f"{name} has no lines of five schemes"


def test_the_report_has_everything_in_one_file(reported: Path) -> None:
    text = (reported / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', text)
    assert len(sources) == 6 and all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert not re.findall(r"@import|url\(", text)
    assert text.count("<tr") == 2 * 6
    heads = "<th>epochs to 0.9</th><th>paper</th><th>best (epochs)</th><th>Table 3</th>"
    assert heads in text
    # The program's accuracy is 1 - lr / step - seed / 1000, at steps 10, 20 and 30: epochs 1, 2 and 3.
    assert "<td>1.5</td><td>12</td><td>96.62 (3)</td><td>97.1 (278)</td>" in text
    assert json.loads((reported / "report.json").read_text())["num_missing"] == 0


@pytest.mark.skipif(not any(map(shutil.which, BROWSERS)), reason="no Chromium here: apt-get install chromium")
def test_a_browser_opens_the_report_without_a_network(reported: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text((reported / "report.html").read_text().replace("</body>", ASKS_EACH_IMAGE))
    done = subprocess.run(
        [
            next(filter(None, map(shutil.which, BROWSERS))),
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
            "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--dump-dom",
            page.as_uri(),
        ],
        env={**os.environ, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert 'data-seen="6 of 6 images, 0 requests"' in done.stdout
    assert done.stdout.count("<tr") == 2 * 6
