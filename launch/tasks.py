"""What can be trained: a model, its batches as a function of the step, and its test.

A batch depends on the seed, the step, the rank and the world size alone. So a run that resumes at a step sees what an
unbroken one would have seen, and the same global batch is cut over however many ranks there are.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from launch.cifar import CIFAR10, CIFAR100, Cifar
from launch.corpus import load_stdlib
from launch.data import Images, find_fashion_mnist, load_images
from launch.fetch import fetch_fashion_mnist
from launch.models import ByteGPT, LeNet, RowLSTM
from launch.vision_models import VGG, GoogLeNet, ResNet18

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Shard:
    """One rank's part of every global batch.

    Attributes:
        rank: of `world_size`.
        world_size: number of ranks.
        batch_size: samples per rank and step.
        seed: decides the order of the samples.
    """

    rank: int
    world_size: int
    batch_size: int
    seed: int

    @property
    def global_batch_size(self) -> int:
        """Samples per step over all ranks."""
        return self.batch_size * self.world_size

    def cut(self, global_batch: Tensor) -> Tensor:
        """Return this rank's part of a global batch, which is cut along its first dimension."""
        return global_batch[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]


class Task(ABC):
    """One thing to train.

    Attributes:
        metric: what the test measures, as it is called in the results.
        higher_is_better: which way.
        source: where the data came from, for people to read; "A in place of B" where it stands in for the real ones.
    """

    metric: str
    higher_is_better: bool
    source: str

    @abstractmethod
    def build_model(self) -> nn.Module:
        """Make the model from torch's random state, on the CPU."""

    @abstractmethod
    def steps_per_epoch(self, shard: Shard) -> int:
        """Return the whole global batches in an epoch; 0 if the data do not fill one."""

    @abstractmethod
    def batch(self, step: int, shard: Shard) -> Batch:
        """Return this rank's inputs and targets at a step, which counts from 0."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean training loss, a scalar, in nats."""

    @abstractmethod
    def evaluate(self, model: nn.Module, rank: int, world_size: int, device: torch.device) -> Tensor:
        """Return this rank's share of the test as `[sum, count]`, float64; the metric is the ratio of the totals."""


class ImageTask(Task):
    """Classify the images of Fashion-MNIST.

    Args:
        network: makes the model.
        data: a folder, `digits`, or None to find them; see `launch.data`.
    """

    metric = "test_accuracy"
    higher_is_better = True

    def __init__(self, network: Callable[[], nn.Module], data: str | None = None) -> None:
        self._network = network
        self._images = self._load(data)
        self.source = self._images.source
        scaled = self._images.train_images.float() / 255
        self._mean, self._std = self._mean_and_std(scaled)
        self._order: tuple[tuple[int, int], Tensor] | None = None

    def build_model(self) -> nn.Module:
        """See `Task.build_model`."""
        return self._network()

    def steps_per_epoch(self, shard: Shard) -> int:
        """See `Task.steps_per_epoch`."""
        return len(self._images.train_labels) // shard.global_batch_size

    def batch(self, step: int, shard: Shard) -> Batch:
        """See `Task.batch`; every epoch has an order of its own, and the rest that fills no batch is left out."""
        epoch, within = divmod(step, self.steps_per_epoch(shard))
        start = within * shard.global_batch_size
        chosen = shard.cut(self._epoch_order(epoch, shard.seed)[start : start + shard.global_batch_size])
        images = self._varied(self._images.train_images[chosen], step, shard)
        return self._scaled(images), self._images.train_labels[chosen]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy."""
        return F.cross_entropy(model(batch[0]), batch[1])

    @torch.no_grad()
    def evaluate(self, model: nn.Module, rank: int, world_size: int, device: torch.device) -> Tensor:
        """Return the number of test images that are classified rightly, and their number."""
        images, labels = self._images.test_images[rank::world_size], self._images.test_labels[rank::world_size]
        correct = torch.zeros((), dtype=torch.float64, device=device)
        for some_images, some_labels in zip(torch.split(images, 500), torch.split(labels, 500), strict=True):
            guesses = model(self._scaled(some_images).to(device)).argmax(dim=1)
            correct += (guesses == some_labels.to(device)).sum()
        return torch.stack([correct, torch.tensor(float(len(labels)), dtype=torch.float64, device=device)])

    def _load(self, data: str | None) -> Images:
        return load_images(find_fashion_mnist(data))

    def _mean_and_std(self, scaled: Tensor) -> tuple[Tensor, Tensor]:
        return scaled.mean(), scaled.std()

    def _varied(self, images: Tensor, step: int, shard: Shard) -> Tensor:
        """Return what is trained on in place of this rank's images at a step."""
        del step, shard
        return images

    def _scaled(self, images: Tensor) -> Tensor:
        return (images.float() / 255 - self._mean) / self._std

    def _epoch_order(self, epoch: int, seed: int) -> Tensor:
        if self._order is None or self._order[0] != (epoch, seed):
            order = torch.randperm(len(self._images.train_labels), generator=_generator(seed, epoch))
            self._order = (epoch, seed), order
        return self._order[1]


