"""What goes wrong while training, provoked for real: how a run ends, and what it leaves."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from PIL import Image
from torch import Tensor, nn

from helpers import another_process
from helpers.folders import CONFIGS, ENVIRONMENT
from helpers.networks import flat, make_episodes
from helpers.runs import Noise, is_same, network
from helpers.trainers import trainer_in_double as trainer
from lightning_maml import FOMAML, HFMAML, MAML, CheckpointOnInterrupt, ProtoNet, SkipNonFinite
from lightning_maml.cli import main
from lightning_maml.core.rng import random_state
from lightning_maml.datamodules import ImageFolderDataModule
from lightning_maml.io.replay import load_step, save_step


class Broken(Noise):
    """Has images that are not finite in the third meta-batch, in the second task."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        batch = super().on_after_batch_transfer(batch, dataloader_idx)
        if self.trainer.training and self.trainer.fit_loop.total_batch_idx == 1:
            batch.support_x[1, 0] = torch.nan
            batch.query_x[1, 0] = torch.nan
        return batch


@pytest.mark.parametrize("algorithm", [MAML, FOMAML, HFMAML, ProtoNet])
def test_a_step_that_is_not_finite_stops_the_run_and_can_be_taken_again(
    tmp_path: Path, algorithm: type[MAML]
) -> None:
    def model() -> LightningModule:
        return (
            ProtoNet(network(None, dropout=0.5))
            if algorithm is ProtoNet
            else algorithm(network(dropout=0.5), 0.1, 2)
        )

    broken = model()
    with pytest.raises(
        FloatingPointError,
        match=r"in tasks \[1\] at step 2.*import load_step; .*load_step\(model, "
        r"'.*step_2.repro'\); model.meta_loss\(episodes\)`",
    ) as first:
        trainer(tmp_path, precision="32-true").fit(broken, Broken())
    again = model()
    episodes, epoch = load_step(again, tmp_path / "step_2.repro")
    assert epoch == 0
    assert torch.equal(flat(dict(again.named_parameters())), flat(dict(broken.named_parameters())))
    assert episodes.support_x[1, 0].isnan().all()
    with pytest.raises(FloatingPointError) as second:
        again.train().meta_loss(episodes)
    losses = [
        re.search(r"got (.*) in tasks", str(error.value)).group(1) for error in (first, second)
    ]
    assert losses[0] == losses[1]


def test_the_command_that_a_broken_run_names_takes_the_step_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small = [
        "--data.train_batches=2",
        "--data.meta_batch_size=2",
        "--trainer.max_epochs=1",
        "--trainer.limit_val_batches=1",
    ]
    with pytest.raises(SystemExit, match="Expected a finite query loss") as end:
        main(
            [
                "fit",
                f"--config={CONFIGS / 'glyphs_maml.yaml'}",
                *small,
                "--model.inner_lr=1e30",
                "--trainer.enable_progress_bar=false",
            ]
        )
    command = re.search(r"`lightning-maml (.*)`", str(end.value)).group(1).split()
    with pytest.raises(SystemExit, match="Expected a finite query loss") as replayed:
        main(command)
    assert str(end.value).startswith(str(replayed.value).split(" at step")[0])


