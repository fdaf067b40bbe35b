"""The small models of the three tasks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LeNet(nn.Module):
    """LeNet-5 with ReLU and max pooling, for images of 28 x 28.

    Args:
        width: multiplies the number of channels and hidden units; 1 has 61,706 parameters, 2 has 244,362.
    """

    def __init__(self, width: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6 * width, kernel_size=5, padding=2)
        self.conv2 = nn.Conv2d(6 * width, 16 * width, kernel_size=5)
        self.fc1 = nn.Linear(16 * width * 25, 120 * width)
        self.fc2 = nn.Linear(120 * width, 84 * width)
        self.fc3 = nn.Linear(84 * width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (batch, 28, 28), float, to logits (batch, 10)."""
        x = F.max_pool2d(F.relu(self.conv1(images.unsqueeze(1))), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2).flatten(1)
        x = F.relu(self.fc2(F.relu(self.fc1(x))))
        logits: Tensor = self.fc3(x)
        return logits


class RowLSTM(nn.Module):
    """Two LSTM layers that read an image row by row, and a linear layer on the last state.

    Args:
        width: multiplies the 128 hidden units; 1 has 214,282 parameters.
    """

    def __init__(self, width: int = 1) -> None:
        super().__init__()
        self.lstm = nn.LSTM(input_size=28, hidden_size=128 * width, num_layers=2, batch_first=True)
        self.head = nn.Linear(128 * width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (batch, 28, 28), float, to logits (batch, 10)."""
        states, _ = self.lstm(images)
        logits: Tensor = self.head(states[:, -1])
        return logits


class _Block(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, 4 * dim)
        self.down = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, length, dim))
        out: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return out


class ByteGPT(nn.Module):
    """A decoder-only transformer over bytes, the output tied to the embedding; 4 layers, 484,416 parameters at width 1.

    Args:
        context: the longest sequence, in bytes.
        width: multiplies the 96 channels (4 heads).
    """

    def __init__(self, context: int = 128, width: int = 1) -> None:
        super().__init__()
        dim = 96 * width
        self.embed = nn.Embedding(256, dim)
        self.position = nn.Parameter(torch.zeros(context, dim))
        self.blocks = nn.ModuleList(_Block(dim, num_heads=4) for _ in range(4))
        self.norm = nn.LayerNorm(dim)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                # As GPT-2: what adds to the residual stream starts smaller, by the root of the number of additions.
                nn.init.normal_(p, std=0.02 / 8**0.5 if name.endswith(("proj.weight", "down.weight")) else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (batch, length), int64 in 0..255, to the next tokens' logits (batch, length, 256)."""
        x = self.embed(tokens) + self.position[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embed.weight)
