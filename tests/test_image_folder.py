"""Anybody's tree of images."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_maml.datamodules import ImageFolderDataModule
from lightning_maml.datamodules.class_splits import split_classes
from lightning_maml.datamodules.image_files import read_image


def write_class(place: Path, count: int, color: int, suffix: str = ".png") -> None:
    place.mkdir(parents=True)
    for number in range(count):
        Image.new("RGB", (20 + number, 30), (color, number, 0)).save(place / f"{number:03d}{suffix}")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """25 classes of 6 to 10 images, of several sizes and formats."""
    for number in range(25):
        write_class(
            tmp_path / "animals" / f"species {number:02d}", 6 + number % 5, 10 * number, (".png", ".jpg", ".JPEG", ".bmp")[number % 4]
        )
    return tmp_path / "animals"


@pytest.fixture
def split_tree(tmp_path: Path) -> Path:
    for split, numbers in (("train", range(5)), ("val", range(5, 8)), ("test", range(8, 12))):
        for number in numbers:
            write_class(tmp_path / "photos" / split / f"class {number}", 7, 20 * number)
    return tmp_path / "photos"


def datamodule(root: Path, **arguments) -> ImageFolderDataModule:
    return ImageFolderDataModule(str(root), **({"ways": 3, "shots": 2, "queries": 4, "image_size": 16, "meta_batch_size": 2} | arguments))


def prepared(root: Path, **arguments) -> ImageFolderDataModule:
    module = datamodule(root, **arguments)
    module.prepare_data()
    module.setup()
    return module


def test_a_tree_with_splits(split_tree: Path) -> None:
    module = prepared(split_tree)
    assert [len(module.class_images(split).members) for split in ("train", "val", "test")] == [5, 3, 4]
    reds = module.class_images("test").images[:, 0, 8, 8]
    assert sorted({int(reds[rows].unique()) for rows in module.class_images("test").members}) == [160, 180, 200, 220]
    batch = next(iter(module.test_dataloader()))
    assert batch.support_x.shape == (2, 6, 3, 16, 16)
    assert batch.query_y.tolist() == [[0] * 4 + [1] * 4 + [2] * 4] * 2


def test_other_names_of_the_validation_split(split_tree: Path) -> None:
    expected = prepared(split_tree).class_images("val").images.clone()
    (split_tree / "val").rename(split_tree / "validation")
    assert torch.equal(prepared(split_tree).class_images("val").images, expected)


def test_a_tree_without_splits_is_shared_out_by_class(tree: Path) -> None:
    module = prepared(tree)
    names = {split: list(module.class_images(split).names) for split in ("train", "val", "test")}
    assert {split: len(of_split) for split, of_split in names.items()} == {"train": 16, "val": 4, "test": 5}
    assert sorted(name for of_split in names.values() for name in of_split) == [f"species {number:02d}" for number in range(25)]
    for split, of_split in names.items():
        images = module.class_images(split)
        for name, rows in zip(of_split, images.members, strict=True):
            number = int(name[-2:])
            assert len(rows) == 6 + number % 5
            assert (images.images[rows][:, 0].float() - 10 * number).abs().max() < 3


def test_the_split_depends_on_its_seed_and_on_the_names_alone(tree: Path) -> None:
    one = split_classes(50, (0.6, 0.2, 0.2), 0)
    assert one == split_classes(50, (0.6, 0.2, 0.2), 0)
    assert one != split_classes(50, (0.6, 0.2, 0.2), 1)
    assert sorted(number for part in one.values() for number in part) == list(range(50))
    assert [len(part) for part in one.values()] == [30, 10, 10]
    first, second = prepared(tree), prepared(tree, seed=5, image_size=8)
    assert first.class_images("test").names == second.class_images("test").names
    other = prepared(tree, split_seed=1)
    assert first.class_images("test").names != other.class_images("test").names
    assert len(list(tree.glob("*.pt"))) == 2, "one cache per size serves all splits"


def test_images_of_a_class_may_lie_deeper(tree: Path) -> None:
    place = tree / "species 03"
    (place / "a" / "b").mkdir(parents=True)
    for file in sorted(place.glob("*.bmp"))[:3]:
        file.rename(place / "a" / "b" / file.name)
    (place / ".hidden.png").write_bytes(b"")
    (place / "notes.txt").write_text("seen in May")
    (place / ".ipynb_checkpoints").mkdir()
    shutil.copy(place / "a" / "b" / "000.bmp", place / ".ipynb_checkpoints" / "000-checkpoint.bmp")
    (place / "a" / "loop").symlink_to(place)
    module = prepared(tree)
    assert [len(rows) for name, rows in _classes(module) if name == "species 03"] == [9]


def _classes(module: ImageFolderDataModule) -> list[tuple[str, np.ndarray]]:
    splits = [module.class_images(split) for split in ("train", "val", "test")]
    return [pair for images in splits for pair in zip(images.names, images.members, strict=True)]


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK", "LA"])
def test_images_of_any_mode_become_rgb(split_tree: Path, mode: str) -> None:
    (split_tree / "test" / "class 8" / "000.png").unlink()
    file = split_tree / "test" / "class 8" / f"000{'.tif' if mode == 'CMYK' else '.png'}"
    Image.new("RGB", (30, 30), (255, 255, 255)).convert(mode if mode != "LA" else "L").convert(mode).save(file)
    images = prepared(split_tree).class_images("test")
    first = images.members[list(images.names).index("test/class 8")][0]
    assert images.images[first].min() > 250


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_images_of_more_than_8_bits_are_refused(split_tree: Path, mode: str) -> None:
    (split_tree / "test" / "class 8" / "000.png").unlink()
    Image.new(mode, (30, 30), 300).save(split_tree / "test" / "class 8" / "000.tif")
    with pytest.raises(OSError, match=rf"000.tif to be an image but .* mode {mode}\S* have more than 8 bits; convert them to 8"):
        datamodule(split_tree).prepare_data()


def test_no_flipped_bit_of_an_image_with_checksums_gets_through(tmp_path: Path) -> None:
    file = tmp_path / "image.png"
    drawing = np.ones((105, 105), bool)  # as Omniglot's
    drawing[5:25, 4:24] = False
    Image.fromarray(drawing).save(file)
    content, whole, refused = file.read_bytes(), read_image(file, 28, "L"), 0
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        file.write_bytes(damaged)
        try:
            assert np.array_equal(read_image(file, 28, "L"), whole), position
        except (OSError, SyntaxError, ValueError):
            refused += 1
    assert refused > 0.9 * len(content)


def test_trees_without_images_say_so(split_tree: Path) -> None:
    for file in split_tree.rglob("*.png"):
        file.rename(file.with_suffix(".txt"))
    with pytest.raises(FileNotFoundError, match=r"Expected images \(.jpg, .*\) of the classes in .*photos but found none"):
        datamodule(split_tree).prepare_data()


def test_without_progress_bars_the_images_are_the_same(tree: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tree, tmp_path / "other")
    code = "import sys; from test_image_folder import prepared; from pathlib import Path; prepared(Path(sys.argv[1]), on_corrupt='skip')"
    for place in (tree, other):
        (place / "species 24" / "000.png").write_bytes(b"no image")
    assert "TQDM_DISABLE" not in os.environ
    environment = os.environ | {"TQDM_DISABLE": "1", "PYTHONPATH": str(Path(__file__).parent)}
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(other)], env=environment, check=True)
    with_bars, without = (prepared(place, on_corrupt="skip").class_images("train") for place in (tree, other))
    assert torch.equal(with_bars.images, without.images)
    assert [rows.tolist() for rows in with_bars.members] == [rows.tolist() for rows in without.members]


def test_what_is_no_tree_is_said(tmp_path: Path, split_tree: Path, tree: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"`root` to be a folder of images but there is none at .*mistyped"):
        datamodule(tmp_path / "mistyped").prepare_data()
    with pytest.raises(FileNotFoundError, match=r"Expected a folder of images for each class in .*, but found none"):
        datamodule(tree / "species 00").prepare_data()
    shutil.rmtree(split_tree / "val")
    with pytest.raises(FileNotFoundError, match=r"Expected train, val and test in .*photos but got train, test only; or put all classes"):
        datamodule(split_tree).prepare_data()


def test_splits_that_share_a_class_are_refused(split_tree: Path) -> None:
    shutil.copytree(split_tree / "train" / "class 0", split_tree / "test" / "class 0")
    with pytest.raises(
        ValueError, match=r"photos to share no class but 1 are both in train and in test \(class 0\): .* ordinary classification"
    ):
        datamodule(split_tree).prepare_data()


def test_small_classes(tree: Path) -> None:
    with pytest.raises(ValueError, match=r"split 'train' \(2 \+ 6\) to be at most 6, .* species \d\d \(\d\).*; leave these out by small"):
        prepared(tree, queries=6)
    with pytest.warns(UserWarning, match=r"Split 'train': \d of its 16 classes have fewer images: species .*; without them \d+ classes"):
        module = prepared(tree, queries=6, ways=2, small_classes="drop")
    for _ in range(20):
        assert next(iter(module.train_dataloader())).query_x.shape == (2, 12, 3, 16, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shares": (0.5, 0.5, 0.5)}, "`shares` to be three positive numbers that sum to 1 but got"),
        ({"shares": (1.0, 0.0, 0.0)}, "`shares` to be three positive numbers that sum to 1 but got"),
        ({"image_size": 0}, "`image_size` to be at least 1 but got 0"),
        ({"on_corrupt": "ignore"}, "`on_corrupt` to be 'raise' or 'skip' but got 'ignore'"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        datamodule(Path(), **arguments)
