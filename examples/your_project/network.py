"""A network of one's own: one-dimensional convolutions for signals."""

from torch import Tensor, nn


class SignalNetwork(nn.Module):
    """Classifies signals ``[B, 1, L]``.

    Args:
        ways: Classes per task.
        channels: Channels of both convolutions.
    """

    def __init__(self, ways: int = 3, channels: int = 16) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(1, channels, 7, stride=2, padding=3),
            nn.GroupNorm(4, channels),
            nn.GELU(),
            nn.Conv1d(channels, channels, 7, stride=2, padding=3),
            nn.GroupNorm(4, channels),
            nn.GELU(),
            nn.AdaptiveAvgPool1d(4),
            nn.Flatten(),
        )
        self.head = nn.Linear(4 * channels, ways)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[B, ways]``."""
        logits: Tensor = self.head(self.body(x))
        return logits