class CifarTask(ImageTask):
    """Classify CIFAR's images, trained on random crops (padding 4) and horizontal flips, tested as they are.

    Args:
        dataset: which of the two.
        network: makes the model from a number of classes.
        data: a folder, `synthetic`, or None to find them; see `launch.cifar`.
    """

    def __init__(self, dataset: Cifar, network: Callable[[int], nn.Module], data: str | None = None) -> None:
        self._dataset = dataset
        super().__init__(lambda: network(dataset.num_classes), data)

    def _load(self, data: str | None) -> Images:
        return self._dataset.load(self._dataset.find(data))

    def _mean_and_std(self, scaled: Tensor) -> tuple[Tensor, Tensor]:
        return scaled.mean(dim=(0, 2, 3)).view(3, 1, 1), scaled.std(dim=(0, 2, 3)).view(3, 1, 1)

    def _varied(self, images: Tensor, step: int, shard: Shard) -> Tensor:
        """Crop and flip; by how much is drawn for the global batch, so that it does not matter how that is cut."""
        generator = _generator(~shard.seed, step)  # not the stream that orders the epochs
        drawn = torch.stack(
            [torch.randint(most, (shard.global_batch_size,), generator=generator) for most in (9, 9, 2)], dim=1
        )
        down, right, flipped = shard.cut(drawn).unbind(dim=1)
        along = torch.arange(32)
        columns = torch.where(flipped[:, None] == 1, 31 - along, along) + right[:, None]
        rows = along + down[:, None]
        which, colours = torch.arange(len(images))[:, None, None, None], torch.arange(3)[:, None, None]
        padded = F.pad(images, (4, 4, 4, 4))
        return padded[which, colours, rows[:, None, :, None], columns[:, None, None, :]]