def test_replay_says_when_a_step_does_not_break(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small = [
        "--data.train_batches=2",
        "--data.meta_batch_size=2",
        "--trainer.max_epochs=1",
        "--trainer.enable_progress_bar=false",
    ]
    with pytest.raises(SystemExit) as end:
        main(["fit", f"--config={CONFIGS / 'glyphs_maml.yaml'}", *small, "--model.inner_lr=1e30"])
    command = re.search(r"`lightning-maml (.*)`", str(end.value)).group(1).split()
    main([*command, "--model.inner_lr=0.1"])
    assert "does not break this model" in capsys.readouterr().out
    with pytest.raises(
        SystemExit, match=r"Expected .* to be a step that the same model saved but got another"
    ):
        main([*command, "--model.network.channels=8"])
    torch.save({"weights": 1}, "other.repro")
    with pytest.raises(
        SystemExit,
        match=r"Expected other\.repro to be a step that a run saved when it broke but it holds "
        "'weights'",
    ):
        main([command[0], command[1], "--ckpt_path=other.repro"])


@pytest.mark.parametrize(
    "changes",
    [
        [
            "--model=MAMLPlusPlus",
            "--model.multi_step_epochs=2",
            "--model.first_order_epochs=1",
            "--model.batch_norm=per_step",
        ],
        ["--trainer.precision=bf16-mixed", "--model=FOMAML"],
    ],
    ids=["annealing", "bf16"],
)
def test_steps_are_replayed_as_they_were_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small = [
        "--data.train_batches=2",
        "--data.meta_batch_size=2",
        "--trainer.max_epochs=1",
        "--trainer.enable_progress_bar=false",
    ]
    with pytest.raises(SystemExit) as end:
        main(
            [
                "fit",
                f"--config={CONFIGS / 'glyphs_maml.yaml'}",
                *changes,
                *small,
                "--model.inner_lr=1e30",
            ]
        )
    with pytest.raises(SystemExit, match="Expected a finite query loss") as replayed:
        main(re.search(r"`lightning-maml (.*)`", str(end.value)).group(1).split())
    assert str(end.value).startswith(str(replayed.value).split(" at step")[0])


def test_weights_are_of_the_types_that_they_were_of(tmp_path: Path) -> None:
    def mixed() -> MAML:
        model = MAML(network(), 0.1)
        model.network.register_buffer("unsaved", torch.zeros(1), persistent=False)
        return model

    broken, again = mixed().double(), mixed()
    broken.network[0].bias.data = broken.network[0].bias.data.float()
    broken.trainer = trainer(tmp_path)
    path = save_step(broken, make_episodes(), random_state(broken.device), tmp_path)
    load_step(again, path)
    assert is_same(again.state_dict(), broken.state_dict())
    assert {name: p.dtype for name, p in again.named_parameters()} == {
        name: p.dtype for name, p in broken.named_parameters()
    }
    assert again.network.unsaved.dtype == torch.float64


class Weights(Callback):
    """Keeps the weights after each step."""

    def __init__(self) -> None:
        self.after: list[Tensor] = []

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        self.after.append(flat(dict(module.named_parameters())))


@pytest.mark.parametrize("algorithm", [MAML, FOMAML, HFMAML])
def test_steps_that_are_not_finite_can_be_skipped_and_are_counted(
    tmp_path: Path, algorithm: type[MAML]
) -> None:
    weights = Weights()
    run = trainer(tmp_path, precision="32-true", callbacks=[SkipNonFinite(), weights])
    run.fit(algorithm(network(), 0.1), Broken())
    moved = [not torch.equal(*pair) for pair in zip(weights.after, weights.after[1:], strict=False)]
    assert moved == [True, False, True, True, True], "the third step is none"
    assert run.callback_metrics["train/skipped"] == 1
    assert not list(tmp_path.glob("*.repro"))
    with pytest.raises(
        FloatingPointError,
        match="Expected at most 0 meta-batches without a finite loss and meta-gradient but there "
        "were 1",
    ):
        trainer(tmp_path, precision="32-true", callbacks=[SkipNonFinite(at_most=0)]).fit(
            algorithm(network(), 0.1), Broken()
        )


def test_what_cannot_skip_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected `at_most` to be at least 0 but got -1"):
        SkipNonFinite(at_most=-1)
    run = trainer(tmp_path, precision="32-true", callbacks=[SkipNonFinite()])
    with pytest.raises(
        TypeError, match="Expected a module of lightning_maml for SkipNonFinite but got BoringModel"
    ):
        run.fit(BoringModel())
    several = Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False)
    with pytest.raises(
        ValueError,
        match="Expected one process for SkipNonFinite but got 2, which have to step together; "
        "remove it",
    ):
        SkipNonFinite().setup(several, MAML(network(), 0.1), "fit")
    SkipNonFinite().setup(several, MAML(network(), 0.1), "test")


def test_skipping_ends_with_its_run_and_the_count_goes_on_with_its_checkpoint(
    tmp_path: Path,
) -> None:
    model = MAML(network(), 0.1)
    run = trainer(tmp_path, precision="32-true", callbacks=[SkipNonFinite()])
    run.fit(model, Broken())
    run.save_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(FloatingPointError, match="at step 2"):
        trainer(tmp_path, precision="32-true").fit(model, Broken())
    again = MAML(network(), 0.1)
    trainer(tmp_path, precision="32-true", callbacks=[SkipNonFinite()], max_epochs=2).fit(
        again, Broken(), ckpt_path=tmp_path / "one.ckpt"
    )
    assert again.skipped == 1
    trainer(tmp_path, precision="32-true", callbacks=[SkipNonFinite()]).fit(again, Broken())
    assert again.skipped == 1, "another run counts anew"


