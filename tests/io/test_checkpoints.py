"""Checkpoints of any algorithm load in another process, running nothing, and predict the same."""

import os
import re
import signal
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning import Callback, Trainer
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from torch import nn
from torch.utils.data import DataLoader

import lightning_maml
from helpers import another_process
from helpers.folders import ENVIRONMENT
from helpers.networks import build, make_episodes
from helpers.trainers import trainer_in_double as trainer
from lightning_maml import ANIL, FOMAML, HFMAML, IMAML, MAML, MLP, Conv4, MAMLPlusPlus
from lightning_maml.algorithms.base import EpisodicModule
from lightning_maml.io.checkpoints import WholeCheckpoints, read_checkpoint


def subclasses(of: type) -> set[type]:
    return {of} | {name for direct in of.__subclasses__() for name in subclasses(direct)}


ALGORITHMS = sorted(
    cls.__name__
    for cls in subclasses(EpisodicModule)
    if vars(lightning_maml).get(cls.__name__) is cls
)
POLICIES = {"MAMLPlusPlus": "per_step", "ProtoNet": "running", "HFMAML": "running"}

LOADING = """
import sys, torch, lightning_maml
path, name, ways = sys.argv[1:]
assert torch.load(path, weights_only=True)["state_dict"]
ways = None if name == "ProtoNet" else int(ways)
network = lightning_maml.Conv4(1, ways, 8, channels=4, activation="gelu")
algorithm = getattr(lightning_maml, name)
model = algorithm.load_from_checkpoint(path, network=network, weights_only=True).eval()
batch = lightning_maml.Episodes(*torch.load(path + ".tasks", weights_only=True))
torch.save((model.evaluate(batch).aux, dict(model.hparams)), path + ".outputs")
"""


def test_list_of_algorithms_is_complete() -> None:
    named = "ANIL BOIL FOMAML HFMAML IMAML LSLR MAML MAMLPlusPlus MetaSGD ProtoNet Reptile"
    assert named.split() == ALGORITHMS


@pytest.mark.parametrize("name", ALGORITHMS)
def test_another_process_loads_a_checkpoint_and_predicts_the_same(
    name: str, tmp_path: Path
) -> None:
    algorithm, policy = vars(lightning_maml)[name], POLICIES.get(name, "batch")
    network = Conv4(1, None if name == "ProtoNet" else 3, 8, channels=4, activation="gelu")
    steps = {} if name == "ProtoNet" else {"inner_lr": 0.05, "train_steps": 2, "test_steps": 3}
    steps |= {"multi_step_epochs": 1} if algorithm is MAMLPlusPlus else {}
    model = algorithm(
        network, batch_norm=policy, optimizer=partial(torch.optim.Adam, lr=0.01), **steps
    )
    episodes = make_episodes()
    single = episodes._replace(
        support_x=episodes.support_x.float(), query_x=episodes.query_x.float()
    )
    run = trainer(tmp_path, precision="32-true", max_epochs=2)
    run.fit(model, DataLoader([single], batch_size=None))
    path = tmp_path / "model.ckpt"
    run.save_checkpoint(path)
    torch.save(tuple(single), f"{path}.tasks")
    another_process.output(LOADING, path, name, 3, folder=tmp_path)
    outputs, hparams = torch.load(f"{path}.outputs", weights_only=True)
    torch.testing.assert_close(outputs, model.eval().evaluate(single).aux, rtol=1e-5, atol=1e-5)
    assert hparams["batch_norm"] == policy


KILLED_WHILE_WRITING = """
import os, signal, sys
from lightning_maml.io.checkpoints import WholeCheckpoints
os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)
WholeCheckpoints().save_checkpoint({"step": 2, "weights": list(range(10_000))}, sys.argv[1])
"""

