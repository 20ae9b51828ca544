"""A config and checkpoints of version 0.1 load, and training goes on as it did then."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from torch import nn

from helpers import earlier_episodes
from helpers.trainers import trainer
from lightning_maml import MAMLPlusPlus
from lightning_maml.cli import run
from lightning_maml.datamodules import GlyphsDataModule
from lightning_maml.datamodules.sampler import EpisodeDataset

WRITTEN = Path(__file__).parent / "format_0_1"
NORMS = json.loads((WRITTEN / "goes_on.json").read_text())
"""Norms of the weights after a second epoch, trained by the version that wrote the checkpoints."""


WITHOUT_GRADIENT = (
    "network.0.bias",
    "step_statistics.running_mean_0",
    *(f"network.features.{block}.0.bias" for block in range(4)),
)
"""Biases that batch norm takes out again, and the mean that holds one: their gradient is rounding, of
which Adam makes steps."""


@pytest.fixture(autouse=True)
def _episodes_of_version_0_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EpisodeDataset, "draw", earlier_episodes.draw)


def norms(weights: dict[str, torch.Tensor]) -> dict[str, float]:
    return {
        name: float(tensor.double().norm())
        for name, tensor in weights.items()
        if name not in WITHOUT_GRADIENT
    }


def expected(name: str) -> Any:
    then = {key: value for key, value in NORMS[name].items() if key not in WITHOUT_GRADIENT}
    return pytest.approx(then, rel=1e-4)


def test_training_resumes_from_a_config_and_checkpoint_of_version_0_1(tmp_path: Path) -> None:
    checkpoint = WRITTEN / "hfmaml.ckpt"
    arguments = [
        f"--config={WRITTEN / 'hfmaml.yaml'}",
        f"--ckpt_path={checkpoint}",
        "--trainer.max_epochs=2",
    ]
    folders = [
        f"--trainer.default_root_dir={tmp_path}",
        f"--trainer.logger.init_args.save_dir={tmp_path}",
    ]
    run(["fit", *arguments, *folders])
    last = next(tmp_path.rglob("last.ckpt"))
    assert norms(torch.load(last, weights_only=True)["state_dict"]) == expected("hfmaml")


def test_training_resumes_with_learned_rates_and_per_step_batch_norm_of_version_0_1(
    tmp_path: Path,
) -> None:
    checkpoint = WRITTEN / "mamlplusplus.ckpt"
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2),
        nn.BatchNorm2d(4),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(4 * 13 * 13, 5),
    )
    model = MAMLPlusPlus.load_from_checkpoint(checkpoint, network=network)
    data = GlyphsDataModule(train_batches=2, meta_batch_size=2, val_tasks=4)
    going_on: Trainer = trainer(tmp_path, max_epochs=2)
    going_on.fit(model, data, ckpt_path=checkpoint)
    assert going_on.global_step == 4
    assert norms(model.state_dict()) == expected("mamlplusplus")
