"""The command in a folder of one's own: own network, own datamodule, and nothing else configured."""

import csv
import importlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_maml import MAML, InnerSGD
from lightning_maml.cli import FewShotCLI, last_checkpoint, main, run

PROJECT = """
import torch
from lightning import LightningDataModule
from torch import nn
from torch.utils.data import DataLoader, Dataset


class Tasks(Dataset):
    def __init__(self, first, uneven):
        self.first, self.uneven = first, uneven

    def __len__(self):
        return 8

    def __getitem__(self, number):
        random = torch.Generator().manual_seed(self.first + number)
        shots = 1 + number % 2 if self.uneven else 2
        centres, labels = torch.randn(2, 8, generator=random), torch.arange(2).repeat(shots + 3)
        x = centres[labels] + 0.3 * torch.randn(len(labels), 8, generator=random)
        return x[: 2 * shots], labels[: 2 * shots], x[2 * shots :], labels[2 * shots :]


class MyData(LightningDataModule):
    def __init__(self, uneven: bool = False):
        super().__init__()
        self.uneven = uneven

    def loader(self, first):
        return DataLoader(
            Tasks(first, self.uneven), batch_size=4, collate_fn=list if self.uneven else None
        )

    def train_dataloader(self):
        return self.loader(0)

    def val_dataloader(self):
        return self.loader(100)

    def test_dataloader(self):
        return self.loader(200)

    predict_dataloader = test_dataloader


class WithoutValidation(MyData):
    val_dataloader = LightningDataModule.val_dataloader


class MyNetwork(nn.Sequential):
    def __init__(self, hidden: int = 16):
        super().__init__(nn.Linear(8, hidden), nn.Tanh(), nn.Linear(hidden, 2))
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a module and a config, which the command is started in."""
    (tmp_path / "my_project.py").write_text(PROJECT)
    config = {
        "model": {
            "class_path": "MAML",
            "init_args": {"network": "my_project.MyNetwork", "inner_lr": 0.1},
        },
        "data": "my_project.MyData",
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 3,
            "enable_progress_bar": False,
            "log_every_n_steps": 1,
        },
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", ".")])
    monkeypatch.setattr(sys, "argv", ["lightning-maml"])
    yield tmp_path
    sys.modules.pop("my_project", None)


