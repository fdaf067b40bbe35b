"""Getting Fashion-MNIST where it is not there yet: once a machine, from Debian or from the dataset's own project.

apt-get installs Debian's package where this is root's machine and it has apt. Else, or where that fails, the four files
are downloaded into the user's cache; what they unpack to is checked against `launch.data.SHA256`.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import socket
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from launch import data

DEBIAN_PACKAGE = "dataset-fashion-mnist"
PROJECT_URL = "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/"
CONNECT_TIMEOUT_S = 5.0
_LARGEST_DOWNLOAD_BYTES = 32 << 20


def fetch_fashion_mnist(named: str | None = None, say: Callable[[str], None] = lambda _: None) -> Path | None:
    """Find the files, and where there are none, install or download them once.

    Call it in one process per machine, before the others look. Without a network it gives up within seconds.

    Args:
        named: as for `data.find_fashion_mnist`.
        say: is told in words what takes time and what failed.

    Returns:
        The folder; `None` where the files cannot be had.

    Raises:
        DataError: a folder was named and a file is missing in it.
    """
    folder = data.find_fashion_mnist(named)
    if folder is not None or (named or os.environ.get("DISTSIGN_DATA")) == data.DIGITS:
        return folder
    if _may_install():
        say(f"installing Debian's {DEBIAN_PACKAGE}")
        if _install_debian_package():
            return data.find_fashion_mnist()
        say(f"apt-get could not install {DEBIAN_PACKAGE}")
    host = urlsplit(PROJECT_URL).hostname
    say(f"downloading Fashion-MNIST (30 MB) from {host}")
    try:
        _download(data.cache_folder())
    except (OSError, data.DataError) as error:
        say(f"no download: {error}")
    return data.find_fashion_mnist()


def _may_install() -> bool:
    return os.geteuid() == 0 and shutil.which("apt-get") is not None


def _install_debian_package() -> bool:
    options = ("Acquire::Retries=0", "Acquire::http::Timeout=10", "DPkg::Lock::Timeout=60")
    apt = ["apt-get", "-q", *(f"-o{option}" for option in options)]
    install = [*apt, "install", "-y", "--no-install-recommends", DEBIAN_PACKAGE]
    # The lists may be missing or stale, but refreshing them costs seconds: only if the first try fails.
    for command in (install, [*apt, "update"], install):
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
                timeout=180,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return False
        if command is install and done.returncode == 0:
            return True
    return False


def reachable(url: str) -> bool:
    """Say whether a connection opens in time; looking up a name has no time limit of its own, hence the thread."""
    parts = urlsplit(url)
    opened = threading.Event()

    def probe() -> None:
        try:
            socket.create_connection((parts.hostname or "", parts.port or 443), timeout=CONNECT_TIMEOUT_S).close()
        except OSError:
            return
        opened.set()

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(CONNECT_TIMEOUT_S)
    return opened.is_set()


def _download(folder: Path) -> None:
    """Download the four files into `folder`; each appears there whole and checked, or not at all."""
    if not reachable(PROJECT_URL):
        raise data.DataError(f"{urlsplit(PROJECT_URL).hostname} cannot be reached in {CONNECT_TIMEOUT_S:g} s")
    folder.mkdir(parents=True, exist_ok=True)
    for name in data.FILES:
        if data.file_in(folder, name) is not None:
            continue
        url = f"{PROJECT_URL}{name}.gz"
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                raw = response.read(_LARGEST_DOWNLOAD_BYTES)
        except (urllib.error.URLError, http.client.HTTPException) as error:
            raise data.DataError(f"{url}: {error}") from error
        got = hashlib.sha256(data.unpack(raw, url)).hexdigest()
        if got != data.SHA256[name]:
            raise data.DataError(
                f"{url}: expected contents with SHA-256 {data.SHA256[name]}, got {got}; the file is not used"
            )
        write_at_once(folder / f"{name}.gz", raw)


def write_at_once(path: Path, content: bytes) -> None:
    """Write a file so that it appears whole or not at all."""
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
