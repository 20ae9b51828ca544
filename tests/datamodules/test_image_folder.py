"""Anybody's tree of images."""

import os
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageOps

from helpers.folders import ENVIRONMENT
from lightning_maml.datamodules import ImageFolderDataModule, load_images
from lightning_maml.datamodules.class_splits import split_classes
from lightning_maml.datamodules.images import files as image_files
from lightning_maml.datamodules.images.files import pixels, read_image
from lightning_maml.datamodules.images.folders import IMAGE_EXTENSIONS

pytestmark = pytest.mark.cpu_only  # files


def write_class(place: Path, count: int, color: int, suffix: str = ".png") -> None:
    place.mkdir(parents=True)
    for number in range(count):
        Image.new("RGB", (20 + number, 30), (color, number, 0)).save(
            place / f"{number:03d}{suffix}"
        )


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """25 classes of 6 to 10 images, of several sizes and formats."""
    for number in range(25):
        write_class(
            tmp_path / "animals" / f"species {number:02d}",
            6 + number % 5,
            10 * number,
            (".png", ".jpg", ".JPEG", ".bmp")[number % 4],
        )
    return tmp_path / "animals"


@pytest.fixture
def split_tree(tmp_path: Path) -> Path:
    for split, numbers in (("train", range(5)), ("val", range(5, 8)), ("test", range(8, 12))):
        for number in numbers:
            write_class(tmp_path / "photos" / split / f"class {number}", 7, 20 * number)
    return tmp_path / "photos"


def datamodule(root: Path, **arguments) -> ImageFolderDataModule:
    return ImageFolderDataModule(
        str(root),
        **(
            {"ways": 3, "shots": 2, "queries": 4, "image_size": 16, "meta_batch_size": 2}
            | arguments
        ),
    )


def prepared(root: Path, **arguments) -> ImageFolderDataModule:
    module = datamodule(root, **arguments)
    module.prepare_data()
    module.setup()
    return module


def test_a_tree_with_splits_is_read(split_tree: Path) -> None:
    module = prepared(split_tree)
    assert [len(module.class_images(split).members) for split in ("train", "val", "test")] == [
        5,
        3,
        4,
    ]
    reds = module.class_images("test").images[:, 0, 8, 8]
    assert sorted({int(reds[rows].unique()) for rows in module.class_images("test").members}) == [
        160,
        180,
        200,
        220,
    ]
    batch = next(iter(module.test_dataloader()))
    assert batch.support_x.shape == (2, 6, 3, 16, 16)
    assert batch.query_y.tolist() == [[0] * 4 + [1] * 4 + [2] * 4] * 2


def test_the_validation_split_may_be_named_validation(split_tree: Path) -> None:
    expected = prepared(split_tree).class_images("val").images.clone()
    (split_tree / "val").rename(split_tree / "validation")
    assert torch.equal(prepared(split_tree).class_images("val").images, expected)


def test_a_tree_without_splits_is_split_by_class(tree: Path) -> None:
    module = prepared(tree)
    names = {split: list(module.class_images(split).names) for split in ("train", "val", "test")}
    assert {split: len(of_split) for split, of_split in names.items()} == {
        "train": 16,
        "val": 4,
        "test": 5,
    }
    assert sorted(name for of_split in names.values() for name in of_split) == [
        f"species {number:02d}" for number in range(25)
    ]
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
    # they may be set between two runs
    first.setup()
    first.split_seed, first.image_size = 1, 8
    first.setup()
    again = next(iter(first.test_dataloader())).query_x
    assert again.shape[-2:] == (8, 8)
    assert torch.equal(
        again, next(iter(prepared(tree, split_seed=1, image_size=8).test_dataloader())).query_x
    )
    first.shares = (0.5, 0.6, 0.7)
    with pytest.raises(ValueError, match="three positive numbers that sum to 1"):
        first.setup()


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
    Image.new("RGB", (30, 30), (255, 255, 255)).convert(mode if mode != "LA" else "L").convert(
        mode
    ).save(file)
    images = prepared(split_tree).class_images("test")
    first = images.members[list(images.names).index("test/class 8")][0]
    assert images.images[first].min() > 250