FULL_DISK = """
import sys, torch
from pathlib import Path
from torch.utils.data import DataLoader
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from helpers.networks import make_episodes
from lightning_maml import MAML, MLP
folder = Path(sys.argv[1])
episodes = make_episodes()
support_x, query_x = episodes.support_x.float(), episodes.query_x.float()
data = DataLoader([episodes._replace(support_x=support_x, query_x=query_x)], batch_size=None)
every = ModelCheckpoint(folder, every_n_epochs=1, save_top_k=-1, filename="{epoch}", save_last=True)
model = MAML(MLP(64, 3, hidden=(200, 100)), 0.1)
trainer = Trainer(
    max_epochs=20,
    logger=False,
    callbacks=[every],
    default_root_dir=folder,
    accelerator="cpu",
    enable_progress_bar=False,
)
try:
    trainer.fit(model, data)
except OSError as error:
    print("SAID:", error)
    whole = [torch.load(file, weights_only=True) for file in folder.glob("epoch=*.ckpt")]
    print("WHOLE:", *(checkpoint["epoch"] for checkpoint in whole))
    print("LAST:", torch.load(folder / "last.ckpt", weights_only=True)["epoch"])
    print("LEFT:", [file.name for file in folder.iterdir() if file.suffix != ".ckpt"])
    print("WEIGHTS:", all(p.isfinite().all() for p in model.parameters()))
"""


