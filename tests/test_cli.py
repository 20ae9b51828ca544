"""The command, run as users run it: every shipped config, checkpoints, logs and pictures."""

import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning import Callback
from PIL import Image
from torch import nn

import lightning_maml
from helpers.cifar100_files import write_cifar100
from helpers.cub_files import write_cub
from helpers.folders import CONFIGS
from helpers.mini_imagenet_files import CLASSES
from helpers.tiered_imagenet_files import draw_images, write_npz
from lightning_maml import FOMAML, HFMAML, MAML, Conv4, ProtoNet
from lightning_maml.cli import last_checkpoint, main, run
from lightning_maml.datamodules import omniglot
from lightning_maml.datamodules.images.cache import DecodedImages, write_cache
from lightning_maml.networks.kinks import kinks

NAMES = sorted(file.stem for file in CONFIGS.glob("*.yaml"))
SMOOTH_AND_NOT = [
    *(
        f"{name}_5w{shots}s"
        for name in ("cifar_fs", "fc100", "tiered_imagenet", "cub")
        for shots in (1, 5)
    ),
    *("sinusoid_5shot", "sinusoid_10shot"),
]
"""Settings with a smooth network for HF-MAML, and one with kinks for the others."""

SMALL = [
    *("--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"),
    *("--data.train_batches=3", "--data.val_tasks=4", "--data.test_tasks=20"),
]


@pytest.fixture(scope="session")
def omniglot_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of Omniglot's size, filled with noise."""
    root = tmp_path_factory.mktemp("omniglot")
    names = [
        f"{folder}/alphabet/character{number:04d}"
        for folder, count in omniglot.CHARACTERS.items()
        for number in range(count)
    ]
    images = torch.randint(0, 256, (len(names) * omniglot.DRAWINGS, 28, 28), dtype=torch.uint8)
    labels = torch.arange(len(names)).repeat_interleave(omniglot.DRAWINGS)
    write_cache(root / "omniglot_28.pt", omniglot._SOURCE, DecodedImages(images, labels, names, []))
    return root


@pytest.fixture(scope="session")
def mini_imagenet_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pickles with mini-ImageNet's classes, of 20 images of noise each."""
    root = tmp_path_factory.mktemp("mini_imagenet")
    for split, names in CLASSES.items():
        images = np.random.RandomState(0).randint(0, 256, (20 * len(names), 84, 84, 3), np.uint8)
        content = {
            "image_data": images,
            "class_dict": {name: list(range(20 * k, 20 * k + 20)) for k, name in enumerate(names)},
        }
        (root / f"mini-imagenet-cache-{split}.pkl").write_bytes(pickle.dumps(content))
    return root


