"""Read damaged and hostile files with everything that reads a file.

Does anything but the documented errors happen, and does any of the files run or write something?

    .venv/bin/python benchmarks/fuzz.py
    .venv/bin/python benchmarks/fuzz.py --readers images csv --files 1000

The first gives each reader 200,000 files, takes an hour or so, and prints a table.

atheris, which is libFuzzer for Python, makes the files by changing whole ones, and keeps those that
reach code that no other did. A file is a finding if it raises an undocumented error, takes more
than ten seconds or 3 GB, runs or writes something, or ends the process: it then stops its reader
and is kept beside the report. Needs `pip install --group bench`.
"""

import argparse
import contextlib
import io
import json
import os
import random
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import atheris

for _module in ("pickle", "zipfile", "csv"):  # so that they are imported anew
    sys.modules.pop(_module, None)
with atheris.instrument_imports(include=["lightning_maml", "pickle", "csv", "zipfile", "PIL"]):
    import csv
    import pickle
    import zipfile

    import h5py
    import numpy as np
    import torch
    import yaml
    from PIL import Image

    from lightning_maml import MAML, MLP, cli
    from lightning_maml.core.rng import random_state
    from lightning_maml.datamodules.imagenet.array_files import (
        open_cache_pickle,
        open_category_pickle,
        open_hdf5,
    )
    from lightning_maml.datamodules.imagenet.csv_lists import list_files
    from lightning_maml.datamodules.images.cache import DecodedImages, read_cache, write_cache
    from lightning_maml.datamodules.images.files import _Chunks, rows_of_classes
    from lightning_maml.io.checkpoints import read_checkpoint
    from lightning_maml.io.replay import load_step

CONFIGS = Path(__file__).parent.parent / "configs"
SIZE = 8
"""Height and width of images, in pixels."""

FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.chmod",
    "os.symlink",
)
# not exec: modules that are imported late call it
FORBIDDEN += ("os.link", "os.truncate", "shutil.", "subprocess.", "socket.", "ctypes.")

Mutator = Callable[[bytes, int, int], bytes]


class Reader(NamedTuple):
    """A reader of files, and the files that it is given first.

    Attributes:
        name: Name of its files.
        seeds: Contents of whole files.
        read: Function that reads a file.
        documented: The errors that it may raise.
        mutate: Function that changes a file, where changed bytes would mostly be refused at once,
            for example for a checksum.
        trusted: Parts of the details of forbidden events that it may cause nevertheless, as its
            documentation says.
    """

    name: str
    seeds: list[bytes]
    read: Callable[[Path], object]
    documented: tuple[type[BaseException], ...]
    mutate: Mutator | None = None
    trusted: tuple[str, ...] = ()


def pickles(folder: Path) -> Reader:
    """Return the reader of both families of mini-ImageNet's pickles."""
    images, labels = np.zeros((6, SIZE, SIZE, 3), np.uint8), np.arange(6) % 2
    by_class = {"cat": [0, 1, 2], "dog": [3, 4, 5]}
    forms = [
        {"image_data": images, "class_dict": by_class},
        {"data": images, "labels": labels},
        {"data": images, "labels": labels.tolist()},
    ]

    def read(path: Path) -> object:
        try:
            return open_cache_pickle(path, SIZE).read()
        except ValueError:
            return open_category_pickle(path, SIZE).read()

    return Reader(
        "x.pkl",
        [pickle.dumps(form, protocol) for form in forms for protocol in range(6)],
        read,
        (ValueError,),
    )


def hdf5(folder: Path) -> Reader:
    """Return the reader of torchmeta's files."""
    seeds = []
    for number, options in enumerate(({}, {"compression": "gzip"}, {"chunks": True})):
        path = folder / f"{number}.hdf5"
        with h5py.File(path, "w") as content:
            for name in "ab":
                content.create_dataset(
                    f"datasets/{name}", data=np.zeros((3, SIZE, SIZE, 3), np.uint8), **options
                )
        seeds.append(path.read_bytes())
        path.unlink()
    return Reader("x.hdf5", seeds, lambda path: open_hdf5(path, SIZE).read(), (ValueError,))


