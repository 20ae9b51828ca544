"""mini-ImageNet: six layouts give the same episodes, and wrong files are refused."""

import csv
import errno
import os
import pickle
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from helpers.mini_imagenet_files import (
    CLASSES,
    LAYOUTS,
    Encoded,
    draw_images,
    write_folders,
    write_ravi,
)
from lightning_maml.datamodules import MiniImageNetDataModule
from lightning_maml.datamodules.images import files as image_files
from lightning_maml.datamodules.images.files import decode

pytestmark = pytest.mark.cpu_only  # files

PER_CLASS = 21


@pytest.fixture(scope="module")
def images() -> Encoded:
    return draw_images(PER_CLASS)


@pytest.fixture(scope="module")
def layouts(images: Encoded, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each layout in a folder of its own; not to be changed."""
    roots = {name: tmp_path_factory.mktemp("layout") for name in LAYOUTS}
    for name, write in LAYOUTS.items():
        write(roots[name], images)
    return roots


@pytest.fixture
def copy_of(layouts: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    def copy(name: str) -> Path:
        shutil.copytree(
            layouts[name],
            tmp_path / "copy",
            copy_function=shutil.copy2,
            ignore=shutil.ignore_patterns("*.pt"),
        )
        return tmp_path / "copy"

    return copy


def datamodule(root: Path, **arguments) -> MiniImageNetDataModule:
    return MiniImageNetDataModule(
        str(root), **({"shots": 5, "meta_batch_size": 2, "seed": 3} | arguments)
    )


def prepared(root: Path, **arguments) -> MiniImageNetDataModule:
    module = datamodule(root, **arguments)
    module.prepare_data()
    module.setup()
    return module


def first_batches(module: MiniImageNetDataModule) -> list[torch.Tensor]:
    loaders = (module.train_dataloader(), module.val_dataloader(), module.test_dataloader())
    return [tensor for loader in loaders for tensor in next(iter(loader))]


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same_episodes(name: str, layouts: dict[str, Path]) -> None:
    expected = first_batches(prepared(layouts["cache pickles"]))
    assert expected[0].shape == (2, 25, 3, 84, 84)
    assert expected[0].dtype == torch.uint8
    found = first_batches(prepared(layouts[name]))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_images_of_each_class(
    name: str, layouts: dict[str, Path], images: Encoded
) -> None:
    module = prepared(layouts[name])
    for split, of_split in images.items():
        read = module.class_images(split)
        assert len(read.members) == len(CLASSES[split])
        for rows, encoded in list(zip(read.members, of_split.values(), strict=True))[::7]:
            assert len(rows) == PER_CLASS
            for row, image in list(zip(rows, encoded, strict=True))[::4]:
                file = layouts[name] / "image.jpg"
                file.write_bytes(image)
                with Image.open(file) as decoded:
                    assert np.array_equal(
                        read.images[row].permute(1, 2, 0), np.asarray(decoded.convert("RGB"))
                    )


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_log_says_which_layout_was_found(
    name: str, layouts: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        prepared(layouts[name])
    kind = "CSV lists" if name.startswith("CSV") else name
    expected = f"mini-ImageNet from the {kind} in {layouts[name]}"
    assert expected in caplog.text
    assert (
        "train 64 classes, 1344 images; val 16 classes, 336 images; test 20 classes, 420 images"
        in caplog.text
    )


@pytest.mark.parametrize("moved", [{"val": "validation"}, {"": "mini-imagenet"}])
def test_other_usual_names_and_places_are_found(
    moved: dict[str, str], copy_of: Callable[[str], Path], layouts: dict[str, Path]
) -> None:
    root = copy_of("class folders")
    for old, new in moved.items():
        if old:
            (root / old).rename(root / new)
        else:
            inner = root.rename(root.with_name("inner"))
            root.mkdir()
            inner.rename(root / new)
    assert torch.equal(
        first_batches(prepared(root))[4], first_batches(prepared(layouts["cache pickles"]))[4]
    )


def test_ravis_list_with_a_folder_per_class_and_originals_of_other_sizes(
    images: Encoded, tmp_path: Path
) -> None:
    """As mmfewshot and the MAML paper's code arrange it."""
    write_ravi(tmp_path, images)
    for file in list((tmp_path / "images").iterdir())[:500]:
        place = tmp_path / "images" / file.name[:9]
        place.mkdir(exist_ok=True)
        file.rename(place / file.name)
    name = f"{CLASSES['val'][0]}00000000.jpg"
    file = next((tmp_path / "images").rglob(name))
    Image.new("RGB", (500, 375), (10, 200, 30)).save(file)
    read = prepared(tmp_path).class_images("val")
    assert (
        read.images[read.members[0][0]].float() - torch.tensor([10.0, 200, 30])[:, None, None]
    ).abs().max() < 3


def test_several_folders_of_mini_imagenet_are_refused(
    layouts: dict[str, Path], tmp_path: Path
) -> None:
    for name in ("cub", "miniimagenet"):
        shutil.copytree(layouts["HDF5 files"] / "miniimagenet", tmp_path / name)
    with pytest.raises(
        ValueError,
        match=r"one folder in .* like mini-ImageNet but got .*/cub, .*/miniimagenet; give one of "
        "them as `root`",
    ):
        datamodule(tmp_path).prepare_data()
    prepared(tmp_path / "miniimagenet")


def test_the_first_start_draws_the_same_random_numbers_as_later_ones(
    copy_of: Callable[[str], Path],
) -> None:
    root = copy_of("class folders")

    def drawn() -> float:
        torch.manual_seed(0)
        prepared(root)
        return float(torch.rand(1))

    assert drawn() == drawn()


def test_the_error_for_missing_data_names_all_layouts_and_sources(tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "missing"):
        with pytest.raises(FileNotFoundError) as error:
            datamodule(root).prepare_data()
        message = str(error.value)
        assert message.startswith(
            f"Expected mini-ImageNet in {root} or in a folder of it but found nothing of it; put "
            "it there in one of these"
        )
        for name in (
            "mini-imagenet-cache-train.pkl",
            "miniImageNet_category_split_train_phase_train.pickle",
            "train_data.hdf5",
            "train.csv",
        ):
            assert name in message
        for source in (
            "zenodo.org",
            "MetaOptNet",
            "torchmeta",
            "filename,label",
            "class_name,image_name",
            "easy-few-shot-learning",
            "class folders",
        ):
            assert source in message
    assert not (tmp_path / "missing").exists()


def test_a_missing_part_is_named(copy_of: Callable[[str], Path]) -> None:
    root = copy_of("cache pickles")
    (root / "mini-imagenet-cache-validation.pkl").unlink()
    with pytest.raises(
        FileNotFoundError,
        match=r"found .*mini-imagenet-cache-train.pkl without mini-imagenet-cache-val.pkl; put it",
    ):
        datamodule(root).prepare_data()


def write_wrong_classes(root: Path, images: Encoded) -> None:
    write_folders(root, {**images, "val": dict(list(images["val"].items())[:3])})


def write_classification_split(root: Path, images: Encoded) -> None:
    write_folders(
        root,
        {
            split: {name: files[:2] for part in images.values() for name, files in part.items()}
            for split in images
        },
    )


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (
            write_wrong_classes,
            (
                "64 train, 16 val, 20 test classes in .*, .*, but got 64 train, 3 val, 20 test "
                "classes; for other data take ImageFolderDataModule"
            ),
        ),
        (
            write_classification_split,
            (
                r"share no class but 100 are both in train and in val \(n0.*, \.\.\.\): "
                ".* ordinary classification"
            ),
        ),
    ],
)
def test_other_splits_are_refused(
    write: Callable, message: str, images: Encoded, tmp_path: Path
) -> None:
    write(tmp_path, images)
    with pytest.raises(ValueError, match=message):
        datamodule(tmp_path).prepare_data()
    assert not list(tmp_path.glob("*.pt"))


