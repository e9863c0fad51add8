"""Networks on sequences, points and volumes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.experiments.zoo.entry import Entry, entry_of
from benchmarks.experiments.zoo.inputs import (
    CLASSES,
    floats,
)


class RecurrentClassifier(nn.Module):
    """Projection of the inputs, a recurrent layer, and a hidden layer on its last output."""

    def __init__(self, recurrent: type[nn.LSTM] | type[nn.GRU], layers: int = 1) -> None:
        super().__init__()
        self.project = nn.Linear(6, 16)
        self.recurrent = recurrent(16, 24, layers, batch_first=True, bidirectional=layers > 1)
        self.hidden = nn.Linear(48 if layers > 1 else 24, 32)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the classes."""
        out, _ = self.recurrent(F.relu(self.project(x)))
        return self.head(F.relu(self.hidden(out[:, -1])))


def conv1d_network() -> nn.Module:
    """Convolutions over a signal."""
    return nn.Sequential(
        nn.Conv1d(2, 16, 5, padding=2),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.MaxPool1d(2),
        nn.Conv1d(16, 24, 3, padding=1),
        nn.BatchNorm1d(24),
        nn.ELU(),
        nn.AvgPool1d(2),
        nn.Flatten(),
        nn.Linear(24 * 8, 32),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.Linear(32, CLASSES),
    )


def conv3d_network() -> nn.Module:
    """Convolutions over a volume."""
    return nn.Sequential(
        nn.Conv3d(1, 8, 3, padding=1),
        nn.BatchNorm3d(8),
        nn.ReLU(),
        nn.MaxPool3d(2),
        nn.Conv3d(8, 16, 3, padding=1),
        nn.BatchNorm3d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(16, CLASSES),
    )


class PointNet(nn.Module):
    """Layers shared by all points, and the maximum over the points."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(3, 16, 1), nn.Conv1d(16, 32, 1)
        self.bn1, self.bn2 = nn.BatchNorm1d(16), nn.BatchNorm1d(32)
        self.fc1 = nn.Linear(32, 24)
        self.bn3 = nn.BatchNorm1d(24)
        self.fc2 = nn.Linear(24, CLASSES)

    def forward(self, points: Tensor) -> Tensor:
        """Log-probabilities of the classes; points has shape (batch, points, 3)."""
        x = points.transpose(2, 1)
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        x = torch.max(x, 2, keepdim=True)[0]
        x = x.view(-1, 32)
        return F.log_softmax(self.fc2(F.relu(self.bn3(self.fc1(x)))), dim=1)


class WaveNetBlock(nn.Module):
    """Gated dilated convolution with a residual and a skip output."""

    def __init__(self, channels: int, hidden: int, dilation: int) -> None:
        super().__init__()
        self.filter = nn.Conv1d(channels, hidden, 2, dilation=dilation)
        self.gate = nn.Conv1d(channels, hidden, 2, dilation=dilation)
        self.residual = nn.Conv1d(hidden, channels, 1)
        self.skip = nn.Conv1d(hidden, 16, 1)
        self.dilation = dilation

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Next input and skip output."""
        padded = F.pad(x, (self.dilation, 0))
        out = torch.tanh(self.filter(padded)) * torch.sigmoid(self.gate(padded))
        return x + self.residual(out), self.skip(out)


class WaveNet(nn.Module):
    """Gated dilated convolutions whose skip outputs are summed."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(1, 12, 1)
        self.blocks = nn.ModuleList(WaveNetBlock(12, 20, 2**level) for level in range(3))
        self.last = nn.Sequential(nn.ReLU(), nn.Conv1d(16, 16, 1), nn.ReLU(), nn.Conv1d(16, CLASSES, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Scores at each time."""
        x = self.first(x)
        total = 0
        for block in self.blocks:
            x, skip = block(x)
            total = total + skip
        return self.last(total)


class TemporalBlock(nn.Module):
    """Two causal convolutions, whose surplus end is cut off, and a shortcut."""

    def __init__(self, in_channels: int, channels: int, dilation: int) -> None:
        super().__init__()
        self.padding = 2 * dilation
        self.conv1 = nn.Conv1d(in_channels, channels, 3, padding=self.padding, dilation=dilation)
        self.conv2 = nn.Conv1d(channels, channels, 3, padding=self.padding, dilation=dilation)
        self.dropout = nn.Dropout(0.2)
        self.downsample = nn.Conv1d(in_channels, channels, 1) if in_channels != channels else None

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch."""
        out = self.dropout(F.relu(self.conv1(x)[:, :, : -self.padding].contiguous()))
        out = self.dropout(F.relu(self.conv2(out)[:, :, : -self.padding].contiguous()))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class TemporalNetwork(nn.Module):
    """Temporal convolutional network, classified at its last time."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            TemporalBlock(4, 16, 1), TemporalBlock(16, 16, 2), TemporalBlock(16, 16, 4)
        )
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the classes."""
        return self.head(self.blocks(x)[:, :, -1])


def sequence_networks() -> Iterable[Entry]:
    """Return the networks of this family."""
    steps = floats((2, 9, 6))
    units = {"where": "recurrent", "structures": "hidden", "granularity": "batch"}
    places = ("project", "hidden", units)
    return (
        entry_of("lstm", lambda: RecurrentClassifier(nn.LSTM), steps, *places),
        entry_of("gru", lambda: RecurrentClassifier(nn.GRU), steps, *places),
        entry_of("deep_lstm", lambda: RecurrentClassifier(nn.LSTM, 2), steps, *places),
        entry_of("conv1d", conv1d_network, floats((2, 2, 32)), {"where": nn.BatchNorm1d}),
        entry_of("conv3d", conv3d_network, floats((2, 1, 8, 8, 8)), {"where": nn.BatchNorm3d}),
        entry_of("pointnet", PointNet, floats((2, 24, 3)), {"where": nn.BatchNorm1d}),
        entry_of("wavenet", WaveNet, floats((2, 1, 16)), "*.filter", "last.1"),
        entry_of("temporal_network", TemporalNetwork, floats((3, 4, 16)), "*.conv1"),
    )