def drawing(mode: str) -> Image.Image:
    """A black square on a transparent ground, whose hidden pixels are black too."""
    image = Image.new("LA", (30, 30), (0, 0))
    ImageDraw.Draw(image).rectangle((5, 5, 14, 14), fill=(0, 255))
    if mode != "P":
        return image.convert(mode)
    palette = Image.fromarray((np.asarray(image)[..., 1] > 0).astype(np.uint8), "P")
    palette.putpalette([0] * 6)
    palette.info["transparency"] = 0
    return palette


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("RGBA", ".png"), ("LA", ".png"), ("P", ".png"), ("P", ".gif"), ("RGBA", ".webp")],
)
def test_transparent_images_are_put_on_white(tmp_path: Path, mode: str, suffix: str) -> None:
    file = tmp_path / f"drawing{suffix}"
    drawing(mode).save(file, **({"lossless": True} if suffix == ".webp" else {}))
    expected = np.full((30, 30), 255, np.uint8)
    expected[5:15, 5:15] = 0
    assert np.array_equal(read_image(file, 30, "L"), expected)
    assert np.array_equal(read_image(file, 30, "RGB"), np.repeat(expected[..., None], 3, -1))


def test_half_transparent_pixels_are_mixed_with_white() -> None:
    image = Image.new("RGBA", (4, 4), (200, 0, 100, 51))  # a fifth
    assert np.array_equal(pixels(image, "RGB", None), np.full((4, 4, 3), (244, 204, 224), np.uint8))


def test_an_opaque_alpha_channel_changes_nothing() -> None:
    colours = np.random.RandomState(0).randint(0, 256, (16, 16, 3)).astype(np.uint8)
    opaque = Image.fromarray(np.concatenate([colours, np.full((16, 16, 1), 255, np.uint8)], -1))
    assert np.array_equal(pixels(opaque, "RGB", None), colours)


def test_a_white_drawing_on_a_transparent_ground_is_refused(split_tree: Path) -> None:
    white = ImageOps.invert(drawing("LA").getchannel("L"))
    white.putalpha(drawing("LA").getchannel("A"))
    white.save(split_tree / "test" / "class 8" / "000.png")
    with pytest.raises(
        OSError,
        match=r"000.png to be an image but it would be blank, .* what this one shows is white on a "
        r"transparent ground, or transparent throughout; save it on a darker ground",
    ):
        datamodule(split_tree).prepare_data()
    with pytest.warns(UserWarning, match="1 images cannot be read"):
        module = prepared(split_tree, on_corrupt="skip")
    assert dict(_classes(module))["test/class 8"].shape == (6,)
    assert dict(_classes(module))["test/class 9"].shape == (7,)


