"""Hostile files: nothing in them runs, and they take no more memory or time than others.

No file that they name is read either. Those in `hostile/` were found by `benchmarks/fuzz.py`, which
starts from them.
"""

import os
import pickle
import signal
import struct
import sys
import tracemalloc
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from lightning_maml import MAML, MLP
from lightning_maml.cli import main
from lightning_maml.datamodules.imagenet.array_files import (
    open_cache_pickle,
    open_category_pickle,
    open_hdf5,
)
from lightning_maml.datamodules.images.cache import DecodedImages, read_cache, write_cache
from lightning_maml.datamodules.images.files import decode, read_image
from lightning_maml.datamodules.images.pickles import read_pickle
from lightning_maml.io.checkpoints import read_checkpoint
from lightning_maml.io.replay import load_step
from lightning_maml.io.safe_files import check_archive

pytestmark = pytest.mark.cpu_only  # files

SIZE = 8
IMAGES = np.zeros((6, SIZE, SIZE, 3), np.uint8)


@pytest.fixture(autouse=True)
def within_bounds(request: pytest.FixtureRequest) -> Iterator[None]:
    """Give up after ten minutes, and allow 50 MB of memory, except to the parser of configs."""

    def give_up(*_: object) -> None:
        raise TimeoutError(request.node.name)

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(600)
    is_measured = "config" not in request.node.name
    if is_measured:
        tracemalloc.start()
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    if is_measured:
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert most < 50e6


def write(file: Path, content: bytes) -> Path:
    file.write_bytes(content)
    return file


