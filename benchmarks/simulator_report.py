"""What `benchmarks.simulator` says of predictions: each error, the choice of a scheme, errors by scheme and link."""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import geometric_mean

from benchmarks.common import Column, Report, Row
from benchmarks.simulator_settings import HIERARCHICAL, SIMULATED, Results, Setting, load_profile, predict, schemes_of
from benchmarks.step_schemes import BF16, FP32, NO_OP

LARGEST_ERROR, NEAR_ENOUGH, CORES_MATTER, STEADY = 0.20, 0.03, 0.05, 0.05

TABLE = (
    Column("setting", "ranks/per node, link, model"),
    Column("name", "scheme"),
    Column("predicted_ms", "predicted ms", ".1f"),
    Column("ms", "measured ms", ".1f"),
    Column("error", "error", "+.1%"),
    Column("cores_matter", "cores matter"),
)
PARTS = (
    Column("of", "of"),
    Column("steps", "steps", "d"),
    Column("error", "error", ".1%"),
    Column("error_bias", "bias", "+.1%"),
    Column("error_large", "above 20 %", "d"),
    Column("quick_error", "quick", ".1%"),
    Column("quick_error_bias", "bias", "+.1%"),
    Column("quick_error_large", "above 20 %", "d"),
)
CHOICES = (
    Column("setting", "ranks/per node, link, model"),
    Column("predicted", "predicted fastest"),
    Column("measured", "measured fastest"),
    Column("behind", "behind it by", ".1%"),
)
CALIBRATIONS = (Column("profile", "profile"), Column("seconds", "seconds", ".0f"))


def rows_of(setting: Setting, results: Results) -> list[Row]:
    """Return a row for each scheme in one setting."""
    ms, compute = results.measured[setting.key], results.compute[setting.key]
    rows = []
    for name in (each for each in schemes_of(setting) if each in ms):
        compute_s = compute[name] / 1e3
        predicted = predict(setting, results, name, compute_s)
        # The same on a machine where nobody waits for a core, forward and backward alone taking as long as they did.
        without = predict(setting, results, name, compute_s, cores=math.inf)
        row: Row = {"setting": setting.key, "name": name, "predicted_ms": predicted, "ms": ms[name]}
        row |= {"error": predicted / ms[name] - 1, "compute_ms": compute[name]}
        quick_ms = predict(setting, results, name, compute_s, whole_steps=False)
        row["quick_error"] = quick_ms / ms[name] - 1
        row["cores_matter"] = "yes" if predicted > (1 + CORES_MATTER) * without else "no"
        rows.append(row)
    return rows


def choice_of(rows: Sequence[Row]) -> Row:
    """Return which scheme would have been chosen in one setting, and how far behind the fastest one it is."""
    chosen = min(rows, key=lambda row: float(row["predicted_ms"]))
    fastest = min(rows, key=lambda row: float(row["ms"]))
    names = {"setting": chosen["setting"], "predicted": chosen["name"], "measured": fastest["name"]}
    return {**names, "behind": chosen["ms"] / fastest["ms"] - 1}


def summary_of(of: str, rows: Sequence[Row]) -> Row:
    """Return how far some steps are off on the whole, to which side, and how far without whole steps."""
    found: Row = {"of": of, "steps": len(rows)}
    for name in ("error", "quick_error"):
        errors = [row[name] for row in rows]
        found |= {name: mean_error(rows, name), f"{name}_bias": sum(errors) / len(errors)}
        found[f"{name}_large"] = sum(abs(error) > LARGEST_ERROR for error in errors)
    return found


def mean_error(rows: Sequence[Row], of: str = "error") -> float:
    """Return the geometric mean of how far predictions are off, as a factor beyond 1, whichever way."""
    return geometric_mean([max(1 + row[of], 1 / (1 + row[of])) for row in rows]) - 1


