"""Profiles: files that come back as they were, and those that are refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from distsign.simulator import Profile
from distsign.simulator.profile import COLLECTIVES, KERNELS, CollectiveCost, InStep, KernelCost


def test_a_profile_comes_back_as_it_was(tmp_path: Path) -> None:
    made = Profile(
        {name: CollectiveCost(1e-3, byte_cpu_s=1e-9) for name in COLLECTIVES},
        {name: KernelCost.linear(1e-5, 1e-10) for name in KERNELS},
        cores=1.9,
        bandwidth_bytes_per_s=1.2e8,
        latency_s=1e-4,
        in_step={"powersgd": (InStep(1e5, 1.5, 1.1), InStep(1e6, 1.2, 1.0), InStep(1e5, 1.3, 1.0, rank=4))},
        facts={"ranks": 4},
    )
    made.save(tmp_path / "profile.json")
    assert Profile.load(tmp_path / "profile.json") == made
    Profile.ideal().save(tmp_path / "ideal.json")
    assert Profile.load(tmp_path / "ideal.json") == Profile.ideal()


def test_a_profile_without_factors_of_steps_is_read(tmp_path: Path) -> None:
    Profile.ideal().save(tmp_path / "new.json")
    data = json.loads((tmp_path / "new.json").read_text())
    del data["in_step"]
    (tmp_path / "old.json").write_text(json.dumps(data))
    assert Profile.load(tmp_path / "old.json") == Profile.ideal()


def test_factors_are_interpolated_between_sizes_and_ranks() -> None:
    points = (InStep(1e4, 2.0, 1.2), InStep(1e6, 1.6), InStep(1e4, 1.2, rank=4), InStep(1e6, 0.8, rank=4))
    profile = replace(Profile.ideal(), in_step={"powersgd": points})
    for elements, rank, work, wire in (
        (1e4, 1, 2.0, 1.2),
        (1e5, 1, 1.8, 1.1),
        (1e5, 2, 1.4, 1.05),
        (1e5, 4, 1.0, 1.0),
        (1e9, 64, 0.8, 1.0),
    ):
        assert profile.in_step_of("powersgd", elements, rank) == InStep(
            elements, pytest.approx(work), pytest.approx(wire), rank
        )


def test_profiles_that_are_refused(tmp_path: Path) -> None:
    Profile.ideal().save(tmp_path / "good.json")
    good = (tmp_path / "good.json").read_text()
    for bad, words in (
        (good[:200], "is damaged, no JSON"),
        ("[]", "is no profile"),
        ('{"format": "other"}', "is no profile"),
        (good.replace('"version": 1', '"version": 7'), "is of version 7, expected 1"),
        (good.replace('"to_half"', '"to_hlaf"'), "needs the cost of to_half"),
        (good.replace('"call_s": 0.0', '"call_s": -1.0'), "call_s of all_reduce_fp32"),
        (good.replace('"call_s"', '"cal_s"'), "is damaged"),
        (good.replace('"efficiency": 1.0', '"efficiency": 0'), "efficiency must be"),
        (good.replace('"device": "cpu"', '"device": "abacus"'), "device must be"),
        (good.replace('"latency_s": 0.0', '"latency_s": "fast"'), "latency_s must be"),
        (good.replace('"in_step": {}', '"in_step": {"fp32": [{"elements": 1e5, "work": 0}]}'), "work must be a number"),
        (good.replace('"in_step": {}', '"in_step": {"fp32": []}'), "by growing ranks and elements"),
        (good.replace('"in_step": {}', '"in_step": {"fp32": [{"elms": 1e5}]}'), "is damaged"),
        (re.sub(r'("to_half": \{\s*"points": \[\s*\[\s*[\d.]+,\s*)[\d.]+', r"\1NaN", good), "seconds of to_half"),
    ):
        (tmp_path / "bad.json").write_text(bad)
        with pytest.raises(ValueError, match=words):
            Profile.load(tmp_path / "bad.json")
    with pytest.raises(ValueError, match="cannot read the profile"):
        Profile.load(tmp_path / "absent.json")
