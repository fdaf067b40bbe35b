"""The shaped-link lab: rates are real, bytes are counted, and nothing is left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch import netns
from launch.netlab import Lab, counters_table, main
from launch.netns import Counters, LabUnavailable, burst_bytes, node_address, parse_rate
from launch.netrun import LabTimeout

PREFIX = f"distsign-test-{os.getpid()}"


def why_not() -> str:
    """Say why this machine cannot make the lab; empty where it can."""
    try:
        netns.require()
    except LabUnavailable as error:
        return str(error)
    allowed = subprocess.run(["unshare", "--net", "--mount", "true"], check=False, capture_output=True, text=True)
    return "" if allowed.returncode == 0 else f"network namespaces are not permitted here: {allowed.stderr.strip()}"


REASON = why_not()
needs_lab = pytest.mark.skipif(bool(REASON), reason=REASON)


def namespaces(prefix: str = PREFIX) -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True).stdout
    return [line.split()[0] for line in listed.splitlines() if line.startswith(prefix)]


def is_running(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")


def none_running(pids: list[int], within_s: float = 5.0) -> bool:
    end = time.monotonic() + within_s
    while any(map(is_running, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(is_running, pids))


# Rank 0 receives; every other rank sends it `size` bytes per round, waits for the answer and prints the seconds taken.
# They start together: a sender that had the link to itself for a while would seem faster than its share.
TRANSFER = """
import os, socket, sys, time
size, rounds, pause = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
address = (os.environ["MASTER_ADDR"], 5000)
if rank == 0:
    import threading
    def serve(peer):
        buffer = bytearray(1 << 18)
        for _ in range(rounds):
            left = size
            while left:
                left -= peer.recv_into(buffer, min(left, len(buffer)))
            peer.sendall(b"x")
    listener = socket.create_server(address)
    peers = [listener.accept()[0] for _ in range(world_size - 1)]
    for peer in peers: peer.sendall(b"x")
    threads = [threading.Thread(target=serve, args=(peer,)) for peer in peers]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