PAGE = (
    b"\n<!DOCTYPE html><html><head><title>Google Drive - Virus scan warning</title></head></html>"
)


@pytest.mark.parametrize(
    "name", ["CSV lists of easyfsl", "cache pickles", "category-split pickles", "HDF5 files"]
)
def test_a_web_page_in_place_of_a_file_is_refused(
    name: str, copy_of: Callable[[str], Path]
) -> None:
    root = copy_of(name)
    file = min(
        file for file in root.rglob("*test*") if file.suffix in (".csv", ".pkl", ".pickle", ".hdf5")
    )
    file.write_bytes(PAGE)
    with pytest.raises(
        ValueError,
        match=f"{file.name} to hold data but it is a web page, as hosts send in place of large "
        "files; download it",
    ):
        datamodule(root).prepare_data()


def pickled(file: str, content: object) -> Callable[[Path], None]:
    return lambda root: (root / file).write_bytes(pickle.dumps(content))


def pixels(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.uint8)


REN, GIDARIS = "mini-imagenet-cache-test.pkl", "miniImageNet_category_split_test.pickle"


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (
            "cache pickles",
            pickled(REN, {"images": pixels(2, 84, 84, 3)}),
            "to hold 'image_data' and 'class_dict' but it holds 'images'",
        ),
        ("cache pickles", pickled(REN, [1, 2]), "cache-test.pkl to be a dictionary but got list"),
        (
            "cache pickles",
            pickled(REN, {"image_data": pixels(2, 84, 84, 3), "class_dict": [0, 1]}),
            "'class_dict' of .* a dictionary but got list",
        ),
        (
            "cache pickles",
            pickled(
                REN,
                {"image_data": np.zeros((2, 84, 84, 3), np.float32), "class_dict": {"n01": [0, 1]}},
            ),
            r"to be uint8 \[N, 84, 84, 3\] but got float32 \[2, 84, 84, 3\]",
        ),
        (
            "cache pickles",
            pickled(REN, {"image_data": pixels(2, 32, 32, 3), "class_dict": {"n01": [0, 1]}}),
            r"but got uint8 \[2, 32, 32, 3\]",
        ),
        (
            "cache pickles",
            pickled(REN, {"image_data": [pixels(84, 84, 3)], "class_dict": {"n01": [0]}}),
            "but got list",
        ),
        (
            "cache pickles",
            pickled(
                REN,
                {
                    "image_data": np.array([pixels(84, 84, 3), pixels(3)], object),
                    "class_dict": {"n01": [0, 1]},
                },
            ),
            "an array of objects, such as images of several sizes",
        ),
        (
            "cache pickles",
            pickled(REN, {"image_data": pixels(2, 84, 84, 3), "class_dict": {"n01": [0, 2]}}),
            r"share out the numbers 0 \.\. 1",
        ),
        (
            "cache pickles",
            pickled(REN, {"image_data": pixels(2, 84, 84, 3), "class_dict": {"a": [0], "b": [0]}}),
            "share out the numbers",
        ),
        (
            "category-split pickles",
            pickled(GIDARIS, {"data": pixels(2, 84, 84, 3), "labels": [0]}),
            "as many as its 2 images but got 1",
        ),
        (
            "category-split pickles",
            pickled(GIDARIS, {"data": pixels(2, 84, 84, 3), "labels": ["a", "b"]}),
            "'labels' .* lists of whole numbers",
        ),
        (
            "category-split pickles",
            pickled(GIDARIS, {"data": pixels(2, 84, 84, 3), "catname2label": {}}),
            "but it holds 'data', 'catname2label'",
        ),
        (
            "cache pickles",
            lambda root: (root / REN).write_bytes(b""),
            "cache-test.pkl to be a whole pickle but it is cut short or damaged",
        ),
    ],
)
def test_pickles_of_other_data_are_refused(
    name: str, damage: Callable, message: str, copy_of: Callable[[str], Path]
) -> None:
    root = copy_of(name)
    damage(root)
    with pytest.raises(ValueError, match=message):
        datamodule(root).prepare_data()


