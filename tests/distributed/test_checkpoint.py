"""Checkpoints of all ranks through torch.distributed.checkpoint: bit-exact, elastic, and refused where damaged."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import xxhash

from distsign import FixedConfidence, RMSConfidence, SignAdamPP, SignVoteState, TargetDensity
from distsign.checkpoint import CheckpointError, load, newest, save
from tests.vote_states import undecided, unsent

from . import checkpoint_jobs as jobs
from .carry_oracle import CARRY
from .oracle import Case
from .ranks import REPOSITORY, RankPool, RanksFailed

Pools = Callable[[int], RankPool]
NUM_KILLS = 60

WAYS = {
    "rms": (replace(CARRY, options={}), 0.0),
    "rms, budget, owner carry": (replace(CARRY, options={"bits_per_param": 0.1, "margin": 2}), 0.9),
    "rms, budget, standing": (replace(CARRY, options={"bits_per_param": 0.1, "owner_carry": "standing"}), 0.0),
    "rms, plain owner carry": (replace(CARRY, options={"owner_carry": "plain", "margin": 2}), 0.0),
    "adaptive, momentum": (Case(), 0.9),
    "steered": (Case(TargetDensity(0.02), {"bits_per_param": 0.2, "margin": 2}), 0.9),
}


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("name", WAYS)
def test_a_run_goes_on_bit_for_bit_from_any_step(rank_pool: Pools, tmp_path: Path, name: str, world_size: int) -> None:
    case, momentum = WAYS[name]
    stops = [0, *sorted(random.Random(name).sample(range(1, 12), 3))]  # from before the first step, too
    rank_pool(world_size).run(jobs.go_on_at_each, case, str(tmp_path), stops, momentum, deadline_s=110)


ELASTIC = replace(CARRY, options={"owner_carry": "plain", "margin": 2})


FLAT = [(4, 1, 2, 1), (2, 1, 4, 1), (4, 1, 3, 1), (1, 1, 2, 1)]
NODES = [(4, 2, 8, 2), (4, 2, 3, 1), (2, 1, 4, 2), (1, 1, 4, 2), (4, 2, 4, 1), (8, 4, 8, 2)]


@pytest.mark.parametrize(("old", "old_per_node", "new", "new_per_node"), [*FLAT, *NODES])
def test_other_ranks_and_nodes_take_over_what_the_carries_held(
    rank_pool: Pools, tmp_path: Path, old: int, old_per_node: int, new: int, new_per_node: int
) -> None:
    def case(num_ranks: int, per_node: int) -> Case:
        nodes = {} if per_node == 1 else {"exchange": "hierarchical", "ranks_per_node": per_node}
        margin = min(2, num_ranks // per_node)
        return replace(ELASTIC, options={**ELASTIC.options, **nodes, "margin": margin})

    folder = str(tmp_path / "step-5")
    saved = rank_pool(old).run(jobs.train_and_save, case(old, old_per_node), folder)
    loaded = rank_pool(new).run(jobs.load_elsewhere, case(new, new_per_node), folder)
    assert len({end for _, end in loaded}) == 1
    before, after = [each["vote"] for each in saved], [taken_over["vote"] for taken_over, _ in loaded]
    for name in before[0]["voter"]:
        carried = unsent(before, name, old_per_node), unsent(after, name, new_per_node)
        assert torch.allclose(*carried, atol=1e-5) and (carried[0].any() or carried[0].numel() < 20), name
        assert torch.equal(undecided(before, name, old_per_node), undecided(after, name, new_per_node)), name
    assert old == 1 or any(undecided(before, name, old_per_node).any() for name in before[0]["voter"])
    for taken_over, _ in loaded:
        assert taken_over["digest"] == saved[0]["digest"]
        assert not jobs.paths(taken_over["optimizer"], saved[0]["optimizer"])


def test_an_all_gather_by_other_ranks_stays_one(rank_pool: Pools, tmp_path: Path) -> None:
    """Each rank counts every shard itself, and must take over what was undecided of all."""
    case, folder = replace(ELASTIC, options={**ELASTIC.options, "exchange": "all_gather"}), str(tmp_path / "step-5")
    rank_pool(4).run(jobs.train_and_save, case, folder)
    loaded = rank_pool(3).run(jobs.load_elsewhere, case, folder)
    assert len({end for _, end in loaded}) == 1


def test_a_missing_shard_is_named_on_all_ranks(rank_pool: Pools, tmp_path: Path) -> None:
    for step in (1, 2):
        rank_pool(4).run(jobs.train_and_save, ELASTIC, str(tmp_path / f"step-{step}"))
    folder = tmp_path / "step-2"
    assert {path.name for path in folder.glob("__*")} == {f"__{rank}_0.distcp" for rank in range(4)}
    (folder / "__2_0.distcp").unlink()
    words = f"{folder}/__2_0.distcp, which rank 2 wrote, is missing; restore it, or load {tmp_path}/step-1, the newest"
    for world_size in (4, 2):
        with pytest.raises(RanksFailed) as caught:
            rank_pool(world_size).run(jobs.load_only, ELASTIC, str(folder))
        assert len(caught.value.failures) == world_size
        assert all(words in failure.message for failure in caught.value.failures)


def test_a_folder_that_one_rank_does_not_see_is_an_error_on_all(rank_pool: Pools, tmp_path: Path) -> None:
    with pytest.raises(RanksFailed) as caught:
        rank_pool(4).run(jobs.load_where_rank_2_sees_nothing, ELASTIC, str(tmp_path / "step-1"))
    assert len(caught.value.failures) == 4
    assert all("elsewhere is not there" in f.message and "(seen by rank 2)" in f.message for f in caught.value.failures)


# ---------------------------------------------------------------------------------------------- in one process, damage


def a_run(num_inputs: int = 9, confidence: Any = None) -> dict[str, Any]:
    torch.manual_seed(3)
    net = torch.nn.Linear(num_inputs, 40)
    state = SignVoteState(confidence=confidence or RMSConfidence(k=4))
    optimizer = SignAdamPP(net.named_parameters(), lr=0.1, momentum=0.9, vote_state=state)
    torch.nn.functional.mse_loss(net(torch.ones(2, num_inputs)), torch.zeros(2, 40)).backward()
    optimizer.step()
    return {"model": net, "optimizer": optimizer, "vote": state, "step": 1, "words": ["a", ("b", None)], "none": []}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(a_run(), tmp_path / "step-1")
    return tmp_path / "step-1"


def refusal(folder: Path, parts: dict[str, Any] | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(a_run() if parts is None else parts, folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_was_saved_comes_back(folder: Path) -> None:
    want, parts = a_run(), a_run()
    with torch.no_grad():
        parts["model"].weight.zero_()
        for state in parts["optimizer"].state.values():
            state["momentum_buffer"].zero_()
    parts.update(step=0, words=None, none=None)
    load(parts, folder)
    assert (parts["step"], parts["words"], parts["none"]) == (1, ["a", ("b", None)], [])
    for key in ("model", "optimizer"):
        assert not jobs.paths(dict(want[key].state_dict()), dict(parts[key].state_dict())), key


def test_torch_reads_the_model_by_itself(folder: Path) -> None:
    target = {"model": torch.nn.Linear(9, 40).state_dict()}
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        dcp.load(target, checkpoint_id=folder)
    assert torch.equal(target["model"]["weight"], a_run()["model"].weight)


def test_any_damage_is_named(folder: Path) -> None:
    rng = random.Random(4)
    files = sorted(path for path in folder.iterdir())
    assert [path.name for path in files] == [".metadata", "__0_0.distcp", "digests.json"]
    for path in files:
        whole = path.read_bytes()
        for cut in {0, 1, len(whole) // 2, len(whole) - 1}:
            path.write_bytes(whole[:cut])
            assert f"{path} is damaged: it " in refusal(folder)
        for bit in rng.sample(range(8 * len(whole)), 60):
            changed = bytearray(whole)
            changed[bit // 8] ^= 1 << bit % 8
            path.write_bytes(changed)
            # A digest or a name that was changed accuses the file that it belongs to.
            accused = "is damaged" if path.name != "digests.json" else f"{folder}/"
            assert accused in refusal(folder)
        path.unlink()
        said = refusal(folder)
        assert (f"{folder} has no digests.json" if path.name == "digests.json" else f"{path}") in said
        path.write_bytes(whole)
    load(a_run(), folder)


def test_what_is_said_of_the_wrong_folder(folder: Path, tmp_path: Path) -> None:
    assert f"{tmp_path}/no is not there; restore it, or load {folder}, the newest whole" in refusal(tmp_path / "no")
    (tmp_path / "empty").mkdir()
    assert "has no digests.json, which distsign.checkpoint.save writes last: it was broken off" in refusal(
        tmp_path / "empty"
    )
    assert f"{folder} has no 'sampler': it has model, none, optimizer, step, vote, words" in refusal(
        folder, {**a_run(), "sampler": 1}
    )
    assert f"{folder}: 'model' was not a SignVoteState" in refusal(folder, {"model": a_run()["vote"]})
    with pytest.raises(ValueError, match=f"{folder} holds a checkpoint already: give each checkpoint a folder"):
        save(a_run(), folder)


def test_a_folder_whose_writing_was_broken_off_is_written_again(folder: Path) -> None:
    (folder / "digests.json").unlink()
    save(a_run(), folder)
    load(a_run(), folder)


def test_a_checkpoint_of_another_model_is_refused(folder: Path) -> None:
    other = a_run(num_inputs=8)
    before = {name: value.clone() for name, value in other["model"].state_dict().items()}
    said = "'model' is of another model: weight was (40, 9) when it was saved, and is (40, 8) here; load the checkpoint"
    assert f"{folder}: {said}" in refusal(folder, other)
    only = a_run(confidence=FixedConfidence(1e-3))
    said = "'vote' does not fit what was saved: ValueError: the checkpoint was written with RMSConfidence"
    assert f"{folder}: {said}" in refusal(folder, {"model": torch.nn.Linear(9, 40), "vote": only["vote"]})
    extra = torch.nn.Sequential(torch.nn.Linear(9, 40))
    said = "'model' does not fit what was saved: RuntimeError: Error(s) in loading state_dict for Sequential: Missing"
    assert f"{folder}: {said}" in refusal(folder, {"model": extra})
    assert all(torch.equal(before[name], value) for name, value in other["model"].state_dict().items())


def refuse_on_some(rank: int, world_size: int, folder: str) -> str:
    """Rank 1 alone has another model than the one that was saved."""

    def parts(num_inputs: int) -> dict[str, Any]:
        net, state = torch.nn.Linear(num_inputs, 40), SignVoteState(confidence=RMSConfidence(k=4))
        state.track(net.named_parameters())
        return {"vote": state, "model": net}

    save(parts(9), folder)
    with pytest.raises(CheckpointError) as caught:
        load(parts(9 - rank), folder)
    return str(caught.value)


def test_what_one_rank_refuses_all_do(rank_pool: Pools, tmp_path: Path) -> None:
    found = rank_pool(2).run(refuse_on_some, str(tmp_path / "step-1"))
    assert found[0] == found[1] and "weight was (40, 9)" in found[0] and found[0].endswith("(seen by rank 1)")


class Part:
    """Notes when it is loaded."""

    def __init__(self, name: str, order: list[str]) -> None:
        self.name, self.order = name, order

    def state_dict(self) -> dict[str, Any]:
        return {"name": self.name}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state == {"name": self.name}
        self.order.append(self.name)


def test_parts_are_loaded_in_the_order_of_the_dict(tmp_path: Path) -> None:
    """On all ranks alike, whatever the seed of their hashes: one of them may be a collective."""
    order: list[str] = []
    names = [f"part {(7 * k) % 20}" for k in range(20)]
    parts: dict[str, Any] = {name: Part(name, order) for name in names}
    save(parts, tmp_path / "step-1")
    load(parts, tmp_path / "step-1")
    assert order == names


def test_a_lazy_model_takes_the_shapes_that_were_saved(folder: Path) -> None:
    lazy = torch.nn.LazyLinear(40)
    load({"model": lazy}, folder)
    assert torch.equal(lazy.weight, a_run()["model"].weight)


def reshard_what_one_cannot(rank: int, world_size: int, folder: str) -> str:
    """The states of another number of ranks, in nodes of which rank 1 alone knows."""
    net = torch.nn.Linear(9, 40)
    state = SignVoteState(confidence=RMSConfidence(k=4))
    state.track(net.named_parameters())
    if rank == 1:
        state = SignVoteState(confidence=RMSConfidence(k=4), exchange="hierarchical", ranks_per_node=2)
    with pytest.raises(CheckpointError) as caught:
        load({"vote": state, "model": net}, folder)
    return str(caught.value)


def test_what_one_rank_cannot_reshard_none_loads(rank_pool: Pools, folder: Path) -> None:
    found = rank_pool(3).run(reshard_what_one_cannot, str(folder))
    said = f"{folder}: 'vote' does not fit what was saved: ValueError: reshard needs"
    assert all(each.startswith(said) and each.endswith("(seen by rank 1)") for each in found), found


def test_a_checkpoint_that_is_removed_meanwhile_is_passed_over(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    later, stat = folder.parent / "step-2", Path.stat
    save(a_run(), later)

    def gone(self: Path, **options: Any) -> os.stat_result:
        if self.is_relative_to(later):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return stat(self, **options)

    monkeypatch.setattr(Path, "stat", gone)
    assert newest(folder.parent) == folder


def test_the_newest_whole_checkpoint_is_found(folder: Path) -> None:
    assert newest(folder.parent) == folder and newest(folder) is None and newest(folder / "nowhere") is None
    later = folder.parent / "step-2"
    save(a_run(), later)
    assert newest(folder.parent) == later
    (later / "__0_0.distcp").write_bytes(b"")
    assert newest(folder.parent) == folder


def save_until_killed(folder: Path, first: int, done: int, kill_at: int | None) -> None:
    """Save one checkpoint after another and tell each that is done; die by one's own hand at a chosen operation."""
    count = itertools.count()

    def hook(event: str, args: tuple[Any, ...]) -> None:
        touches = event in {"os.rename", "os.mkdir", "os.remove"} or (
            event == "open" and str(args[0]).startswith(str(folder))
        )
        if touches and next(count) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    for step in itertools.count(first):
        save({"weights": torch.full((10_000,), float(step)), "step": step}, folder / f"step-{step}")
        os.write(done, step.to_bytes(4, "little"))


