"""Fashion-MNIST from wherever it can be had, as tensors in memory.

The files are looked for in this order, and the first that is there is taken:

1. the folder that the user names (`--data` or `$DISTSIGN_DATA`); if it is incomplete, that is an error;
2. Debian's package `dataset-fashion-mnist`, if it is installed;
3. the user's cache, `$XDG_CACHE_HOME/distsign/fashion-mnist`.

`launch.fetch` fills one of the last two. Where nothing can be had, `DIGITS` stands in: the 1,797 small digits that
scikit-learn ships.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
DIGITS = "digits"
"""The name that asks for scikit-learn's digits instead of a folder."""

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")

# Of the unpacked files, so that it does not matter who compressed them: Debian's differ from the published ones in the
# gzip header alone. With the published header put back, all four have the MD5 sums of the project's README.
SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


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
        missing = [name for name in FILES if file_in(folder, name) is None]
        if missing:
            what = "is no folder" if not folder.is_dir() else f"lacks {', '.join(missing)} (as they are, or .gz)"
            raise DataError(
                f"the data folder {folder} {what}; expected the four files of Fashion-MNIST: copy them there, "
                "or unset DISTSIGN_DATA / --data to have them found"
            )
        return folder
    for folder in (DEBIAN_FOLDER, cache_folder()):
        if all(file_in(folder, name) for name in FILES):
            return folder
    return None


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


def file_in(folder: Path, name: str) -> Path | None:
    """Return where one of the files is in a folder, packed or not; None where it is not."""
    return next((path for path in (folder / f"{name}.gz", folder / name) if path.is_file()), None)


def _read(folder: Path, name: str) -> npt.NDArray[np.uint8]:
    path = file_in(folder, name)
    if path is None:
        raise DataError(f"{folder} lacks {name} (as it is, or .gz): copy the file there")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    return parse_idx(unpack(raw, path), path)


def unpack(raw: bytes, path: Path | str) -> bytes:
    """Return the contents of a file, decompressed if its name says so.

    Raises:
        DataError: it is truncated or damaged.
    """
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