def differences(now: Results, then: Results) -> tuple[int, float, float]:
    """Return how many steps two runs share, and by how much their times differ; geometric means, as `mean_error`.

    Returns:
        `(count, difference, beside)`; `beside` is that of times divided by those of forward and backward in their run.
    """
    both = [
        (key, name)
        for key in now.measured.keys() & then.measured.keys()
        for name in (now.measured[key].keys() & then.measured[key].keys()) - {NO_OP}
    ]
    plain = [now.measured[key][name] / then.measured[key][name] for key, name in both]
    alone = [now.compute[key][name] / then.compute[key][name] for key, name in both]
    beside = [step / compute for step, compute in zip(plain, alone, strict=True)]
    if not both:
        return 0, 0.0, 0.0
    off, off_beside = (geometric_mean([max(x, 1 / x) for x in each]) - 1 for each in (plain, beside))
    return len(both), off, off_beside


def write_report(options: argparse.Namespace, settings: Sequence[Setting], results: Results) -> None:
    """Print, and keep in `OUT/simulator.json`, how near predictions come in those settings that have been measured.

    Args:
        options: the command line.
        settings: all that there are.
        results: what has been measured of them.
    """
    report = Report("simulator", options)
    complete = [setting for setting in settings if results.is_complete(setting)]
    done = [rows_of(setting, results) for setting in complete]
    rows = [row for each in done for row in each]
    without = sum(setting.key in results.measured for setting in settings) - len(complete)
    if without:
        print(f"{without} settings were measured and have no profile here: a run without --report measures them again")
    if not rows:
        print("nothing measured yet")
        return
    for title, limited in (("The links are the limit", "no"), ("The cores are the limit, too", "yes")):
        chosen = [row for row in rows if row["cores_matter"] == limited]
        if chosen:
            worst = max(abs(row["error"]) for row in chosen)
            note = f"{len(chosen)} held out: geometric mean error {mean_error(chosen):.1%}, largest {worst:.1%}"
            report.table(title, TABLE, chosen, note)
    choices = [choice_of(each) for each in done]
    right = sum(choice["behind"] <= NEAR_ENOUGH for choice in choices)
    uncompressed = sum(choice["measured"] in (FP32, BF16) for choice in choices)
    note = (
        f"all {len(rows)} held out: geometric mean error {mean_error(rows):.1%}, "
        f"{sum(abs(row['error']) > LARGEST_ERROR for row in rows)} above {LARGEST_ERROR:.0%}; choice right, or within "
        f"{NEAR_ENOUGH:.0%}, in {right} of {len(choices)} settings; fp32 or bf16 was the fastest in {uncompressed}"
    )
    commits = Counter(str(results.commits[setting.key]) for setting in complete)
    if len(commits) > 1:
        note += "; measured by several commits: " + ", ".join(f"{name}, {count}" for name, count in commits.items())
    report.table("The choice", CHOICES, choices, note)
    _report_parts(report, options, settings, results, rows)
    profiles = {path.name: load_profile(path).facts for path in map(results.profile_path, complete)}
    took = [{"profile": name, "seconds": facts["seconds"]} for name, facts in profiles.items() if "seconds" in facts]
    if took:
        report.table("How long calibrating took, starting the ranks apart", CALIBRATIONS, took)
    report.write()


def _report_parts(
    report: Report, options: argparse.Namespace, settings: Sequence[Setting], results: Results, rows: Sequence[Row]
) -> None:
    parts = {"all": rows}
    parts |= {name: [row for row in rows if row["name"] == name] for name in {**SIMULATED, **HIERARCHICAL}}
    parts |= {each.rate: [row for row in rows if each.rate in row["setting"].split()] for each in settings}
    drifts = {each.key: results.drift(each) for each in settings if results.is_complete(each)}
    told = any(drift is not None for drift in drifts.values())
    if told:
        for of, steady in (("a steady machine", True), ("one that had changed", False), ("not known", None)):
            keys = {key for key, drift in drifts.items() if steady == (None if drift is None else abs(drift) <= STEADY)}
            parts[of] = [row for row in rows if row["setting"] in keys]
    note = "quick: without whole steps, as calibrate --quick has it"
    if told:
        note += f". Steady: fixed work took as long as right after the calibration, to {STEADY:.0%}"
    if options.earlier:
        shared, difference, beside = differences(results, Results(Path(options.earlier)))
        note += (
            f". {shared} of the steps differ by {difference:.1%} from an earlier run, by {beside:.1%} where forward "
            "and backward of each run are taken as given"
        )
    report.table("By scheme, by link", PARTS, [summary_of(of, part) for of, part in parts.items() if part], note)