ONE_BREAKS = """
import sys, torch
from lightning import Trainer
from helpers.runs import Noise, network
from lightning_maml import MAML

class Broken(Noise):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        batch = super().on_after_batch_transfer(batch, dataloader_idx)
        if self.trainer.training and self.trainer.global_step == 2 and self.trainer.global_rank == int(sys.argv[1]):
            batch.query_x[:] = torch.nan
        return batch

quiet = dict(logger=True, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=sys.argv[2])
Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=5, **quiet).fit(MAML(network(), 0.1), Broken())
"""


@pytest.mark.cpu_only
@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_step_that_breaks_in_one_process_ends_all(tmp_path: Path, rank: int) -> None:
    script = tmp_path / "script.py"
    script.write_text(ONE_BREAKS)
    command = [sys.executable, str(script), str(rank), str(tmp_path)]
    done = subprocess.run(
        command, env=ENVIRONMENT, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode != 0
    assert f"step_2_rank_{rank}.repro" in done.stderr
    assert [*tmp_path.rglob(f"step_2_rank_{rank}.repro")]


OUT_OF_MEMORY = """
import resource, sys, torch
from lightning_maml import MAML, Conv4, Episodes
torch.set_num_threads(1)
model = MAML(Conv4(3, 5, 84, channels=64, downsample="max"), 0.1, 5, tasks=sys.argv[1])
x, y = torch.rand(16, 25, 3, 84, 84), torch.arange(5).repeat_interleave(5).repeat(16, 1)
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + int(sys.argv[2]) * 2**20,) * 2)
model.meta_loss(Episodes(x, y, x, y))
"""


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    ("tasks", "cure"),
    [
        ("vmap", "with a smaller `chunk_size`, or tasks='loop', fewer are held at once; "),
        ("loop", ""),
    ],
    ids=["vmap", "loop"],
)
def test_without_memory_the_error_names_what_takes_less(tasks: str, cure: str) -> None:
    ended = another_process.run(OUT_OF_MEMORY, tasks, 300)
    assert ended.returncode == 1
    found = (
        f"Expected memory for 16 tasks but there is not enough (tasks='{tasks}', "
        f"chunk_size=None); {cure}smaller are tasks with"
    )
    assert f"OutOfMemoryError: {found}" in ended.stderr


class Killed(Noise):
    """Its second loader process kills itself on the way."""

    def train_dataloader(self) -> Any:
        loader = super().train_dataloader()
        draw = type(loader.dataset).__getitems__

        class Dying(type(loader.dataset)):  # type: ignore[misc]
            def __getitems__(self, keys: Any) -> Any:
                if any(number == 6 for _, number in keys):
                    os.kill(os.getpid(), signal.SIGKILL)
                return draw(self, keys)

        loader.dataset.__class__ = Dying
        return loader


def test_a_loader_process_that_dies_ends_the_run_and_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        RuntimeError, match=r"DataLoader worker \(pid.* exited unexpectedly|is killed by signal"
    ):
        trainer(tmp_path, precision="32-true").fit(MAML(network(), 0.1), Killed(num_workers=2))


def photographs(folder: Path) -> Path:
    random = torch.Generator().manual_seed(0)
    for number in range(30):
        (folder / f"class_{number:02d}").mkdir(parents=True)
        for image in range(4):
            pixels = torch.randint(256, (8, 8), generator=random, dtype=torch.uint8, device="cpu")
            Image.fromarray(pixels.numpy()).save(folder / f"class_{number:02d}" / f"{image}.png")
    return folder


def test_a_data_folder_that_vanishes(tmp_path: Path) -> None:
    class Vanishing(Callback):
        def on_train_batch_end(
            self, trainer: Trainer, module: LightningModule, batch: Any, *_: Any
        ) -> None:
            shutil.rmtree(tmp_path / "photographs", ignore_errors=True)

    def data() -> ImageFolderDataModule:
        sizes = {"ways": 3, "queries": 1, "meta_batch_size": 2, "train_batches": 4, "val_tasks": 2}
        return ImageFolderDataModule(tmp_path / "photographs", image_size=8, **sizes)

    photographs(tmp_path / "photographs")
    run = trainer(tmp_path, precision="32-true", callbacks=[Vanishing()], max_epochs=2)
    run.fit(MAML(nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 3)), 0.1), data())
    assert run.global_step == 8, "what is in memory stays there"
    with pytest.raises((FileNotFoundError, ValueError), match=r"Expected .*photographs"):
        trainer(tmp_path, precision="32-true").fit(
            MAML(nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 3)), 0.1), data()
        )


