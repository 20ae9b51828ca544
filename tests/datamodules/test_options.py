"""The arguments that all datamodules share: the command shows them, and typos are refused."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import nn
from torchvision.datasets import FakeData

from helpers.trainers import trainer
from lightning_maml import MAML, datamodules
from lightning_maml.cli import main
from lightning_maml.datamodules import EpisodicDataModule, FewShotDataModule, GlyphsDataModule

pytestmark = pytest.mark.cpu_only  # arguments

SHARED = {
    "ways": 5,
    "shots": 1,
    "queries": 1,
    "test_ways": None,
    "test_shots": None,
    "test_queries": None,
    "meta_batch_size": 32,
    "train_batches": 500,
    "val_tasks": 200,
    "test_tasks": 600,
    "rotations": "none",
    "regime": "finite_sum",
    "train_steps": 1,
    "hessian_shots": None,
    "transforms": None,
    "small_classes": "raise",
    "seed": 0,
    "num_workers": 0,
}
SPLIT = {"shares": [0.64, 0.16, 0.2], "split_seed": 0}
FAKE_DATA = {
    "class_path": "torchvision.datasets.FakeData",
    "init_args": {
        "size": 1000,
        "image_size": [3, 224, 224],
        "num_classes": 10,
        "transform": None,
        "target_transform": None,
        "random_offset": 0,
    },
}
IMAGES: dict[str, Any] = {"root": "data", "queries": 15, "meta_batch_size": 4}
OWN: dict[str, dict[str, Any]] = {
    "CIFARFSDataModule": IMAGES | {"download": True},
    "FC100DataModule": IMAGES | {"download": True},
    "CUBDataModule": IMAGES | {"image_size": 84, "on_corrupt": "raise"},
    "TieredImageNetDataModule": IMAGES | {"on_corrupt": "raise"},
    "SinusoidDataModule": {
        "shots": 10,
        "queries": 10,
        "test_queries": 100,
        "meta_batch_size": 25,
    },
    "GlyphsDataModule": {"meta_batch_size": 16, "train_batches": 200, "glyph_seed": 0},
    "OmniglotDataModule": {
        "root": "data",
        "split": "random",
        "split_seed": 0,
        "rotations": "classes",
        "download": True,
    },
    "MiniImageNetDataModule": IMAGES | {"on_corrupt": "raise"},
    "ImageFolderDataModule": SPLIT
    | {
        "root": "data",
        "queries": 15,
        "meta_batch_size": 4,
        "image_size": 84,
        "on_corrupt": "raise",
        "class_level": None,
    },
    "FewShotDataModule": SPLIT
    | {
        "train": FAKE_DATA,
        "val": None,
        "test": None,
        "queries": 15,
        "meta_batch_size": 4,
        "image_size": None,
        "image_key": "image",
        "label_key": "label",
    },
}
"""The arguments of each datamodule that others do not have, or have with another default."""

OF_IMAGES = {"ways", "test_ways", "rotations", "transforms", "small_classes"}
"""The arguments that a regression lacks."""

DATASET = {"FewShotDataModule": ["--data.train=torchvision.datasets.FakeData"]}


def arguments_of(name: str) -> dict[str, Any]:
    lacking = OF_IMAGES if name == "SinusoidDataModule" else set()
    return {key: value for key, value in SHARED.items() if key not in lacking} | OWN[name]


def printed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["fit", *arguments])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", OWN)
def test_the_printed_config_has_every_argument_with_its_default(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model=ProtoNet", "--model.network=Conv4", f"--data={name}"]
    config = printed([*arguments, *DATASET.get(name, []), "--print_config"], capsys)
    assert yaml.safe_load(config)["data"] == {
        "class_path": f"lightning_maml.datamodules.{name}",
        "init_args": arguments_of(name),
    }


@pytest.mark.parametrize("name", OWN)
def test_the_help_of_the_command_explains_every_argument(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = printed([f"--data.help={name}"], capsys)
    for argument in arguments_of(name):
        explanation = re.search(rf"^ +--data\.{argument} [^\n]*\s+(\S[^(]+)\(", shown, re.MULTILINE)
        assert explanation is not None, argument
        assert len(explanation[1]) > 15, argument


@pytest.mark.parametrize("name", OWN)
def test_a_typo_on_the_command_line_is_refused(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model=ProtoNet", "--model.network=Conv4", f"--data={name}"]
    with pytest.raises(SystemExit) as stop:
        main(["fit", *arguments, *DATASET.get(name, []), "--data.init_args.shot=1"])
    assert stop.value.code == 2
    assert "Option 'shot' is not accepted" in capsys.readouterr().err


@pytest.mark.parametrize("name", OWN)
def test_a_typo_in_python_is_refused(name: str) -> None:
    dataset = [FakeData()] if name == "FewShotDataModule" else []
    with pytest.raises(TypeError, match="got an unexpected keyword argument 'shot'"):
        getattr(datamodules, name)(*dataset, shot=1)


@pytest.mark.parametrize("name", OWN)
def test_options_are_given_by_keyword_only(name: str) -> None:
    """Their order has changed: as positional arguments they would silently mean others."""
    positional = [*([FakeData()] * 3 if name == "FewShotDataModule" else ["data"]), 5, 1]
    with pytest.raises(TypeError, match=r"positional arguments?"):
        getattr(datamodules, name)(*positional)


def documented(datamodule: type[EpisodicDataModule]) -> list[str]:
    """Return the names in the section ``Args:`` of a class's docstring."""
    docstring = inspect.getdoc(datamodule) or ""
    section = docstring.split("\nArgs:\n")[1].split("\n\n")[0]
    return re.findall(r"^    (\**\w+):", section, re.MULTILINE)


