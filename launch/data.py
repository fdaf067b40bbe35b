"""Fashion-MNIST from wherever it can be had, as tensors in memory.

The files are looked for in this order, and the first that is there is taken:

1. the folder that the user names (`--data` or `$DISTSIGN_DATA`); if it is incomplete, that is an error;
2. Debian's package `dataset-fashion-mnist`, if it is installed;
3. the user's cache, `$XDG_CACHE_HOME/distsign/fashion-mnist`.

`fetch_fashion_mnist` fills one of the last two: with apt-get where this is root's machine and it has apt, else
with one download whose contents are checked. Where nothing can be had, `DIGITS` stands in: the 1,797 small
digits that scikit-learn ships.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import os
import shutil
import socket
import subprocess
import threading
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
DIGITS = "digits"
"""The name that asks for scikit-learn's digits instead of a folder."""

DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
PROJECT_URL = "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/"
CONNECT_TIMEOUT_S = 5.0

# Of the unpacked files, so that it does not matter who compressed them: Debian's differ from the published ones in the
# gzip header alone. With the published header put back, all four have the MD5 sums of the project's README.
SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
_LARGEST_DOWNLOAD_BYTES = 32 << 20


class DataError(ValueError):
    """A dataset that is missing or damaged; the message names the file, what was expected, what came and what to do."""


@dataclass(frozen=True)
class Images:
    """A labelled image dataset, split for training and test.

    Attributes:
        train_images: uint8, shape (num_train, 28, 28).
        train_labels: int64, shape (num_train,).
        test_images: uint8, shape (num_test, 28, 28).
        test_labels: int64, shape (num_test,).
        source: where it came from, for people to read.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    source: str


def cache_folder() -> Path:
    """Return where downloads are kept; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distsign" / "fashion-mnist"


def find_fashion_mnist(named: str | None = None) -> Path | None:
    """Return the folder that holds the four files, without installing or downloading anything.

    Args:
        named: a folder, or `DIGITS`; `None` stands for `$DISTSIGN_DATA`.

    Returns:
        The folder; `None` where there is none, and the digits have to do.

    Raises:
        DataError: a folder was named and a file is missing in it: another source is never taken in its place.
    """
    named = named or os.environ.get("DISTSIGN_DATA") or None
    if named == DIGITS:
        return None
    if named is not None:
        folder = Path(named).expanduser()
        missing = [name for name in FILES if _file_in(folder, name) is None]
        if missing:
            what = "is no folder" if not folder.is_dir() else f"lacks {', '.join(missing)} (as they are, or .gz)"
            raise DataError(
                f"the data folder {folder} {what}; expected the four files of Fashion-MNIST: copy them there, "
                "or unset DISTSIGN_DATA / --data to have them found"
            )
        return folder
    for folder in (DEBIAN_FOLDER, cache_folder()):
        if all(_file_in(folder, name) for name in FILES):
            return folder
    return None


def fetch_fashion_mnist(named: str | None = None, say: Callable[[str], None] = lambda _: None) -> Path | None:
    """Find the files, and where there are none, install or download them once.

    Call it in one process per machine, before the others look. Without a network it gives up within seconds.

    Args:
        named: as for `find_fashion_mnist`.
        say: is told in words what takes time and what failed.

    Returns:
        The folder; `None` where the files cannot be had.

    Raises:
        DataError: a folder was named and a file is missing in it.
    """
    folder = find_fashion_mnist(named)
    if folder is not None or (named or os.environ.get("DISTSIGN_DATA")) == DIGITS:
        return folder
    if _may_install():
        say(f"installing Debian's {DEBIAN_PACKAGE}")
        if _install_debian_package():
            return find_fashion_mnist()
        say(f"apt-get could not install {DEBIAN_PACKAGE}")
    host = urlsplit(PROJECT_URL).hostname
    say(f"downloading Fashion-MNIST (30 MB) from {host}")
    try:
        _download(cache_folder())
    except (OSError, DataError) as error:
        say(f"no download: {error}")
    return find_fashion_mnist()


def load_images(folder: Path | None) -> Images:
    """Read Fashion-MNIST from a folder, or scikit-learn's digits.

    Args:
        folder: what `find_fashion_mnist` returned; `None` for the digits.

    Returns:
        The images as they are stored, one byte a pixel.

    Raises:
        DataError: a file is missing, truncated or damaged, or the files do not belong together.
    """
    if folder is None:
        return _load_digits()
    arrays = [_read(folder, name) for name in FILES]
    for images, labels, part in ((arrays[0], arrays[1], "train"), (arrays[2], arrays[3], "t10k")):
        if images.ndim != 3 or images.shape[1:] != (28, 28) or labels.shape != images.shape[:1] or len(images) == 0:
            raise DataError(
                f"{folder}: the {part} files do not belong together: expected images of shape (n, 28, 28) and n "
                f"labels, got {images.shape} and {labels.shape}; copy all four files from one source"
            )
        if labels.max() > 9:
            raise DataError(
                f"{folder}: the {part} labels go up to {labels.max()}, expected 0 to 9; copy the file again"
            )
    tensors = [torch.from_numpy(array) for array in arrays]
    owner = "Debian" if folder == DEBIAN_FOLDER else "downloaded" if folder == cache_folder() else "own copy"
    return Images(
        tensors[0], tensors[1].long(), tensors[2], tensors[3].long(), f"{_title(arrays[1])} ({owner}: {folder})"
    )


