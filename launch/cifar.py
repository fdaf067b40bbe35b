"""CIFAR-10 and CIFAR-100 in their binary form, from a folder, a cache or one download; else images that are made up.

A record is one label byte (CIFAR-100: the coarse label, then the fine one, which is taken) and 3072 bytes of a picture,
red, green, blue, row by row. The Python form of the same data is pickled, and pickles of strangers are not read here.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import os
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from launch.data import DataError, Images
from launch.fetch import reachable, write_at_once

SYNTHETIC = "synthetic"
"""The name that asks for made-up images instead of a folder."""

URL = "https://www.cs.toronto.edu/~kriz/"
_NUM_PIXEL_BYTES = 3 * 32 * 32
_LARGEST_DOWNLOAD_BYTES = 256 << 20
_NUM_SYNTHETIC = 2000


@dataclass(frozen=True)
class Cifar:
    """One of the two datasets.

    Attributes:
        name: as people call it.
        num_classes: of its labels.
        archive: the download's name.
        md5: of the download, as its page gives it.
        folder: within the archive.
        train: files of the training images.
        test: file of the test images.
        num_label_bytes: of a record; the last is the label.
    """

    name: str
    num_classes: int
    archive: str
    md5: str
    folder: str
    train: tuple[str, ...]
    test: str
    num_label_bytes: int

    @property
    def files(self) -> tuple[str, ...]:
        """All files that are needed."""
        return *self.train, self.test

    def find(self, named: str | None = None) -> Path | None:
        """Return the folder with the files; None where there is none, and made-up images have to do.

        Args:
            named: the folder, or one that has the archive's folder in it; or `SYNTHETIC`.

        Raises:
            DataError: a folder was named and a file is missing in it.
        """
        if named == SYNTHETIC:
            return None
        top = self.cache_folder() if named is None else Path(named).expanduser()
        for folder in (top / self.folder, top):
            if all((folder / name).is_file() for name in self.files):
                return folder
        if named is None:
            return None
        missing = ", ".join(name for name in self.files if not (top / name).is_file())
        raise DataError(
            f"the data folder {top} lacks {missing}; expected the binary version of {self.name}: unpack "
            f"{self.archive} there, or leave out --data to have it found, or name {SYNTHETIC!r}"
        )

    def fetch(self, named: str | None = None, say: Callable[[str], None] = lambda _: None) -> Path | None:
        """Find the files, and where there are none, download them once; None where they cannot be had.

        Call it in one process per machine. Without a network it gives up within seconds.

        Raises:
            DataError: a folder was named and a file is missing in it.
        """
        folder = self.find(named)
        if folder is not None or named == SYNTHETIC:
            return folder
        say(f"downloading {self.name} (162 MB) from {URL}")
        try:
            if not reachable(URL):
                raise DataError(f"{URL} cannot be reached")
            self._unpack(self._download())
        except (OSError, DataError) as error:
            say(f"no download: {error}")
        return self.find()

    def load(self, folder: Path | None) -> Images:
        """Read the images.

        Args:
            folder: what `find` returned; None for made-up images.

        Returns:
            uint8 images of shape (n, 3, 32, 32), and their labels.

        Raises:
            DataError: a file is missing, of another length or has labels that are too large.
        """
        if folder is None:
            return self._synthetic()
        parts = [self._read(folder / name) for name in self.files]
        train_images, train_labels = (torch.cat([part[i] for part in parts[:-1]]) for i in range(2))
        return Images(train_images, train_labels, *parts[-1], f"{self.name} ({folder})")

    def cache_folder(self) -> Path:
        """Return where downloads are kept; it need not exist."""
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distsign" / "cifar"

    def _read(self, path: Path) -> tuple[Tensor, Tensor]:
        try:
            raw = np.fromfile(path, dtype=np.uint8)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from error
        num_bytes = self.num_label_bytes + _NUM_PIXEL_BYTES
        if len(raw) == 0 or len(raw) % num_bytes:
            raise DataError(
                f"{path}: expected whole records of {num_bytes} bytes, got {len(raw)}: unpack {self.archive} again"
            )
        records = torch.from_numpy(raw.reshape(-1, num_bytes))
        labels = records[:, self.num_label_bytes - 1].long()
        if labels.max() >= self.num_classes:
            raise DataError(f"{path}: labels go up to {labels.max()}, expected 0 to {self.num_classes - 1}")
        return records[:, self.num_label_bytes :].reshape(-1, 3, 32, 32).contiguous(), labels

    def _download(self) -> bytes:
        url = URL + self.archive
        try:
            with urllib.request.urlopen(url, timeout=60) as response:
                raw: bytes = response.read(_LARGEST_DOWNLOAD_BYTES)
        except (urllib.error.URLError, http.client.HTTPException) as error:
            raise DataError(f"{url}: {error}") from error
        got = hashlib.md5(raw, usedforsecurity=False).hexdigest()
        if got != self.md5:
            raise DataError(f"{url}: expected contents with MD5 {self.md5}, got {got}; the file is not used")
        return raw

    def _unpack(self, archive: bytes) -> None:
        """Take the files that are needed out of the archive, by name; nothing else is written."""
        folder = self.cache_folder() / self.folder
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            for name in self.files:
                member = tar.extractfile(f"{self.folder}/{name}")
                if member is None:
                    raise DataError(f"{self.archive} has no file {name}")
                write_at_once(folder / name, member.read())

    def _synthetic(self) -> Images:
        """Make images that can be told apart: a coarse pattern for each class, and noise."""
        generator = torch.Generator().manual_seed(0)
        patterns = torch.randn(self.num_classes, 3, 4, 4, generator=generator)
        patterns = 50 * patterns.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
        labels = torch.arange(_NUM_SYNTHETIC + _NUM_SYNTHETIC // 4) % self.num_classes
        noise = 40 * torch.randn(len(labels), 3, 32, 32, generator=generator)
        images = (128 + patterns[labels] + noise).clamp(0, 255).to(torch.uint8)
        return Images(
            *(images[:_NUM_SYNTHETIC], labels[:_NUM_SYNTHETIC], images[_NUM_SYNTHETIC:], labels[_NUM_SYNTHETIC:]),
            f"synthetic images in place of {self.name}",
        )


CIFAR10 = Cifar(
    *("CIFAR-10", 10, "cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530", "cifar-10-batches-bin"),
    train=tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
    test="test_batch.bin",
    num_label_bytes=1,
)
CIFAR100 = Cifar(
    *("CIFAR-100", 100, "cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8", "cifar-100-binary"),
    train=("train.bin",),
    test="test.bin",
    num_label_bytes=2,
)
