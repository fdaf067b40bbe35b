"""CIFAR: its binary files, its networks, and batches as a function of the step."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from launch import cifar as cifar_module
from launch.cifar import CIFAR10, CIFAR100, SYNTHETIC, Cifar
from launch.data import DataError
from launch.tasks import CifarTask, Shard
from launch.vision_models import VGG, GoogLeNet, ResNet18

TASK = CifarTask(CIFAR10, lambda num_classes: torch.nn.Linear(1, num_classes), SYNTHETIC)


@pytest.mark.parametrize(
    ("build", "num_parameters"),
    [
        (VGG, 20_035_018),
        (partial(VGG, num_classes=100), 20_081_188),
        (GoogLeNet, 6_158_346),
        (ResNet18, 11_173_962),
        (partial(ResNet18, squeeze=True), 11_263_042),
    ],
    ids=["vgg", "vgg100", "googlenet", "resnet", "senet"],
)
def test_networks(build: Callable[[], torch.nn.Module], num_parameters: int) -> None:
    """The sizes are those of the usual CIFAR forms (GoogLeNet: 6,166,250 less the 7,904 biases before norms).

    Seeded: a gate of SENet's first blocks has four hidden units, and one start in eight has all of one gate's dead.
    """
    torch.manual_seed(0)
    model = build()
    assert sum(p.numel() for p in model.parameters()) == num_parameters
    logits = model(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, model.head.out_features)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.ndim > 1)


def write(folder: Path, dataset: Cifar, num: int = 3) -> None:
    """Write files whose record i has label i and pixels i, i + 1, i + 2 in its three colours."""
    folder.mkdir(parents=True)
    record = [
        bytes([7] * (dataset.num_label_bytes - 1) + [i]) + b"".join(bytes([i + c]) * 1024 for c in range(3))
        for i in range(num)
    ]
    for name in dataset.files:
        (folder / name).write_bytes(b"".join(record))


@pytest.mark.parametrize(("dataset", "num_train"), [(CIFAR10, 15), (CIFAR100, 3)])
def test_files_are_read(dataset: Cifar, num_train: int, tmp_path: Path) -> None:
    write(tmp_path / dataset.folder, dataset)
    assert dataset.find(str(tmp_path)) == dataset.find(str(tmp_path / dataset.folder)) == tmp_path / dataset.folder
    images = dataset.load(tmp_path / dataset.folder)
    assert images.train_images.shape == (num_train, 3, 32, 32)
    assert images.test_labels.tolist() == [0, 1, 2]
    assert [images.test_images[2, colour].unique().tolist() for colour in range(3)] == [[2], [3], [4]]
    assert dataset.name in images.source and "synthetic" not in images.source


def test_damaged_files_are_named(tmp_path: Path) -> None:
    folder = tmp_path / CIFAR100.folder
    write(folder, CIFAR100)
    whole = (folder / "test.bin").read_bytes()
    (folder / "test.bin").write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"test.bin: expected whole records of 3074 bytes, got 9221"):
        CIFAR100.load(folder)
    (folder / "test.bin").write_bytes(bytes([0, 100]) + whole[2:])
    with pytest.raises(DataError, match="labels go up to 100, expected 0 to 99"):
        CIFAR100.load(folder)
    (folder / "test.bin").unlink()
    with pytest.raises(DataError, match=r"lacks train.bin, test.bin; expected the binary version of CIFAR-100"):
        CIFAR100.find(str(tmp_path))
    with pytest.raises(DataError, match=r"lacks test.bin;"):
        CIFAR100.find(str(folder))


def test_a_download_is_checked_and_only_what_is_needed_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "made" / CIFAR100.folder, CIFAR100)
    (tmp_path / "made" / CIFAR100.folder / "extra.sh").write_text("no")
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        tar.add(tmp_path / "made" / CIFAR100.folder, CIFAR100.folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cifar_module, "reachable", lambda url: True)
    monkeypatch.setattr(cifar_module.urllib.request, "urlopen", lambda url, timeout: io.BytesIO(packed.getvalue()))
    said: list[str] = []
    assert CIFAR100.fetch(say=said.append) is None
    assert f"expected contents with MD5 {CIFAR100.md5}, got" in said[-1]
    monkeypatch.setattr(cifar_module.hashlib, "md5", lambda raw, usedforsecurity: Known())
    folder = CIFAR100.fetch(say=said.append)
    assert folder == CIFAR100.cache_folder() / CIFAR100.folder
    assert sorted(path.name for path in folder.iterdir()) == ["test.bin", "train.bin"]


class Known:
    def hexdigest(self) -> str:
        return CIFAR100.md5


def test_without_a_network_images_stand_in_and_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cifar_module, "reachable", lambda url: False)
    said: list[str] = []
    assert CIFAR10.fetch(say=said.append) is None
    assert "cannot be reached" in said[-1]
    images = CIFAR100.load(CIFAR100.find())
    assert images.source == "synthetic images in place of CIFAR-100"
    assert images.train_labels.unique().tolist() == list(range(100))


@pytest.mark.parametrize("step", [0, 5, 200])
def test_ranks_share_the_same_varied_batch(step: int) -> None:
    whole = TASK.batch(step, Shard(0, 1, 24, seed=5))
    parts = [TASK.batch(step, Shard(rank, 4, 6, seed=5)) for rank in range(4)]
    assert all(torch.equal(torch.cat([part[i] for part in parts]), whole[i]) for i in range(2))


def test_images_are_cropped_and_flipped_and_nothing_else() -> None:
    images = TASK._images.train_images[:200]
    varied = TASK._varied(images, 3, Shard(0, 1, 200, seed=1))
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    seen = set()
    for index in range(200):
        found = [
            (down, right, flip)
            for down in range(9)
            for right in range(9)
            for flip in (False, True)
            if torch.equal(crop(padded[index], down, right, flip), varied[index])
        ]
        assert len(found) == 1, index
        seen.add(found[0])
    assert len({down for down, _, _ in seen}) == len({right for _, right, _ in seen}) == 9
    assert {flip for _, _, flip in seen} == {False, True}
    assert not torch.equal(varied, TASK._varied(images, 4, Shard(0, 1, 200, seed=1)))
    assert torch.equal(varied, TASK._varied(images, 3, Shard(0, 1, 200, seed=1)))


def crop(padded: torch.Tensor, down: int, right: int, flip: bool) -> torch.Tensor:
    cut = padded[:, down : down + 32, right : right + 32]
    return cut.flip(2) if flip else cut
