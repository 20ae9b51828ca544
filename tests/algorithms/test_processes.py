"""Several processes that share the tasks of a step are one process with all of them."""

import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from helpers import another_process
from helpers.folders import ENVIRONMENT, ROOT
from helpers.networks import build, relative_error
from helpers.run_of_processes import CASES, run
from helpers.runs import Noise, network
from helpers.trainers import trainer_in_double as trainer
from lightning_maml import HFMAML, MAML, AdaptiveMetaStepsize
from lightning_maml.callbacks import (
    EpisodePictures,
    MetaGradientMonitor,
    StationarityMonitor,
    TrainingPictures,
)

pytestmark = pytest.mark.cpu_only  # processes that Lightning starts on the CPU

DYING = """
import os, signal, sys
from lightning import Callback, Trainer
from helpers.runs import Noise, network
from lightning_maml import MAML

class Dying(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_rank == 1 and trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGKILL)

quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=5, callbacks=[Dying()], **quiet).fit(MAML(network(), 0.1), Noise())
print("came to the end")
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, threads = tmp_path_factory.mktemp("alone"), torch.get_num_threads()
    torch.set_num_threads(1)  # as in each of several: the order of sums depends on it
    run(folder, 1)
    torch.set_num_threads(threads)
    return folder


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_shared_tasks_give_the_meta_gradient_of_one_process(
    processes: int, alone: Path, tmp_path: Path
) -> None:
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
    ]
    script = ROOT / "tests" / "helpers" / "run_of_processes.py"
    done = subprocess.run(
        [*launcher, str(script), str(tmp_path), str(processes)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for case, (algorithm, _) in enumerate(CASES):
        ranks = [
            torch.load(tmp_path / f"case_{case}_rank_{rank}_of_{processes}.pt", weights_only=True)
            for rank in range(processes)
        ]
        one = torch.load(alone / f"case_{case}_rank_0_of_1.pt", weights_only=True)
        for step, tasks in enumerate(one["tasks"]):
            shared = torch.stack([rank["tasks"][step] for rank in ranks], 1).flatten(0, 1)
            assert torch.equal(shared, tasks), "each task in one process"
            # HF-MAML's differences make 1e-11 of the last bit in which the parameters differ after
            # a step
            bound = 1e-9 if algorithm is HFMAML and step else 1e-12
            assert all(
                relative_error(rank["gradients"][step], one["gradients"][step]) < bound
                for rank in ranks
            )
        assert all(relative_error(rank["end"], one["end"]) < 1e-11 for rank in ranks)
        assert all(rank["tested"] == pytest.approx(one["tested"], abs=1e-7) for rank in ranks)
        assert len(one["history"]) == 2
        assert all(
            rank["history"]
            == [pytest.approx(validation, abs=1e-6) for validation in one["history"]]
            for rank in ranks
        )


ACCUMULATING = """
import sys, torch
from functools import partial
from pathlib import Path
from lightning import Callback, Trainer
from helpers.networks import flat
from helpers.runs import Noise, network
from lightning_maml import MAML

class Save(Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx == 2:
            trainer.save_checkpoint(folder / "middle.ckpt")

class End(Callback):
    def __init__(self, name):
        self.name = name

    def on_train_end(self, trainer, module):
        torch.save(flat(dict(module.named_parameters())), folder / f"{self.name}_{trainer.global_rank}.pt")

def fit(callbacks, path=None):
    torch.manual_seed(0)
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, precision="64-true")
    model = MAML(network(), 0.1, optimizer=partial(torch.optim.SGD, lr=0.1))
    run = Trainer(accelerator="cpu", devices=2, strategy="ddp_fork", max_epochs=1, accumulate_grad_batches=2, callbacks=callbacks, **quiet)
    run.fit(model, Noise(), ckpt_path=path)

folder = Path(sys.argv[1])
fit([Save(), End("whole")])
fit([End("resumed")], folder / "middle.ckpt")
"""


def test_a_run_that_goes_on_amid_an_accumulation_has_the_gradients_of_all(tmp_path: Path) -> None:
    another_process.output(ACCUMULATING, tmp_path)
    expected = torch.load(tmp_path / "whole_0.pt")
    for end in ("whole_1", "resumed_0", "resumed_1"):
        torch.testing.assert_close(torch.load(tmp_path / f"{end}.pt"), expected, rtol=0, atol=1e-14)


def test_what_is_sent_to_other_processes_trains_as_it_does_here(tmp_path: Path) -> None:
    model = MAML(network(), 0.1, optimizer=partial(torch.optim.SGD, lr=0.1))
    watching = [
        AdaptiveMetaStepsize(scale=1.0, tasks=2),
        StationarityMonitor(tasks=2, every_n_steps=2),
        MetaGradientMonitor(tasks=2),
    ]
    here = (model, Noise(train_batches=2), [*watching, EpisodePictures(), TrainingPictures()])
    ends = []
    for number, (module, data, callbacks) in enumerate((pickle.loads(pickle.dumps(here)), here)):
        torch.manual_seed(0)
        trainer(tmp_path / str(number), precision="32-true", callbacks=callbacks).fit(module, data)
        ends.append(dict(module.state_dict()))
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], tensor) for name, tensor in ends[1].items())


def test_a_process_that_dies_ends_the_run(tmp_path: Path) -> None:
    script = tmp_path / "dying.py"
    script.write_text(DYING)
    done = subprocess.run(
        [sys.executable, str(script)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode != 0
    assert "came to the end" not in done.stdout


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy])
def test_strategies_that_split_parameters_are_refused(strategy: type) -> None:
    module = MAML(build("mlp"), 0.1)
    module.trainer = Trainer(accelerator="cpu", logger=False)
    # a trainer itself takes them on GPUs only
    module.trainer._accelerator_connector.strategy = strategy.__new__(strategy)
    with pytest.raises(
        TypeError,
        match=rf"Expected a strategy that keeps whole parameters .* but got {strategy.__name__}; .*'ddp'",
    ):
        module.setup("fit")
