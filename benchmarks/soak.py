"""Kill runs at random moments, and resume them from their last checkpoint.

Do they end as the run that was not killed, bit for bit?

.venv/bin/python benchmarks/soak.py                # 200 kills; prints a table
"""

import argparse
import logging
import mmap
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from tqdm import tqdm

from lightning_maml import AdaptiveMetaStepsize
from lightning_maml.io.checkpoints import WholeCheckpoints

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from helpers.runs import MODELS, STEPS, Noise, is_same

EPOCHS = 3
PHASES = ("training", "validating", "writing a checkpoint")


class Watched(WholeCheckpoints):
    """Checkpoint writer that says when it writes."""

    def __init__(self, phase: mmap.mmap) -> None:
        self.phase = phase

    def save_checkpoint(self, *arguments: Any, **options: Any) -> None:
        """Write a checkpoint."""
        before, self.phase[0] = self.phase[0], 2
        super().save_checkpoint(*arguments, **options)
        self.phase[0] = before


class Phases(Callback):
    """Callback that says when the run validates."""

    def __init__(self, phase: mmap.mmap) -> None:
        self.phase = phase

    def on_validation_start(self, *_: Any) -> None:
        """Say that validation begins."""
        self.phase[0] = 1

    def on_validation_end(self, *_: Any) -> None:
        """Say that training goes on."""
        self.phase[0] = 0


def train(folder: Path, name: str, phase: mmap.mmap) -> None:
    """Train to the end and write ``end.pt``.

    Start from the last checkpoint in ``folder`` if there is one, but from another random seed.
    """
    torch.set_num_threads(1)
    last = folder / "last.ckpt"
    torch.manual_seed(os.getpid() if last.exists() else 0)
    trainer = Trainer(
        default_root_dir=folder,
        max_epochs=EPOCHS,
        val_check_interval=2,
        num_sanity_val_steps=0,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[Watched(phase)],
        callbacks=[
            ModelCheckpoint(folder, every_n_train_steps=1, save_last=True, filename="step_{step}"),
            ModelCheckpoint(folder, monitor="val/loss", filename="best"),
            Phases(phase),
            *(
                [AdaptiveMetaStepsize(scale=1.0, tasks=2, every_n_steps=3)]
                if "adaptive" in name
                else []
            ),
        ],
    )
    model = MODELS[name]()
    trainer.fit(model, Noise(noise=0.1), ckpt_path=last if last.exists() else None)
    assert trainer.global_step == EPOCHS * STEPS
    torch.save(
        {"model": model.state_dict(), "optimizer": trainer.optimizers[0].state_dict()},
        folder / "end.pt",
    )


def in_child(function: Callable[[], None], kill_after: float | None = None) -> bool:
    """Call ``function`` in a process of its own; return whether it came to its end.

    The process is killed after ``kill_after`` seconds if given.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            function()
            status = 0
        finally:
            os._exit(status)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if status not in (0, signal.SIGKILL):
        raise RuntimeError(
            f"Expected the run to end or to be killed but it ended with status {status}."
        )
    return status == 0


def whole_run(folder: Path, name: str) -> float:
    """Train without a kill; return how many seconds it took."""
    start = time.perf_counter()
    in_child(lambda: train(folder, name, mmap.mmap(-1, 1)))
    return time.perf_counter() - start


def killed_run(reference: Path, seconds: float, name: str, seed: int) -> str:
    """Kill a run at a random moment, resume it and compare the end.

    Return when it was killed, or what was wrong.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder, phase = Path(temporary), mmap.mmap(-1, 1)
        if in_child(lambda: train(folder, name, phase), random.Random(seed).uniform(0, seconds)):
            return "too late"
        when = PHASES[phase[0]]
        checkpoints = [*folder.glob("*.ckpt")]
        if not (folder / "last.ckpt").exists():
            return "too early"
        try:
            for checkpoint in checkpoints:
                torch.load(checkpoint, weights_only=True)
        except Exception as error:  # noqa: BLE001 # whatever it is, it is a finding
            return f"UNREADABLE: {error}"
        in_child(lambda: train(folder, name, mmap.mmap(-1, 1)))
        is_exact = is_same(
            *(torch.load(path / "end.pt", weights_only=True) for path in (folder, reference))
        )
        return when if is_exact else f"NOT THE SAME, killed while {when}"


def soak(
    kills: int, processes: int, seed: int, names: Iterable[str] = MODELS
) -> Counter[tuple[str, str]]:
    """Kill and resume runs, and count the outcomes.

    ``kills`` runs are killed after their first checkpoint and before their end.
    """
    found: Counter[tuple[str, str]] = Counter()
    with (
        tempfile.TemporaryDirectory() as temporary,
        multiprocessing.get_context("fork").Pool(processes) as pool,
    ):
        folders = {name: Path(temporary) / str(number) for number, name in enumerate(names)}
        seconds = pool.starmap(whole_run, [(folder, name) for name, folder in folders.items()])
        trials = (
            (folder, taken, name)
            for (name, folder), taken in zip(folders.items(), seconds, strict=True)
        )
        rounds = [(*trial, seed + number) for trial in trials for number in range(kills)]
        random.Random(seed).shuffle(rounds)
        killed = 0
        with tqdm(total=kills, desc="Kills") as bar:
            for trial, outcome in zip(rounds, pool.imap(_killed_run, rounds), strict=True):
                found[trial[2], outcome] += 1
                killed += not outcome.startswith("too")
                bar.update(not outcome.startswith("too"))
                if killed == kills:
                    break
        pool.terminate()
    return found


def _killed_run(trial: tuple[Path, float, str, int]) -> str:
    return killed_run(*trial)


def main() -> None:
    """Soak and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)  # of the runs' trainers
    start = time.perf_counter()
    found = soak(arguments.kills, arguments.processes, arguments.seed)
    print(f"\n| killed while | {' | '.join(MODELS)} | all |\n|{'---|' * (len(MODELS) + 2)}")
    for outcome in sorted({outcome for _, outcome in found}):
        counts = [found[name, outcome] for name in MODELS]
        print(f"| {outcome} | {' | '.join(map(str, counts))} | {sum(counts)} |")
    exact = sum(count for (_, outcome), count in found.items() if outcome in PHASES)
    print(
        f"\n{exact} of {arguments.kills} killed runs ended as the ones that were not, in "
        f"{time.perf_counter() - start:.0f} s"
    )
    raise SystemExit(exact != arguments.kills)


if __name__ == "__main__":
    main()