@pytest.mark.parametrize(
    ("saved", "arguments", "loaded", "message"),
    [
        (
            MAML,
            {"loss": F.mse_loss},
            MAML,
            (
                "adapts with loss mse_loss but this one with loss cross_entropy; if unintended, "
                "use the checkpoint's settings"
            ),
        ),
        (
            MAML,
            {"loss": nn.CrossEntropyLoss(label_smoothing=0.1)},
            partial(MAML, loss=nn.CrossEntropyLoss()),
            (
                "'label_smoothing': 0.1} but this one with loss CrossEntropyLoss with "
                "{'reduction': 'mean', 'ignore_index': -100, 'label_smoothing': 0.0};"
            ),
        ),
        (
            MAML,
            {"loss": partial(F.cross_entropy, label_smoothing=0.1)},
            MAML,
            (
                "loss cross_entropy with {'label_smoothing': 0.1} but this one with loss "
                "cross_entropy;"
            ),
        ),
        (MAML, {"loss": nn.MSELoss()}, partial(MAML, loss=nn.MSELoss()), None),
        (ANIL, {}, MAML, "with adapt head but this one with adapt all;"),
        (MAML, {}, IMAML, "with no proximal_strength but this one with proximal_strength 2.0;"),
        (MAML, {"loss": F.mse_loss}, partial(MAML, loss=F.mse_loss), None),
        (MAML, {}, FOMAML, None),
    ],
)
def test_loading_warns_if_the_checkpoint_adapts_in_another_way(
    saved, arguments, loaded, message: str | None, tmp_path: Path
) -> None:
    run = trainer(tmp_path, max_epochs=0)
    run.fit(saved(MLP(4, 2), **arguments), DataLoader([make_episodes()], batch_size=None))
    run.save_checkpoint(tmp_path / "model.ckpt")
    given = loaded.keywords if isinstance(loaded, partial) else {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        getattr(loaded, "func", loaded).load_from_checkpoint(
            tmp_path / "model.ckpt", network=MLP(4, 2), **given
        )
    found = [str(warning.message) for warning in caught if "adapts with" in str(warning.message)]
    assert len(found) == (message is not None)
    assert message is None or message in found[0]


def test_what_is_killed_while_it_writes_leaves_the_file_before(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    WholeCheckpoints().save_checkpoint({"step": 1}, path)
    assert another_process.run(KILLED_WHILE_WRITING, path).returncode == -signal.SIGKILL
    assert read_checkpoint(path) == {"step": 1}
    WholeCheckpoints().save_checkpoint({"step": 3}, path)
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"], (
        "what was left half done is gone"
    )


def test_a_full_disk_stops_the_run_and_costs_no_checkpoint(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(FULL_DISK)
    disk = tmp_path / "disk"
    disk.mkdir()
    alone = [
        "unshare",
        "--user",
        "--map-root-user",
        "--mount",
        "sh",
        "-c",
        f"mount -t tmpfs -o size=2m tmpfs {disk} && exec $0 $@",
    ]
    if subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody mount a disk of their own")
    run = subprocess.run(
        [*alone, sys.executable, str(script), str(disk)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    said = dict(
        line.split(": ", 1)
        for line in run.stdout.splitlines()
        if line.split(":")[0] in ("SAID", "WHOLE", "LAST", "LEFT", "WEIGHTS")
    )
    assert re.match(
        r"Expected to write the checkpoint .*\.ckpt but it cannot be written: .*; "
        r"make room and go on from the last checkpoint",
        said["SAID"],
    )
    epochs = sorted(map(int, said["WHOLE"].split()))
    assert epochs == [*range(len(epochs))]
    assert len(epochs) > 1
    assert int(said["LAST"]) in (epochs[-1], epochs[-1] - 1)
    assert said["LEFT"] == "[]"
    assert said["WEIGHTS"] == "True"


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9, 0.999])
def test_what_is_cut_off_is_refused_and_the_one_before_is_offered(
    share: float, tmp_path: Path
) -> None:
    run, model, data = short_run(tmp_path)
    for epoch in (1, 2, 3):
        run.fit_loop.max_epochs = epoch
        run.fit(model, data)
        run.save_checkpoint(tmp_path / f"{epoch}.ckpt")
        os.utime(tmp_path / f"{epoch}.ckpt", (epoch, epoch))
    for name in ("2.ckpt", "3.ckpt"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: int(share * len(whole))])
    run, model, data = short_run(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"Expected .*3\.ckpt to be a whole checkpoint .*; "
        r"go on from .*1\.ckpt, the newest whole one",
    ):
        run.fit(model, data, ckpt_path=tmp_path / "3.ckpt")
    (tmp_path / "1.ckpt").unlink()
    with pytest.raises(
        ValueError,
        match=r"Expected .*3\.ckpt to be a whole checkpoint .*; there is no whole one beside it",
    ):
        read_checkpoint(tmp_path / "3.ckpt")


def test_a_missing_checkpoint_raises_file_not_found(tmp_path: Path) -> None:
    run, model, data = short_run(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no\.ckpt"):
        run.fit(model, data, ckpt_path=tmp_path / "no.ckpt")


def test_a_checkpoint_plugin_of_the_trainer_is_kept(tmp_path: Path) -> None:
    class Own(TorchCheckpointIO):
        pass

    own = Own()
    run, model, data = short_run(tmp_path, plugins=[own])
    run.fit(model, data)
    assert run.strategy.checkpoint_io is own
    run, model, data = short_run(tmp_path)
    run.fit(model, data)
    assert isinstance(run.strategy.checkpoint_io, WholeCheckpoints)


def short_run(folder: Path, **options: Any) -> tuple[Trainer, MAML, DataLoader]:
    return (
        trainer(folder, **options),
        MAML(build("mlp"), 0.1),
        DataLoader([make_episodes()], batch_size=None),
    )


def saved(folder: Path, model: EpisodicModule, **options: Any) -> Path:
    run = trainer(folder, **options)
    run.fit(model, DataLoader([make_episodes()], batch_size=None))
    run.save_checkpoint(folder / "model.ckpt")
    return folder / "model.ckpt"


STEP = torch.optim.lr_scheduler.StepLR
RATE = np.logspace(-2, 0, 3)[1]
OF_NUMPY = {
    "inner_lr": (MAML, {"inner_lr": RATE}),
    "float32": (MAML, {"inner_lr": np.float32(0.1)}),
    "array": (MAML, {"inner_lr": np.array(0.1)}),
    "tensor": (MAML, {"inner_lr": torch.tensor(0.1)}),
    "steps": (MAML, {"train_steps": np.arange(3)[2], "test_steps": torch.tensor(3)}),
    "chunk_size": (MAML, {"chunk_size": np.int64(2)}),
    "words": (MAML, {"tasks": np.array(["loop"])[0], "compiled": np.bool_(False)}),
    "probe_radius": (HFMAML, {"probe_radius": np.float64(1e-4)}),
    "iMAML": (IMAML, {"proximal_strength": np.float64(2), "cg_steps": np.int64(2)}),
    "MAML++": (MAMLPlusPlus, {"multi_step_epochs": np.int64(1), "first_order_epochs": np.int32(0)}),
    "optimizer": (
        MAML,
        {
            "optimizer": partial(
                torch.optim.Adam, lr=np.float64(1e-3), betas=(np.float64(0.9), 0.99)
            )
        },
    ),
    "schedule": (
        MAML,
        {"lr_scheduler": partial(STEP, step_size=np.int64(1), gamma=np.float64(0.5))},
    ),
    "function": (
        MAML,
        {
            "lr_scheduler": partial(
                torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda epoch: RATE**epoch
            )
        },
    ),
}


class Own(TorchCheckpointIO):
    """A trainer's own way of writing checkpoints."""


@pytest.mark.parametrize("plugins", [[], [Own()]], ids=["ours", "their own"])
@pytest.mark.parametrize("name", OF_NUMPY)
def test_numbers_of_numpy_are_saved_as_pythons_and_read_again(
    name: str, plugins: list[Any], tmp_path: Path
) -> None:
    algorithm, arguments = OF_NUMPY[name]

    def model() -> MAML:
        return algorithm(build("mlp"), **arguments)

    data = DataLoader([make_episodes()], batch_size=None)
    path = saved(tmp_path, model(), plugins=plugins)
    held = torch.load(path, weights_only=True)["hyper_parameters"]
    assert {type(value) for value in held.values()} <= {int, float, bool, str, type(None)}
    loaded = algorithm.load_from_checkpoint(path, network=build("mlp"))
    assert dict(loaded.hparams) == dict(model().hparams)
    trainer(tmp_path).test(model(), data, ckpt_path=path, verbose=False)
    run = trainer(tmp_path, max_epochs=2)
    run.fit(model(), data, ckpt_path=path)
    assert run.global_step == 2


@pytest.mark.parametrize(
    ("algorithm", "arguments", "message"),
    [
        (MAML, {"inner_lr": "0.1"}, "Expected `inner_lr` to be a number but got '0.1'"),
        (
            MAML,
            {"inner_lr": np.ones(2)},
            r"Expected `inner_lr` to be a number but got ndarray of shape \[2\]",
        ),
        (MAML, {"inner_lr": None}, "Expected `inner_lr` to be a number but got None"),
        (MAML, {"train_steps": 2.0}, "Expected `train_steps` to be a whole number but got 2.0"),
        (MAML, {"test_steps": np.float64(2)}, "Expected `test_steps` to be a whole number but got"),
        (MAML, {"chunk_size": 1.5}, "Expected `chunk_size` to be a whole number but got 1.5"),
        (
            HFMAML,
            {"probe_radius": "small"},
            "Expected `probe_radius` to be a number but got 'small'",
        ),
        (
            IMAML,
            {"proximal_strength": "2"},
            "Expected `proximal_strength` to be a number but got '2'",
        ),
        (IMAML, {"cg_steps": 2.5}, "Expected `cg_steps` to be a whole number but got 2.5"),
        (
            MAMLPlusPlus,
            {"multi_step_epochs": 1.5},
            "Expected `multi_step_epochs` to be a whole number but got 1.5",
        ),
    ],
)
def test_arguments_that_are_no_numbers_are_refused(
    algorithm, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        algorithm(build("mlp"), **arguments)


class Keeps(Callback):
    def __init__(self, kept: Any) -> None:
        self.kept = kept

    def state_dict(self) -> dict[str, Any]:
        return {"history": [1.0, {"kept": self.kept}]}


def test_numpy_numbers_in_a_callback_are_saved_as_pythons(tmp_path: Path) -> None:
    kept = {
        np.int64(1): [np.float64(0.5), (np.float32(0.25), np.bool_(True))],
        "weights": torch.ones(2),
    }
    path = saved(tmp_path, MAML(build("mlp"), 0.1), callbacks=[Keeps(kept)])
    held = torch.load(path, weights_only=True)["callbacks"]["Keeps"]["history"][1]["kept"]
    assert held[1] == [0.5, (0.25, True)]
    assert held["weights"].tolist() == [1, 1]
    assert type(next(iter(kept))) is np.int64, "the callback's own are left as they are"


@pytest.mark.parametrize(
    "kept", [Path("x"), np.ones(2), bytearray(2)], ids=["object", "array", "bytes"]
)
def test_an_entry_that_cannot_be_read_without_running_it_is_named(
    kept: Any, tmp_path: Path
) -> None:
    where = r"`checkpoint\['callbacks'\]\['Keeps'\]\['history'\]\[1\]\['kept'\]` is a "
    with pytest.warns(
        UserWarning,
        match=f"{where}{type(kept).__name__}, so it can only be read with `weights_only=False`",
    ):
        path = saved(tmp_path, MAML(build("mlp"), 0.1), callbacks=[Keeps(kept)])
    with pytest.raises(ValueError, match="to be a whole checkpoint but it cannot be read"):
        MAML.load_from_checkpoint(path, network=build("mlp"))
    assert MAML.load_from_checkpoint(path, network=build("mlp"), weights_only=False).inner_lr == 0.1


def test_an_entry_that_cannot_be_saved_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(
        TypeError,
        match=r"`checkpoint\['callbacks'\]\['Keeps'\].*\['kept'\]` is a function, "
        "which cannot be saved",
    ):
        saved(tmp_path, MAML(build("mlp"), 0.1), callbacks=[Keeps(lambda: 1)])
    assert not [*tmp_path.glob("*model.ckpt*")]


def test_reading_names_the_functions_that_a_checkpoint_asks_for(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "history": np.float64(1)}, tmp_path / "model.ckpt")
    with pytest.raises(
        ValueError,
        match=r"nothing in it was run \(it asks for numpy.*scalar.*; "
        "where you trust it, read it with",
    ):
        read_checkpoint(tmp_path / "model.ckpt")


@pytest.mark.parametrize("where", [None, "model", "state_dict"])
@pytest.mark.parametrize("of_model", [False, True])
def test_weights_saved_without_a_trainer_are_refused_with_the_lines_that_load_them(
    of_model: bool, where: str | None, tmp_path: Path
) -> None:
    original = MAML(build("mlp", seed=1), 0.1)
    weights = (original if of_model else original.network).state_dict()
    path = tmp_path / "weights.pt"
    torch.save(weights if where is None else {"epoch": 3, where: weights}, path)
    run, model, data = short_run(tmp_path)
    for load in (
        lambda: MAML.load_from_checkpoint(path, network=build("mlp")),
        lambda: run.test(model, data, ckpt_path=path),
        lambda: run.fit(model, data, ckpt_path=path),
    ):
        with pytest.raises(
            ValueError, match="it holds weights saved without one; load them by"
        ) as caught:
            load()
        lines = re.findall(r"`((?:network|model)\.load_state_dict.*?\))`", str(caught.value))
        assert len(lines) == 1
    # the line that the message has
    exec(lines[0], {"torch": torch, "model": model, "network": model.network})  # noqa: S102
    for name, weight in original.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight)


def test_a_checkpoint_with_a_loss_that_has_weights_asks_for_the_same_loss(tmp_path: Path) -> None:
    def weighted() -> nn.Module:
        return nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]).double())

    path = saved(tmp_path, MAML(build("mlp"), 0.1, loss=weighted()))
    message = (
        r"but \['loss.weight'\] are in the checkpoint alone; make the model with the same `loss=`"
    )
    with pytest.raises(ValueError, match=message):
        MAML.load_from_checkpoint(path, network=build("mlp"))
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path).test(
            MAML(build("mlp"), 0.1), DataLoader([make_episodes()], batch_size=None), ckpt_path=path
        )
    loaded = MAML.load_from_checkpoint(path, network=build("mlp"), loss=weighted())
    assert loaded.loss.weight.tolist() == [1, 2, 3]
    MAML.load_from_checkpoint(path, network=build("mlp"), strict=False)
    with pytest.raises(ValueError, match="are in this model alone"):
        MAML.load_from_checkpoint(
            saved(tmp_path, MAML(build("mlp"), 0.1)), network=build("mlp"), loss=weighted()
        )