def checkpoints(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*.ckpt")}


@pytest.mark.parametrize("uneven", ["false", "true"])
def test_own_data_and_network_are_trained_resumed_tested_and_predicted(
    project: Path, uneven: str
) -> None:
    same = ["--config=config.yaml", f"--data.init_args.uneven={uneven}"]
    main(["fit", *same])
    kept = {f"runs/version_0/checkpoints/{name}.ckpt" for name in ("best", "last")}
    assert checkpoints(project) == kept
    main(["fit", *same, "--ckpt_path=last", "--trainer.max_epochs=5"])
    last = torch.load("runs/version_1/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 10
    assert last["epoch"] == 4
    tested = run(["test", *same, "--ckpt_path=last"])
    assert "test/accuracy" in tested.trainer.callback_metrics
    main(["predict", *same, "--ckpt_path=last"])
    main(["check", *same])


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
def test_the_check_gives_batches_as_the_trainer_does(project: Path, precision: str) -> None:
    main(["check", "--config=config.yaml", f"--trainer.precision={precision}"])


def test_the_check_asks_the_models_hooks(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "drawing.py").write_text(
        "from lightning_maml import MAML, mini_batches\n"
        "class OnMiniBatches(MAML):\n"
        "    def on_after_batch_transfer(self, batch, dataloader_idx):\n"
        "        return mini_batches(batch, size=2, steps=self.train_steps)\n"
    )
    main(["check", "--config=config.yaml", "--model=drawing.OnMiniBatches"])
    assert "ResampledEpisodes" in capsys.readouterr().out
    sys.modules.pop("drawing", None)


def test_inner_loops_are_configured(project: Path) -> None:
    inner = ["--model.inner_optimizer=InnerSGD", "--model.inner_optimizer.momentum=0.9"]
    inner += ["--model.support_loss=torch.nn.CrossEntropyLoss", "--model.query_in_eval=true"]
    inner += ["--model.support_loss.label_smoothing=0.1"]
    for algorithm in ("MAML", "HFMAML", "Reptile"):
        chosen = f"--model={algorithm}"
        cli = run(["fit", "--config=config.yaml", chosen, *inner, "--trainer.max_epochs=1"])
        assert cli.model.inner_optimizer == InnerSGD(momentum=0.9)
        assert cli.model.support_loss.label_smoothing == 0.1
        assert cli.model.hparams["query_in_eval"]


def test_the_best_checkpoint_is_of_the_highest_accuracy(project: Path) -> None:
    cli = run(["fit", "--config=config.yaml", "--trainer.max_epochs=6"])
    rows = csv.DictReader(Path("runs/version_0/metrics.csv").read_text().splitlines())
    validated = [row for row in rows if row["val/accuracy"]]
    accuracies = [float(row["val/accuracy"]) for row in validated]
    best = torch.load("runs/version_0/checkpoints/best.ckpt", weights_only=True)
    assert len(accuracies) == 6
    assert best["epoch"] == accuracies.index(max(accuracies))
    assert cli.trainer.checkpoint_callback.best_model_score == max(accuracies)


def test_without_validation_only_the_last_checkpoint_is_kept(project: Path) -> None:
    main(["fit", "--config=config.yaml", "--data=my_project.WithoutValidation"])
    assert checkpoints(project) == {"runs/version_0/checkpoints/last.ckpt"}


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        (
            ["--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.filename=own"],
            {"runs/version_0/checkpoints/own.ckpt"},
        ),
        (["--trainer.enable_checkpointing=false"], set()),
        (["--trainer.fast_dev_run=true"], set()),
        (
            [
                "--trainer.barebones=true",
                "--trainer.enable_progress_bar=null",
                "--trainer.log_every_n_steps=null",
            ],
            set(),
        ),
    ],
)
def test_checkpoints_of_ones_own_or_none_are_kept_as_they_are(
    project: Path, arguments: list[str], kept: set[str]
) -> None:
    main(["fit", "--config=config.yaml", *arguments])
    assert checkpoints(project) == kept


def test_checkpoint_callbacks_given_in_python_are_the_only_ones(project: Path) -> None:
    own = ModelCheckpoint(filename="own")
    cli = run(["fit", "--config=config.yaml"], callbacks=[own])
    assert [*cli.trainer.checkpoint_callbacks][:1] == [own]
    assert checkpoints(project) == {"runs/version_0/checkpoints/own.ckpt"}


def test_lightnings_options_for_optimizer_and_schedule_have_effect(project: Path) -> None:
    schedule = ["--lr_scheduler=CosineAnnealingLR", "--lr_scheduler.T_max=3"]
    with pytest.warns(UserWarning, match="configure_optimizers` will be overridden"):
        cli = run(
            ["fit", "--config=config.yaml", "--optimizer=SGD", "--optimizer.lr=0.5", *schedule]
        )
    (optimizer,) = cli.trainer.optimizers
    assert type(optimizer) is torch.optim.SGD
    assert optimizer.param_groups[0]["initial_lr"] == 0.5
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0)


def test_schedules_are_stepped_after_every_step_if_asked_for(project: Path) -> None:
    schedule = {
        "class_path": "torch.optim.lr_scheduler.OneCycleLR",
        "init_args": {"max_lr": 0.1, "total_steps": 7},
    }
    flow = yaml.safe_dump(schedule, default_flow_style=True, width=1000)
    given = [f"--model.lr_scheduler={flow}", "--model.lr_scheduler_interval=step"]
    cli = run(["fit", "--config=config.yaml", "--model.optimizer=torch.optim.SGD", *given])
    assert cli.trainer.global_step == 6
    plain = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    torchs = torch.optim.lr_scheduler.OneCycleLR(plain, max_lr=0.1, total_steps=7)
    for _ in range(6):
        plain.step()
        torchs.step()
    (optimizer,) = cli.trainer.optimizers
    assert optimizer.param_groups[0]["lr"] == plain.param_groups[0]["lr"]