else:
    for _ in range(100):
        try:
            peer = socket.create_connection(address)
            break
        except OSError:
            time.sleep(0.05)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    payload, times = bytes(size), []
    assert peer.recv(1) == b"x"
    for _ in range(rounds):
        time.sleep(pause)
        begin = time.perf_counter()
        peer.sendall(payload)
        assert peer.recv(1) == b"x"
        times.append(time.perf_counter() - begin)
    print(sorted(times)[len(times) // 2])
"""


@pytest.fixture(scope="module")
def transfer(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("netlab") / "transfer.py"
    path.write_text(TRANSFER)
    return str(path)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Lab]:
    with Lab(3, prefix=PREFIX) as made:
        yield made
    netns.remove_stale(PREFIX)  # what a failing test has left


@pytest.fixture
def lab(nodes: Lab) -> Iterator[Lab]:
    """Three nodes whose links are not shaped, whatever other tests have done to them."""
    yield nodes
    nodes.set_rate("all", "none")


def seconds(lab: Lab, script: str, size: int, rounds: int = 1, pause: float = 0.05) -> list[float]:
    """Send from every other node to node 0; return the median seconds of each sender."""
    ranks = lab.run([sys.executable, script, str(size), str(rounds), str(pause)], deadline_s=30)
    assert [rank.returncode for rank in ranks] == [0] * len(ranks), [rank.stderr for rank in ranks]
    return [float(rank.stdout) for rank in ranks[1:]]


# ------------------------------------------------------------------------------------------------ without the lab


@pytest.mark.parametrize(
    ("text", "bits_per_s"),
    [("50mbit", 50e6), ("1gbit", 1e9), ("2.5Gbit", 2.5e9), ("800kbit", 8e5), ("64bit", 64), ("none", None)],
)
def test_rates_are_read(text: str, bits_per_s: float | None) -> None:
    assert parse_rate(text) == bits_per_s


@pytest.mark.parametrize("text", ["", "fast", "1", "1gb", "1 gbit/s", "-1gbit", "0mbit", "nan gbit", "1e3mbit"])
def test_other_rates_are_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match=f"rate '{text}'"):
        parse_rate(text)


def test_bursts_are_small_beside_what_the_link_carries_in_a_millisecond() -> None:
    for bits_per_s in (50e6, 100e6, 1e9, 10e9):
        assert 3000 <= burst_bytes(bits_per_s) <= 0.6e-3 * bits_per_s / 8
    assert burst_bytes(1e9, burst_s=2e-3) == 250_000


def test_addresses_differ_and_fit_the_network() -> None:
    addresses = [node_address(node) for node in range(netns.MAX_NODES)]
    assert len(set(addresses)) == netns.MAX_NODES
    assert all(int(part) in range(1, 255) for part in (address.rsplit(".", 1)[1] for address in addresses))


def test_table_shows_both_moments_and_the_difference() -> None:
    table = counters_table([Counters(1, 2, 3, 4)], [Counters(1001, 22, 33, 44)])
    assert table.splitlines()[1].split() == ["0", "sent", "1", "1,001", "1,000", "2", "22", "20"]
    assert table.splitlines()[2].split() == ["0", "received", "3", "33", "30", "4", "44", "40"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--ranks", "2"], "no command: put it after --"),
        (["--ranks", "2", "--"], "no command: put it after --"),
        (["--ranks", "3", "--ranks-per-node", "2", "--", "true"], "--ranks 3 must be a positive multiple"),
        (["--ranks", "0", "--", "true"], "--ranks 0 must be a positive multiple"),
        (["--ranks", "2", "--deadline", "0", "--", "true"], "--deadline must be above zero"),
        (["--ranks", "2", "--rate", "1parsec", "--", "true"], "cannot read the rate '1parsec'"),
        (["--ranks", "1", "--json", "/no/such/dir/f.json", "--", "true"], "/no/such/dir"),
        (["--ranks", "5000", "--", "true"], "1 to 1000 nodes"),
        (["--ranks", "2", "--burst-ms", "0", "--", "true"], "a burst lasts above 0"),
    ],
)
def test_wrong_options_are_one_line_and_exit_code_2(
    argv: list[str], words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(argv)
    except SystemExit as leaving:  # argparse's way
        code = int(str(leaving.code))
    error = capfd.readouterr().err
    assert code == 2
    assert words in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("missing", ["root", "tools"])
def test_a_machine_without_root_or_tools_is_told_so(
    missing: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if missing == "root":
        monkeypatch.setattr(shutil, "which", lambda tool, path=None: f"/sbin/{tool}")
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
    else:
        monkeypatch.setattr(shutil, "which", lambda tool, path=None: None)
    assert main(["--ranks", "2", "--", "true"]) == 2
    error = capfd.readouterr().err
    assert ("root" if missing == "root" else "ip and tc from iproute2") in error
    assert len(error.splitlines()) == 1


# --------------------------------------------------------------------------------------------------- with the lab


@needs_lab
def test_measured_throughput_is_the_asked_rate_in_both_directions(lab: Lab, transfer: str) -> None:
    size, rate = 3_000_000, 100e6

    def fastest(bits: int, shaped: slice) -> list[float]:
        """Transfer until the rate is as asked: a busy machine makes tries too slow. None may be too fast."""
        tries: list[list[float]] = []
        while len(tries) < 12:
            tries.append(seconds(lab, transfer, size))
            measured = bits / max(tries[-1][shaped])
            assert measured < 1.15 * rate
            if measured > 0.85 * rate:
                return [min(sender) for sender in zip(*tries, strict=True)]
        raise AssertionError(f"12 tries below 85 % of the rate, the last at {measured / 1e6:.1f} Mbit/s: {tries} s")

    lab.set_rate("all", "100mbit")
    fastest(2 * size * 8, slice(None))  # two senders share the receiver's link
    lab.set_rate(0, "none")
    lab.set_rate(2, "none")
    shaped_s, free_s = fastest(size * 8, slice(1))
    assert free_s < shaped_s / 2


@needs_lab
def test_small_messages_are_shaped_too(lab: Lab, transfer: str) -> None:
    lab.set_rate(1, "100mbit")
    shaped_s, _ = seconds(lab, transfer, 50_000, rounds=5)
    assert shaped_s > 0.85 * 50_000 * 8 / 100e6, "after a pause, a message must not pass on saved-up tokens"


@needs_lab
def test_counters_show_what_was_sent(lab: Lab, transfer: str) -> None:
    before = lab.counters()
    size = 2_000_000
    seconds(lab, transfer, size)
    receiver, *senders = (last - first for first, last in zip(before, lab.counters(), strict=True))
    for sender in senders:  # headers, and what a busy machine lost and sent again
        assert size < sender.tx_bytes < 1.15 * size + 4096
        assert 0 < sender.rx_bytes < 0.06 * size
    assert 2 * size < receiver.rx_bytes <= sum(sender.tx_bytes for sender in senders)
    assert 0 < receiver.rx_packets <= 2 * size / 1400 + 100


@needs_lab
def test_ranks_of_one_node_share_it_and_know_their_place(lab: Lab) -> None:
    names = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK MASTER_ADDR GLOO_SOCKET_IFNAME MINE"
    show = f"import os; print(*(os.environ[n] for n in '{names}'.split()), os.readlink('/proc/self/ns/net'))"
    before = lab.counters()
    ranks = lab.run([sys.executable, "-c", show], ranks_per_node=2, env={"MINE": "x"}, deadline_s=30)
    seen = [rank.stdout.split() for rank in ranks]
    assert [line[:8] for line in seen] == [
        [str(r), "6", str(r % 2), "2", str(r // 2), "10.77.0.1", "eth0", "x"] for r in range(6)
    ]
    inodes = [line[8] for line in seen]
    assert inodes[0::2] == inodes[1::2]
    assert len({os.readlink("/proc/self/ns/net"), *inodes}) == 4
    assert lab.counters() == before, "idle nodes send nothing"


@needs_lab
def test_a_cut_link_loses_packets_until_it_is_mended(lab: Lab, transfer: str) -> None:
    job = lab.start([sys.executable, transfer, "1000", "20", "0.05"])
    time.sleep(0.5)
    lab.link_down(0)
    time.sleep(1.2)
    assert all(rank.returncode is None for rank in job.ranks), "nobody was told"
    lab.link_up(0)
    assert [rank.returncode for rank in job.wait(20)] == [0, 0, 0]
    with pytest.raises(ValueError, match="nodes of this lab are 0 to 2"):
        lab.link_down(3)


@needs_lab
def test_past_the_deadline_ranks_show_their_stacks_and_are_gone(lab: Lab) -> None:
    code = (
        "import subprocess, time\nprint(subprocess.Popen(['setsid', 'sleep', '600']).pid, flush=True)\ntime.sleep(600)"
    )
    job = lab.start([sys.executable, "-c", code])
    while not all(rank.stdout for rank in job.ranks):
        time.sleep(0.05)
    with pytest.raises(LabTimeout, match="deadline of 0.5 s passed with ranks 0, 1, 2") as caught:
        job.wait(0.5)
    assert 'File "<string>", line 3' in str(caught.value)
    assert lab.pids() == [], "not even what had left its group"


@needs_lab
def test_the_others_are_ended_after_the_first_failure(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.netrun.FAILURE_GRACE_S", 0.2)
    job = lab.start(["sh", "-c", "if [ $RANK = 1 ]; then exit 5; fi; exec sleep 600"])
    codes = [rank.returncode for rank in job.wait(20)]
    assert codes == [-signal.SIGTERM, 5, -signal.SIGTERM]
    assert job.first_failure is job.ranks[1]
    job = lab.start(["sh", "-c", "if [ $RANK = 1 ]; then exit 5; fi; sleep 1"])
    assert [rank.returncode for rank in job.wait(20, stop_on_failure=False)] == [0, 5, 0]


@needs_lab
def test_a_rate_that_tc_refuses_is_named_and_leaves_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    before = namespaces()
    assert main(["--ranks", "1", "--rate", "1bit", "--prefix", PREFIX, "--", "true"]) == 2
    error = capfd.readouterr().err
    assert "tc refuses the rate '1bit'" in error
    assert len(error.splitlines()) == 1
    assert namespaces() == before


@needs_lab
def test_a_missing_command_is_named_and_leaves_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    before = namespaces()
    assert main(["--ranks", "1", "--prefix", PREFIX, "--", "no-such-command"]) == 2
    assert capfd.readouterr().err == "netlab: no such command: 'no-such-command'\n"
    assert namespaces() == before


@needs_lab
def test_command_line_passes_output_and_exit_code_and_leaves_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = namespaces()
    out = tmp_path / "lab.json"
    options = ["--ranks", "2", "--rate", "1gbit", "--prefix", PREFIX, "--json", str(out)]
    script = "echo out $RANK; echo err $RANK >&2; exit $((7 * RANK))"
    assert main([*options, "--", "sh", "-c", script]) == 7
    shown = capfd.readouterr()
    assert shown.out == "out 0\n"
    assert "rank 1 failed first, with exit code 7" in shown.err
    assert "err 1" in shown.err
    report = json.loads(out.read_text())
    assert (report["ranks"], report["rate"], report["exit_code"], len(report["nodes"])) == (2, "1gbit", 7, 2)
    assert main([*options, "--output", "all", "--", "sh", "-c", "echo out $RANK; kill -9 $$"]) == 128 + signal.SIGKILL
    assert sorted(capfd.readouterr().out.splitlines()) == ["[0] out 0", "[1] out 1"]
    assert main([*options, "--deadline", "0.5", "--", "sleep", "600"]) == 124
    assert "deadline of 0.5 s passed" in capfd.readouterr().err
    assert namespaces() == before


@needs_lab
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_interrupted_labs_are_removed_with_all_their_processes(number: signal.Signals, code: int, lab: Lab) -> None:
    before = namespaces()
    assert len(before) == 4, "another lab with the same prefix lives meanwhile"
    started = subprocess.Popen(
        [sys.executable, "-m", "launch.netlab", "--ranks", "2", "--rate", "1gbit", "--prefix", PREFIX]
        + ["--output", "all", "--", "sh", "-c", "setsid sleep 600 & sleep 600 & echo $$ $!; wait"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(netns.__file__).parents[1])},
    )
    with started:
        assert started.stdout is not None
        pids = [int(pid) for _ in range(2) for pid in started.stdout.readline().split()[1:]]
        made = set(namespaces()) - set(before)
        assert len(made) == 3
        inside = {pid for name in made for pid in netns.pids_in(name)}
        assert len(inside) == 6
        assert set(pids) < inside
        started.send_signal(number)
        assert started.wait(20) == code
    if number == signal.SIGKILL:  # it could not clean up: the kernel ends its ranks, and the next lab the rest
        assert none_running(pids)
        assert set(netns.remove_stale(PREFIX)) == made
    assert none_running(list(inside))
    assert namespaces() == before


ALL_REDUCE = """
import torch, torch.distributed as dist
torch.set_num_threads(1)
dist.init_process_group("gloo")
total = torch.full((1_000_000,), float(dist.get_rank()))
dist.all_reduce(total)
assert total.eq(1).all()
dist.destroy_process_group()
"""


@needs_lab
def test_gloo_ranks_meet_over_the_links(tmp_path: Path) -> None:
    out = tmp_path / "lab.json"
    script = tmp_path / "all_reduce.py"
    script.write_text(ALL_REDUCE)
    options = ["--ranks", "2", "--rate", "1gbit", "--deadline", "60", "--prefix", PREFIX, "--json", str(out)]
    assert main([*options, "--", sys.executable, str(script)]) == 0
    for node in json.loads(out.read_text())["nodes"]:
        # A ring all-reduce of n floats over two ranks: each sends, and receives, 4n bytes.
        assert 4e6 < node["diff"]["tx_bytes"] < 1.15 * 4e6 + 50e3
        assert 4e6 < node["diff"]["rx_bytes"] < 1.15 * 4e6 + 50e3