def test_colours_that_are_transparent_throughout_are_refused() -> None:
    """As they are where a fourth byte that means nothing is taken for an alpha channel."""
    colours = np.random.RandomState(0).randint(0, 256, (16, 16, 4)).astype(np.uint8)
    colours[..., 3] = 0
    with pytest.raises(ValueError, match=r"it would be blank, .* transparent throughout"):
        pixels(Image.fromarray(colours), "RGB", None)
    colours[...] = 0  # a blank page
    assert pixels(Image.fromarray(colours), "RGB", None).min() == 255


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_as_their_exif_data_say(
    tmp_path: Path, orientation: int, suffix: str
) -> None:
    """Against the turns that the EXIF standard lists, of arrays."""
    stored = np.zeros((40, 40, 3), np.uint8)
    stored[:20, :20, 0], stored[:20, 20:, 1], stored[20:, :20, 2] = 255, 255, 255
    upright = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: np.rot90(stored, -1),
        7: stored[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(stored, 1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    quality = (
        {"quality": 95, "subsampling": 0}
        if suffix == ".jpg"
        else {"lossless": True}
        if suffix == ".webp"
        else {}
    )
    Image.fromarray(stored).save(tmp_path / f"photograph{suffix}", exif=exif, **quality)
    read = read_image(tmp_path / f"photograph{suffix}", 40, "RGB").astype(int)
    inner = [slice(4, 16), slice(24, 36)]  # away from the edges, which JPEG blurs
    for rows in inner:
        for columns in inner:
            assert np.abs(read[rows, columns] - upright[rows, columns]).max() < 8


def write_all_kinds(place: Path) -> None:
    """Images of every mode and format that are read, some of them turned."""
    exif = Image.Exif()
    exif[0x0112] = 6
    photograph = Image.fromarray(
        np.random.RandomState(0).randint(0, 256, (24, 20, 3)).astype(np.uint8)
    )
    for mode, suffix in (
        ("RGB", ".jpg"),
        ("L", ".jfif"),
        ("CMYK", ".jpeg"),
        ("RGB", ".png"),
        ("1", ".png"),
        ("L", ".bmp"),
        ("RGB", ".tif"),
    ):
        photograph.convert(mode).save(
            place / f"{mode}{suffix}", exif=exif, format="JPEG" if suffix == ".jfif" else None
        )
    for mode, suffix in (
        ("RGBA", ".png"),
        ("LA", ".png"),
        ("P", ".png"),
        ("P", ".gif"),
        ("RGBA", ".webp"),
    ):
        drawing(mode).save(place / f"drawing {mode}{suffix}")


def test_load_images_reads_as_the_datamodule_does_bit_for_bit(split_tree: Path) -> None:
    write_all_kinds(split_tree / "train" / "class 0")
    module = prepared(split_tree, ways=2, shots=1, queries=1)
    files = sorted((split_tree / "train" / "class 0").iterdir())
    assert len(files) == 7 + 12
    images = module.class_images("train")
    assert torch.equal(load_images(files, 16), images.images[images.members[0]].float() / 255)
    episodes = module.on_after_batch_transfer(next(iter(module.train_dataloader())), 0)
    loaded = load_images([str(file) for file in sorted((split_tree / "train").rglob("*.*"))], 16)
    for image in episodes.query_x.flatten(0, 1):
        assert (loaded == image).flatten(1).all(1).any()


def test_load_images_reads_gray_images(tmp_path: Path) -> None:
    drawing("RGBA").save(tmp_path / "a.png")
    images = load_images([tmp_path / "a.png"] * 2, 30, mode="L")
    assert images.shape == (2, 1, 30, 30)
    assert images.unique().tolist() == [0, 1]


def test_load_images_refuses_bad_files_and_arguments(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(
        OSError, match=r"Expected .*a.png to be an image but it cannot be read \(cannot identify"
    ):
        load_images([tmp_path / "a.png"], 28)
    with pytest.raises(OSError, match=r"Expected to read .*b.png but .*No such file"):
        load_images([tmp_path / "b.png"], 28)
    with pytest.raises(ValueError, match="`files` to name at least one image but got none"):
        load_images([], 28)
    with pytest.raises(ValueError, match="`image_size` to be at least 1 but got 0"):
        load_images([tmp_path / "a.png"], 0)
    with pytest.raises(ValueError, match="`mode` to be 'RGB' or 'L' but got 'RGBA'"):
        load_images([tmp_path / "a.png"], 28, mode="RGBA")


def test_a_cache_made_by_other_rules_is_made_anew(
    split_tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_files, "_RULES", "1: transparency is cut off")
    prepared(split_tree)
    monkeypatch.undo()
    with pytest.warns(
        UserWarning,
        match=r"images_16.pt is damaged or out of date .*other files, or by the rules of another "
        "version",
    ):
        prepared(split_tree)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_images_of_more_than_8_bits_are_refused(split_tree: Path, mode: str) -> None:
    (split_tree / "test" / "class 8" / "000.png").unlink()
    Image.new(mode, (30, 30), 300).save(split_tree / "test" / "class 8" / "000.tif")
    with pytest.raises(
        OSError,
        match=rf"000.tif to be an image but .* mode {mode}\S* have more than 8 bits; convert "
        "them to 8",
    ):
        datamodule(split_tree).prepare_data()


def test_flipped_bits_of_images_with_checksums_are_detected(tmp_path: Path) -> None:
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


def test_trees_without_images_are_refused(split_tree: Path) -> None:
    for file in split_tree.rglob("*.png"):
        file.rename(file.with_suffix(".txt"))
    with pytest.raises(
        FileNotFoundError,
        match=r"Expected images \(.jpg, .*\) of the classes in .*photos but found none",
    ):
        datamodule(split_tree).prepare_data()


def test_without_progress_bars_the_images_are_the_same(tree: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tree, tmp_path / "other")
    code = (
        "import runpy, sys; from pathlib import Path; "
        "runpy.run_path(sys.argv[2])['prepared'](Path(sys.argv[1]), on_corrupt='skip')"
    )
    for place in (tree, other):
        (place / "species 24" / "000.png").write_bytes(b"no image")
    assert "TQDM_DISABLE" not in os.environ
    environment = ENVIRONMENT | {"TQDM_DISABLE": "1"}
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(other), __file__],
        env=environment,
        check=True,
    )
    with_bars, without = (
        prepared(place, on_corrupt="skip").class_images("train") for place in (tree, other)
    )
    assert torch.equal(with_bars.images, without.images)
    assert [rows.tolist() for rows in with_bars.members] == [
        rows.tolist() for rows in without.members
    ]


def test_folders_that_are_no_tree_of_classes_are_refused(
    tmp_path: Path, split_tree: Path, tree: Path
) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"`root` to be a folder of images but there is none at .*mistyped"
    ):
        datamodule(tmp_path / "mistyped").prepare_data()
    with pytest.raises(
        FileNotFoundError, match=r"Expected a folder of images for each class in .*, but found none"
    ):
        datamodule(tree / "species 00").prepare_data()
    shutil.rmtree(split_tree / "val")
    with pytest.raises(
        FileNotFoundError,
        match=r"Expected train, val and test in .*photos but got train, test only; or put all "
        "classes",
    ):
        datamodule(split_tree).prepare_data()


