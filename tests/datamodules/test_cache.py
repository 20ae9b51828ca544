"""The cache of decoded images: whole or not used, and mapped rather than read."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import another_process
from lightning_maml.datamodules.images.cache import DecodedImages, read_cache, write_cache

pytestmark = pytest.mark.cpu_only  # files

SHAPE = (50, 9, 9, 3)


def content(shape: tuple[int, ...] = SHAPE) -> DecodedImages:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return DecodedImages(
        images, torch.arange(shape[0]) % 5, [f"class {number}" for number in range(5)], []
    )


def same(read: DecodedImages | None, whole: DecodedImages) -> bool:
    return (
        read is not None
        and read[2:] == whole[2:]
        and torch.equal(read.images, whole.images)
        and torch.equal(read.labels, whole.labels)
    )


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_cache(tmp_path / "images.pt", "photos", content())
    return tmp_path / "images.pt"


@pytest.mark.parametrize("checksums", [False, True])
def test_a_cache_is_read_as_it_was_written(file: Path, checksums: bool) -> None:
    assert same(read_cache(file, "photos", SHAPE, checksums=checksums), content())
    assert [path.name for path in file.parent.iterdir()] == ["images.pt"]


def test_a_missing_cache_gives_no_warning(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    assert read_cache(tmp_path / "images.pt", "photos", SHAPE) is None
    assert not recwarn.list


class Touch:
    """Pickles as a call that leaves a file."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self):
        return Path.touch, (self._file,)