INTERRUPTED = """
import sys, time, torch
from pathlib import Path
from lightning import Callback
from helpers.runs import Noise, network
from helpers.trainers import trainer_in_double as trainer
from lightning_maml import CheckpointOnInterrupt, MAML

class Slow(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        (folder / "started").write_text(f"step {trainer.global_step}")
        time.sleep(0.2)

    def on_validation_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0):
        (folder / "started").write_text(f"validation after {trainer.global_step}")
        time.sleep(0.2)

folder = Path(sys.argv[1])
torch.manual_seed(0)
run = trainer(folder, precision="32-true", callbacks=[Slow(), CheckpointOnInterrupt()], max_epochs=2)
model = MAML(network(dropout=0.3), 0.1)
run.fit(model, Noise(), ckpt_path=sys.argv[2] if len(sys.argv) > 2 else None)
torch.save(model.state_dict(), folder / "end.pt")
"""


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    "at",
    [
        pytest.param("step 3", id="step"),
        pytest.param("validation after 6", id="validation"),
        pytest.param("validation after 12", id="last validation", marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_run_leaves_a_checkpoint_to_go_on_from(tmp_path: Path, at: str) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir()
    stopped.mkdir()
    another_process.output(INTERRUPTED, whole)
    run = another_process.start(INTERRUPTED, stopped, prints_into=tmp_path)
    try:
        while not (stopped / "started").exists() or (stopped / "started").read_text() != at:
            assert run.is_alive()
            time.sleep(0.02)
        os.kill(run.pid, signal.SIGINT)
        run.join(60)
    finally:
        run.kill()
    assert run.exitcode == 128 + signal.SIGINT
    checkpoint = stopped / "checkpoints" / "interrupted.ckpt"
    assert f"ckpt_path={checkpoint}" in (tmp_path / "stderr").read_text()
    assert not (stopped / "end.pt").exists()
    another_process.output(INTERRUPTED, stopped, checkpoint)
    assert is_same(
        *(torch.load(folder / "end.pt", weights_only=True) for folder in (stopped, whole))
    )


@pytest.mark.parametrize("kept", ["best", None])
def test_an_interrupted_run_leaves_it_beside_its_checkpoints(
    tmp_path: Path, kept: str | None
) -> None:
    class CtrlC(Callback):
        def on_train_batch_start(self, *_) -> None:
            signal.raise_signal(signal.SIGINT)

    checkpoints = (
        [OnExceptionCheckpoint(tmp_path), ModelCheckpoint(tmp_path / kept)]
        if kept is not None
        else []
    )
    run = trainer(
        tmp_path,
        callbacks=[CheckpointOnInterrupt(), CtrlC(), *checkpoints],
        precision="64-true",
        enable_checkpointing=kept is not None,
    )
    with pytest.raises(SystemExit):
        run.fit(
            MAML(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), 0.1),
            torch.utils.data.DataLoader([make_episodes()], batch_size=None),
        )
    assert [*tmp_path.rglob("interrupted.ckpt")] == [
        tmp_path / (kept or "checkpoints") / "interrupted.ckpt"
    ]


def test_a_validation_after_an_interrupted_run_leaves_its_checkpoint(tmp_path: Path) -> None:
    """As in a notebook, where the exit is caught and the trainer is used again."""

    class CtrlC(Callback):
        def on_train_batch_start(self, *_) -> None:
            signal.raise_signal(signal.SIGINT)

    loader = torch.utils.data.DataLoader([make_episodes()], batch_size=None)
    run = trainer(tmp_path, callbacks=[CheckpointOnInterrupt(), CtrlC()], precision="64-true")
    with pytest.raises(SystemExit):
        run.fit(MAML(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), 0.1), loader)
    (checkpoint,) = tmp_path.rglob("interrupted.ckpt")
    before = checkpoint.read_bytes()
    other = MAML(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), 0.1)
    (found,) = run.validate(other, loader, verbose=False)
    assert "val/accuracy" in found
    assert checkpoint.read_bytes() == before


@pytest.mark.parametrize("fails", [False, True])
def test_the_signal_is_as_before_after_a_run(tmp_path: Path, fails: bool) -> None:
    class Fails(Callback):
        def on_train_batch_end(self, *_) -> None:
            if fails:
                raise ZeroDivisionError

    before, model = (
        signal.getsignal(signal.SIGINT),
        MAML(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), 0.1),
    )
    with pytest.raises(ZeroDivisionError) if fails else nullcontext():
        trainer(tmp_path, callbacks=[CheckpointOnInterrupt(), Fails()], precision="64-true").fit(
            model, torch.utils.data.DataLoader([make_episodes()], batch_size=None)
        )
    assert signal.getsignal(signal.SIGINT) is before
