"""Payloads that nobody wrote, in the places where they arrive: `python -m tests.fuzz --payloads 1000000 --seed 0`.

Ballots go into `VoteExchange.vote` as if they came from other ranks, verdicts into `VoteExchange.read`. Each must come
to what `tests.fuzz_oracle` says of the same bytes: a `PayloadError`, poison, or its verdicts. All else is a failure,
and so is a vote that takes a minute.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import itertools
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from distsign.admission import Admission
from distsign.collectives import Link
from distsign.exchange import VoteExchange
from distsign.kernels import cpu
from distsign.owner import make_owner
from distsign.payload import Form
from distsign.voter import rotating_starts
from distsign.wire import HEADER_BYTES, Header, PayloadError
from tests.fuzz_cases import CHANGES, HARMLESS, HARMLESS_PLANES, Setting, changed, valid
from tests.fuzz_oracle import Bytes, Read, SlowOwner, admitted, in_plane_order, most_votes, read

PAYLOADS_A_SETTING = 1000
HANG_S = 60.0
NUM_VALID = 6


class FakeLink(Link):
    """A link from which comes what the test puts there."""

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__(None)
        self.rank, self.world_size = rank, world_size
        self.arriving: list[Tensor] = []

    def all_to_all(self, source: Tensor, send: list[int], receive: list[int], what: str = "") -> Tensor:
        return self.arriving.pop() if self.arriving else source.reshape(-1)

    def all_gather(self, source: Tensor, what: str = "") -> Tensor:
        return self.arriving.pop()


class Votes:
    """Votes in one setting, by the library and by the oracle."""

    def __init__(self, setting: Setting, rng: np.random.Generator, tried: Counter[tuple[str, str]]) -> None:
        self.setting, self.rng, self.tried = setting, rng, tried
        self.link = FakeLink(setting.rank, setting.num_voters)
        admission = Admission(setting.num_voters, setting.max_density, 5)
        admission.left_out = torch.tensor(setting.left_out)
        self.exchange = VoteExchange(self.link, setting.kind, checksum=setting.layout.checksum, admission=admission)
        self.owner = make_owner(setting.owner_carry, setting.margin, setting.num_voters, forget=setting.forget)
        self.slow = SlowOwner(setting.owner_carry, setting.margin, setting.num_voters, setting.forget)
        owners, honesty = range(setting.num_voters), float(rng.choice([1.0, 0.8, 0.0, 0.0]))
        self.valid = {
            (form.verdict, owner): [
                (row, read(form, owner, row)) for row in (valid(form, owner, honesty, rng) for _ in range(NUM_VALID))
            ]
            for form in (setting.ballots, setting.verdicts)
            for owner in owners
        }
        self.others = [rows[0][0] for rows in self.valid.values()]
        self.step = 0

    def rows(self, form: Form, owner: int, writers: Sequence[int], share: float) -> tuple[Bytes, list[Read], list[str]]:
        """Return payloads of several senders, what each is, and how it was changed, "" if it was not.

        Args:
            form: of the payloads.
            owner: whose pieces they speak of.
            writers: voters that wrote them; what this rank wrote itself is never held against its checksum.
            share: of the payloads to change; 0 changes all, in ways that leave payloads.
        """
        rows, reads, ways = [], [], []
        allowed = CHANGES if share else HARMLESS if form.codes[owner] else HARMLESS_PLANES
        for writer in writers:
            row, found = self.valid[form.verdict, owner][self.rng.integers(NUM_VALID)]
            how = ""
            if not share or self.rng.random() < share:
                row, how = changed(row, form, owner, self.others, self.rng, allowed)
                found = read(form, owner, row)
            if writer == self.setting.rank and not (form.verdict and self.setting.kind == "all_gather"):
                found = replace(found, damaged=False)
            rows.append(row)
            reads.append(found)
            ways.append(how)
        return np.stack(rows), reads, ways

    def run(self) -> int:
        """Hold one vote, and read verdicts; return how many payloads of it were changed."""
        self.step += 1
        return self.vote() + self.read() + (self.cut_short() if self.step % 16 == 0 else 0)

    def share_of(self, number: int) -> float:
        """Return which share of payloads to change: what is refused hides the others."""
        return float(self.rng.choice([0.0, 0.0, 0.0, 1.0 / number, 1.0]))

    def vote(self) -> int:
        setting, form = self.setting, self.setting.ballots
        shards = [setting.rank] if setting.kind == "two_phase" else list(range(setting.num_voters))
        share = self.share_of(len(shards) * setting.num_voters)
        drawn = [self.rows(form, shard, range(setting.num_voters), share) for shard in shards]
        starts = rotating_starts(setting.layout, self.step)
        arrived = torch.from_numpy(np.concatenate([rows for rows, _, _ in drawn], axis=1))
        self.link.arriving = [arrived.reshape(-1) if setting.kind == "two_phase" else arrived]
        nothing = torch.zeros(form.buffer_bytes, dtype=torch.uint8)
        try:
            found = self.exchange.vote(form, setting.verdicts, nothing, self.owner, starts, cpu)
        except PayloadError:
            found = None
        want, poisoned = self._expected_vote([reads for _, reads, _ in drawn], shards, starts)
        outcome = "refused" if found is None else "poison" if poisoned else "verdict"
        self._take_note([how for _, _, ways in drawn for how in ways], outcome)
        assert (found is None) == (want is None), f"{'refused' if found is None else 'taken'}, but should not be"
        if found is not None and want is not None:
            parts = torch.split(
                found[: sum(setting.verdicts.sizes[k] for k in shards)], [setting.verdicts.sizes[k] for k in shards]
            )
            for shard, part, expected in zip(shards, parts, want, strict=True):
                self._compare(shard, part.numpy(), expected)
        if found is not None:
            self.owner.commit(torch.tensor(poisoned))
        self.slow.commit(poisoned or found is None)
        return sum(how != "" for _, _, ways in drawn for how in ways)

    def _expected_vote(
        self, reads: list[list[Read]], shards: list[int], starts: Any
    ) -> tuple[list[tuple[bool, Any, Any, Any]] | None, bool]:
        """Return poison, votes, census and average of the verdicts on each shard, None if something is refused."""
        setting, form = self.setting, self.setting.ballots
        if any(each.refused or each.damaged for part in reads for each in part):
            return None, False
        out = setting.left_out
        poison = any(each.poison and not gone for part in reads for each, gone in zip(part, out, strict=True))
        expected, is_poisoned = [], poison
        for shard, whole in zip(shards, reads, strict=True):
            most, num_bits = most_votes(form, shard, setting.max_density), 8 * form.layout.plane_bytes(shard)
            part = [admitted(each, gone, most, num_bits) for each, gone in zip(whole, out, strict=True)]
            mean = part[0].raw.copy()
            with np.errstate(all="ignore"):
                for each in part[1:]:
                    mean += each.raw
                mean /= np.float32(max(1, out.count(False)))
            here = poison or not np.isfinite(mean).all()
            is_poisoned |= here
            if here:
                expected.append((True, None, None, None))
                continue
            if any(each.votes is None for each in part):
                return None, False
            counted = self.slow.count(form, setting.verdicts, shard, np.stack([each.votes for each in part]), starts)
            code = setting.verdicts.codes[shard]
            if code is not None and np.count_nonzero(counted.verdicts) > code.num_slots:
                return None, False
            claims = None
            if form.caps is not None:
                claims = counted.crowded | (2 * sum(each.claims.astype(int) for each in part) >= len(part))
            expected.append((False, counted.verdicts, claims, mean))
        return expected, is_poisoned

    def _compare(self, shard: int, payload: Bytes, expected: tuple[bool, Any, Any, Any]) -> None:
        poison, verdicts, claims, mean = expected
        found = read(self.setting.verdicts, shard, payload)
        assert not found.refused and not found.damaged and found.poison == poison
        if not poison:
            assert found.votes is not None and np.array_equal(found.votes, verdicts), "other verdicts"
            assert (claims is None and found.claims is None) or np.array_equal(found.claims, claims), "another census"
            assert found.raw.tobytes() == mean.tobytes(), "another average"

    def read(self) -> int:
        setting, form = self.setting, self.setting.verdicts
        share = self.share_of(setting.num_voters)
        drawn = [self.rows(form, owner, [owner], share) for owner in range(setting.num_voters)]
        payloads = torch.from_numpy(np.concatenate([rows[0] for rows, _, _ in drawn]))
        try:
            found = self.exchange.read(form, payloads, cpu)
        except PayloadError:
            found = None
        reads = [found for _, (found,), _ in drawn]
        poison = any(each.poison for each in reads)
        refused = any(each.refused or each.damaged for each in reads)
        refused |= not poison and any(each.votes is None for each in reads)
        self._take_note(
            [how for _, _, (how,) in drawn], "refused" if found is None else "poison" if poison else "verdict"
        )
        assert (found is None) == refused, f"verdicts {'refused' if found is None else 'taken'}, but should not be"
        if found is not None:
            assert bool(found.poisoned) == poison
        if found is not None and not poison:
            assert found.mean.numpy().tobytes() == b"".join(each.raw.tobytes() for each in reads), "another average"
            for each, owner in zip(reads, range(setting.num_voters), strict=True):
                if found.crowded is not None:
                    assert np.array_equal(found.crowded.numpy()[form.layout.owned(owner)[1]], each.claims)
            self._compare_gradients(found.planes, reads)
        return sum(how != "" for _, _, (how,) in drawn)

    def _compare_gradients(self, planes: Tensor, reads: list[Any]) -> None:
        """Hold what the verdicts write into gradients to the votes of the payloads."""
        layout = self.setting.layout
        for pieces, owners in zip(layout.pieces, layout.owners, strict=True):
            out = torch.full((int((pieces.start + pieces.length).max(initial=0)),), torch.nan)
            cpu.unpack(planes, pieces, torch.tensor(1.0), out)
            for k, owner in enumerate(owners.tolist()):
                start, length = int(pieces.start[k]), int(pieces.length[k])
                first = 8 * (int(pieces.mask_at[k]) - layout.offsets[owner] - HEADER_BYTES)
                want = reads[owner].votes[first : first + length]
                got = in_plane_order(out.numpy()[start : start + length], length)
                assert np.array_equal(got, want), "other gradients"

    def cut_short(self) -> int:
        """Read payloads that are too short or too long where single bytes are read."""
        form, owner = self.setting.ballots, self.setting.rank
        row, code = self.valid[False, owner][0][0], form.codes[owner]
        size = int(self.rng.integers(0, HEADER_BYTES))
        try:
            Header.expect(row[:size].tobytes(), form.headers[owner], sender=1, receiver=0)
            raise AssertionError("a header was taken that has been cut")
        except PayloadError:
            self._take_note(["shorter"], "refused")
        if code is None or not code.num_bytes:
            return 1
        body = row[HEADER_BYTES + form.census_bytes[owner] :][: code.num_bytes]
        size = int(self.rng.integers(0, code.num_bytes))
        planes = torch.zeros(code.num_bits // 4, dtype=torch.uint8)
        for wrong in (body[:size], np.concatenate([body, body[: size + 1]])):
            taken = cpu.decode_sparse(torch.from_numpy(wrong.copy()), code, code.num_bits // 8, planes)
            assert not taken, "a body of another size was taken"
        self._take_note(["shorter", "longer"], "refused")
        return 3

    def _take_note(self, ways: list[str], outcome: str) -> None:
        self.tried.update((how, outcome) for how in ways if how)


def try_setting(seed: int, number: int) -> Counter[tuple[str, str]]:
    """Try `PAYLOADS_A_SETTING` payloads, or a few more, in one setting; see `fuzz`."""
    rng = np.random.default_rng([seed, number])
    setting = Setting.draw(rng)
    tried: Counter[tuple[str, str]] = Counter()
    faulthandler.dump_traceback_later(HANG_S, exit=True)
    try:
        votes, done = Votes(setting, rng, tried), 0
        while done < PAYLOADS_A_SETTING:
            done += votes.run()
    except Exception as error:
        again = f"python -m tests.fuzz --seed {seed} --first {number} --payloads 1"
        raise AssertionError(f"{type(error).__name__}: {error} ({setting}); again by: {again}") from error
    finally:
        faulthandler.cancel_dump_traceback_later()
    return tried


def fuzz(num_payloads: int, seed: int, first: int = 0, jobs: int = 0) -> Counter[tuple[str, str]]:
    """Try so many payloads; return how often each change had each outcome.

    Args:
        num_payloads: at least so many.
        seed: of everything.
        first: number of the first setting.
        jobs: processes; 0 is this one. A crash or a hang then breaks the pool.

    Raises:
        AssertionError: something came to what it should not; it names the setting.
    """
    tried: Counter[tuple[str, str]] = Counter()
    numbers = itertools.count(first)
    spawn = multiprocessing.get_context("spawn")
    with (
        tqdm(total=num_payloads, unit="payload", disable=not jobs, mininterval=1.0) as bar,
        ProcessPoolExecutor(jobs, spawn, _start_job) if jobs else contextlib.nullcontext() as pool,
    ):
        while tried.total() < num_payloads:
            batch = list(itertools.islice(numbers, 4 * jobs if num_payloads > 1 and jobs else 1))
            for found in (pool.map if pool else map)(try_setting, [seed] * len(batch), batch):
                tried += found
                bar.update(found.total())
    return tried


def _start_job() -> None:
    torch.set_num_threads(1)
    faulthandler.enable()


def report(tried: Counter[tuple[str, str]]) -> str:
    """Return a table of what was tried and what it came to."""
    outcomes = ("refused", "poison", "verdict")
    lines = [f"{'change':<20}" + "".join(f"{name:>12}" for name in outcomes)]
    for how in sorted({how for how, _ in tried}):
        lines.append(f"{how:<20}" + "".join(f"{tried[how, name]:>12,}" for name in outcomes))
    sums = [sum(count for (_, found), count in tried.items() if found == name) for name in outcomes]
    return "\n".join([*lines, f"{'all':<20}" + "".join(f"{each:>12,}" for each in sums)])


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.fuzz", description=__doc__)
    parser.add_argument("--payloads", type=int, default=1_000_000, help="how many to try")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, metavar="SETTING", help="the first setting's number")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    options = parser.parse_args()
    try:
        tried = fuzz(options.payloads, options.seed, options.first, max(1, options.jobs))
    except AssertionError as error:
        sys.exit(f"tests.fuzz: {error}")
    except BrokenExecutor:
        sys.exit("tests.fuzz: a process crashed, or hung for a minute and was ended; its stacks are above")
    print(report(tried))
    print(f"{tried.total():,} changed payloads, seed {options.seed}: no crash, no hang, no verdict but the oracle's")


if __name__ == "__main__":
    main()