def damaged(file: Path, kind: str) -> None:
    whole = file.read_bytes()
    if kind == "truncated":
        file.write_bytes(whole[: len(whole) // 2])
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "a web page":
        file.write_bytes(b"<html>not found</html>")
    elif kind == "another source":
        write_cache(file, "drawings", content())
    elif kind == "another version":
        torch.save({**torch.load(file, weights_only=True), "version": 0}, file)
    elif kind == "another shape":
        write_cache(file, "photos", content((50, 8, 8, 3)))
    elif kind == "labels without a class":
        write_cache(file, "photos", content()._replace(names=["class 0"]))
    elif kind == "not bytes":
        write_cache(file, "photos", content()._replace(images=torch.zeros(SHAPE)))
    else:
        torch.save(
            {
                "version": 1,
                "source": "photos",
                **content()._asdict(),
                "unreadable": Touch(file.with_name("proof")),
            },
            file,
        )


KINDS = [
    *(
        "truncated",
        "empty",
        "a web page",
        "another source",
        "another version",
        "another shape",
        "labels without a class",
        "not bytes",
    ),
    "code in a pickle",
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_cache_or_one_of_another_source_is_not_used(file: Path, kind: str) -> None:
    damaged(file, kind)
    with pytest.warns(UserWarning, match=r"images.pt is damaged or out of date and is not used"):
        assert read_cache(file, "photos", SHAPE) is None
    assert not file.with_name("proof").exists()


@pytest.mark.filterwarnings("ignore:.*is damaged or out of date")
def test_checksums_detect_any_flipped_bit(file: Path) -> None:
    whole = file.read_bytes()
    names = (b"data.pkl", b"data/0", b"data/1", b"version", b"byteorder")
    positions = {whole.find(name) + offset for name in names for offset in range(-30, 140)} | {
        *range(len(whole) - 1200, len(whole))
    }
    positions |= set(np.random.RandomState(0).randint(0, len(whole), 300).tolist())
    for position in sorted(positions):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 8
        file.write_bytes(flipped)
        read = read_cache(file, "photos", SHAPE, checksums=True)
        assert read is None or same(read, content()), position


def test_images_are_mapped_into_memory_and_not_read(tmp_path: Path) -> None:
    """One image is read before the measurement, so that the code is in memory already."""
    images = torch.ones(3000, 84, 84, 3, dtype=torch.uint8)
    for count in (1, 3000):
        write_cache(
            tmp_path / f"{count}.pt",
            "photos",
            DecodedImages(images[:count], torch.zeros(count).long(), ["x"], []),
        )
    script = (
        "import resource; from pathlib import Path; from lightning_maml.datamodules.images.cache "
        "import read_cache\nfor count in (1, 3000):\n    before = "
        "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n    cached = "
        "read_cache(Path(f'{count}.pt'), 'photos', (count, 84, 84, 3))\n    assert "
        "int(cached.images[count // 2].sum()) == 84 * 84 * 3\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    grown = another_process.output(script, folder=tmp_path)
    assert int(grown) * 1024 < images.nbytes / 3


def test_a_full_disk_leaves_the_old_cache_and_no_partial_file(file: Path) -> None:
    """A limit of 100 kB on the files of a process is reported like a full disk."""
    script = (
        "import resource, signal, sys, torch; from pathlib import Path\nfrom "
        "lightning_maml.datamodules.images.cache import DecodedImages, write_cache\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\nimages = "
        "DecodedImages(torch.zeros(50, 84, 84, 3, dtype=torch.uint8), torch.zeros(50).long(), "
        "['x'], [])\nwrite_cache(Path(sys.argv[1]), 'photos', images)"
    )
    failed = another_process.run(script, file)
    assert failed.returncode == 1
    assert (
        f"OSError: Expected to write 1 MB into {file.parent} but could not ([Errno 27] File too "
        "large); make room"
    ) in failed.stderr
    assert [path.name for path in file.parent.iterdir()] == ["images.pt"]
    assert same(read_cache(file, "photos", SHAPE), content())


def test_a_process_killed_while_writing_leaves_the_old_cache(
    file: Path,
) -> None:
    """A limit on the size of its files kills the process in the middle of a write."""
    script = (
        "import resource, signal, sys, torch; from pathlib import Path\nfrom "
        "lightning_maml.datamodules.images.cache import DecodedImages, write_cache\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_DFL); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\nimages = "
        "DecodedImages(torch.zeros(50, 84, 84, 3, dtype=torch.uint8), torch.zeros(50).long(), "
        "['x'], [])\nwrite_cache(Path(sys.argv[1]), 'photos', images)"
    )
    assert another_process.run(script, file).returncode == -signal.SIGXFSZ
    assert same(read_cache(file, "photos", SHAPE, checksums=True), content())
    (part,) = set(file.parent.iterdir()) - {file}
    write_cache(file, "photos", content())
    assert part.exists(), "another process may be writing it"
    os.utime(part, (0, 0))
    write_cache(file, "photos", content())
    assert [path.name for path in file.parent.iterdir()] == ["images.pt"]


def test_two_processes_that_write_at_once_leave_a_whole_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes on two machines that share a folder may even have the same process id."""
    file, save = tmp_path / "images.pt", torch.save

    def save_while_another_writes(*arguments) -> None:
        monkeypatch.setattr(torch, "save", save)
        write_cache(file, "photos", content())
        save(*arguments)

    monkeypatch.setattr(torch, "save", save_while_another_writes)
    write_cache(file, "photos", content())
    assert same(read_cache(file, "photos", SHAPE, checksums=True), content())
    assert [path.name for path in tmp_path.iterdir()] == ["images.pt"]


@pytest.mark.skipif(
    os.geteuid() == 0, reason="needs a user who may not write everywhere; this is root"
)
def test_a_folder_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(
        OSError,
        match=r"Expected to write 0 MB into .* but could not .*, or choose a writable `root`, "
        r"with links to the data\.",
    ):
        write_cache(tmp_path / "images.pt", "photos", content())


def test_a_file_in_place_of_the_folder_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"Expected to write 0 MB into .*file but could not"):
        write_cache(tmp_path / "file" / "images.pt", "photos", content())


def test_other_users_can_read_the_cache(tmp_path: Path) -> None:
    umask = os.umask(0o022)
    try:
        write_cache(tmp_path / "images.pt", "photos", content())
    finally:
        os.umask(umask)
    assert (tmp_path / "images.pt").stat().st_mode & 0o777 == 0o644