@pytest.mark.parametrize("name", OWN)
def test_docstrings_name_own_arguments_and_refer_to_the_shared_ones(name: str) -> None:
    datamodule = getattr(datamodules, name)
    if name == "SinusoidDataModule":  # it has too few of the shared ones to refer to them
        assert sorted(documented(datamodule)) == sorted(arguments_of(name))
        return
    assert sorted(documented(datamodule)) == sorted([*OWN[name], "**options"])
    assert "**options: Arguments of :class:`EpisodicDataModule`" in datamodule.__doc__


def test_the_docstring_of_the_base_explains_the_shared_arguments() -> None:
    assert documented(EpisodicDataModule) == list(SHARED)


class MyGlyphs(GlyphsDataModule):
    """A user's datamodule, which keeps its arguments in checkpoints."""

    def __init__(self, alphabet: str = "runes", **options: Any) -> None:
        super().__init__(**options)
        self.save_hyperparameters()


def test_checkpoints_keep_the_options_of_a_datamodule_that_saves_them(tmp_path: Path) -> None:
    options = {"ways": 3, "meta_batch_size": 2, "train_batches": 1, "val_tasks": 2}
    data = MyGlyphs(alphabet="ogham", **options)
    assert dict(data.hparams) == {"alphabet": "ogham", **options}
    network = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 3))
    training = trainer(tmp_path)
    training.fit(MAML(network, inner_lr=0.1), data)
    training.save_checkpoint(tmp_path / "glyphs.ckpt")
    loaded = MyGlyphs.load_from_checkpoint(tmp_path / "glyphs.ckpt")
    assert dict(loaded.hparams) == dict(data.hparams)
    assert (loaded.ways, loaded.shots, loaded.train_batches) == (3, 1, 1)


def test_a_users_subclass_shows_its_options_too(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model=ProtoNet", "--model.network=Conv4", f"--data={__name__}.MyGlyphs"]
    config = printed([*arguments, "--print_config"], capsys)
    assert yaml.safe_load(config)["data"]["init_args"] == {
        **SHARED,
        **OWN["GlyphsDataModule"],
        "alphabet": "runes",
    }


def test_values_reach_the_base_whether_an_argument_is_own_or_shared() -> None:
    data = FewShotDataModule(FakeData(), queries=3, meta_batch_size=2, shots=4, regime="resampling")
    assert (data.queries, data.test_queries, data.meta_batch_size) == (3, 3, 2)
    assert (data.shots, data.test_shots, data.hessian_shots, data.regime) == (4, 4, 4, "resampling")


def test_every_datamodule_of_episodes_is_tried_here() -> None:
    exported = [getattr(datamodules, name) for name in dir(datamodules)]
    classes = [found for found in exported if inspect.isclass(found)]
    own = {found.__name__ for found in classes if issubclass(found, EpisodicDataModule)}
    assert own - {"EpisodicDataModule"} == OWN.keys()