@pytest.fixture(scope="module")
def other_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CIFAR-100, tiered-ImageNet and CUB-200-2011, with enough images for every config."""
    root = tmp_path_factory.mktemp("others")
    write_cifar100(root / "cifar-100-python", train=15, test=5)
    write_cub(root, per_class=21)
    write_npz(root / "tiered-imagenet", draw_images(per_class=20))
    return root


@pytest.fixture(autouse=True)
def no_arguments_of_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-maml"])


@pytest.fixture
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(name: str) -> str:
    return f"--config={CONFIGS / name}.yaml"


def test_all_promised_configs_are_there() -> None:
    omniglot_settings = [f"omniglot_{ways}w{shots}s" for ways in (5, 20) for shots in (1, 5)]
    settings = [
        "glyphs",
        *omniglot_settings,
        "mini_imagenet_5w1s",
        "mini_imagenet_5w5s",
        "mini_imagenet_quick_5w5s",
    ]
    names = [
        f"{setting}_{algorithm}"
        for setting in settings
        for algorithm in ("maml", "fomaml", "hfmaml")
    ]
    smooth = [
        f"{setting}_{algorithm}"
        for setting in SMOOTH_AND_NOT
        for algorithm in ("maml", "fomaml", "hfmaml_smooth")
    ]
    others = [f"mini_imagenet_5w{shots}s_hfmaml_smooth" for shots in (1, 5)]
    assert sorted([*names, *smooth, *others, "glyphs_protonet", "glyphs_maml_mse"]) == NAMES


@pytest.fixture
def root_of(
    omniglot_root: Path, mini_imagenet_root: Path, other_root: Path
) -> Callable[[str], Path | None]:
    def find(name: str) -> Path | None:
        dataset = name.split("_")[0]
        if dataset in ("glyphs", "sinusoid"):
            return None
        return {"omniglot": omniglot_root, "mini": mini_imagenet_root}.get(dataset, other_root)

    return find


def like_a_quicker_one(name: str) -> bool:
    """Return whether a config is one for 1 shot, with data that another one trains MAML on."""
    has_one_for_a_shot = "5s_" in name and name.replace("5s_", "1s_") in NAMES
    return has_one_for_a_shot and not name.endswith("_maml")


@pytest.mark.parametrize("name", filter(like_a_quicker_one, NAMES))
def test_more_shots_change_nothing_but_data_and_length(name: str) -> None:
    more, one = (
        yaml.safe_load((CONFIGS / f"{of}.yaml").read_text())
        for of in (name, name.replace("5s_", "1s_"))
    )
    for settings in (more, one):
        del (
            settings["data"],
            settings["trainer"]["default_root_dir"],
            settings["trainer"]["max_epochs"],
        )
    assert more == one


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * like_a_quicker_one(name)) for name in NAMES],
)
def test_every_shipped_config_runs(
    name: str, in_tmp_path: Path, root_of: Callable[[str], Path | None]
) -> None:
    root = root_of(name)
    few = [f"--data.root={root}", "--data.meta_batch_size=1"] if root else []
    if root and not name.startswith("omniglot"):  # photographs
        few.append("--model.network.channels=4")
    on_the_papers_network = name.startswith("mini_imagenet_5w") and name.endswith("_hfmaml")
    with (
        pytest.warns(UserWarning, match="needs a twice differentiable network")
        if on_the_papers_network
        else nullcontext()
    ):
        cli = run(
            [
                "fit",
                config(name),
                *few,
                "--trainer.fast_dev_run=1",
                "--trainer.enable_progress_bar=false",
            ]
        )
    algorithm = name.removesuffix("_smooth").removesuffix("_mse").rsplit("_", 1)[1]
    assert (
        type(cli.model)
        is {"maml": MAML, "fomaml": FOMAML, "hfmaml": HFMAML, "protonet": ProtoNet}[algorithm]
    )
    with_kinks = name.startswith(("mini_imagenet_5w", *SMOOTH_AND_NOT))
    assert bool(kinks(cli.model.network)) == (with_kinks and not name.endswith("_smooth"))
    assert cli.trainer.global_step == 1


@pytest.mark.parametrize("shots", [1, 5])
def test_mini_imagenet_has_the_values_of_the_maml_paper(
    shots: int, in_tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = yaml.safe_load(printed_config([config(f"mini_imagenet_5w{shots}s_maml")], capsys))
    model, data, trainer = (
        values["model"]["init_args"],
        values["data"]["init_args"],
        values["trainer"],
    )
    assert (
        model["inner_lr"],
        model["train_steps"],
        model["test_steps"],
        model["optimizer"]["init_args"]["lr"],
    ) == (0.05, 5, 10, 1e-3)
    assert (
        data["ways"],
        data["shots"],
        data["queries"],
        data["test_queries"],
        data["meta_batch_size"],
    ) == (5, shots, 15, shots, 4)
    assert data["train_batches"] * trainer["max_epochs"] == 60_000
    assert (trainer["gradient_clip_val"], trainer["gradient_clip_algorithm"]) == (10, "value")
    network = Conv4(**model["network"]["init_args"])
    assert (
        sum(p.numel() for p in network.parameters())
        == 32 * 27 + 3 * 32 * 32 * 9 + 4 * 3 * 32 + 800 * 5 + 5
    )


def test_fit_then_test_leaves_logs_checkpoints_and_pictures(in_tmp_path: Path) -> None:
    cli = run(["fit", config("glyphs_hfmaml"), *SMALL, "--trainer.log_every_n_steps=1"])
    folder = Path(cli.trainer.log_dir)
    assert folder == Path("runs/glyphs_hfmaml/version_0")
    assert {file.name for file in (folder / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert (folder / "metrics.csv").read_text().count("\n") > 3
    assert list(folder.glob("events.out.tfevents.*"))
    tested = run(
        [
            "test",
            f"--config={folder / 'config.yaml'}",
            f"--ckpt_path={folder / 'checkpoints' / 'best.ckpt'}",
            *SMALL,
        ]
    )
    pictures = Path(tested.trainer.log_dir)
    for name in ("episode.png", "adaptation.png"):
        with Image.open(pictures / name) as picture:
            assert picture.size[0] > 200
            assert len(picture.convert("RGB").getcolors(1_000_000)) > 10, "not blank"
    tested.trainer.validate(tested.model, tested.datamodule, verbose=False)
    saved = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert all(
        torch.equal(saved[name], tensor) for name, tensor in tested.model.state_dict().items()
    )


def test_the_command_line_decides_over_the_checkpoint(in_tmp_path: Path) -> None:
    cli = run(["fit", config("glyphs_maml"), *SMALL])
    checkpoint = Path(cli.trainer.log_dir) / "checkpoints" / "last.ckpt"
    arguments = [
        config("glyphs_maml"),
        *SMALL,
        f"--ckpt_path={checkpoint}",
        "--model.test_steps=7",
        "--model.batch_norm=support",
    ]
    tested = run(["test", *arguments])
    assert (tested.model.test_steps, tested.model.batch_norm) == (7, "support")
    assert "test/accuracy_step_07" in tested.trainer.callback_metrics


def test_a_checkpoint_trained_with_other_arguments_is_pointed_out(in_tmp_path: Path) -> None:
    cli = run(["fit", config("glyphs_maml"), *SMALL, "--model.inner_lr=0.123"])
    checkpoint = Path(cli.trainer.log_dir) / "checkpoints" / "last.ckpt"
    with pytest.warns(
        UserWarning,
        match=r"trained with other arguments than those given now, which are used: inner_lr=0.123 "
        r"\(0.4 now\)",
    ):
        run(["test", config("glyphs_maml"), *SMALL, f"--ckpt_path={checkpoint}"])


def test_a_checkpoint_trained_with_the_same_arguments_is_not(in_tmp_path: Path) -> None:
    cli = run(["fit", config("glyphs_maml"), *SMALL])
    checkpoint = Path(cli.trainer.log_dir) / "checkpoints" / "last.ckpt"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(["test", config("glyphs_maml"), *SMALL, f"--ckpt_path={checkpoint}"])
    assert not [
        text
        for text in map(str, caught)
        if "trained with other arguments" in text or "dirpath has changed" in text
    ]


def test_the_last_checkpoint_is_that_of_the_last_run(in_tmp_path: Path) -> None:
    with pytest.raises(
        SystemExit,
        match="Expected `ckpt_path` 'last' to be the last checkpoint of a run in runs/glyphs_maml "
        "but there is none",
    ):
        main(["fit", config("glyphs_maml"), *SMALL, "--ckpt_path=last"])
    first = run(["fit", config("glyphs_maml"), *SMALL])
    second = run(
        [
            "fit",
            config("glyphs_maml"),
            *SMALL,
            "--ckpt_path=last",
            f"--trainer.max_epochs={first.trainer.max_epochs + 1}",
        ]
    )
    assert second.trainer.log_dir != first.trainer.log_dir
    assert second.trainer.ckpt_path == f"{first.trainer.log_dir}/checkpoints/last.ckpt"
    assert (
        second.trainer.global_step
        == first.trainer.global_step * second.trainer.max_epochs // first.trainer.max_epochs
    )
    tested = run(["test", config("glyphs_maml"), *SMALL, "--ckpt_path=last"])
    assert tested.trainer.ckpt_path == f"{second.trainer.log_dir}/checkpoints/last.ckpt"


def test_the_last_checkpoint_is_found_in_any_folder_and_by_its_age(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    for age, name in enumerate(
        ["a/last.ckpt", "a/last-v1.ckpt", "b/c/interrupted.ckpt", "a/best.ckpt"]
    ):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        os.utime(file, (age, age))
        assert last_checkpoint(tmp_path) == (
            file if file.name != "best.ckpt" else tmp_path / "b" / "c" / "interrupted.ckpt"
        )


def test_the_last_checkpoint_is_kept_where_validation_does_not_improve(in_tmp_path: Path) -> None:
    still = [
        "--trainer.max_epochs=3",
        "--model.optimizer.init_args.lr=0",
        "--model.lr_scheduler=null",
    ]
    cli = run(["fit", config("glyphs_fomaml"), *SMALL, *still])
    files = [
        Path(cli.trainer.log_dir) / "checkpoints" / f"{name}.ckpt" for name in ("best", "last")
    ]
    assert [torch.load(file, weights_only=True)["global_step"] for file in files] == [3, 9]


@pytest.mark.parametrize(
    ("mode", "kept", "best_step"), [("min", True, 3), ("max", True, 6), ("min", False, 6)]
)
def test_the_best_checkpoint_of_a_run_that_goes_on_is_that_of_all_of_it(
    mode: str, kept: bool, best_step: int, in_tmp_path: Path
) -> None:
    best_one = {
        "class_path": "ModelCheckpoint",
        "init_args": {"monitor": "step", "mode": mode, "filename": "best"},
    }
    callbacks = yaml.safe_dump([best_one, str(CONFIGS / "parts" / "last.yaml")])
    settings = [
        config("glyphs_fomaml"),
        *SMALL,
        "--trainer.default_root_dir=./runs",
        f"--trainer.callbacks={callbacks}",
    ]
    first = Path(run(["fit", *settings]).trainer.log_dir) / "checkpoints" / "best.ckpt"
    before = first.read_bytes()
    if not kept:
        first.unlink()
    second = run(["fit", *settings, "--ckpt_path=last", "--trainer.max_epochs=2"]).trainer
    best, *others = Path(second.log_dir).glob("checkpoints/best*.ckpt")
    assert others == []
    assert Path(second.checkpoint_callback.best_model_path) == best != first
    assert second.checkpoint_callback.best_model_score == best_step
    assert (best.read_bytes() == before) == (best_step == 3)
    assert not kept or first.read_bytes() == before


def test_a_checkpoint_that_cannot_be_read_is_named(in_tmp_path: Path) -> None:
    cli = run(["fit", config("glyphs_maml"), *SMALL])
    checkpoint = Path(cli.trainer.log_dir) / "checkpoints" / "last.ckpt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:5000])
    with pytest.raises(
        SystemExit,
        match=r"lightning-maml: Expected .*last.ckpt to be a whole checkpoint but it cannot be "
        "read",
    ):
        main(["test", config("glyphs_maml"), *SMALL, f"--ckpt_path={checkpoint}"])


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        (
            "--model.inner_lr=-1",
            "Expected `inner_lr` to be a finite number of at least 0 but got -1.0.",
        ),
        (
            "--data.ways=500",
            "Expected the ways of split 'train' to be at most 400, its classes, but got 500.",
        ),
    ],
)
def test_what_a_user_can_cause_ends_with_one_sentence(
    argument: str, sentence: str, in_tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", config("glyphs_maml"), argument])
    assert stop.value.code == f"lightning-maml: {sentence}"


class _FailsToCleanUp(Callback):
    """Meets a mendable error, and an error of its own while it handles that one."""

    def on_train_start(self, *_: Any) -> None:
        try:
            MAML(nn.Identity(), inner_lr=-1.0)
        except ValueError:
            raise KeyError("mine")  # noqa: B904 that nothing is said of the first is the point


def test_an_error_that_came_up_while_a_mendable_one_was_handled_keeps_its_traceback(
    in_tmp_path: Path,
) -> None:
    path = f"{_FailsToCleanUp.__module__}.{_FailsToCleanUp.__name__}"
    with pytest.raises(KeyError, match="mine"):
        main(["fit", config("glyphs_maml"), *SMALL, f"--trainer.callbacks+={path}"])


def test_predict_returns_outputs_for_every_query(in_tmp_path: Path) -> None:
    cli = run(["predict", config("glyphs_fomaml"), *SMALL])
    predictions = cli.trainer.predict(cli.model, cli.datamodule)
    assert sum(len(prediction) for prediction in predictions) == 20
    assert predictions[0].shape[1:] == (5, 5)


@pytest.mark.parametrize(
    "algorithm",
    [
        "FOMAML",
        "HFMAML",
        "MAMLPlusPlus",
        "Reptile",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("ANIL", "BOIL", "LSLR", "MetaSGD")
        ),
    ],
)
def test_swapping_the_class_is_the_whole_change(algorithm: str, in_tmp_path: Path) -> None:
    cli = run(
        [
            "fit",
            config("glyphs_maml"),
            f"--model={algorithm}",
            "--trainer.fast_dev_run=1",
            "--trainer.enable_progress_bar=false",
        ]
    )
    assert type(cli.model) is getattr(lightning_maml, algorithm)
    assert cli.model.network.head.in_features == 32
    assert cli.model.test_steps == 3


def test_optimizer_and_scheduler_can_be_given_on_the_command_line(in_tmp_path: Path) -> None:
    arguments = [
        "--optimizer=SGD",
        "--optimizer.lr=0.5",
        "--lr_scheduler=StepLR",
        "--lr_scheduler.step_size=1",
    ]
    cli = run(["fit", config("glyphs_maml"), *SMALL, *arguments])
    assert type(cli.trainer.optimizers[0]) is torch.optim.SGD
    assert cli.trainer.optimizers[0].defaults["lr"] == 0.5


def test_another_loss_is_named_in_yaml(in_tmp_path: Path) -> None:
    loss = "{class_path: torch.nn.CrossEntropyLoss, init_args: {label_smoothing: 0.1}}"
    cli = run(
        [
            "fit",
            config("glyphs_maml"),
            f"--model.loss={loss}",
            "--trainer.fast_dev_run=1",
            "--trainer.enable_progress_bar=false",
        ]
    )
    assert cli.model.loss.label_smoothing == 0.1


OWN_IMAGES = """
data:
  class_path: ImageFolderDataModule
  init_args: {root: photos, image_size: 16, ways: 2, queries: 2, meta_batch_size: 2, train_batches: 2, val_tasks: 2}
