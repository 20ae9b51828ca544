"""A sample of benchmarks/zoo.py: whole networks of other libraries.

The reference is autograd through the unrolled loop.
"""

import gc

import pytest

from helpers.zoo_catalogue import NETWORKS, TIMM, TORCHVISION, TRANSFORMERS
from zoo import row

QUICK = (
    "torchvision mobilenet_v3_small",
    "timm convmixer",
    "timm vit_tiny_patch16_224",
    "transformers BertForSequenceClassification",
)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in NETWORKS],
)
@pytest.mark.filterwarnings("ignore")
def test_a_network_gives_the_gradients_of_the_unrolled_loop_or_is_refused_in_a_sentence(
    name: str,
) -> None:
    cells = row(NETWORKS[name])
    gc.collect()  # the next network may be a large one
    assert {found.word for found in cells.values()} <= {"equal", "refused"}, cells
    assert cells["first order"].word == cells["adapt"].word == "equal", cells
    if cells["exact"].word == "refused":
        assert "train with FOMAML or HFMAML" in cells["exact"].detail


def test_the_sample_is_in_the_catalogue() -> None:
    assert {*QUICK} <= NETWORKS.keys()


def test_the_catalogue_holds_every_network_of_torchvision_and_many_of_the_others() -> None:
    assert len(TORCHVISION) >= 80
    assert len(TIMM) >= 20
    assert len(TRANSFORMERS) >= 10
