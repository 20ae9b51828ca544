"""CUB-200-2011, from made-up photographs in its tree."""

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from helpers.cub_files import SPECIES, write_cub
from lightning_maml.datamodules import CUBDataModule, load_images
from lightning_maml.datamodules.cub import split_species

pytestmark = pytest.mark.cpu_only  # files

SETTINGS = {"shots": 1, "queries": 2, "meta_batch_size": 2, "seed": 3, "image_size": 32}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    folder = tmp_path_factory.mktemp("data")
    write_cub(folder)
    return folder


def prepared(root: Path, **arguments) -> CUBDataModule:
    data = CUBDataModule(str(root), **SETTINGS | arguments)
    data.prepare_data()
    data.setup()
    return data


def test_the_split_is_that_of_chen_et_al() -> None:
    """Of the species in their order, counted from 0, the even ones are for training, and of the
    odd ones those that leave 1 by fours for validation, 3 for testing."""
    splits = split_species(SPECIES)
    assert splits["train"] == [name for i, name in enumerate(SPECIES) if i % 2 == 0]
    assert splits["val"] == [name for i, name in enumerate(SPECIES) if i % 4 == 1]
    assert splits["test"] == [name for i, name in enumerate(SPECIES) if i % 4 == 3]
    assert [len(names) for names in splits.values()] == [100, 50, 50]
    assert sorted(name for names in splits.values() for name in names) == SPECIES


def test_every_species_has_its_photographs(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        data = prepared(root)
    assert (
        f"CUB-200-2011 from {root / 'CUB_200_2011'}: train 100 classes, 300 images; val 50 "
        "classes, 150 images; test 50 classes, 150 images" in caplog.text
    )
    for split, names in split_species(SPECIES).items():
        read = data.class_images(split)
        assert list(read.names) == names
        for rows, name in [*zip(read.members, names, strict=True)][::7]:
            files = sorted((root / "CUB_200_2011" / "images" / name).iterdir())
            expected = (load_images(files, image_size=32) * 255).round().to(torch.uint8)
            assert torch.equal(read.images[rows], expected)


def test_equal_seeds_give_equal_episodes_wherever_the_tree_lies(root: Path, tmp_path: Path) -> None:
    tree = shutil.copytree(root / "CUB_200_2011", tmp_path / "birds")
    (tree / "images.txt").unlink()  # only the images were copied
    nested = tmp_path / "nested" / "CUB_200_2011" / "CUB_200_2011"
    shutil.copytree(tree, nested)
    for split in ("train", "val", "test"):
        one, *others = (
            next(iter(getattr(prepared(place), f"{split}_dataloader")()))
            for place in (root, tree, tmp_path / "nested")
        )
        assert one.support_x.shape == (2, 5, 3, 32, 32)
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"get CUB_200_2011.tgz from data.caltech.edu"):
        prepared(tmp_path)
    (tmp_path / "images" / "dogs").mkdir(parents=True)  # of another dataset
    with pytest.raises(FileNotFoundError, match=r"get CUB_200_2011.tgz from data.caltech.edu"):
        prepared(tmp_path)
    folder = write_cub(tmp_path, per_class=2)
    [first, _] = sorted((folder / "images" / SPECIES[3]).iterdir())
    first.unlink()
    with pytest.raises(
        FileNotFoundError, match=rf"all 400 images .* 1 are missing: .*{first.name}"
    ):
        prepared(tmp_path)
    shutil.rmtree(folder / "images" / SPECIES[3])
    with pytest.raises(ValueError, match=r"folders 001\.\* \.\. 200\.\* of species but got 199"):
        prepared(tmp_path)


def test_damaged_photographs_are_refused_or_skipped(tmp_path: Path) -> None:
    folder = write_cub(tmp_path, per_class=4)
    [first, *_] = sorted((folder / "images" / SPECIES[3]).iterdir())
    first.write_bytes(first.read_bytes()[:200])
    with pytest.raises(OSError, match=first.name):
        prepared(tmp_path)
    with pytest.warns(UserWarning, match="1 images cannot be read and are left out"):
        data = prepared(tmp_path, on_corrupt="skip")
    assert min(map(len, data.class_images("test").members)) == 3
    Image.new("RGB", (9, 9)).save(first)
    prepared(tmp_path)


def test_arguments_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="Expected `image_size` to be at least 1 but got 0"):
        CUBDataModule(image_size=0)
    with pytest.raises(ValueError, match="Expected `on_corrupt` to be 'raise' or 'skip'"):
        CUBDataModule(on_corrupt="ignore")
