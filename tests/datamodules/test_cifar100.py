"""CIFAR-FS and FC100, from made-up images in the files of CIFAR-100."""

import hashlib
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR100

from helpers.cifar100_files import NAMES, SUPERCLASSES, write_cifar100
from helpers.python2_pickles import write_python2_pickle
from lightning_maml.datamodules import CIFARFSDataModule, FC100DataModule
from lightning_maml.datamodules.cifar100 import divided, read_cifar100

pytestmark = pytest.mark.cpu_only  # files

CIFAR_FS_TRAIN = """
    dolphin seal aquarium_fish ray trout orchid sunflower tulip bottle bowl can cup plate apple
    mushroom orange pear clock keyboard chair couch bee caterpillar cockroach bear lion tiger wolf
    bridge castle house road skyscraper cloud forest mountain elephant kangaroo porcupine possum
    raccoon skunk lobster spider boy girl dinosaur lizard snake turtle hamster mouse rabbit shrew
    squirrel oak_tree palm_tree pine_tree willow_tree bus train lawn_mower streetcar tank
"""
CIFAR_FS_VAL = """
    beaver otter flatfish shark lamp television beetle butterfly sea camel cattle crab crocodile
    maple_tree motorcycle tractor
"""
"""The classes of Bertinetto et al. 2019, as other libraries list them."""

FC100_SUPERCLASSES = {
    "train": [
        *("fish", "flowers", "food_containers", "fruit_and_vegetables"),
        *("household_electrical_devices", "household_furniture", "large_man-made_outdoor_things"),
        *("large_natural_outdoor_scenes", "reptiles", "trees", "vehicles_1", "vehicles_2"),
    ],
    "val": [
        *("large_carnivores", "large_omnivores_and_herbivores"),
        *("non-insect_invertebrates", "small_mammals"),
    ],
    "test": ["aquatic_mammals", "insects", "medium_mammals", "people"],
}
"""The superclasses of each split (Oreshkin et al. 2018, section 3)."""

MODULES = [CIFARFSDataModule, FC100DataModule]
SETTINGS = {"shots": 2, "queries": 3, "meta_batch_size": 2, "seed": 3, "download": False}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    folder = tmp_path_factory.mktemp("data")
    write_cifar100(folder / "cifar-100-python")
    return folder


def first_batches(module) -> list[torch.Tensor]:
    module.prepare_data()
    module.setup()
    loaders = (module.train_dataloader(), module.val_dataloader(), module.test_dataloader())
    return [tensor for loader in loaders for tensor in next(iter(loader))]


def test_the_splits_are_the_published_ones() -> None:
    of_fs = divided(NAMES, CIFARFSDataModule.held_out)
    assert sorted(of_fs["train"]) == sorted(CIFAR_FS_TRAIN.split())
    assert sorted(of_fs["val"]) == sorted(CIFAR_FS_VAL.split())
    assert {split: len(names) for split, names in of_fs.items()} == {
        "train": 64,
        "val": 16,
        "test": 20,
    }
    of_fc = divided(NAMES, FC100DataModule.held_out)
    for split, superclasses in FC100_SUPERCLASSES.items():
        names = [name for superclass in superclasses for name in SUPERCLASSES[superclass].split()]
        assert of_fc[split] == sorted(names)
    for splits in (of_fs, of_fc):
        every = [name for names in splits.values() for name in names]
        assert sorted(every) == NAMES, "no class is in two splits, or in none"


@pytest.mark.parametrize("module", MODULES)
def test_every_class_has_its_images_of_both_files(module, root: Path) -> None:
    data = module(str(root), **SETTINGS)
    for split in ("train", "val", "test"):
        images, members, names = data.class_images(split)
        assert images.shape[1:] == (3, 32, 32)
        assert images.dtype == torch.uint8
        for rows, name in zip(members, names, strict=True):
            assert len(rows) == 7
            assert set(images[rows, 0, 0, 0].tolist()) == {NAMES.index(name)}
    pixels = read_cifar100(root).pixels
    assert len(pixels) == 700
    assert torch.equal(pixels[:500, 1, 0, 0], torch.arange(500).to(torch.uint8))


def test_images_are_as_torchvision_reads_them(root: Path, monkeypatch) -> None:
    monkeypatch.setattr(CIFAR100, "_check_integrity", lambda self: True)  # checksums of real files
    monkeypatch.setattr(CIFAR100, "meta", CIFAR100.meta | {"md5": None})
    of_training = CIFAR100(str(root), train=True)
    read = read_cifar100(root)
    assert of_training.classes == list(read.rows)
    assert np.array_equal(of_training.data, read.pixels[:500].permute(0, 2, 3, 1))
    for number, rows in enumerate(read.rows.values()):
        assert [of_training.targets[row] for row in rows if row < 500] == [number] * 5