def kill_many(folder: Path, seed: int) -> None:
    """Kill writers at each operation on a file in turn, then at random moments; what was told to be done is whole."""
    torch.set_num_threads(1)  # a fork inherits no thread, and would wait for OpenMP's for ever
    rng, last, num_broken, found = random.Random(seed), 0, 0, None
    for trial in range(NUM_KILLS):
        told, done = os.pipe()
        kill_at = trial if trial < NUM_KILLS // 2 else None
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):  # a child that goes on would kill writers of its own
                save_until_killed(folder, last + 1, done, kill_at)
            os._exit(1)
        os.close(done)
        if kill_at is None:
            time.sleep(rng.uniform(0, 0.1))
            os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        steps = os.read(told, 1 << 16)
        os.close(told)
        last = int.from_bytes(steps[-4:], "little") if steps else last
        found = newest(folder)
        num_broken += len(list(folder.iterdir())) > (0 if found is None else int(found.name[5:]))
        loaded = {"weights": torch.zeros(10_000), "step": 0}
        if last or found is not None:
            assert found in (folder / f"step-{last}", folder / f"step-{last + 1}"), (trial, found, last)
            load(loaded, found)
            assert found.name == f"step-{loaded['step']}" and bool((loaded["weights"] == loaded["step"]).all())
            last = int(found.name[5:])
    assert num_broken > NUM_KILLS // 4 and last > 10, (num_broken, last)  # else nobody was killed where it matters


