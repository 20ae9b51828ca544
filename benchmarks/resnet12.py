"""What second-order training of a ResNet-12 costs on the CPU.

84 x 84, 5-way 5-shot, 15 queries per class, N = 5, one task at a time.

    MALLOC_MMAP_THRESHOLD_=1000000 python benchmarks/resnet12.py

That takes some minutes, and prints time and largest memory, imports included.
"""

import argparse
import os
import resource
import time

import torch
from lightning import Trainer
from torch.utils.data import DataLoader

from lightning_maml import MAML, Episodes, ResNet12


def noise(tasks: int = 2) -> list[Episodes]:
    """Return meta-batches of one task each."""
    labels = torch.arange(5)
    return [
        Episodes(
            torch.rand(1, 25, 3, 84, 84),
            labels.repeat_interleave(5)[None],
            torch.rand(1, 75, 3, 84, 84),
            labels.repeat_interleave(15)[None],
        )
        for _ in range(tasks)
    ]


def main() -> None:
    """Train on two tasks, so that the second meets the state of the optimizer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--smooth",
        action="store_true",
        help="GELU and average pooling in place of LeakyReLU and maximum pooling",
    )
    smooth = {"activation": "gelu", "downsample": "avg"} if parser.parse_args().smooth else {}
    model = MAML(
        ResNet12(3, 5, **smooth), inner_lr=0.01, train_steps=5, tasks="loop", keep_graphs="never"
    )
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        log_every_n_steps=10,
    )
    start = time.perf_counter()
    trainer.fit(model, DataLoader(noise(), batch_size=None))
    seconds = (time.perf_counter() - start) / 2
    gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(
        f"{gigabytes:.2f} GB ({gigabytes * 1e9 / 2**30:.2f} GiB), {seconds:.0f} s per task, "
        f"{os.cpu_count()} cores"
    )


if __name__ == "__main__":
    main()
