"""Where things lie, and what another process needs to import these helpers."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}

SMALL_NETWORK = [
    "--data.ways=3",
    "--model.network=lightning_maml.MLP",
    "--model.network.in_features=784",
    "--model.network.ways=3",
    "--model.network.hidden=[8]",
    "--model.network.activation=gelu",
]
"""Arguments that give a config of 28 x 28 pixels a network that is measured in a second or two."""