def rewritten(change: Callable[[h5py.File], None]) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        with h5py.File(file, "r+") as content:
            change(content)

    return damage


def replace_class_by_a_group(content: h5py.File) -> None:
    name = next(iter(content["datasets"]))
    del content["datasets"][name]
    content["datasets"].create_group(name)


def replace_class(content: h5py.File) -> None:
    name = next(iter(content["datasets"]))
    del content["datasets"][name]
    content["datasets"].create_dataset(name, data=np.zeros((21, 84, 90, 3), np.uint8))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            rewritten(replace_class),
            (
                r"the images of class n0\d+ of .*test_data.hdf5 to be uint8 \[N, 84, 84, 3\] "
                r"but got uint8 \[21, 84, 90, 3\]"
            ),
        ),
        (rewritten(replace_class_by_a_group), r"the images of class n0\d+ of .* but got Group"),
        (
            rewritten(lambda content: content.move("datasets", "data")),
            "a whole HDF5 file with a group 'datasets' but it is not",
        ),
        (
            lambda file: file.write_bytes(file.read_bytes()[:5000]),
            "a whole HDF5 file with a group 'datasets' but it is not",
        ),
        (
            lambda file: file.write_bytes(b"nothing"),
            "a whole HDF5 file with a group 'datasets' but it is not",
        ),
    ],
)
def test_hdf5_files_of_other_data_are_refused(
    damage: Callable, message: str, copy_of: Callable[[str], Path]
) -> None:
    root = copy_of("HDF5 files")
    damage(root / "miniimagenet" / "test_data.hdf5")
    with pytest.raises(ValueError, match=message):
        datamodule(root).prepare_data()


