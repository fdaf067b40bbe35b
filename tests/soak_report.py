"""The report of a soak, from its rounds."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from tests import soak_plan as kinds
from tests.soak_life import SLACK_S

LOSSES = (kinds.KILL, kinds.KILL_WRITING, kinds.FREEZE, kinds.CUT)
NOT_COVERED = """\
NaN and Inf are planted in the run without the other faults, too: a step that they skip is skipped in both.
Left out: a rank that is lost before all have met (torchrun ends the others; by themselves they wait for half an hour,
since a machine may still be fetching its data). Bits of payloads are flipped in the rank that receives, since TCP's
checksum would hide a damaged packet. The ranks are forked from one process, and no torchrun starts them again:
tests/distributed/test_restart.py has that. Liars, numbers that overflow under a loss scale, lost shards of a sharded
checkpoint and a start with another number of ranks are not drawn: tests/test_robustness.py, tests/test_liars.py,
tests/distributed/test_hook.py and tests/distributed/test_checkpoint.py have them.
"""


def report(lines: Sequence[dict[str, Any]], timeout_s: float, no_lab: str, machine: dict[str, Any]) -> str:
    """Return the text.

    Args:
        lines: the rounds'.
        timeout_s: of `launch.train`.
        no_lab: why there were no links to cut; empty where there were.
        machine: as `describe_machine` tells.
    """
    rounds = [line for line in lines if "given_up" not in line]
    faults = [fault for line in rounds for fault in line["faults"]]
    good = [fault for fault in faults if "why" not in fault]
    equal = sum(line["equal"] for line in rounds)
    text = [_table(faults, timeout_s), ""]
    text.append(f"{len(good)} of {len(faults)} faults survived; {sum(f['hangs'] for f in faults)} hangs")
    text.append(
        f"{equal} of {len(rounds)} rounds ended in the state of the run without faults but the poison, bit for bit"
    )
    ways = Counter(line.get("way", "standing ballots") for line in rounds)
    text.append("rounds by how they voted: " + ", ".join(f"{way} {count}" for way, count in sorted(ways.items())))
    lives, steps = sum(line["lives"] for line in rounds), sum(line["num_steps"] for line in rounds)
    lost = sum(line["steps_lost"] for line in rounds)
    text.append(f"{lost} steps lost, of {steps} in all; the ranks were started {lives} times")
    writing = [fault["hit"] for fault in faults if "hit" in fault]
    text.append(f"{sum(writing)} of {len(writing)} kills for a checkpoint's writing came while it lasted")
    slow = [fault["went_on"] for fault in faults if "went_on" in fault]
    text.append(f"{sum(slow)} of {len(slow)} slow links were waited out; over the others the run ended by the timeout")
    text.append(f"ends of lives that no fault explains: {sum(len(line['strays']) for line in rounds)}")
    text.append(f"faults for which the run was over too soon: {sum(len(line['not_met']) for line in rounds)}")
    given_up = [line["given_up"] for line in lines if "given_up" in line]
    text.append(f"rounds given up: {len(given_up)}" + "".join(f"\n  {each}" for each in given_up))
    if faults and not all(line["has_trained"] for line in rounds):
        text.append("warning: in some rounds no parameter moved, so that they show little")
    text += _troubles(rounds)
    if no_lab:
        text.append(f"No faults of links: {no_lab}")
    text += ["", NOT_COVERED.rstrip(), "", ", ".join(str(value) for value in machine.values())]
    return "\n".join(text) + "\n"


def _table(faults: Sequence[dict[str, Any]], timeout_s: float) -> str:
    head = f"{'fault':<40}{'planted':>8}{'survived':>9}{'detected after s, median':>25}{'most':>7}{'in time':>9}"
    rows = [head]
    for kind in kinds.WEIGHTS:
        mine = [fault for fault in faults if fault["kind"] == kind]
        row = f"{kind:<40}{len(mine):>8}{sum('why' not in fault for fault in mine):>9}"
        times = [fault["detected_s"] for fault in mine if "detected_s" in fault] if kind in LOSSES else []
        if times:
            in_time = sum(each <= timeout_s + 1 for each in times)
            row += f"{statistics.median(times):>25.2f}{max(times):>7.2f}{in_time:>9}"
        rows.append(row)
    rows.append(
        f"in time: the last rank has raised that another is lost within the timeout of {timeout_s:g} s and a second "
        f"for\nthe step that went on meanwhile; a rank hangs if it has not ended within the timeout and {SLACK_S:g} s"
    )
    return "\n".join(rows)


def _troubles(rounds: Sequence[dict[str, Any]]) -> list[str]:
    found = []
    for line in rounds:
        where = f"round {line['round']} of seed {line['soak_seed']}"
        found += [f"{where}: the end states differ in {', '.join(line['different'])}"] * (not line["equal"])
        found += [f"{where}: {each}" for each in line["strays"]]
        found += [f"{where}: {fault['kind']}: {fault['why']}" for fault in line["faults"] if "why" in fault]
    return found
