"""tiered-ImageNet: every form gives the same episodes and colours, and wrong files are refused."""

import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.python2_pickles import write_python2_pickle
from helpers.tiered_imagenet_files import CLASSES, LAYOUTS, Images, draw_images, png
from lightning_maml.datamodules import TieredImageNetDataModule
from lightning_maml.datamodules.images.pickles import read_pickle

pytestmark = pytest.mark.cpu_only  # files

PER_CLASS = 3


@pytest.fixture(scope="module")
def images() -> Images:
    return draw_images(PER_CLASS)


@pytest.fixture(scope="module")
def layouts(images: Images, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each form in a folder of its own; not to be changed."""
    roots = {name: tmp_path_factory.mktemp("form") for name in LAYOUTS}
    for name, write in LAYOUTS.items():
        write(roots[name], images)
    return roots


@pytest.fixture
def copy_of(layouts: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    def copy(name: str) -> Path:
        ignored = shutil.ignore_patterns("*.pt")
        return Path(shutil.copytree(layouts[name], tmp_path / "copy", ignore=ignored))

    return copy


def prepared(root: Path, **arguments) -> TieredImageNetDataModule:
    settings = {"shots": 1, "queries": 2, "meta_batch_size": 2, "seed": 3} | arguments
    module = TieredImageNetDataModule(str(root), **settings)
    module.prepare_data()
    module.setup()
    return module


def first_batches(module: TieredImageNetDataModule) -> list[torch.Tensor]:
    loaders = (module.train_dataloader(), module.val_dataloader(), module.test_dataloader())
    return [tensor for loader in loaders for tensor in next(iter(loader))]


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_form_gives_the_same_episodes(
    name: str, layouts: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    expected = first_batches(prepared(layouts["pickles of PNGs"]))
    assert expected[0].shape == (2, 5, 3, 84, 84)
    assert expected[0].dtype == torch.uint8
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        found = first_batches(prepared(layouts[name]))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert (
        f"tiered-ImageNet from the {name.partition(',')[0]} in {layouts[name]}: train 351 classes, "
        "1053 images; val 97 classes, 291 images; test 160 classes, 480 images" in caplog.text
    )


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_form_gives_the_colours_of_each_class(
    name: str, layouts: dict[str, Path], images: Images
) -> None:
    module = prepared(layouts[name])
    for split, (pixels, labels) in images.items():
        read = module.class_images(split)
        assert len(read.members) == CLASSES[split]
        for label, rows in [*enumerate(read.members)][::9]:
            expected = pixels[labels == label]
            assert np.array_equal(read.images[rows].permute(0, 2, 3, 1), expected)


def test_a_second_run_reads_the_cache_and_changed_files_are_decoded_anew(
    copy_of: Callable[[str], Path],
) -> None:
    root = copy_of("npz archives")
    prepared(root)
    caches = sorted(root.glob("*.pt"))
    assert [cache.name for cache in caches] == [
        f"tiered_imagenet_{split}_84.pt" for split in ("test", "train", "val")
    ]
    times = [cache.stat().st_mtime_ns for cache in caches]
    prepared(root)
    assert [cache.stat().st_mtime_ns for cache in caches] == times
    os.utime(root / "val_labels.pkl", ns=(1, 1))
    with pytest.warns(UserWarning, match="out of date"):
        prepared(root)
    changed = [cache.stat().st_mtime_ns for cache in caches]
    assert [a == b for a, b in zip(changed, times, strict=True)] == [True, True, False]


def test_pngs_of_over_4_kb_stay_in_the_file_until_they_are_decoded(tmp_path: Path) -> None:
    noise = np.random.RandomState(0).randint(0, 256, (84, 84, 3), np.uint8)
    file = tmp_path / "noise.pkl"
    write_python2_pickle(file, [np.frombuffer(png(noise), np.uint8)])
    [read] = read_pickle(file)
    assert len(read) > 1 << 12
    assert not read.flags.owndata
    base = read.base
    while isinstance(base, np.ndarray):
        base = base.base
    assert isinstance(base, memoryview)


def test_metaoptnets_labels_and_zenodos_names_are_read(
    layouts: dict[str, Path], copy_of: Callable[[str], Path]
) -> None:
    """MetaOptNet numbers the classes of all splits together, in a list."""
    expected = first_batches(prepared(layouts["pickles of PNGs"]))
    root, first = copy_of("npz archives"), 0
    for split, classes in CLASSES.items():
        labels = (first + np.arange(classes).repeat(PER_CLASS)).tolist()
        write_python2_pickle(root / f"{split}_labels.pkl", {"labels": labels})
        first += classes
    found = first_batches(prepared(root))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    for file in layouts["pickles of PNGs"].glob("*.pkl"):
        shutil.copy(file, root / f"tiered-imagenet-{file.name}")
    for split in CLASSES:
        (root / f"{split}_images.npz").unlink()
        (root / f"{split}_labels.pkl").unlink()
    found = first_batches(prepared(root))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("form", ["pickles of PNGs", "npz archives"])
def test_splits_that_share_classes_are_refused(form: str, copy_of: Callable[[str], Path]) -> None:
    root = copy_of(form)
    labels = np.arange(97, dtype=np.int32).repeat(PER_CLASS)
    content = {
        "label_specific": labels,
        "label_general": labels // 18,
        "label_specific_str": [f"train animal {number}" for number in range(97)],
        "label_general_str": [f"train kind {number}" for number in range(6)],
    }
    write_python2_pickle(root / "val_labels.pkl", content)
    with pytest.raises(ValueError, match=r"share no class but 97 are both in train and in val"):
        prepared(root)
    # one name for a bird and a machine
    content["label_general_str"] = [f"val kind {number}" for number in range(6)]
    write_python2_pickle(root / "val_labels.pkl", content)
    assert prepared(root).class_images("val").names[0] == "train animal 0 (val kind 0)"


def test_swapped_colours_full_disks_and_missing_images_are_said(
    copy_of: Callable[[str], Path], images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = copy_of("npz archives")
    blue = images["val"][0].copy()
    blue[..., 0] //= 2
    np.savez(root / "val_images.npz", images=blue[..., ::-1])
    for _ in range(2):  # from the cache too
        with pytest.warns(UserWarning, match="val_images.npz are more blue than red.* reverse the"):
            prepared(root)
    with pytest.warns(UserWarning, match="other numbers of images than published .448695 train"):
        prepared(root)
    for cache in root.glob("*.pt"):
        cache.unlink()
    usage = shutil.disk_usage(root)._replace(free=10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"MB of free disk in .* but got 1 MB; make room"):
        prepared(root)


def test_class_folders_of_another_dataset_are_no_obstacle(
    layouts: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(layouts["class folders"], tmp_path / "another")
    shutil.copytree(layouts["npz archives"], tmp_path / "tiered")
    assert prepared(tmp_path)._found().folder == tmp_path / "tiered"
    shutil.copytree(layouts["class folders"], tmp_path, dirs_exist_ok=True)
    assert prepared(tmp_path)._found().folder == tmp_path / "tiered"
    (tmp_path / "tiered").rename(tmp_path / ".tiered")  # hidden
    (tmp_path / "third").symlink_to(tmp_path / "another")
    assert prepared(tmp_path)._found().folder == tmp_path


def test_missing_files_are_named(tmp_path: Path, copy_of: Callable[[str], Path]) -> None:
    with pytest.raises(FileNotFoundError) as error:
        prepared(tmp_path)
    for text in (
        "Expected tiered-ImageNet",
        "train_images_png.pkl",
        "train_images.npz",
        "few-shot",
    ):
        assert text in str(error.value)
    root = copy_of("pickles of PNGs")
    (root / "val_labels.pkl").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"labels of val_images_png.pkl in .*val_labels.pkl"
    ):
        prepared(root)
    (root / "test_images_png.pkl").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"train_images_png.pkl without test_images_png.pkl"
    ):
        prepared(root)


WRONG_LABELS = {
    r"'label_specific' or 'labels' but it holds 'label_general'": {"label_general": np.arange(3)},
    r"to hold lists of whole numbers but got list of another": {"labels": ["a", "b"]},
    r"to hold lists of whole numbers but got ndarray of another": {"label_specific": np.zeros(3)},
    r"but got 351 train, 1 val, 160 test classes": {"label_specific": np.zeros(291, np.int32)},
    r"hold 292 images, one for each of its labels, but got 291": {
        "label_specific": np.arange(292, dtype=np.int32) % 97
    },
    r"hold 290 images, one for each of its labels, but got more": {
        "label_specific": np.arange(290, dtype=np.int32) % 97
    },
}


@pytest.mark.parametrize("message", WRONG_LABELS)
@pytest.mark.parametrize("form", ["pickles of PNGs", "npz archives"])
def test_wrong_labels_are_refused(message: str, form: str, copy_of: Callable[[str], Path]) -> None:
    root = copy_of(form)
    write_python2_pickle(root / "val_labels.pkl", WRONG_LABELS[message])
    with pytest.raises(ValueError, match=message):
        prepared(root)
    assert not (root / "tiered_imagenet_val_84.pt").exists()


def test_damaged_png_pickles_are_refused(copy_of: Callable[[str], Path], images: Images) -> None:
    root = copy_of("pickles of PNGs")
    file = root / "val_images_png.pkl"
    encoded = [np.frombuffer(png(image), np.uint8) for image in images["val"][0]]

    def refused(content: object, message: str) -> None:
        write_python2_pickle(file, content)
        with pytest.raises(ValueError, match=message):
            prepared(root)

    small = np.frombuffer(png(np.zeros((9, 9, 3), np.uint8)), np.uint8)
    refused([*encoded[:-1], small], "image 290 of .* of 84 x 84 pixels but it has 9 x 9 pixels")
    refused([*encoded[:-1], encoded[-1][:60]], "image 290 of .* download it again")
    refused([*encoded[:-1], np.zeros(60, np.uint8)], "image 290 of .*cannot identify")
    deep = np.frombuffer(png(np.full((84, 84), 40_000, np.uint16)), np.uint8)
    refused([*encoded[:-1], deep], "image 290 of .* have more than 8 bits")
    refused({"images": encoded}, "to be a list of PNG files as arrays but it is not")
    refused(["a", "b"], "to be a list of PNG files as arrays but it is not")
    file.write_bytes(pickle.dumps(os.system))
    with pytest.raises(ValueError, match="nothing ran"):
        prepared(root)


def test_damaged_npz_archives_are_refused(copy_of: Callable[[str], Path]) -> None:
    root = copy_of("npz archives, compressed")
    file = root / "val_images.npz"
    whole = file.read_bytes()

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            prepared(root)

    np.savez(file, images=np.zeros((291, 32, 32, 3), np.uint8))
    refused(r"uint8 \[N, 84, 84, 3\] but got uint8 \[291, 32, 32, 3\]")
    np.savez(file, images=np.array([print] * 291))
    refused(r"but got object \[291\]")
    np.savez(file, pictures=np.zeros(3))
    refused("npz archive with 'images' but it cannot be read")
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("images.npy", b"\x93NUMPY\x01\x00\x10\x00{'descr': (((((")
    refused("npz archive with 'images' but it cannot be read")
    file.write_bytes(whole[:2000])
    refused("npz archive with 'images' but it cannot be read")
    middle = len(whole) // 2
    file.write_bytes(whole[:middle] + bytes(64) + whole[middle + 64 :])
    refused("npz archive with 'images' but it cannot be read")
    assert not (root / "tiered_imagenet_val_84.pt").exists()