def test_splits_that_share_a_class_are_refused(split_tree: Path) -> None:
    shutil.copytree(split_tree / "train" / "class 0", split_tree / "test" / "class 0")
    with pytest.raises(
        ValueError,
        match=r"photos to share no class but 1 are both in train and in test \(class 0\): .* "
        "ordinary classification",
    ):
        datamodule(split_tree).prepare_data()


def test_files_that_are_no_images_are_left_out_and_counted(
    tree: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = [len(rows) for _, rows in _classes(prepared(tree))]
    for place in (
        tree / "__MACOSX" / "species 00",
        tree / "species 00" / "@eaDir" / "000.png",
        tree / ".ipynb_checkpoints",
    ):
        write_class(place, 3, 0)
    for name in (
        "._000.png",
        ".DS_Store",
        "Thumbs.db",
        "notes.txt",
        "phone.heic",
        "phone2.HEIC",
        "README",
    ):
        (tree / "species 01" / name).write_bytes(b"")
    (tree / "logs").mkdir()
    write_class(tree / "loose", 1, 0)
    (tree / "loose" / "000.png").rename(tree / "loose.png")
    with caplog.at_level("INFO"):
        module = prepared(tree)
    assert [len(rows) for _, rows in _classes(module)] == expected
    (line,) = [record.message for record in caplog.records if "left out" in record.message]
    assert (
        line.split("left out: ")[0]
        == f"Images in {tree}: 16 train classes, 4 val classes, 5 test classes; "
    )
    assert set(line.split("left out: ")[1].split(", ")) == {
        *(
            "3 folders of programs",
            "3 hidden files",
            "2 files .heic",
            "2 folders without images",
            "1 files .txt",
        ),
        *("1 files without an extension", "1 images above the folders of classes"),
    }


def test_the_log_mentions_no_left_out_files_if_there_are_none(
    tree: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        prepared(tree)
    assert [record.message for record in caplog.records if "Images in" in record.message] == [
        f"Images in {tree}: 16 train classes, 4 val classes, 5 test classes"
    ]


def test_images_with_any_usual_extension_are_read(tmp_path: Path) -> None:
    image = Image.new("RGB", (20, 20), (200, 100, 50))
    for suffix in IMAGE_EXTENSIONS:
        file = tmp_path / "photos" / "one class" / f"image{suffix.upper()}"
        file.parent.mkdir(parents=True, exist_ok=True)
        form = {".jfif": "JPEG", ".jpe": "JPEG", ".mpo": "JPEG", ".apng": "PNG"}.get(suffix)
        image.convert("L" if suffix in (".pgm", ".pbm") else "RGB").save(file, format=form)
    files = image_files.decode(
        {"one class": sorted((tmp_path / "photos" / "one class").iterdir())}, 20, "RGB", "raise", ""
    )
    assert files.images.shape == (len(IMAGE_EXTENSIONS), 20, 20, 3)


@pytest.mark.parametrize(
    "names",
    [
        ("Train", "Val", "Test"),
        ("train", "valid", "test"),
        ("training", "validation", "testing"),
        ("base", "val", "novel"),
        ("meta-train", "meta-val", "meta-test"),
    ],
)
def test_splits_may_have_their_usual_names(split_tree: Path, names: tuple[str, str, str]) -> None:
    expected = {
        split: prepared(split_tree).class_images(split).images.clone()
        for split in ("train", "val", "test")
    }
    for split, name in zip(expected, names, strict=True):
        (split_tree / split).rename(split_tree / f"{split}_")
        (split_tree / f"{split}_").rename(split_tree / name)
    module = prepared(split_tree)
    assert all(
        torch.equal(module.class_images(split).images, images) for split, images in expected.items()
    )


def test_missing_or_repeated_splits_are_refused(split_tree: Path) -> None:
    shutil.copytree(split_tree / "val", split_tree / "validation")
    with pytest.raises(
        ValueError,
        match=r"one folder of each split in .*photos but got train, val, validation, test; leave "
        "one for val",
    ):
        datamodule(split_tree).prepare_data()
    for name in ("val", "validation"):
        shutil.rmtree(split_tree / name)
    for name, omniglot in (("train", "images_background"), ("test", "images_evaluation")):
        (split_tree / name).rename(split_tree / omniglot)
    with pytest.raises(
        FileNotFoundError,
        match=r"got images_background, images_evaluation only; .*; for Omniglot take "
        "OmniglotDataModule",
    ):
        datamodule(split_tree).prepare_data()


@pytest.mark.parametrize("kind", ["tree", "split_tree"])
def test_a_tree_may_lie_some_folders_deeper(
    tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    whole = request.getfixturevalue(kind)
    expected = prepared(whole)
    (tmp_path / "download" / "data" / "v1").mkdir(parents=True)
    shutil.copytree(whole, tmp_path / "download" / "data" / "v1" / "images")
    module = prepared(tmp_path / "download")
    assert [(name, len(rows)) for name, rows in _classes(module)] == [
        (name, len(rows)) for name, rows in _classes(expected)
    ]
    assert module.cache_file.parent == tmp_path / "download"


def superclasses(root: Path) -> Path:
    for number in range(6):
        for kind in range(3):
            write_class(root / f"family {number}" / f"kind {kind}", 6, 40 * number + kind)
    return root


def test_superclasses_need_class_level(tmp_path: Path) -> None:
    root = superclasses(tmp_path / "animals")
    with pytest.raises(
        ValueError,
        match=r"lie in its folder but .*family 0 holds none, and 3 folders of images "
        r"\(kind 0, kind 1, kind 2\): give class_level=2 if each of these is a class, or "
        "class_level=1 if family 0 is one class",
    ):
        datamodule(root).prepare_data()
    names = [name for name, _ in _classes(prepared(root, class_level=2))]
    assert sorted(names) == [
        f"family {number}/kind {kind}" for number in range(6) for kind in range(3)
    ]
    merged = _classes(prepared(root, class_level=1, ways=2, test_ways=2, shares=(0.34, 0.33, 0.33)))
    assert sorted((name, len(rows)) for name, rows in merged) == [
        (f"family {number}", 18) for number in range(6)
    ]


def test_superclasses_within_splits_need_class_level(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        superclasses(tmp_path / "animals" / split).rename(tmp_path / "animals" / split)
    for place in (tmp_path / "animals").glob("*/*"):
        place.rename(place.with_name(f"{place.parent.name} {place.name}"))
    with pytest.raises(ValueError, match="give class_level=2"):
        datamodule(tmp_path / "animals").prepare_data()
    module = prepared(tmp_path / "animals", class_level=2)
    assert [len(module.class_images(split).members) for split in ("train", "val", "test")] == [
        18,
        18,
        18,
    ]


def test_one_folder_of_images_below_each_class_is_part_of_it(tmp_path: Path) -> None:
    """As Tiny ImageNet has it: train/n01443537/images/*.JPEG."""
    for number in range(10):
        write_class(tmp_path / "tiny" / f"n{number}" / "images", 6, 10 * number)
    names = [name for name, _ in _classes(prepared(tmp_path / "tiny", ways=2))]
    assert sorted(names) == [f"n{number}" for number in range(10)]


def test_linked_folders_are_followed_once(tree: Path, tmp_path: Path) -> None:
    links = tmp_path / "links"
    for place in sorted(tree.iterdir()):
        write_class(links / place.name, 2, 0)
        (links / place.name / "more").symlink_to(place)
        (links / place.name / "again").symlink_to(place)
        (links / place.name / "circle").symlink_to(links / place.name)
    counts = {name: len(rows) for name, rows in _classes(prepared(links))}
    assert counts == {f"species {number:02d}": 2 + 6 + number % 5 for number in range(25)}


def test_a_dead_link_is_refused_or_skipped_until_it_is_mended(split_tree: Path) -> None:
    (split_tree / "test" / "class 8" / "new.png").symlink_to(split_tree / "elsewhere.png")
    with pytest.raises(
        OSError,
        match=r"new.png to be an image but it is a link to .*elsewhere.png, where there is "
        "nothing; mend or",
    ):
        datamodule(split_tree).prepare_data()
    with pytest.warns(UserWarning, match="1 images cannot be read"):
        module = prepared(split_tree, on_corrupt="skip")
    place = list(module.class_images("test").names).index("test/class 8")
    assert len(module.class_images("test").members[place]) == 7
    Image.new("RGB", (20, 20)).save(split_tree / "elsewhere.png")
    with pytest.warns(UserWarning, match="out of date"):
        assert len(prepared(split_tree).class_images("test").members[place]) == 8


def test_small_classes_are_refused_or_dropped(tree: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"split 'train' \(2 \+ 6\) to be at most 6, .* species \d\d \(\d\).*; lower .*leave these "
        "out by small",
    ):
        prepared(tree, queries=6)
    with pytest.warns(
        UserWarning,
        match=r"Split 'train': \d of its 16 classes have fewer images .*: species .*; without them "
        r"\d+ classes",
    ):
        module = prepared(tree, queries=6, ways=2, small_classes="drop")
    for _ in range(20):
        assert next(iter(module.train_dataloader())).query_x.shape == (2, 12, 3, 16, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"shares": (0.5, 0.5, 0.5)},
            "`shares` to be three positive numbers that sum to 1 but got",
        ),
        (
            {"shares": (1.0, 0.0, 0.0)},
            "`shares` to be three positive numbers that sum to 1 but got",
        ),
        ({"image_size": 0}, "`image_size` to be at least 1 but got 0"),
        ({"class_level": 0}, "`class_level` to be at least 1 but got 0"),
        ({"on_corrupt": "ignore"}, "`on_corrupt` to be 'raise' or 'skip' but got 'ignore'"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        datamodule(Path(), **arguments)


@pytest.mark.parametrize("link", ["train/alias", "test/inner"])
def test_one_folder_is_not_two_classes(split_tree: Path, link: str) -> None:
    place = split_tree / link
    aim = split_tree / ("test" if link.startswith("train") else "train")
    place.symlink_to(min(aim.iterdir()))
    with pytest.raises(ValueError, match=r"folder of images to be of one class .*; remove one"):
        datamodule(split_tree).prepare_data()


@pytest.mark.parametrize("end", ["png", "tif"])
def test_colours_of_more_than_8_bits_are_refused(end: str, tmp_path: Path) -> None:
    """Pillow would cut them to 8; a mode of such colours it does not have."""
    file = tmp_path / f"deep.{end}"
    colours = torch.randint(2**12, (6, 6, 3)).numpy().astype("uint16")
    (write_deep_png if end == "png" else write_deep_tif)(file, colours)
    with Image.open(file) as image:
        assert image.mode == "RGB", "so that it looks like any other"
    with pytest.raises(OSError, match="its colours have more than 8 bits; convert them to 8"):
        load_images([file], 6)


def write_deep_png(file: Path, colours: np.ndarray) -> None:
    def chunk(name: bytes, content: bytes) -> bytes:
        checked = name + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    height, width, _ = colours.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in colours)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


def write_deep_tif(file: Path, colours: np.ndarray) -> None:
    height, width, _ = colours.shape
    pixels = colours.astype("<u2").tobytes()
    bits, first = 8, 14  # where the numbers of bits and the pixels lie
    entries = [
        (256, 3, 1, width),
        (257, 3, 1, height),
        (258, 3, 3, bits),
        (259, 3, 1, 1),
        (262, 3, 1, 2),
        (273, 4, 1, first),
        (277, 3, 1, 3),
        (278, 3, 1, height),
        (279, 4, 1, len(pixels)),
    ]
    directory = struct.pack("<H", len(entries)) + b"".join(
        struct.pack("<HHII", *entry) for entry in entries
    )
    start = struct.pack("<2sHI", b"II", 42, first + len(pixels))
    file.write_bytes(start + struct.pack("<3H", 16, 16, 16) + pixels + directory + bytes(4))


def test_a_bitmap_of_16_bits_for_all_colours_together_is_read(tmp_path: Path) -> None:
    sizes = struct.pack("<IiiHHIIiiII", 40, 2, 2, 1, 16, 3, 8, 0, 0, 0, 0)
    masks = struct.pack("<III", 0xF800, 0x07E0, 0x001F)  # 5, 6 and 5 bits
    pixels = struct.pack("<4H", *[0xF800] * 4)
    start = struct.pack("<2sIHHI", b"BM", 14 + 40 + 12 + 8, 0, 0, 14 + 40 + 12)
    (tmp_path / "red.bmp").write_bytes(start + sizes + masks + pixels)
    assert load_images([tmp_path / "red.bmp"], 2)[0, :, 0, 0].tolist() == [1, 0, 0]


def test_folders_named_sets_are_splits(tmp_path: Path) -> None:
    for split in ("training_set", "valset", "test-set"):
        for number in range(2):
            folder = tmp_path / split / f"{split} class {number}"
            folder.mkdir(parents=True)
            for shot in range(3):
                Image.new("RGB", (6, 6)).save(folder / f"{shot}.png")
    data = ImageFolderDataModule(tmp_path, ways=2, shots=1, queries=1, image_size=6)
    data.prepare_data()
    data.setup()
    assert all("test" in name for name in data.class_images("test").names)
    assert len(data.class_images("train").members) == 2


def test_the_only_superclass_of_a_split_counts_as_a_level(tmp_path: Path) -> None:
    for split, families in {"train": 2, "val": 1, "test": 1}.items():
        for family in range(families):
            for kind in range(3):
                place = tmp_path / "animals" / split / f"{split} {family}" / f"kind {kind}"
                write_class(place / "near", 4, 40 * family + kind)
                write_class(place / "far", 4, 40 * family + kind)
    module = prepared(tmp_path / "animals", class_level=2, ways=2, test_ways=2)
    assert module.class_images("val").names == [f"val/val 0/kind {kind}" for kind in range(3)]
    assert len(module.class_images("train").members) == 6


def test_the_only_superclass_of_all_counts_as_a_level(tmp_path: Path) -> None:
    for kind in range(9):
        write_class(tmp_path / "animals" / "cats" / f"kind {kind}", 6, kind)
    options = {"ways": 2, "test_ways": 2, "shares": (0.34, 0.33, 0.33)}
    module = prepared(tmp_path / "animals", class_level=2, **options)
    assert {name.split("/")[0] for name, _ in _classes(module)} == {"cats"}


def test_a_damaged_file_that_was_removed_is_not_looked_for_again(tmp_path: Path) -> None:
    for number in range(6):
        write_class(tmp_path / "animals" / f"kind {number}", 7, number)
    damaged = sorted((tmp_path / "animals" / "kind 2").iterdir())[3]
    damaged.write_bytes(b"damaged")
    sizes = {"ways": 2, "test_ways": 2, "shares": (0.34, 0.33, 0.33)}
    module = datamodule(tmp_path / "animals", **sizes)
    with pytest.raises(OSError, match="cannot be read"):
        module.prepare_data()
    damaged.unlink()
    module.prepare_data()
    module.setup()
    assert sum(len(rows) for _, rows in _classes(module)) == 6 * 7 - 1


def test_a_folder_with_all_images_of_each_split_does_not_count_as_a_level(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        superclasses(tmp_path / "animals" / split / "photos")
        for place in (tmp_path / "animals" / split / "photos").iterdir():
            place.rename(place.with_name(f"{split} {place.name}"))
    module = prepared(tmp_path / "animals", class_level=2)
    assert len(module.class_images("train").members) == 18