@pytest.mark.parametrize("module", MODULES)
def test_equal_seeds_give_equal_episodes_from_the_archive_too(
    module, root: Path, tmp_path: Path, monkeypatch, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"),
        pytest.warns(UserWarning, match="other numbers of images than published .3[68].00 train"),
    ):
        expected = first_batches(module(str(root), **SETTINGS))
    counts = "train 64 classes, 448 images; val 16 classes, 112 images; test 20 classes, 140 images"
    if module is FC100DataModule:
        counts = counts.replace("64", "60").replace("448", "420")
        counts = counts.replace("16", "20").replace("112", "140")
    assert f"CIFAR-100 from {root / 'cifar-100-python'}: {counts}" in caplog.text
    assert expected[0].shape == (2, 10, 3, 32, 32)
    archive = tmp_path / CIFAR100.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(root / "cifar-100-python", "cifar-100-python")
    monkeypatch.setattr(CIFAR100, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    for other in (tmp_path, root / "cifar-100-python"):
        found = first_batches(module(str(other), **SETTINGS))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    others = first_batches(module(str(root), **SETTINGS | {"seed": 4}))
    assert not torch.equal(others[0], expected[0])


@pytest.mark.parametrize("download", [True, False])
def test_missing_files_are_named_with_where_to_get_them(
    tmp_path: Path, monkeypatch, download: bool
) -> None:
    monkeypatch.setattr(CIFAR100, "url", "http://localhost:9/cifar-100-python.tar.gz")
    data = CIFARFSDataModule(str(tmp_path), download=download)
    step = data.prepare_data if download else data.setup
    with pytest.raises(FileNotFoundError, match=r"cifar-100-python.tar.gz of http.* into") as error:
        step()
    assert ("and its download failed" in str(error.value)) == download
    assert ("or set download=True, and call `prepare_data()`" in str(error.value)) != download
    assert str(tmp_path / "cifar-100-python") in str(error.value)


def test_a_damaged_archive_is_neither_unpacked_nor_downloaded_unasked(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(CIFAR100, "url", "http://localhost:9/cifar-100-python.tar.gz")
    (tmp_path / CIFAR100.filename).write_bytes(b"a web page")
    message = "archive of CIFAR-100 for Python but its checksum is another; download it again"
    with pytest.raises(ValueError, match=rf"{message}\.$"):
        CIFARFSDataModule(str(tmp_path), download=False).prepare_data()
    with pytest.raises(ValueError, match=rf"{message} \(that failed: "):
        CIFARFSDataModule(str(tmp_path)).prepare_data()


def test_files_that_are_not_cifar_100s_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-100-python"

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            CIFARFSDataModule(str(tmp_path), download=False).setup()
        write_cifar100(folder, 2, 1)

    write_cifar100(folder, 2, 1)
    write_python2_pickle(folder / "meta", {"label_names": ["cat"]})
    refused(r"meta to hold 'fine_label_names' but it holds 'label_names'")
    write_python2_pickle(folder / "meta", {"fine_label_names": NAMES[1:]})
    refused("meta to name 100 different classes but got 99 names")
    write_python2_pickle(folder / "meta", {"fine_label_names": [NAMES[0], *NAMES]})
    refused("meta to name 100 different classes but got 101 names, 100 of")
    write_python2_pickle(folder / "meta", {"fine_label_names": [["a"], *NAMES[1:]]})
    refused("meta to name 100 different classes but got list")
    write_python2_pickle(folder / "meta", {"fine_label_names": ["Beaver", *NAMES[:4], *NAMES[5:]]})
    refused("Expected the classes of CIFAR-100 but there is none called beaver")
    images = np.zeros((4, 3072), np.uint8)
    write_python2_pickle(folder / "train", {"data": images, "fine_labels": [1, 2, 3]})
    refused(r"train to hold images uint8 \[n, 3072\] and n whole numbers")
    write_python2_pickle(folder / "train", {"data": images[:, :9], "fine_labels": [1, 2, 3, 4]})
    refused(r"but got uint8 \[4, 9\] and 4 labels")
    write_python2_pickle(folder / "train", {"data": [[0] * 3072], "fine_labels": [1]})
    refused("but got list and 1 labels")
    many: list = [1]
    for _ in range(40):  # few bytes in the file, 2^40 numbers for numpy
        many = [many, many]
    (folder / "train").write_bytes(pickle.dumps({"data": images, "fine_labels": many}, protocol=2))
    refused("`fine_labels` of .*train to hold lists of whole numbers but got list of another")
    write_python2_pickle(folder / "train", {"data": images, "fine_labels": [1, 2, 3, 100]})
    refused("to have labels from 0 to 99 but got 100")
    (folder / "test").write_bytes(pickle.dumps(print))
    refused("nothing ran")
    (folder / "test").write_bytes((folder / "train").read_bytes()[:-100])
    refused("cut short or damaged")
    CIFARFSDataModule(str(tmp_path), queries=1, download=False).setup()