def test_the_error_without_h5py_says_how_to_install_it(
    layouts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(
        ModuleNotFoundError,
        match=r"h5py to be installed, for .*hdf5, but it is not: pip install "
        r"'lightning_maml\[hdf5\]'",
    ):
        datamodule(layouts["HDF5 files"]).prepare_data()


@pytest.mark.parametrize(
    "name",
    [
        "../secret.jpg",
        "/etc/secret.jpg",
        "a/../../secret.jpg",
        "..\\secret.jpg",
        "C:\\secret.jpg",
        "",
    ],
)
@pytest.mark.parametrize("column", [0, 1])
def test_a_list_that_leads_out_of_its_folder_is_refused(
    name: str, column: int, copy_of: Callable[[str], Path]
) -> None:
    root = copy_of("CSV lists of Ravi & Larochelle")
    Image.new("RGB", (84, 84)).save(root.parent / "secret.jpg")
    row = ["x.jpg", CLASSES["test"][0]]
    row[column] = name
    with (root / "test.csv").open("a", newline="") as stream:
        csv.writer(stream).writerow(row)
    with pytest.raises(ValueError, match=r"test.csv to name files inside its folder but got '"):
        datamodule(root).prepare_data()


def test_rows_without_files_are_counted_and_named(copy_of: Callable[[str], Path]) -> None:
    root = copy_of("CSV lists of Ravi & Larochelle")
    gone = sorted((root / "images").glob(f"{CLASSES['val'][2]}*"))[3:10]
    for file in gone:
        file.unlink()
    names = ", ".join(file.name for file in gone[:5])
    with pytest.raises(
        FileNotFoundError,
        match=r"the 336 images of .*val.csv in its folder images, .* but 7 are missing: "
        rf"{names}, \.\.\.\.",
    ):
        datamodule(root).prepare_data()


def test_file_names_that_are_too_long_are_reported(copy_of: Callable[[str], Path]) -> None:
    root = copy_of("CSV lists of Ravi & Larochelle")
    with (root / "val.csv").open("a") as stream:
        stream.write(f"{'x' * 300}.jpg,{CLASSES['val'][0]}\n")
    with pytest.raises(FileNotFoundError, match=r"but 1 are missing: xxx"):
        datamodule(root).prepare_data()
    with (root / "val.csv").open("a") as stream:
        stream.write(f"{'x' * 200_000}.jpg,{CLASSES['val'][0]}\n")
    with pytest.raises(
        ValueError, match=r"val.csv to be a CSV file but it cannot be read \(field larger"
    ):
        datamodule(root).prepare_data()


def test_an_unknown_header_is_shown(copy_of: Callable[[str], Path]) -> None:
    root = copy_of("CSV lists of Ravi & Larochelle")
    (root / "val.csv").write_text("file,wnid\na.jpg,n01\n")
    with pytest.raises(
        ValueError,
        match=r"val.csv to be filename,label or class_name,image_name but got 'file,wnid'",
    ):
        datamodule(root).prepare_data()


def cut_image(root: Path, number: int = 5) -> Path:
    file = root / "train" / CLASSES["train"][1] / f"{CLASSES['train'][1]}{number:08d}.jpg"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return file


def test_a_truncated_image_is_named(copy_of: Callable[[str], Path]) -> None:
    root = copy_of("class folders")
    file = cut_image(root)
    with pytest.raises(
        OSError,
        match=rf"Expected .*{file.name} to be an image but it cannot be read \(.*truncated.*\); "
        "copy or unpack it again",
    ):
        datamodule(root).prepare_data()
    assert not list(root.glob("*.pt")), "no half cache"
    assert not list(root.glob(".*")), "nor a part of one"


def test_truncated_images_are_skipped_when_asked(
    copy_of: Callable[[str], Path], layouts: dict[str, Path]
) -> None:
    root = copy_of("class folders")
    names = [cut_image(root, number).name for number in (5, 9)]
    for _ in range(2):  # decoded, then from the cache
        with pytest.warns(
            UserWarning,
            match=rf"2 images cannot be read and are left out, .*{names[0]} .*, .*{names[1]} ",
        ):
            module = prepared(root, on_corrupt="skip", queries=10)
        assert [len(rows) for rows in module.class_images("train").members] == [21, 19, *[21] * 62]
    with pytest.raises(OSError, match=names[0]):
        datamodule(root).prepare_data()
    whole = prepared(layouts["class folders"]).class_images("train")
    kept = [number for number in range(21) if number not in (5, 9)]
    read = module.class_images("train")
    assert torch.equal(read.images[read.members[1]], whole.images[whole.members[1][kept]])


def test_files_that_cannot_be_opened_now_are_not_skipped(
    copy_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A skipped file stays skipped until it changes, so passing problems must not skip it."""
    root = copy_of("class folders")
    for error in (OSError(errno.EIO, "Input/output error"), MemoryError()):
        monkeypatch.setattr(
            image_files, "read_image", lambda *_, error=error: (_ for _ in ()).throw(error)
        )
        with pytest.raises(
            OSError,
            match=r"Expected to read .*jpg but (.*Input/output error|MemoryError); see to that "
            "and start again",
        ):
            datamodule(root, on_corrupt="skip").prepare_data()


def decoded_anew(root: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether images are decoded by another start."""
    calls = []
    with monkeypatch.context() as context:
        context.setattr(
            image_files, "decode", lambda *arguments: calls.append(1) or decode(*arguments)
        )
        prepared(root)
    return bool(calls)


def touch(file: Path) -> None:
    os.utime(file, ns=(time.time_ns(), time.time_ns()))


@pytest.mark.filterwarnings("ignore:.*is damaged or out of date")
@pytest.mark.parametrize(
    ("change", "anew"),
    [
        (lambda root: None, False),
        (
            lambda root: touch(
                root / "train" / CLASSES["train"][0] / f"{CLASSES['train'][0]}00000003.jpg"
            ),
            True,
        ),
        (
            lambda root: (
                root / "test" / CLASSES["test"][0] / f"{CLASSES['test'][0]}00000003.jpg"
            ).unlink(),
            True,
        ),
        (lambda root: (root / "val" / CLASSES["val"][0]).rename(root / "val" / "n99999999"), True),
        (
            lambda root: (
                (root / "train" / CLASSES["train"][0]).rename(root / "train" / ".hidden")
                and write_class(root)
            ),
            True,
        ),
        (
            lambda root: (root / "mini_imagenet_84.pt").write_bytes(
                (root / "mini_imagenet_84.pt").read_bytes()[:-10_000]
            ),
            True,
        ),
        (
            lambda root: (root / "train" / CLASSES["train"][0] / ".DS_Store").write_bytes(
                b"desktop"
            ),
            False,
        ),
        (
            lambda root: (root / "train" / CLASSES["train"][0] / "Thumbs.db").write_bytes(
                b"desktop"
            ),
            False,
        ),
    ],
    ids=[
        "nothing",
        "a changed file",
        "a file less",
        "a renamed class",
        "another class",
        "a truncated cache",
        ".DS_Store",
        "Thumbs.db",
    ],
)
def test_the_cache_is_used_while_the_files_are_the_same(
    change: Callable, anew: bool, copy_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = copy_of("class folders")
    prepared(root)
    change(root)
    assert decoded_anew(root, monkeypatch) == anew


def write_class(root: Path) -> None:
    place = root / "train" / "n99999999"
    place.mkdir()
    for number in range(21):
        Image.new("RGB", (84, 84)).save(place / f"{number}.jpg")


def test_the_old_cache_stays_until_the_new_one_is_whole(copy_of: Callable[[str], Path]) -> None:
    root = copy_of("class folders")
    old = prepared(root)
    inode = (root / "mini_imagenet_84.pt").stat().st_ino
    cut_image(root)
    with (
        pytest.warns(UserWarning, match="out of date"),
        pytest.raises(OSError, match="cannot be read"),
    ):
        datamodule(root).prepare_data()
    assert (root / "mini_imagenet_84.pt").stat().st_ino == inode
    before = old.class_images("val").images
    expected = before.clone()
    with pytest.warns(UserWarning, match="out of date"):
        datamodule(root, on_corrupt="skip").prepare_data()
    assert (root / "mini_imagenet_84.pt").stat().st_ino != inode
    assert torch.equal(before, expected), "who had it mapped goes on"


def test_setup_finds_what_another_process_prepared(
    layouts: dict[str, Path], copy_of: Callable[[str], Path]
) -> None:
    prepared(layouts["class folders"])
    module = datamodule(layouts["class folders"])
    module.setup("fit")
    assert len(next(iter(module.train_dataloader())).support_x) == 2
    root = copy_of("class folders")
    (root / "mini_imagenet_84.pt").unlink(missing_ok=True)
    with pytest.raises(
        FileNotFoundError,
        match=r"mini_imagenet_84.pt to hold the decoded images but it does not; call "
        r"`prepare_data\(\)` first",
    ):
        datamodule(root).setup("fit")


def test_small_classes_are_reported_and_dropped_only_when_asked(
    copy_of: Callable[[str], Path],
) -> None:
    root = copy_of("class folders")
    fewer = (CLASSES["train"][3], 12), (CLASSES["train"][8], 0)
    for name, kept in fewer:
        for file in sorted((root / "train" / name).iterdir())[kept:]:
            file.unlink()
    found = ", ".join(rf"train/{name} \({kept}\)" for name, kept in fewer)
    message = f"2 of its 64 classes have fewer images than the .* that an episode takes: {found}"
    with pytest.raises(
        ValueError,
        match=rf"split 'train' \(5 \+ 15\) to be at most 0, .*{message}; .*leave these out by "
        "small_classes='drop'",
    ):
        prepared(root)
    with pytest.warns(
        UserWarning, match=rf"Split 'train': {message}; without them 62 classes are left"
    ):
        module = prepared(root, small_classes="drop")
    assert len(next(iter(module.train_dataloader())).support_x) == 2


@pytest.mark.parametrize("argument", ["on_corrupt", "small_classes"])
def test_unknown_words_are_refused(argument: str) -> None:
    with pytest.raises(ValueError, match=f"`{argument}` to be 'raise' or '.*' but got 'ignore'"):
        datamodule(Path(), **{argument: "ignore"})
