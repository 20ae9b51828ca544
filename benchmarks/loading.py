"""What loading mini-ImageNet at its full size costs: time, memory, and time per episode.

    pip install --group bench
    python benchmarks/loading.py

That takes some minutes and prints a table. The images are made up, in a temporary folder of 3 GB.
"""

import json
import os
import pickle
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from tqdm import tqdm

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from helpers.mini_imagenet_files import CLASSES, SIZE, draw_images, write_ravi
from helpers.python2_pickles import write_python2_pickle

PER_CLASS = 600

START = """
import json, re, sys, time
from lightning_maml.datamodules import MiniImageNetDataModule

def memory():  # at most so far, of this program alone
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])

def use_all(images):
    images.permute(0, 2, 3, 1).numpy().max()

before, start = memory(), time.perf_counter()
data = MiniImageNetDataModule(sys.argv[1], shots=5, queries=15, meta_batch_size=1)
data.prepare_data()
data.setup("fit")
"""

LOAD = f"""{START}
seconds, loaded = time.perf_counter() - start, memory() - before
images = data.class_images("train").images
use_all(images)
print(json.dumps([len(images), seconds, loaded, memory() - before]))
"""

EPISODES = f"""{START}
use_all(data.class_images("train").images)
loader = iter(data.train_dataloader())
times = []
for _ in range(450):
    start = time.perf_counter()
    next(loader)
    times.append(time.perf_counter() - start)
print(json.dumps(times[50:]))
"""


def in_a_process_of_its_own(script: str, root: Path) -> list[float]:
    """Run a script in a process of its own, and return the numbers that it prints last.

    The process keeps other memory out of its figures.
    """
    output = subprocess.run(
        [sys.executable, "-c", script, str(root)], stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    numbers: list[float] = json.loads(output.splitlines()[-1])
    return numbers


def noise() -> Iterator[tuple[str, np.ndarray]]:
    """Yield each split with as many images as mini-ImageNet has."""
    for split, names in CLASSES.items():
        count = len(names) * PER_CLASS
        yield (
            split,
            np.frombuffer(
                np.random.RandomState(0).bytes(count * SIZE * SIZE * 3), np.uint8
            ).reshape(count, SIZE, SIZE, 3),
        )


def write_cache_pickles(root: Path) -> None:
    """Write the pickles of Ren et al."""
    for split, images in noise():
        numbers = {
            name: list(range(k * PER_CLASS, (k + 1) * PER_CLASS))
            for k, name in enumerate(CLASSES[split])
        }
        with (root / f"mini-imagenet-cache-{split}.pkl").open("wb") as stream:
            pickle.dump({"image_data": images, "class_dict": numbers}, stream, protocol=4)


def write_category_pickles(root: Path) -> None:
    """Write the pickles of Gidaris & Komodakis, as Python 2 does."""
    first = 0
    for split, images in noise():
        phase = "train_phase_train" if split == "train" else split
        labels = np.arange(first, first + len(CLASSES[split])).repeat(PER_CLASS).tolist()
        first += len(CLASSES[split])
        content = {"data": images, "labels": labels}
        write_python2_pickle(root / f"miniImageNet_category_split_{phase}.pickle", content)


def loaded(numbers: list[float]) -> str:
    """Return a row's figures."""
    count, seconds, before, after = numbers
    return f"{count:.0f} images | {seconds:.2f} s | {before / 1e6:.0f} MB | {after / 1e6:.0f} MB"


def main() -> None:
    """Measure, and print a table."""
    rows = []
    with TemporaryDirectory() as folder, tqdm(total=6, desc="Measuring") as bar:
        for name, write in (
            ("cache pickles, protocol 4", write_cache_pickles),
            ("category-split pickles, Python 2", write_category_pickles),
        ):
            root = Path(folder) / name
            root.mkdir()
            write(root)
            rows.append(f"{name} | {loaded(in_a_process_of_its_own(LOAD, root))}")
            bar.update()
            for file in root.iterdir():
                file.unlink()
        root = Path(folder) / "files"
        write_ravi(root, draw_images(PER_CLASS))
        bar.update()
        for name in ("60,000 JPEG files, first start", "60,000 JPEG files, second start"):
            rows.append(f"{name} | {loaded(in_a_process_of_its_own(LOAD, root))}")
            bar.update()
        times = sorted(1000 * seconds for seconds in in_a_process_of_its_own(EPISODES, root))
        bar.update()
    print(f"\n{os.cpu_count()} CPU cores; memory is what the process grew by, at most\n")
    print(
        "data | | until training may begin | memory then | memory when all images were used\n--- "
        "| --- | --- | --- | ---"
    )
    print("\n".join(rows))
    print(
        "\nAn episode of 5 classes with 5 support and 15 query images each, from the cache, "
        f"without workers: median {statistics.median(times):.2f} ms, of {len(times)} between "
        f"{times[len(times) // 20]:.2f} and {times[-len(times) // 20]:.2f} ms (5 and 95 %)"
    )


if __name__ == "__main__":
    main()
