"""The paper's four networks in their forms for images of 32 x 32: small first kernels, no early pooling."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VGG19 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 256, 0, 512, 512, 512, 512, 0, 512, 512, 512, 512, 0)
"""Channels of its convolutions; 0 is max pooling by two."""

INCEPTIONS = (
    ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64)),
    (
        (192, 96, 208, 16, 48, 64),
        (160, 112, 224, 24, 64, 64),
        (128, 128, 256, 24, 64, 64),
        (112, 144, 288, 32, 64, 64),
        (256, 160, 320, 32, 128, 128),
    ),
    ((256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128)),
)
"""Table 1 of the GoogLeNet paper, pooling between the groups: 1x1; reduced, 3x3; reduced, 5x5; after pooling."""


def _conv(inputs: int, outputs: int, kernel: int = 3) -> nn.Sequential:
    """Return a convolution that keeps the size, batch normalisation and ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class VGG(nn.Module):
    """VGG-19 with batch normalisation (Simonyan and Zisserman, arXiv 1409.1556, E) and one linear layer at the end.

    Args:
        num_classes: of the logits.
        width: multiplies the channels; 1 has 20,035,018 parameters for 10 classes.
    """

    def __init__(self, num_classes: int = 10, width: int = 1) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for outputs in VGG19:
            layers.append(_conv(channels, outputs * width) if outputs else nn.MaxPool2d(2))
            channels = outputs * width or channels
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (batch, 3, 32, 32), float, to logits (batch, num_classes)."""
        logits: Tensor = self.head(self.features(images).flatten(1))
        return logits


class _Inception(nn.Module):
    def __init__(self, inputs: int, sizes: tuple[int, ...]) -> None:
        super().__init__()
        one, reduced3, three, reduced5, five, pooled = sizes
        self.branches = nn.ModuleList(
            [
                _conv(inputs, one, 1),
                nn.Sequential(_conv(inputs, reduced3, 1), _conv(reduced3, three)),
                # Two 3x3 in place of a 5x5, as in Inception v2 and the usual CIFAR form.
                nn.Sequential(_conv(inputs, reduced5, 1), _conv(reduced5, five), _conv(five, five)),
                nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), _conv(inputs, pooled, 1)),
            ]
        )
        self.num_outputs = one + three + five + pooled

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], dim=1)


class GoogLeNet(nn.Module):
    """GoogLeNet (Szegedy et al., arXiv 1409.4842) with batch normalisation, without its auxiliary heads.

    Args:
        num_classes: of the logits.
        width: multiplies the channels; 1 has 6,158,346 parameters for 10 classes.
    """

    def __init__(self, num_classes: int = 10, width: int = 1) -> None:
        super().__init__()
        channels = 192 * width
        layers: list[nn.Module] = [_conv(3, channels)]
        for index, group in enumerate(INCEPTIONS):
            if index:
                layers.append(nn.MaxPool2d(3, stride=2, padding=1))
            for sizes in group:
                layers.append(block := _Inception(channels, tuple(size * width for size in sizes)))
                channels = block.num_outputs
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (batch, 3, 32, 32), float, to logits (batch, num_classes)."""
        logits: Tensor = self.head(self.features(images).mean(dim=(2, 3)))
        return logits


class _BasicBlock(nn.Module):
    """A residual block; `squeeze` adds the gates of SENet, whose hidden layer is a sixteenth of the channels."""

    def __init__(self, inputs: int, outputs: int, stride: int, squeeze: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.gate: nn.Module | None = None
        if squeeze:
            hidden = outputs // 16
            self.gate = nn.Sequential(nn.Linear(outputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        if self.gate is not None:
            out = out * self.gate(out.mean(dim=(2, 3)))[:, :, None, None]
        return F.relu(out + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18 (He et al., arXiv 1512.03385), or SENet-18 (Hu et al., arXiv 1709.01507).

    Args:
        num_classes: of the logits.
        width: multiplies the channels; 1 has 11,173,962 parameters for 10 classes, SENet-18 11,263,042.
        squeeze: weigh each block's channels by what they are on average (squeeze and excitation).
    """

    def __init__(self, num_classes: int = 10, width: int = 1, *, squeeze: bool = False) -> None:
        super().__init__()
        channels = 64 * width
        layers: list[nn.Module] = [_conv(3, channels)]
        for index in range(4):
            outputs = 64 * width * 2**index
            layers.append(_BasicBlock(channels, outputs, 2 if index else 1, squeeze))
            layers.append(_BasicBlock(outputs, outputs, 1, squeeze))
            channels = outputs
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (batch, 3, 32, 32), float, to logits (batch, num_classes)."""
        logits: Tensor = self.head(self.features(images).mean(dim=(2, 3)))
        return logits