class BytesTask(Task):
    """Predict the next byte of the standard library's source files.

    Args:
        network: makes the model from a context length.
        context: bytes per sample.
        num_valid_windows: the test takes so many windows, evenly spaced over the held-out files.
    """

    metric = "bits_per_byte"
    higher_is_better = False

    def __init__(self, network: Callable[[int], nn.Module], context: int = 128, num_valid_windows: int = 1024) -> None:
        self._network = network
        self._context = context
        corpus = load_stdlib()
        self.source = corpus.source
        self._train = corpus.train
        num_windows = min(num_valid_windows, (len(corpus.valid) - 1) // context)
        starts = torch.linspace(0, len(corpus.valid) - context - 1, num_windows, dtype=torch.float64).long()
        self._valid = corpus.valid[starts[:, None] + torch.arange(context + 1)]

    def build_model(self) -> nn.Module:
        """See `Task.build_model`."""
        return self._network(self._context)

    def steps_per_epoch(self, shard: Shard) -> int:
        """Return the steps that read as many bytes as the training files have."""
        return len(self._train) // (shard.global_batch_size * self._context)

    def batch(self, step: int, shard: Shard) -> Batch:
        """See `Task.batch`; windows start anywhere, each drawn anew."""
        last_start = len(self._train) - self._context - 1
        starts = torch.randint(last_start + 1, (shard.global_batch_size,), generator=_generator(shard.seed, step))
        windows = self._train[shard.cut(starts)[:, None] + torch.arange(self._context + 1)].long()
        return windows[:, :-1], windows[:, 1:]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy per byte."""
        return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    @torch.no_grad()
    def evaluate(self, model: nn.Module, rank: int, world_size: int, device: torch.device) -> Tensor:
        """Return the sum of the held-out bytes' information in bits, and their number."""
        windows = self._valid[rank::world_size]
        total = torch.zeros(2, dtype=torch.float64, device=device)
        for some in torch.split(windows, 64):
            tokens = some.long().to(device)
            nats = self.loss(model, (tokens[:, :-1], tokens[:, 1:])).double()
            num_bytes = len(some) * self._context
            total += torch.stack([nats * num_bytes / math.log(2), torch.full_like(nats, num_bytes)])
        return total


def _generator(seed: int, index: int) -> torch.Generator:
    # Two mixing rounds of SplitMix64: nearby seeds and indices give unrelated streams.
    mixed = (seed * 0x9E3779B97F4A7C15 + index + 1) % 2**64
    for factor, shift in ((0xBF58476D1CE4E5B9, 30), (0x94D049BB133111EB, 27)):
        mixed = (mixed ^ (mixed >> shift)) * factor % 2**64
    return torch.Generator().manual_seed((mixed ^ (mixed >> 31)) >> 1)


class _Find(Protocol):
    def __call__(self, named: str | None = None) -> Path | None: ...


class _Fetch(Protocol):
    def __call__(self, named: str | None = None, say: Callable[[str], None] = ...) -> Path | None: ...


@dataclass(frozen=True)
class Dataset:
    """Files that a task needs: how they are found without a network, and how they are got where they are missing.

    Both take what `--data` names and return the folder, None where other data have to stand in.
    """

    find: _Find
    fetch: _Fetch


FASHION_MNIST = Dataset(find_fashion_mnist, fetch_fashion_mnist)


@dataclass(frozen=True)
class TaskEntry:
    """A task by name: how to make it from `--data` and `--width`, and which files it takes, None for none."""

    make: Callable[[str | None, int], Task]
    dataset: Dataset | None = None


def _cifar(dataset: Cifar, network: Callable[[int, int], nn.Module]) -> TaskEntry:
    return TaskEntry(
        lambda data, width: CifarTask(dataset, lambda num_classes: network(num_classes, width), data),
        Dataset(dataset.find, dataset.fetch),
    )


TASKS = {
    "fashion-mnist-lenet": TaskEntry(lambda data, width: ImageTask(lambda: LeNet(width), data), FASHION_MNIST),
    "fashion-mnist-lstm": TaskEntry(lambda data, width: ImageTask(lambda: RowLSTM(width), data), FASHION_MNIST),
    "stdlib-gpt": TaskEntry(lambda data, width: BytesTask(lambda context: ByteGPT(context, width))),
    "cifar10-vgg19": _cifar(CIFAR10, VGG),
    "cifar10-googlenet": _cifar(CIFAR10, GoogLeNet),
    "cifar10-resnet18": _cifar(CIFAR10, ResNet18),
    "cifar10-senet18": _cifar(CIFAR10, lambda num_classes, width: ResNet18(num_classes, width, squeeze=True)),
    "cifar100-vgg19": _cifar(CIFAR100, VGG),
}
"""Tasks by name."""
