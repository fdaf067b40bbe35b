"""Network namespaces joined by a bridge, each behind a link of a chosen rate (Linux, root, iproute2).

Every node is a network namespace with a loopback and one interface, ``eth0``, whose other end is a port of a bridge
that sits in a namespace of its own. Nothing is added to the host's own network, and no packet can leave: the bridge has
no other port. Addresses are 10.77.x.y, inside these namespaces alone.

A token bucket (``tc … tbf``) at both ends of each link shapes it: at ``eth0`` what the node sends, at the bridge's port
what it receives. Its parameters decide what is measured:

*burst* is what passes unshaped after a pause, so it must be small beside the messages of interest. 512 kB, a value
often seen, lets 100 kB through a 100 Mbit/s link in 0.3 ms instead of 8: whoever compresses well would be measured on
an endless link. Too small a burst errs the other way: it must outlast the moments in which a busy machine does not get
to serve the link, or the rate is not reached. Here it is by default what the rate carries in 0.5 ms, and at least two
frames: no message can seem faster by more than that. *Packets* that TCP hands to the link in one piece are limited to
half of it (``gso_max_size``), since tbf would cut larger ones into single frames, at a cost that two cores cannot pay
beside four ranks: all-reduces at 1 Gbit/s then took 2.5 times as long.

*limit*, the queue in front of the link, holds 100 ms of traffic, as a switch's might, and at least one full segment of
64 KiB, so that very slow links do not live on retransmissions.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from launch.netrun import deaf_to_signals, exit_on_signals, kill_all

MAX_NODES = 1000  # a bridge has 1024 ports
BURST_S = 0.5e-3
MIN_BURST_BYTES = 3200  # two Ethernet frames
MIN_PACKET_BYTES, MAX_PACKET_BYTES = 3100, 65536  # the kernel's own bounds are 320 and, unless told otherwise, 65536
QUEUE_S = 0.1
MIN_QUEUE_BYTES = 64 << 10

INTERFACE = "eth0"

_UNITS = {"bit": 1, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9, "tbit": 1e12}
_RATE = re.compile(r"(\d+(?:\.\d+)?)([a-z]+)", re.IGNORECASE)
_SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
_serial = itertools.count()


class LabUnavailable(RuntimeError):
    """This machine cannot make the lab: the message says what is missing."""


@dataclass(frozen=True)
class Counters:
    """What the kernel counted on one node's ``eth0``, Ethernet headers included.

    The kernel hands segments of one connection through in packets of up to 64 KiB where burst allows, and counts the
    headers of such a packet once.
    """

    tx_bytes: int
    tx_packets: int
    rx_bytes: int
    rx_packets: int

    def __sub__(self, earlier: Counters) -> Counters:
        return Counters(
            self.tx_bytes - earlier.tx_bytes,
            self.tx_packets - earlier.tx_packets,
            self.rx_bytes - earlier.rx_bytes,
            self.rx_packets - earlier.rx_packets,
        )


def parse_rate(rate: str) -> float | None:
    """Read a link rate as tc writes it.

    Args:
        rate: A number and one of bit, kbit, mbit, gbit, tbit (decimal multiples of bits per second), or ``"none"``.

    Returns:
        Bits per second; None for ``"none"``, a link that is not shaped.

    Raises:
        ValueError: Not such a rate, or zero.

    >>> parse_rate("50mbit"), parse_rate("2.5Gbit"), parse_rate("none")
    (50000000.0, 2500000000.0, None)
    """
    text = rate.strip()
    if text.lower() == "none":
        return None
    match = _RATE.fullmatch(text)
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(
            f"cannot read the rate {rate!r}: expected a number and a unit such as 50mbit or 1gbit, or none"
        )
    bits_per_s = float(match[1]) * _UNITS[match[2].lower()]
    if bits_per_s <= 0:
        raise ValueError(f"the rate {rate!r} must be above zero; use none for a link that is not shaped")
    return bits_per_s


def burst_bytes(bits_per_s: float, burst_s: float = BURST_S) -> int:
    """Return how many bytes pass unshaped after a pause, for a link of this rate (see the module's text).

    >>> burst_bytes(50e6), burst_bytes(1e9), burst_bytes(1e9, burst_s=1e-3)
    (3200, 62500, 125000)
    """
    return max(MIN_BURST_BYTES, round(burst_s * bits_per_s / 8))


def node_address(node: int) -> str:
    """Return the IPv4 address of a node inside the lab.

    >>> node_address(0), node_address(250)
    ('10.77.0.1', '10.77.1.1')
    """
    return f"10.77.{node // 250}.{node % 250 + 1}"


def require() -> None:
    """Check that namespaces can be made here.

    Raises:
        LabUnavailable: Not Linux, not root, or iproute2 is missing.
    """
    if not os.path.isdir("/proc/self/ns"):
        raise LabUnavailable("the lab needs Linux network namespaces, which this system does not have")
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool, path=_SEARCH_PATH) is None]
    if missing:
        raise LabUnavailable(f"the lab needs {' and '.join(missing)} from iproute2 (apt-get install iproute2)")
    if os.geteuid() != 0:
        raise LabUnavailable("the lab needs root, to make network namespaces: start it with sudo")


def remove_stale(prefix: str) -> list[str]:
    """Remove namespaces of labs whose process is dead, and end what still runs in them.

    Names carry the id and the start time of the process that made them, so that those of a living process are never
    touched, even where the id has been given away again.

    Args:
        prefix: The prefix the labs were made with.

    Returns:
        The names that were removed.
    """
    removed = []
    for name in _namespaces():
        match = re.fullmatch(re.escape(prefix) + r"-(\d+)-(\d+)-\d+-(?:switch|n\d+)", name)
        if match and _start_time(int(match[1])) != match[2]:
            _remove_namespace(name)
            removed.append(name)
    return removed


class Network:
    """`num_nodes` network namespaces with shaped links to one bridge, as a context.

    Args:
        num_nodes: Number of nodes, 1 to 1000.
        rate: Rate of every link, in each direction: ``"100mbit"``, ``"1gbit"``, or ``"none"`` for no shaping.
        burst_s: Seconds of traffic at the full rate that pass unshaped after a pause.
        prefix: How names of namespaces begin. Leftovers of dead processes with the same prefix are removed first.

    Raises:
        ValueError: An argument out of range, or a rate that tc refuses.
        LabUnavailable: On entering, where the machine cannot do it.
    """

    def __init__(
        self, num_nodes: int, rate: str = "none", *, burst_s: float = BURST_S, prefix: str = "distsign-lab"
    ) -> None:
        if not 1 <= num_nodes <= MAX_NODES:
            raise ValueError(f"the lab takes 1 to {MAX_NODES} nodes, got {num_nodes}")
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", prefix):
            raise ValueError(f"a prefix is a letter and then letters, digits, _ or -, got {prefix!r}")
        if not 0 < burst_s <= 1:
            raise ValueError(f"a burst lasts above 0 and up to 1 second, got {burst_s}")
        parse_rate(rate)
        self.num_nodes = num_nodes
        self.burst_s = burst_s
        self.rate = rate
        self.prefix = prefix
        base = f"{prefix}-{os.getpid()}-{_start_time(os.getpid())}-{next(_serial)}"
        self._switch = f"{base}-switch"
        self._nodes = [f"{base}-n{node}" for node in range(num_nodes)]

    def open(self) -> None:
        """Make the namespaces, links and shapes; nothing is left where that fails."""
        require()
        remove_stale(self.prefix)
        atexit.register(self.close)
        try:
            for name in [self._switch, *self._nodes]:
                _ip("netns", "add", name)
                # Unasked IPv6 chatter would be counted on the interfaces.
                _ip("netns", "exec", name, "sh", "-c", _NO_IPV6)
                _ip("-n", name, "link", "set", "lo", "up")
            bridge = ["type", "bridge", "stp_state", "0", "forward_delay", "0", "mcast_snooping", "0"]
            _ip("-n", self._switch, "link", "add", "br0", *bridge)
            _ip("-n", self._switch, "link", "set", "br0", "up")
            for node, name in enumerate(self._nodes):
                veth = ["type", "veth", "peer", "name", INTERFACE, "netns", name]
                _ip("-n", self._switch, "link", "add", f"port{node}", *veth)
                _ip("-n", self._switch, "link", "set", f"port{node}", "master", "br0", "up")
                _ip("-n", name, "addr", "add", f"{node_address(node)}/16", "dev", INTERFACE)
                _ip("-n", name, "link", "set", INTERFACE, "up")
            self.set_rate("all", self.rate)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Remove all namespaces, and end what still runs in them."""
        with deaf_to_signals():
            existing = set(_namespaces())
            for name in [*self._nodes, self._switch]:
                if name in existing:
                    _remove_namespace(name)
        atexit.unregister(self.close)

    def __enter__(self) -> Self:
        self._restore = exit_on_signals()
        try:
            self.open()
        except BaseException:
            self._restore()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        try:
            self.close()
        finally:
            self._restore()

    def set_rate(self, node: int | str, rate: str) -> None:
        """Shape the link of one node, or of ``"all"``, anew in both directions. Traffic on it goes on.

        Connections that were made at a much higher rate keep their packet size, which only costs processor time.

        Raises:
            ValueError: No such node, or a rate that cannot be read or that tc refuses.
        """
        bits_per_s = parse_rate(rate)
        for each in range(self.num_nodes) if node == "all" else [self._check(node)]:
            burst = MAX_PACKET_BYTES * 2 if bits_per_s is None else burst_bytes(bits_per_s, self.burst_s)
            packet = min(MAX_PACKET_BYTES, max(MIN_PACKET_BYTES, burst // 2))
            _ip("-n", self._nodes[each], "link", "set", INTERFACE, "gso_max_size", str(packet))
            for namespace, device in ((self._nodes[each], INTERFACE), (self._switch, f"port{each}")):
                if bits_per_s is None:
                    with contextlib.suppress(LabUnavailable):  # there is nothing to remove
                        _tool("tc", "-n", namespace, "qdisc", "del", "dev", device, "root")
                else:
                    _shape(namespace, device, bits_per_s, burst, rate)

    def link_down(self, node: int) -> None:
        """Cut the link of a node, as by pulling its cable: packets are lost, and nobody is told."""
        _ip("-n", self._switch, "link", "set", f"port{self._check(node)}", "down")

    def link_up(self, node: int) -> None:
        """Mend what ``link_down`` cut; the rate is kept."""
        _ip("-n", self._switch, "link", "set", f"port{self._check(node)}", "up")

    def counters(self) -> list[Counters]:
        """Return what each node's interface has sent and received so far, by node."""
        return [self._read_counters(name) for name in self._nodes]

    def namespace(self, node: int) -> str:
        """Return the name of a node's network namespace, as `ip netns` knows it."""
        return self._nodes[self._check(node)]

    def command(self, node: int, argv: Sequence[str]) -> list[str]:
        """Return the command line that runs `argv` in a node's namespace (under the same process id)."""
        return [_find("ip"), "netns", "exec", self.namespace(node), *argv]

    def pids(self) -> list[int]:
        """Return the ids of all processes inside the namespaces."""
        return [pid for name in self._nodes for pid in pids_in(name)]

    def _check(self, node: int | str) -> int:
        if not isinstance(node, int) or not 0 <= node < self.num_nodes:
            raise ValueError(f'nodes of this lab are 0 to {self.num_nodes - 1} (or "all" for set_rate), got {node!r}')
        return node

    @staticmethod
    def _read_counters(namespace: str) -> Counters:
        [link] = json.loads(_ip("-n", namespace, "-s", "-j", "link", "show", "dev", INTERFACE))
        sent, received = link["stats64"]["tx"], link["stats64"]["rx"]
        return Counters(sent["bytes"], sent["packets"], received["bytes"], received["packets"])


_NO_IPV6 = "for f in /proc/sys/net/ipv6/conf/*/disable_ipv6; do if [ -w $f ]; then echo 1 > $f; fi; done"


def _shape(namespace: str, device: str, bits_per_s: float, burst: int, rate: str) -> None:
    queue_bytes = max(MIN_QUEUE_BYTES, round(QUEUE_S * bits_per_s / 8))
    limits = ["burst", f"{burst}", "limit", f"{queue_bytes}"]  # both in bytes
    shape = ["root", "tbf", "rate", f"{round(bits_per_s)}bit", *limits]
    try:
        _tool("tc", "-n", namespace, "qdisc", "replace", "dev", device, *shape)
    except LabUnavailable as error:
        if "qdisc kind is unknown" in str(error):
            raise LabUnavailable("the lab needs tbf in the kernel (module sch_tbf), to shape links") from None
        raise ValueError(f"tc refuses the rate {rate!r}: {error}") from None


def _find(tool: str) -> str:
    return shutil.which(tool, path=_SEARCH_PATH) or tool


def _tool(tool: str, *args: str) -> str:
    """Run ip or tc, and return its output.

    Raises:
        LabUnavailable: It failed; the message holds its own words.
    """
    done = subprocess.run([_find(tool), *args], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        words = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise LabUnavailable(f"{tool} {' '.join(args)}: {words}")
    return done.stdout


def _ip(*args: str) -> str:
    return _tool("ip", *args)


def _namespaces() -> list[str]:
    # A line is "name" or "name (id: 3)".
    return [line.split()[0] for line in _ip("netns", "list").splitlines() if line.strip()]


def pids_in(namespace: str) -> list[int]:
    """Return the ids of all processes inside a namespace; none where it is gone."""
    with contextlib.suppress(LabUnavailable):  # the namespace is gone, and so are they
        return [int(pid) for pid in _ip("netns", "pids", namespace).split()]
    return []


def _remove_namespace(name: str) -> None:
    for _ in range(100):  # again: a process may have been starting another
        pids = pids_in(name)
        if not pids:
            break
        kill_all(pids)
        time.sleep(0.01)
    with contextlib.suppress(LabUnavailable):  # another process removes the same leftovers
        _ip("netns", "del", name)


def _start_time(pid: int) -> str | None:
    """Return when a process started, in clock ticks since boot; None where there is none."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[19]
    except OSError:
        return None
