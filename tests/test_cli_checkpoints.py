"""The command and its checkpoints: those that are not there or do not fit, and what a run saves."""

from pathlib import Path

import pytest
import torch
import yaml

from helpers.folders import CONFIGS
from lightning_maml.cli import main, run

SMALL = [
    f"--config={CONFIGS / 'glyphs_maml.yaml'}",
    *("--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"),
    *("--data.train_batches=3", "--data.val_tasks=4", "--data.test_tasks=4"),
    "--trainer.callbacks=[]",  # no pictures
]

OWN_MODEL = """
from lightning_maml import MAML, Conv4

class Own(MAML):
    def __init__(self):
        super().__init__(Conv4(1, 5, 4, 28), inner_lr=0.1)
"""


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the checkpoint of a run in the current folder."""
    monkeypatch.chdir(tmp_path)
    return Path(run(["fit", *SMALL]).trainer.log_dir) / "checkpoints" / "last.ckpt"


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict", "check"])
@pytest.mark.parametrize("path", ["missing.ckpt", "best", ""])
def test_a_checkpoint_that_is_not_there(command: str, path: str) -> None:
    with pytest.raises(SystemExit, match=rf"'last' or the path of a checkpoint .* no '{path}'"):
        main([command, *SMALL, f"--ckpt_path={path}"])


@pytest.mark.parametrize("command", ["test", "check"])
def test_a_network_of_another_width(command: str, trained: Path) -> None:
    with pytest.raises(SystemExit, match=r"Expected weights of such a model but .* there and \[8"):
        main([command, *SMALL, f"--ckpt_path={trained}", "--model.network.channels=8"])


def test_a_resumed_run_saves_no_checkpoint_in_its_config(trained: Path) -> None:
    resumed = run(["fit", *SMALL, f"--ckpt_path={trained}", "--trainer.max_epochs=2"])
    assert resumed.trainer.ckpt_path == str(trained)
    saved = yaml.safe_load((Path(resumed.trainer.log_dir) / "config.yaml").read_text())
    assert saved["ckpt_path"] is None


def test_a_checkpoint_with_objects_is_read_where_it_is_trusted(trained: Path) -> None:
    checkpoint = torch.load(trained, weights_only=True)
    torch.save(checkpoint | {"of_a_callback": Path("here")}, trained)
    arguments = ["test", *SMALL, f"--ckpt_path={trained}"]
    with pytest.raises(SystemExit, match="where you trust it"):
        main(arguments)
    run([*arguments, "--weights_only=false"])


def test_a_model_without_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_model_without_arguments.py").write_text(OWN_MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    arguments = [
        "--model=own_model_without_arguments.Own",
        *("--trainer.max_epochs=1", "--trainer.accelerator=cpu"),
        "--trainer.enable_progress_bar=false",
        *("--data=GlyphsDataModule", "--data.train_batches=3", "--data.val_tasks=4"),
        "--data.test_tasks=4",
    ]
    run(["fit", *arguments])
    run(["test", *arguments, "--ckpt_path=last"])


def test_a_test_saves_the_checkpoint_that_it_took(trained: Path) -> None:
    tested = run(["test", *SMALL, f"--ckpt_path={trained}"])
    saved = yaml.safe_load((Path(tested.trainer.log_dir) / "config.yaml").read_text())
    assert saved["ckpt_path"] == str(trained)


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_a_model_without_a_checkpoint_is_said_to_be_untrained(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="untrained unless the network loads its own"):
        run([command, *SMALL])


@pytest.mark.parametrize("command", ["fit", "check"])
def test_what_needs_no_checkpoint_does_not_warn_without_one(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.chdir(tmp_path)
    run([command, *SMALL])
    assert not [warned for warned in recwarn if "Without `ckpt_path`" in str(warned.message)]
