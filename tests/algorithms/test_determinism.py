"""The same seed gives the same weights, and any Python draws the same tasks.

So it is in another process, with workers, and however tasks are run.
"""

import hashlib
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer, seed_everything

from helpers.folders import ENVIRONMENT
from helpers.images import numbered_images
from helpers.networks import flat
from helpers.runs import Noise, network
from lightning_maml import FOMAML, HFMAML, MAML
from lightning_maml.datamodules.sampler import EpisodeDataset

ALGORITHMS = [MAML, FOMAML, HFMAML]

QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
}

ALONE = """
import sys
import torch
import runpy
test = runpy.run_path(sys.argv[1])
torch.save([test["trained"](algorithm) for algorithm in test["ALGORITHMS"]], sys.argv[2])
"""


def trained(
    algorithm: type[MAML],
    precision: str = "32-true",
    tasks: Any = "auto",
    device: str = "cpu",
    **data: Any,
) -> torch.Tensor:
    """Return the weights after some steps of SGD.

    Adam would make large differences of small ones.
    """
    seed_everything(3)
    model = algorithm(
        network(dropout=0.0), 0.1, 2, tasks=tasks, optimizer=partial(torch.optim.SGD, lr=0.1)
    )
    Trainer(
        max_epochs=2,
        precision=precision,
        **QUIET | {"accelerator": device, "devices": 1, "deterministic": device != "cpu"},
    ).fit(model, Noise(**data))
    return flat(dict(model.named_parameters())).cpu()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_workers_change_no_weight(algorithm: type[MAML], device: torch.device) -> None:
    try:
        alone, again = (trained(algorithm, device=device.type) for _ in range(2))
        with_workers = trained(algorithm, device=device.type, num_workers=2)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(again, alone)
    assert torch.equal(with_workers, alone)


@pytest.mark.cpu_only
def test_another_process_ends_with_the_same_weights(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-c", ALONE, __file__, tmp_path / "w.pt"], env=ENVIRONMENT, check=True
    )
    for algorithm, weights in zip(
        ALGORITHMS, torch.load(tmp_path / "w.pt", weights_only=True), strict=True
    ):
        assert torch.equal(weights, trained(algorithm))


@pytest.mark.usefixtures("two_threads")
# differences magnify rounding
@pytest.mark.cpu_only
@pytest.mark.parametrize(("algorithm", "bound"), [(MAML, 1e-11), (FOMAML, 1e-11), (HFMAML, 1e-6)])
def test_ways_of_running_tasks_change_weights_by_rounding(
    algorithm: type[MAML], bound: float
) -> None:
    loop = trained(algorithm, "64-true", "loop")
    for tasks in ("threads", "vmap"):
        other = trained(algorithm, "64-true", tasks)
        assert (other - loop).norm() < bound * loop.norm()


@pytest.mark.cpu_only
def test_tasks_are_the_same_on_every_python() -> None:
    """The digest was taken on Python 3.11; CI and users have others, and other numpys."""
    episodes = EpisodeDataset(
        numbered_images(),
        ways=5,
        shots=2,
        queries=3,
        rotations="augment",
        seed=(7, 0),
        split="train",
    )
    digest = hashlib.sha256()
    for number in range(50):
        for tensor in episodes[2, number]:
            digest.update(tensor.contiguous().numpy().astype("<i8").tobytes())
    assert digest.hexdigest() == "2f8193f09a6a73474e1e55db454edb69fb0f17a551d645e9be2e9c5434c67fe9"


@pytest.mark.cpu_only  # names its device
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_deterministic_training_on_a_gpu(algorithm: type[MAML]) -> None:
    try:
        first, second = (trained(algorithm, device="cuda") for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first, second)
