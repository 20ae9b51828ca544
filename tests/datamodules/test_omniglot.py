"""Omniglot: the official folders are read, cached and split; broken ones are refused."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.folders import ROOT
from lightning_maml.datamodules import OmniglotDataModule, omniglot
from lightning_maml.datamodules.images.cache import DecodedImages, write_cache

pytestmark = pytest.mark.cpu_only  # files

SPLITS = ROOT.parent / "shared" / "data" / "splits"
COUNTS = {"images_background": 6, "images_evaluation": 4}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """An Omniglot of ten characters."""
    monkeypatch.setattr(omniglot, "CHARACTERS", COUNTS)


def write_tree(root: Path) -> Path:
    """Write small official folders: one-bit PNGs of 105 x 105 pixels, ink 0 on paper 1."""
    number = 0
    for folder, count in COUNTS.items():
        for character in range(count):
            number += 1
            place = (
                root
                / folder
                / f"{folder[7]}_alphabet_{character // 2}"
                / f"character{character % 2 + 1:02d}"
            )
            place.mkdir(parents=True)
            for drawing in range(20):
                image = np.ones((105, 105), bool)
                image[5 * number : 5 * number + 20, 4 * drawing : 4 * drawing + 20] = False
                Image.fromarray(image).save(place / f"{number:04d}_{drawing + 1:02d}.png")
    return root


def datamodule(root: Path, **arguments) -> OmniglotDataModule:
    return OmniglotDataModule(
        str(root),
        **(
            {"ways": 2, "shots": 1, "queries": 2, "meta_batch_size": 2, "download": False}
            | arguments
        ),
    )


def lake(root: Path, **arguments) -> OmniglotDataModule:
    module = datamodule(root, split="lake", **arguments)
    module.prepare_data()
    return module


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("below", ["", "omniglot-py", "omniglot/python"])
def test_the_official_tree_is_found_and_read(tmp_path: Path, below: str) -> None:
    write_tree(tmp_path / below)
    module = lake(tmp_path)
    module.setup("test")
    batch = next(iter(module.test_dataloader()))
    assert batch.support_x.shape == (2, 2, 1, 28, 28)
    assert batch.query_y.tolist() == [[0, 0, 1, 1]] * 2
    floats = module.on_after_batch_transfer(batch, 0)
    assert floats.support_x.dtype == torch.float32
    assert floats.support_x.max() > 0.9, "ink is 1"
    assert floats.support_x.mean() < 0.2, "paper is 0"


@pytest.mark.usefixtures("small")
def test_images_are_the_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    write_tree(tmp_path)
    images = lake(tmp_path).class_images("test")
    assert len(images.members) == 4
    ink_rows = [
        float(
            (images.images[rows].float() * torch.arange(28)[:, None]).sum()
            / images.images[rows].sum()
        )
        for rows in images.members
    ]
    assert ink_rows == pytest.approx(
        [(5 * number + 9.5) * 28 / 105 for number in (7, 8, 9, 10)], abs=0.5
    )


@pytest.mark.usefixtures("small")
def test_nothing_is_read_but_the_cache_once_it_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tree(tmp_path)
    first = lake(tmp_path).class_images("test")
    for folder in COUNTS:
        shutil.rmtree(tmp_path / folder)
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("an image file was opened"))
    again = lake(tmp_path)
    again.setup("test")
    assert len(list(again.test_dataloader())) == 300
    assert torch.equal(again.class_images("test").images, first.images)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("damage", ["truncated", "flipped", "another shape"])
def test_a_damaged_cache_is_built_anew(tmp_path: Path, damage: str) -> None:
    write_tree(tmp_path)
    module = lake(tmp_path)
    whole = module.class_images("test").images.clone()
    content = bytearray(module.cache_file.read_bytes())
    if damage == "truncated":
        module.cache_file.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[len(content) // 2] ^= 0xFF
        module.cache_file.write_bytes(content)
    else:
        write_cache(
            module.cache_file,
            omniglot._SOURCE,
            DecodedImages(torch.zeros(200, 14, 14).byte(), torch.zeros(200).long(), ["x"], []),
        )
    with pytest.warns(
        UserWarning, match=r"omniglot_28.pt is damaged or out of date and is not used"
    ):
        rebuilt = lake(tmp_path)
    assert torch.equal(rebuilt.class_images("test").images, whole)


@pytest.mark.usefixtures("small")
def test_files_of_archivers_and_desktops_are_ignored(tmp_path: Path) -> None:
    write_tree(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "__MACOSX")
    half = tmp_path / "images_background"
    shutil.copytree(
        tmp_path / "whole" / "images_background" / "b_alphabet_0", half / "b_alphabet_0"
    )
    first = tmp_path / "whole" / "images_background" / "b_alphabet_0" / "character01"
    for name in ("._0001_01.png", ".DS_Store"):
        (first / name).write_bytes(b"not an image")
    (first.parent / ".DS_Store").write_bytes(b"")
    assert omniglot.find_tree(tmp_path) == {name: tmp_path / "whole" / name for name in COUNTS}
    assert len(lake(tmp_path).class_images("test").members) == 4


@pytest.mark.usefixtures("small")
def test_a_half_tree_is_downloaded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(write_tree(tmp_path) / "images_evaluation")
    monkeypatch.setattr(
        OmniglotDataModule, "_download_tree", lambda self: write_tree(self.root / "omniglot-py")
    )
    lake(tmp_path, download=True)
    assert set(omniglot.find_tree(tmp_path)) == set(COUNTS)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda root: shutil.rmtree(root / "images_evaluation"),
            (
                "folders images_background and images_evaluation in .* but found "
                ".*images_background; unpack"
            ),
        ),
        (
            lambda root: shutil.rmtree(root / "images_background" / "b_alphabet_0"),
            "to hold 6 characters but got 4; it is half extracted",
        ),
        (
            lambda root: (
                root / "images_background" / "b_alphabet_0" / "character01" / "0001_05.png"
            ).unlink(),
            "character01 to hold 20 images but got 19; it is half extracted",
        ),
        (
            lambda root: [shutil.rmtree(path) for path in root.iterdir()],
            "folders images_background and images_evaluation in .* found neither",
        ),
    ],
)
def test_an_incomplete_folder_is_refused(tmp_path: Path, damage, message: str) -> None:
    damage(write_tree(tmp_path))
    with pytest.raises(FileNotFoundError, match=message):
        lake(tmp_path)
    assert not list(tmp_path.glob("*.pt"))


@pytest.mark.parametrize("root", ["missing", "."])
def test_missing_data_without_a_network_are_reported(
    tmp_path: Path, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("http_proxy", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(
        FileNotFoundError,
        match=r"Expected the folders .*unpack images_background.zip.* The download failed",
    ):
        datamodule(tmp_path / root, download=True).prepare_data()
    with pytest.raises(
        FileNotFoundError, match=r"Expected the folders .*unpack images_background.zip"
    ):
        datamodule(tmp_path / "mistyped").prepare_data()
    assert not (tmp_path / "mistyped").exists()


@pytest.mark.usefixtures("small")
def test_a_broken_image_is_refused(tmp_path: Path) -> None:
    write_tree(tmp_path)
    broken = tmp_path / "images_background" / "b_alphabet_0" / "character01" / "0001_05.png"
    for content in (broken.read_bytes()[:60], b"", b"not an image"):
        broken.write_bytes(content)
        with pytest.raises(OSError, match=r"0001_05.png to be an image but it cannot be read"):
            lake(tmp_path)
        assert not list(tmp_path.glob("*omniglot*"))


@pytest.mark.usefixtures("small")
def test_too_few_classes_or_images_are_refused(tmp_path: Path) -> None:
    write_tree(tmp_path)
    with pytest.raises(
        ValueError, match="the ways of split 'test' to be at most 16, its classes, but got 17"
    ):
        lake(tmp_path, test_ways=17).setup("test")
    with pytest.raises(
        ValueError,
        match=r"split 'test' \(19 \+ 2\) to be at most 20, the images of its smallest class, but "
        r"4 of its 4 classes have fewer images than the .*; lower `shots` or `queries`\.",
    ):
        lake(tmp_path, test_shots=19).setup("test")


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(
        ValueError, match="`split` to be 'random', 'vinyals' or 'lake' but got 'mini'"
    ):
        OmniglotDataModule(split="mini")


ALPHABETS = {  # alphabet:number of characters, as in the official folders
    "images_background": """
        Alphabet_of_the_Magi:20 Anglo-Saxon_Futhorc:29 Arcadian:26 Armenian:41
        Asomtavruli_(Georgian):40 Balinese:24 Bengali:46
        Blackfoot_(Canadian_Aboriginal_Syllabics):14 Braille:26 Burmese_(Myanmar):34 Cyrillic:33
        Early_Aramaic:22 Futurama:26 Grantha:43 Greek:24 Gujarati:48 Hebrew:22
        Inuktitut_(Canadian_Aboriginal_Syllabics):16 Japanese_(hiragana):52
        Japanese_(katakana):47 Korean:40 Latin:26 Malay_(Jawi_-_Arabic):40
        Mkhedruli_(Georgian):41 N_Ko:33 Ojibwe_(Canadian_Aboriginal_Syllabics):14 Sanskrit:42
        Syriac_(Estrangelo):23 Tagalog:17 Tifinagh:55
    """,
    "images_evaluation": """
        Angelic:20 Atemayar_Qelisayer:26 Atlantean:26 Aurek-Besh:26 Avesta:26 Ge_ez:26
        Glagolitic:45 Gurmukhi:45 Kannada:41 Keble:26 Malayalam:47 Manipuri:40 Mongolian:30
        Old_Church_Slavonic_(Cyrillic):45 Oriya:46 Sylheti:28 Syriac_(Serto):23 Tengwar:25
        Tibetan:42 ULOG:26
    """,
}


def character_names() -> list[str]:
    alphabets = [
        (folder, *entry.split(":"))
        for folder, entries in ALPHABETS.items()
        for entry in entries.split()
    ]
    return [
        f"{folder}/{alphabet}/character{number:02d}"
        for folder, alphabet, count in alphabets
        for number in range(1, int(count) + 1)
    ]


def test_the_alphabets_of_these_tests_are_all_of_omniglot() -> None:
    counts = {
        folder: sum(name.startswith(folder) for name in character_names()) for folder in ALPHABETS
    }
    assert counts == omniglot.CHARACTERS


@pytest.mark.parametrize(
    ("split", "sizes"),
    [("random", (1100, 100, 423)), ("vinyals", (1028, 172, 423)), ("lake", (864, 100, 659))],
)
def test_splits_have_their_sizes_and_share_no_class(split: str, sizes: tuple[int, ...]) -> None:
    parts = omniglot.split_characters(character_names(), split, seed=0)
    assert tuple(map(len, parts.values())) == sizes
    assert len({number for part in parts.values() for number in part}) == sum(sizes)


def test_the_random_split_depends_on_its_own_seed_only() -> None:
    names = [f"images_background/a/{number}" for number in range(1623)]
    torch.manual_seed(1)
    np.random.seed(1)
    one = omniglot.split_characters(names, "random", seed=0)
    torch.manual_seed(2)
    np.random.seed(2)
    assert omniglot.split_characters(names, "random", seed=0) == one
    assert omniglot.split_characters(names, "random", seed=1) != one


def test_the_vinyals_split_is_the_published_one() -> None:
    if not SPLITS.is_dir():
        pytest.skip(f"needs the lists that Snell et al. 2017 published, in {SPLITS}")
    names = character_names()
    parts = omniglot.split_characters(names, "vinyals", seed=0)
    for part, numbers in parts.items():
        file = SPLITS / f"omniglot_vinyals_{part}.txt"
        lines = file.read_text().split()
        assert {names[number].split("/", 1)[1] for number in numbers} == {
            line.rsplit("/", 1)[0] for line in lines
        }


@pytest.mark.usefixtures("small")
def test_a_split_that_is_set_between_two_runs_counts(tmp_path: Path) -> None:
    write_tree(tmp_path)
    module = lake(tmp_path)
    module.setup("test")
    before = module.class_fingerprints("test")
    module.split = "vinyals"
    with pytest.raises(ValueError, match="split 'test'"):  # none of its characters are Vinyals'
        module.setup("test")
    module.split = "lage"
    with pytest.raises(ValueError, match="'random', 'vinyals' or 'lake' but got 'lage'"):
        module.setup("test")
    module.split = "lake"
    module.setup("test")
    assert module.class_fingerprints("test") == before