class Run:
    """Pickled, it runs a command when it is read."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.proof}",)


def nested_key(depth: int) -> bytes:
    """Return a pickled dictionary whose key takes 2^depth steps to hash.

    The key is a tuple that holds another tuple twice, which holds another one twice, and so on.
    """
    tuples = b"".join(b"h%ch%c\x86q%c0" % (number, number, number + 1) for number in range(depth))
    return b"\x80\x02})q\x000" + tuples + b"h%cNs." % depth


# Pickles


def test_the_nested_key_of_these_tests_is_a_valid_pickle() -> None:
    assert pickle.loads(nested_key(2)) == {(((), ()), ((), ())): None}


def test_a_nested_key_is_not_hashed(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"whole pickle but it is cut short or damaged \(TypeError: unhashable type: 'list'\)",
    ):
        read_pickle(write(tmp_path / "a.pkl", nested_key(60)))


def test_lists_that_share_their_parts_are_not_unfolded(tmp_path: Path) -> None:
    numbers: list = [1, 2]
    for _ in range(30):
        numbers = [numbers, numbers]
    for opened, content in (
        (open_cache_pickle, {"image_data": IMAGES, "class_dict": {"cat": numbers}}),
        (open_category_pickle, {"data": IMAGES, "labels": numbers}),
    ):
        with pytest.raises(ValueError, match="lists of whole numbers"):
            opened(write(tmp_path / "a.pkl", pickle.dumps(content)), SIZE)


def test_numbers_that_classes_share_are_not_copied_for_each(tmp_path: Path) -> None:
    content = {
        "image_data": IMAGES,
        "class_dict": dict.fromkeys(map(str, range(7000)), [0] * 20_000),
    }
    with pytest.raises(ValueError, match=r"share out the numbers 0 \.\. 5 of its images"):
        open_cache_pickle(write(tmp_path / "a.pkl", pickle.dumps(content)), SIZE)


def test_no_memory_is_taken_for_bytes_that_are_not_there(tmp_path: Path) -> None:
    content = b"\x80\x05}(\x8c\x04data\x96" + struct.pack("<Q", 2**32) + b"abc"
    with pytest.raises(ValueError, match="cut short or damaged"):
        read_pickle(write(tmp_path / "a.pkl", content))


# Archives: checkpoints, steps, decoded images


def archive(content: object, tmp_path: Path) -> dict[str, bytes]:
    torch.save(content, tmp_path / "whole")
    with zipfile.ZipFile(tmp_path / "whole") as whole:
        return {name: whole.read(name) for name in whole.namelist()}


def test_archives_that_torch_saves_are_accepted(tmp_path: Path) -> None:
    for number, content in enumerate(
        [{"a": torch.zeros(3)}, {}, {"text": "x" * 100_000, "b": torch.zeros(1000, 100)}, 1]
    ):
        torch.save(content, tmp_path / str(number))
        check_archive(tmp_path / str(number))


def test_compressed_checkpoints_are_refused(tmp_path: Path) -> None:
    parts = archive({"state_dict": torch.zeros(500_000_000 // 4)}, tmp_path)
    (tmp_path / "whole").unlink()
    with zipfile.ZipFile(tmp_path / "a.ckpt", "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in [*parts]:
            bomb.writestr(name, parts.pop(name))
    assert (tmp_path / "a.ckpt").stat().st_size < 1e6
    tracemalloc.reset_peak()
    with pytest.raises(
        ValueError, match=r"a.ckpt to be a whole checkpoint but it cannot be read: it is compressed"
    ):
        read_checkpoint(tmp_path / "a.ckpt")


def test_archives_that_torch_and_python_read_differently_are_refused(tmp_path: Path) -> None:
    """Python allows bytes before an archive and distinguishes capitals, unlike torch."""
    torch.save({"state_dict": {}}, tmp_path / "whole")
    write(tmp_path / "a.ckpt", bytes(100) + (tmp_path / "whole").read_bytes())
    with pytest.raises(ValueError, match=r"cannot be read: it is no archive of torch\.save"):
        read_checkpoint(tmp_path / "a.ckpt")
    parts = archive({"state_dict": EmptyBytes()}, tmp_path)
    with zipfile.ZipFile(tmp_path / "b.ckpt", "w") as capitals:
        for name, part in parts.items():
            capitals.writestr(name.replace("data.pkl", "DATA.PKL"), part)
    with pytest.raises(ValueError, match="cannot be read: it asks for bytes of its own"):
        read_checkpoint(tmp_path / "b.ckpt")


def test_entries_that_overlap_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.ckpt", "w") as bomb:
        bomb.writestr("archive/data/0", bytes(1000))
        first = bomb.filelist[0]
        for number in range(1, 100):
            same = zipfile.ZipInfo(f"archive/data/{number}")
            for name in ("header_offset", "CRC", "compress_size", "file_size"):
                setattr(same, name, getattr(first, name))
            bomb.filelist.append(same)
            bomb.NameToInfo[same.filename] = same
    with pytest.raises(ValueError, match="cannot be read: it is compressed"):
        read_checkpoint(tmp_path / "a.ckpt")


class EmptyBytes:
    def __reduce__(self) -> tuple[type, tuple[int]]:
        return bytearray, (2**28,)


def test_checkpoints_that_ask_for_empty_bytes_are_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": EmptyBytes()}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="cannot be read: it asks for bytes of its own"):
        read_checkpoint(tmp_path / "a.ckpt")


def test_files_that_are_no_checkpoint_are_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    torch.save([1], tmp_path / "list.ckpt")
    write(tmp_path / "empty.ckpt", b"")
    for name, reason in (
        {
            "old": "no archive of torch.save",
            "list": "it holds list",
            "empty": "no archive of torch.save",
        }
    ).items():
        with pytest.raises(ValueError, match=reason):
            read_checkpoint(tmp_path / f"{name}.ckpt")


def test_loading_a_model_runs_no_code_of_the_checkpoint(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "evil": Run(tmp_path / "ran")}, tmp_path / "a.ckpt")
    for given in ({}, {"weights_only": None}, {"weights_only": True}):
        with pytest.raises(
            ValueError,
            match="it is damaged or holds more than tensors and plain data, and nothing in it was "
            "run",
        ):
            MAML.load_from_checkpoint(tmp_path / "a.ckpt", network=MLP(2, 2), **given)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(KeyError, match="version"):  # it is no model's; but it ran, as was asked for
        MAML.load_from_checkpoint(tmp_path / "a.ckpt", network=MLP(2, 2), weights_only=False)
    assert (tmp_path / "ran").exists()


def test_checkpoints_cannot_name_the_code_that_makes_a_model(tmp_path: Path) -> None:
    (tmp_path / "a_module_of_mine.py").write_text(
        f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\nclass Loss: pass\n"
    )
    model = MAML(MLP(2, 2), 0.1)
    named = {
        "_instantiator": "lightning.pytorch.cli.instantiate_module",
        "loss": {"class_path": "a_module_of_mine.Loss"},
        "inner_lr": 0.1,
    }
    torch.save(
        {
            "state_dict": model.state_dict(),
            "hyper_parameters": named,
            "pytorch-lightning_version": "2.6.0",
        },
        tmp_path / "a.ckpt",
    )
    sys.path.insert(0, str(tmp_path))
    try:
        with pytest.raises(
            ValueError,
            match="to hold plain hyperparameters but it names what makes the model; it is not "
            "loaded",
        ):
            MAML.load_from_checkpoint(tmp_path / "a.ckpt", network=MLP(2, 2))
    finally:
        sys.path.remove(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_malformed_steps_are_refused(tmp_path: Path) -> None:
    model = MAML(MLP(2, 2), 0.1)
    step = {
        "kind": "Episodes",
        "episodes": [torch.zeros(1)] * 4,
        "state_dict": model.state_dict(),
        "random_state": {},
        "epoch": 0,
    }
    for changed in (
        {"kind": []},
        {"kind": "Trainer"},
        {"episodes": 3},
        {"state_dict": []},
        {"state_dict": {"network.0.weight": 3}},
        {"random_state": {"torch": torch.zeros(3)}},
        {"random_state": 1},
    ):
        torch.save(step | changed, tmp_path / "a.repro")
        with pytest.raises(ValueError, match=r"Expected .*a.repro to be a step"):
            load_step(model, tmp_path / "a.repro")


@pytest.mark.parametrize(
    "changed",
    [
        {"names": [1, 2]},
        {"unreadable": [b"x"]},
        {"labels": torch.zeros(6)},
        {"names": 3},
        {"images": "none"},
    ],
    ids=["names", "unreadable", "labels", "number", "images"],
)
def test_malformed_caches_are_not_used(tmp_path: Path, changed: dict) -> None:
    whole = {
        "version": 1,
        "source": "files",
        "images": torch.from_numpy(IMAGES),
        "labels": torch.zeros(6, dtype=torch.int64),
    }
    whole |= {"names": ["a"], "unreadable": []}
    torch.save(whole, tmp_path / "x.pt")
    assert read_cache(tmp_path / "x.pt", "files", IMAGES.shape) is not None
    torch.save(whole | changed, tmp_path / "x.pt")
    with pytest.warns(UserWarning, match="is damaged or out of date and is not used"):
        assert read_cache(tmp_path / "x.pt", "files", IMAGES.shape) is None


def test_a_compressed_cache_is_not_used(tmp_path: Path) -> None:
    write_cache(
        tmp_path / "x.pt",
        "files",
        DecodedImages(torch.from_numpy(IMAGES), torch.zeros(6, dtype=torch.int64), ["a"], []),
    )
    with zipfile.ZipFile(tmp_path / "x.pt") as whole:
        parts = {name: whole.read(name) for name in whole.namelist()}
    with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        for name, part in parts.items():
            bomb.writestr(name, part)
    for checksums in (False, True):
        with pytest.warns(UserWarning, match="it is compressed"):
            assert read_cache(tmp_path / "x.pt", "files", IMAGES.shape, checksums=checksums) is None


# HDF5


@pytest.mark.parametrize(
    "kind", ["external link", "soft link", "group", "external storage", "virtual"]
)
def test_hdf5_files_that_refer_to_others_are_refused(tmp_path: Path, kind: str) -> None:
    with h5py.File(tmp_path / "secret.hdf5", "w") as secret:
        secret["datasets/cat"] = IMAGES
    write(tmp_path / "secret.bin", bytes(IMAGES.nbytes))
    with h5py.File(tmp_path / "a.hdf5", "w") as content:
        content["own"] = IMAGES
        if kind == "external link":
            content["datasets/cat"] = h5py.ExternalLink(tmp_path / "secret.hdf5", "datasets/cat")
        elif kind == "soft link":
            content["datasets/cat"] = h5py.SoftLink("/own")
        elif kind == "group":
            content["datasets"] = h5py.ExternalLink(tmp_path / "secret.hdf5", "datasets")
        elif kind == "external storage":
            content.create_dataset(
                "datasets/cat",
                IMAGES.shape,
                "u1",
                external=[(tmp_path / "secret.bin", 0, IMAGES.nbytes)],
            )
        else:
            layout = h5py.VirtualLayout(IMAGES.shape, "u1")
            layout[:] = h5py.VirtualSource(tmp_path / "secret.hdf5", "datasets/cat", IMAGES.shape)
            content.create_virtual_dataset("datasets/cat", layout)
    with pytest.raises(
        ValueError,
        match=r"Expected .*a.hdf5 to hold its images itself but it refers to other files; it is "
        "not read",
    ):
        open_hdf5(tmp_path / "a.hdf5", SIZE)


def test_hdf5_files_that_unpack_to_too_much_are_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.hdf5", "w") as content:
        content.create_dataset(
            "datasets/cat", (10**9, SIZE, SIZE, 3), "u1", chunks=(1, SIZE, SIZE, 3)
        )
    with pytest.raises(ValueError, match="at most 100 times its size"):
        open_hdf5(tmp_path / "a.hdf5", SIZE)
    with h5py.File(tmp_path / "b.hdf5", "w") as content:
        content.create_dataset(
            "datasets/0", data=np.zeros((1000, SIZE, SIZE, 3), np.uint8), compression="gzip"
        )
        for number in range(1, 300):
            content[f"datasets/{number}"] = content["datasets/0"]
    with pytest.raises(ValueError, match="at most 100 times its size"):
        open_hdf5(tmp_path / "b.hdf5", SIZE)


# Images


def test_images_of_formats_that_start_programs_are_refused(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.jpg")
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.format == "EPS", "Pillow would take it for one"
    with pytest.raises(OSError, match="cannot identify image file"):
        read_image(tmp_path / "a.jpg", SIZE, "RGB")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF", "MPO"])
def test_images_may_be_of_any_other_format_whatever_their_name(tmp_path: Path, form: str) -> None:
    Image.new("RGB", (4, 4), (200, 200, 200)).save(tmp_path / "a.jpg", form)
    assert read_image(tmp_path / "a.jpg", SIZE, "RGB").mean() == pytest.approx(200, abs=2)


def test_images_of_too_many_pixels_are_refused(tmp_path: Path) -> None:
    rows = zlib.compress(bytes(2001 * 20_000), 9)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", 16_000, 20_000 // 2, 1, 0, 0, 0, 0)
    write(
        tmp_path / "a.png",
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""),
    )
    tracemalloc.reset_peak()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with pytest.raises(
            OSError, match=r"it has 16000 x 10000 pixels, more than PIL\.Image\.MAX_IMAGE_PIXELS"
        ):
            decode({"a": [tmp_path / "a.png"]}, SIZE, "RGB", "raise", "Reading")


# Configs


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: " + "[" * 5000 + "]" * 5000, "exceeded maximum nesting depth"),
        (
            "model: !!python/object/apply:os.system ['echo ran']",
            "could not determine a constructor",
        ),
        ("model: \0", "characters are not allowed"),
    ],
    ids=["deep", "object", "control"],
)
def test_hostile_configs_are_reported(
    tmp_path: Path, text: str, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "a.yaml", text.encode())
    with pytest.raises(SystemExit):
        main(["fit", f"--config={tmp_path / 'a.yaml'}"])
    printed = capfd.readouterr()
    assert reason in printed.err
    assert "ran\n" not in printed.out


def test_configs_that_are_no_text_are_reported(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", b"\xff\xfe\x00")
    with pytest.raises(
        SystemExit, match="Expected configs and lists to be text in UTF-8 but one is not"
    ):
        main(["fit", f"--config={tmp_path / 'a.yaml'}"])


# What was found


HOSTILE = sorted((Path(__file__).parent / "hostile").glob("*/*"))


def read_pickles(path: Path) -> object:
    try:
        return open_cache_pickle(path, SIZE).read()
    except ValueError:
        return open_category_pickle(path, SIZE).read()


READERS: dict[str, Callable[[Path], object]] = {
    "pickles": read_pickles,
    "hdf5": lambda path: open_hdf5(path, SIZE).read(),
    "steps": lambda path: load_step(MAML(MLP(2, 2, hidden=(3,)), 0.1), path),
    "checkpoints": read_checkpoint,
}


@pytest.mark.parametrize("file", HOSTILE, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_files_that_fuzzing_found_are_refused(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected "):
        READERS[file.parent.name](write(tmp_path / "x", file.read_bytes()))