model:
  class_path: FOMAML
  init_args:
    network: {class_path: Conv4, init_args: {in_channels: 3, ways: 2, image_size: 16, channels: 4}}
trainer: {max_epochs: 1, accelerator: cpu}
"""

OWN_DATASET = """
data:
  class_path: FewShotDataModule
  init_args:
    train: {class_path: torchvision.datasets.FakeData, init_args: {size: 90, image_size: [3, 20, 20], num_classes: 12}}
    image_size: 16
    ways: 2
    queries: 2
    small_classes: drop
model:
  class_path: FOMAML
  init_args:
    network: {class_path: Conv4, init_args: {in_channels: 3, ways: 2, image_size: 16, channels: 4}}
trainer: {fast_dev_run: true, accelerator: cpu}
"""


@pytest.mark.filterwarnings("ignore:Split '(train|val|test)'")
@pytest.mark.parametrize("text", [OWN_IMAGES, OWN_DATASET], ids=["folder", "dataset"])
def test_ten_lines_of_yaml_train_on_ones_own_images(text: str, in_tmp_path: Path) -> None:
    for number in range(15):
        (in_tmp_path / "photos" / f"class {number}").mkdir(parents=True)
        for image in range(4):
            Image.new("RGB", (20, 20), (10 * number, 60 * image, 0)).save(
                in_tmp_path / "photos" / f"class {number}" / f"{image}.png"
            )
    Path("own.yaml").write_text(text)
    assert run(
        ["fit", "--config=own.yaml", "--trainer.enable_progress_bar=false"]
    ).trainer.global_step in (1, 2)


def test_what_a_file_lacks_ends_with_one_sentence(
    in_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (in_tmp_path / "train_data.hdf5").touch()
    with pytest.raises(
        SystemExit,
        match=r"lightning-maml: Expected mini-ImageNet in \. .*train_data.hdf5 without "
        "val_data.hdf5",
    ):
        main(["fit", config("mini_imagenet_5w1s_maml"), "--data.root=."])
    for split in ("val", "test"):
        (in_tmp_path / f"{split}_data.hdf5").touch()
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(SystemExit, match="lightning-maml: Expected h5py to be installed"):
        main(["fit", config("mini_imagenet_5w1s_maml"), "--data.root=."])


def printed_config(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["fit", *arguments, "--print_config"])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", ["glyphs_maml", "omniglot_20w1s_hfmaml"])
def test_print_config_round_trips(
    name: str, in_tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = printed_config([config(name)], capsys)
    Path("printed.yaml").write_text(printed)
    assert yaml.safe_load(printed_config(["--config=printed.yaml"], capsys)) == yaml.safe_load(
        printed
    )
    assert yaml.safe_load(printed)["model"]["init_args"]["inner_lr"] == 0.4


SCRIPT, MODULE = (
    [str(Path(sys.executable).parent / "lightning-maml")],
    [sys.executable, "-m", "lightning_maml"],
)


@pytest.mark.parametrize(
    ("command", "argument", "status"),
    [
        (SCRIPT, "--model.inner_lr=0.1", 0),
        (MODULE, "--model.inner_rate=0.1", 2),
        pytest.param(SCRIPT, "--model.inner_rate=0.1", 2, marks=pytest.mark.slow),
        pytest.param(MODULE, "--model.inner_lr=0.1", 0, marks=pytest.mark.slow),
    ],
    ids=["script", "module, refused", "script, refused", "module"],
)
def test_the_command_exits_as_it_should(
    in_tmp_path: Path, command: list[str], argument: str, status: int
) -> None:
    arguments = ["fit", config("glyphs_fomaml"), "--trainer.fast_dev_run=1", argument]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == status
    assert ("inner_rate" in done.stderr) == (status != 0)


def test_a_typo_in_a_datamodule_argument_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", config("glyphs_maml"), "--data.quries=3"])
    assert "quries" in capsys.readouterr().err


@pytest.mark.slow
def test_training_on_glyphs_visibly_matters(in_tmp_path: Path) -> None:
    cli = run(["fit", config("glyphs_maml"), "--trainer.enable_progress_bar=false"])
    cli.trainer.test(cli.model, cli.datamodule, ckpt_path="best", verbose=False)
    trained = float(cli.trainer.callback_metrics["test/accuracy"])
    untrained = run(
        ["test", config("glyphs_maml"), "--trainer.enable_progress_bar=false"]
    ).trainer.callback_metrics["test/accuracy"]
    assert trained > 0.9
    assert untrained < 0.55


def test_measure_is_for_the_algorithms_of_the_theory(in_tmp_path: Path) -> None:
    with pytest.raises(
        TypeError,
        match="Expected MAML or one of its variants, which the theory is about, but got ProtoNet",
    ):
        run(["measure", config("glyphs_protonet")])