def parse_idx(raw: bytes, path: Path | str) -> npt.NDArray[np.uint8]:
    """Parse one idx file of unsigned bytes: two zeros, type 8, the number of dimensions, each as 4 bytes, the data.

    Args:
        raw: the whole file, unpacked.
        path: its name, for errors.

    Returns:
        The array, of the shape that the header names, and writable.

    Raises:
        DataError: the header is no such header, or the length does not fit it.
    """
    advice = "; copy or download the file again"
    if len(raw) < 4 or raw[:3] != b"\0\0\x08" or not 1 <= raw[3] <= 4 or len(raw) < 4 + 4 * raw[3]:
        raise DataError(f"{path}: expected an idx file of bytes (first bytes 00 00 08), got {raw[:4].hex(' ')}{advice}")
    start = 4 + 4 * raw[3]
    shape = tuple(int(size) for size in np.frombuffer(raw[4:start], dtype=">u4"))
    expected = start + int(np.prod(shape, dtype=object))
    if len(raw) != expected:
        times = " x ".join(map(str, shape))
        what = "truncated" if len(raw) < expected else "too long"
        raise DataError(f"{path}: {what}: expected {expected} bytes for {times}, got {len(raw)}{advice}")
    return np.frombuffer(raw[start:], dtype=np.uint8).reshape(shape).copy()


def _file_in(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / f"{name}.gz", folder / name) if path.is_file()), None)


def _read(folder: Path, name: str) -> npt.NDArray[np.uint8]:
    path = _file_in(folder, name)
    if path is None:
        raise DataError(f"{folder} lacks {name} (as it is, or .gz): copy the file there")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    return parse_idx(_unpack(raw, path), path)


def _unpack(raw: bytes, path: Path | str) -> bytes:
    if not str(path).endswith(".gz"):
        return raw
    try:
        return gzip.decompress(raw)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path}: expected a whole gzip file, got {len(raw)} bytes that do not unpack ({error}); "
            "it is truncated or damaged: copy or download the file again"
        ) from error


def _title(train_labels: npt.NDArray[np.uint8]) -> str:
    # MNIST comes in files of the same names and may be put in the same place; its results must not pass as the other's.
    header = b"\0\0\x08\x01" + len(train_labels).to_bytes(4, "big")
    digest = hashlib.sha256(header + train_labels.tobytes()).hexdigest()
    return "Fashion-MNIST" if digest == SHA256["train-labels-idx1-ubyte"] else "other data in Fashion-MNIST's format"


def _load_digits() -> Images:
    from sklearn.datasets import load_digits

    digits = load_digits()
    # 8 x 8 pixels of 0..16, each made 3 x 3, with a border of 2: 28 x 28 of 0..255.
    pixels = np.kron(digits.images, np.ones((3, 3))) * (255 / 16)
    images = torch.from_numpy(np.pad(pixels, ((0, 0), (2, 2), (2, 2))).round().astype(np.uint8))
    labels = torch.from_numpy(digits.target.astype(np.int64))
    is_test = torch.arange(len(labels)) % 5 == 0
    return Images(
        images[~is_test],
        labels[~is_test],
        images[is_test],
        labels[is_test],
        "scikit-learn's digits in place of Fashion-MNIST",
    )


def _may_install() -> bool:
    return os.geteuid() == 0 and shutil.which("apt-get") is not None


def _install_debian_package() -> bool:
    apt = [
        "apt-get",
        "-q",
        "-o",
        "Acquire::Retries=0",
        "-o",
        "Acquire::http::Timeout=10",
        "-o",
        "DPkg::Lock::Timeout=60",
    ]
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


def _reachable(url: str) -> bool:
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
    if not _reachable(PROJECT_URL):
        raise DataError(f"{urlsplit(PROJECT_URL).hostname} cannot be reached within {CONNECT_TIMEOUT_S:g} s")
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if _file_in(folder, name) is not None:
            continue
        url = f"{PROJECT_URL}{name}.gz"
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                raw = response.read(_LARGEST_DOWNLOAD_BYTES)
        except (urllib.error.URLError, http.client.HTTPException) as error:
            raise DataError(f"{url}: {error}") from error
        got = hashlib.sha256(_unpack(raw, url)).hexdigest()
        if got != SHA256[name]:
            raise DataError(f"{url}: expected contents with SHA-256 {SHA256[name]}, got {got}; the file is not used")
        _write_at_once(folder / f"{name}.gz", raw)


def _write_at_once(path: Path, content: bytes) -> None:
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