def lists(folder: Path) -> Reader:
    """Return the reader of CSV lists."""
    for name in ("images/n1/a.jpg", "images/b.jpg", "c.jpg", "n2/d.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    seeds = []
    for header in (("filename", "label"), ("class_name", "image_name")):
        text = io.StringIO()
        csv.writer(text).writerows(
            [header, ("a.jpg", "n1"), ("b.jpg", "n2"), ("c.jpg", "n1"), ("d.jpg", "n2")]
        )
        seeds += [text.getvalue().encode(), text.getvalue().encode("utf-16")]
    return Reader(
        "train.csv", seeds, partial(list_files, split="train"), (ValueError, FileNotFoundError)
    )


def images(folder: Path) -> Reader:
    """Return the reader of image files, which reports what it finds wrong and raises nothing."""
    seeds = []
    picture = Image.fromarray(np.random.RandomState(0).randint(0, 255, (12, 10, 3), np.uint8))
    for name in ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF"):
        for mode in ("RGB", "L"):
            picture.convert(mode).save(file := io.BytesIO(), name)
            seeds.append(file.getvalue())
    Image.init()  # now, because Pillow's formats import one another while they read a file

    def read(path: Path) -> object:
        pixels, problems = _Chunks([path], SIZE, "RGB")[0]
        return None if problems else pixels

    return Reader("x.jpg", seeds, read, ())


def caches(folder: Path) -> Reader:
    """Return the reader of caches of decoded images, which raises nothing either, but warns."""
    content = DecodedImages(
        torch.zeros(4, SIZE, SIZE, 3, dtype=torch.uint8),
        torch.tensor([0, 0, 1, -1]),
        ["a", "b"],
        ["c.jpg (cut short)"],
    )
    write_cache(folder / "x.pt", "files", content)

    def read(path: Path) -> object:
        cached = read_cache(path, "files", (4, SIZE, SIZE, 3), checksums=True)
        return cached and (rows_of_classes(cached), "".join(cached.names + cached.unreadable))

    return Reader("x.pt", [(folder / "x.pt").read_bytes()], read, (), mutate_archive)


def checkpoints(folder: Path) -> Reader:
    """Return the reader of checkpoints."""
    optimizer = torch.optim.Adam(MLP(2, 2, hidden=(3,)).parameters())
    content = {
        "state_dict": MLP(2, 2, hidden=(3,)).state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "epoch": 1,
        "hyper_parameters": {},
    }
    torch.save(content, file := io.BytesIO())
    torch.save(content, old := io.BytesIO(), _use_new_zipfile_serialization=False)
    return Reader(
        "x.ckpt", [file.getvalue(), old.getvalue()], read_checkpoint, (ValueError,), mutate_archive
    )


def steps(folder: Path) -> Reader:
    """Return the reader of steps that are to be replayed."""
    module = MAML(MLP(2, 2, hidden=(3,)), 0.1)
    episodes = [torch.zeros(1, 2, 2), torch.tensor([[0, 1]])] * 2
    state = random_state(torch.device("cpu"))
    step = {
        "kind": "Episodes",
        "episodes": episodes,
        "state_dict": module.state_dict(),
        "random_state": state,
        "epoch": 0,
    }
    torch.save(step, file := io.BytesIO())
    return Reader(
        "x.repro",
        [file.getvalue()],
        lambda path: load_step(module, path),
        (ValueError,),
        mutate_archive,
    )


def command_parser() -> Any:
    """Return the parser of the command ``lightning-maml``."""
    found = []

    def keep(_: object, parser: Any, __: object) -> None:
        found.append(parser)
        raise InterruptedError

    with (
        mock.patch.object(cli._CLI, "parse_arguments", keep),
        contextlib.suppress(InterruptedError),
    ):
        cli.run([])
    return found[0]


def _with_parts(value: Any) -> Any:
    """Return a config with the part files that it names put in their places."""
    if isinstance(value, dict):
        return {key: _with_parts(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_parts(item) for item in value]
    return (
        _with_parts(yaml.safe_load((CONFIGS / value).read_text()))
        if str(value).endswith(".yaml")
        else value
    )


def configs(folder: Path) -> Reader:
    """Return the reader of configs.

    As documented, it imports the classes and reads the configs that they name.
    """
    parser = command_parser()
    wholes = [_with_parts(file.name) for file in sorted(CONFIGS.glob("*.yaml"))]
    sections = {
        yaml.safe_dump({section: whole[section]}).encode() for whole in wholes for section in whole
    }
    seeds = [yaml.safe_dump(whole).encode() for whole in wholes]

    def read(path: Path) -> None:
        with contextlib.redirect_stderr(io.StringIO()):
            parser.parse_args(["fit", f"--config={path}"])

    finds_modules = "json.dumps(sys.path)"  # a command of jsonargparse's
    mutate = partial(mutate_yaml, seeds)
    return Reader(
        "x.yaml",
        [*sorted(sections), *seeds],
        read,
        (SystemExit, UnicodeDecodeError),
        mutate,
        (finds_modules,),
    )


READERS = {
    "pickles": pickles,
    "hdf5": hdf5,
    "csv": lists,
    "images": images,
    "caches": caches,
    "checkpoints": checkpoints,
    "steps": steps,
    "configs": configs,
}


def mutate_archive(data: bytes, most: int, seed: int) -> bytes:
    """Change one entry of an archive and mend its checksum, or change any bytes.

    Three times out of four it is an entry.
    """
    choice = random.Random(seed)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            content = {name: archive.read(name) for name in archive.namelist()}
        entries = [name for name in content if name.endswith(".pkl")] or [*content]
    except Exception:  # noqa: BLE001  an archive damaged before
        return atheris.Mutate(data, most)
    if choice.random() < 0.25 or not entries:
        return atheris.Mutate(data, most)
    chosen = choice.choice(entries if choice.random() < 0.9 else [*content])
    content[chosen] = atheris.Mutate(content[chosen], len(content[chosen]) + 200)
    method = choice.choice([zipfile.ZIP_STORED] * 19 + [zipfile.ZIP_DEFLATED])
    with zipfile.ZipFile(file := io.BytesIO(), "w", method) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, entry in content.items():
            archive.writestr(name, entry)
    return file.getvalue()


ODDITIES = (
    None,
    True,
    -1,
    0,
    1e300,
    float("nan"),
    10**30,
    "",
    "os.system",
    "subprocess.Popen",
    "~",
    "../x",
    [],
    {},
    [[]],
    {"class_path": "os.system"},
)


def mutate_yaml(wholes: list[bytes], data: bytes, most: int, seed: int) -> bytes:
    """Replace a part of a config by something odd or by another part, or change any bytes.

    Three times out of four it is a part.

    One time in ten the config is one of ``wholes``, because what the fuzzer keeps is soon full of
    files that are refused at first sight.
    """
    choice = random.Random(seed)
    if choice.random() < 0.1:
        data = choice.choice(wholes)
    try:
        tree = yaml.safe_load(data)
    except Exception:  # noqa: BLE001  no YAML any more
        return atheris.Mutate(data, most)
    places = list(_places(tree))
    if choice.random() < 0.25 or not places:
        return atheris.Mutate(data, most)
    (holder, key), (other, that) = choice.choice(places), choice.choice(places)
    if isinstance(holder, dict) and choice.random() < 0.2:
        holder[str(choice.choice(ODDITIES))] = holder.pop(key)
    else:
        holder[key] = choice.choice([*ODDITIES, other[that]])
    try:
        return yaml.safe_dump(tree).encode()[:most]
    except RecursionError:
        return data


def _places(tree: Any, depth: int = 0) -> Any:
    if depth >= 20:
        return
    entries: Any = ()
    if isinstance(tree, dict):
        entries = tree.items()
    elif isinstance(tree, list):
        entries = enumerate(tree)
    for key, value in entries:
        yield tree, key
        yield from _places(value, depth + 1)


class Watch:
    """Record of what readers did but must not do.

    They must not run something, delete, or write outside one folder.
    """

    def __init__(self, folder: Path, trusted: tuple[str, ...]) -> None:
        self.seen: list[str] = []
        self._on, self._folder = False, str(folder)
        self._trusted = trusted
        sys.addaudithook(self._hear)

    def _hear(self, event: str, details: tuple[Any, ...]) -> None:
        if (
            self._on
            and event.startswith(FORBIDDEN)
            and not any(t in str(details) for t in self._trusted)
        ):
            self.seen.append(f"{event} {str(details)[:200]}")
        if self._on and event == "open":
            path, _, flags = details
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes and not str(path).startswith((self._folder, "/dev/null")):
                self.seen.append(f"write to {path}")

    @contextlib.contextmanager
    def listening(self) -> Any:
        """Record what happens inside the ``with`` block."""
        self._on = True
        try:
            yield
        finally:
            self._on = False


def fuzz(name: str, files: int, seed: int, out: Path) -> None:
    """Read ``files`` files in this process, and write the outcome to ``out``.

    libFuzzer ends the process.
    """
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    reader = READERS[name](folder)
    path, corpus, results, count = folder / reader.name, folder / "corpus", Counter[str](), 0
    corpus.mkdir()
    watch = Watch(folder, reader.trusted)
    warnings.simplefilter("ignore")

    def one(data: bytes) -> None:
        nonlocal count
        path.write_bytes(data)
        try:
            with watch.listening():
                read = reader.read(path)
            results["read" if read is not None or name == "configs" else "refused"] += 1
        except reader.documented:
            results["refused"] += 1
        count += 1
        if watch.seen:
            raise PermissionError(f"A file made its reader do what it must not: {watch.seen}")
        if count == files or count % 1000 == 0:
            (out / f"{name}.json").write_text(json.dumps({"files": count} | results))

    found = [
        file.read_bytes()
        for file in (CONFIGS.parent / "tests" / "datamodules" / "hostile" / name).glob("*")
    ]
    for number, content in enumerate(reader.seeds + found):
        (corpus / str(number)).write_bytes(content)
    most = 4 * max(map(len, reader.seeds))
    options = [
        f"-runs={files}",
        f"-seed={seed}",
        "-timeout=10",
        "-rss_limit_mb=3000",
        f"-max_len={most}",
        f"-artifact_prefix={out}/{name}-",
    ]
    custom = {"custom_mutator": reader.mutate} if reader.mutate else {}
    atheris.Setup([sys.argv[0], *options, str(corpus)], one, **custom)
    atheris.Fuzz()


def main() -> None:
    """Fuzz each reader in a process of its own, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--readers", nargs="+", choices=READERS, default=[*READERS])
    parser.add_argument("--files", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/fuzz"))
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.here:
        fuzz(args.readers[0], args.files, args.seed, args.out.resolve())
    print("| reader | files | read | refused | findings |\n|---|---|---|---|---|")
    for name in args.readers:
        report = args.out / f"{name}.json"
        report.unlink(missing_ok=True)
        command = [
            sys.executable,
            __file__,
            "--here",
            f"--readers={name}",
            f"--files={args.files}",
            f"--seed={args.seed}",
            f"--out={args.out}",
        ]
        with (args.out / f"{name}.log").open("w") as log:
            status = subprocess.run(command, check=False, stdout=log, stderr=log).returncode
        counts = json.loads(report.read_text()) if report.exists() else {}
        finding = (
            "none"
            if status == 0 and counts.get("files", 0) >= args.files
            else f"stopped with status {status}, see {log.name}"
        )
        print(
            f"| {name} | {counts.get('files', 0):,} | {counts.get('read', 0):,} | "
            f"{counts.get('refused', 0):,} | {finding} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