def test_whenever_a_writer_is_killed_the_checkpoint_before_is_found(tmp_path: Path) -> None:
    code = "from pathlib import Path; from tests.distributed.test_checkpoint import kill_many; "
    command = [sys.executable, "-c", f"{code} kill_many(Path({str(tmp_path)!r}), 3)"]
    done = subprocess.run(command, check=False, cwd=REPOSITORY, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


class Evil:
    """Unpickled without care, it makes a folder."""

    def __init__(self, trace: Path) -> None:
        self.trace = str(trace)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.trace,)


def test_code_is_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    save({"good": 1, "bad": Evil(trace)}, tmp_path / "value")
    good = {"good": 0}
    load(good, tmp_path / "value")
    assert good == {"good": 1}
    assert "cannot be loaded: on rank 0 UnpicklingError" in refusal(tmp_path / "value", {"bad": 0})
    index = tmp_path / "value" / ".metadata"
    for forged in (pickle.dumps(Evil(trace)), pickle.dumps(print), pickle.dumps(hashlib.sha256)):
        index.write_bytes(forged)
        digests = json.loads((tmp_path / "value" / "digests.json").read_text())
        digests["files"][".metadata"] = [len(forged), xxhash.xxh3_128_hexdigest(forged)]
        (tmp_path / "value" / "digests.json").write_text(json.dumps(digests))
        assert "wants to use " in refusal(tmp_path / "value", good)
    assert not trace.exists()