def test_rates_of_layers_are_named_in_yaml(project: Path) -> None:
    config = yaml.safe_load(Path("config.yaml").read_text())
    config["model"]["init_args"]["inner_lr"] = {"0": 0.1, "2": 0.5}
    Path("rates.yaml").write_text(yaml.safe_dump(config))
    cli = run(["fit", "--config=rates.yaml"])
    assert cli.model.inner_lr == {"0": 0.1, "2": 0.5}
    again = run(["test", "--config=runs/version_0/config.yaml", "--ckpt_path=last"])
    assert again.model.inner_lr == {"0": 0.1, "2": 0.5}


def test_metrics_are_named_in_yaml(project: Path) -> None:
    metrics = {
        "f1": {
            "class_path": "torchmetrics.classification.MulticlassF1Score",
            "init_args": {"num_classes": 2, "average": "macro"},
        }
    }
    given = f"--model.metrics={yaml.safe_dump(metrics, default_flow_style=True, width=1000)}"
    cli = run(["validate", "--config=config.yaml", given, "--model.metrics_over=queries"])
    assert 0 < cli.trainer.callback_metrics["val/f1"] <= 1


def test_measuring_needs_a_datamodule_that_draws_tasks(project: Path) -> None:
    with pytest.raises(
        SystemExit, match=r"Expected a datamodule of lightning_maml, .*but got MyData"
    ):
        main(["measure", "--config=config.yaml"])


def test_the_config_of_a_run_overwrites_no_file(project: Path) -> None:
    before = Path("config.yaml").read_text()
    arguments = ["--config=config.yaml", "--trainer.logger=false", "--model.inner_lr=0.05"]
    for _ in range(2):
        main(["fit", *arguments, "--trainer.max_epochs=1"])
    assert Path("config.yaml").read_text() == before
    saved = yaml.safe_load(Path("config_2.yaml").read_text())
    assert saved["model"]["init_args"]["inner_lr"] == 0.05


def test_the_last_checkpoint_is_of_a_run_in_the_folder_itself(project: Path) -> None:
    main(["fit", "--config=config.yaml", "--trainer.max_epochs=1"])
    other = ["--model=FOMAML", "--trainer.default_root_dir=runs/other", "--trainer.max_epochs=1"]
    main(["fit", "--config=config.yaml", *other])
    assert last_checkpoint(Path("runs")) == Path("runs/version_0/checkpoints/last.ckpt")
    shutil.rmtree("runs/version_0")
    assert last_checkpoint(Path("runs")) == Path("runs/other/version_0/checkpoints/last.ckpt")


def test_a_command_of_ones_own_takes_arguments_and_the_last_checkpoint(project: Path) -> None:
    sys.path.insert(0, str(project))
    own = importlib.import_module("my_project")

    def command(name: str, *arguments: str) -> FewShotCLI:
        quiet = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
        network = ["--model.network=my_project.MyNetwork", "--trainer.max_epochs=1"]
        return FewShotCLI(
            MAML,
            own.MyData,
            trainer_defaults={"callbacks": [ModelCheckpoint(filename="last")]},
            args=[name, *quiet, *network, *arguments],
        )

    command("fit", "--model.inner_lr=0.1")
    last = "lightning_logs/version_0/checkpoints/last.ckpt"
    tested = command("test", "--ckpt_path=last")
    assert Path(tested.trainer.ckpt_path) == Path(last)
    # given by its path, Lightning's own command would take the checkpoint's arguments
    given = ["--model.inner_lr=0.2", "--model.test_steps=3"]
    with pytest.warns(UserWarning, match=r"trained with other arguments .* inner_lr=0.1 .0.2 now"):
        tested = command("test", f"--ckpt_path={last}", *given)
    assert (tested.model.inner_lr, tested.model.test_steps) == (0.2, 3)
