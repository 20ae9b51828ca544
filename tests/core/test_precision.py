"""Where differences of nearby gradients are taken, GPUs compute in float32 and not in TF32."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.random_numbers import drawn_on_cpu
from lightning_maml import FOMAML, HFMAML, IMAML, MAML, Episodes
from lightning_maml.core import precision as settings
from lightning_maml.core.precision import full_precision, precision


class Watching(nn.Module):
    """Notes the precision that it is called in."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.seen: set[Any]

    def forward(self, x: Tensor) -> Tensor:
        SEEN.add(precision())
        return torch.tanh(self.layer(x))


SEEN: set[Any] = set()


@pytest.fixture(autouse=True)
def forget() -> None:
    SEEN.clear()


def batch() -> Episodes:
    random = torch.Generator().manual_seed(0)
    x, y = drawn_on_cpu(torch.rand, 2, 8, 6, 4, generator=random), torch.tensor([[0, 1, 2] * 2] * 8)
    return Episodes(x[0], y, x[1], y)


def full() -> Any:
    with full_precision():
        return precision()


def test_full_precision_is_put_back() -> None:
    before = precision()
    with full_precision():
        assert precision() == full() != before
    assert precision() == before


def allow(value: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = value


@pytest.mark.parametrize(
    "of_user",
    [
        lambda: None,
        lambda: allow(True),
        lambda: torch.set_float32_matmul_precision("high"),
        lambda: torch.set_float32_matmul_precision("medium"),
    ],
)
def test_torchs_older_interface_agrees(of_user: Callable[[], None]) -> None:
    of_user()
    before = precision()
    try:
        with full_precision():
            # these raise where the two interfaces differ
            assert not torch.backends.cuda.matmul.allow_tf32
            assert not torch.backends.cudnn.allow_tf32
            with torch.backends.cudnn.flags(enabled=False):
                assert torch.get_float32_matmul_precision() == "highest"
        assert precision() == before
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.skipif(not settings._NEWER, reason="torch has had such settings since 2.9")
def test_cpus_do_not_compute_in_bf16() -> None:
    convolutions: Any = torch.backends.mkldnn.conv
    convolutions.fp32_precision = "bf16"
    try:
        with full_precision():
            assert convolutions.fp32_precision == "ieee"
        assert convolutions.fp32_precision == "bf16"
    finally:
        convolutions.fp32_precision = "none"


def test_settings_of_cpus_are_left_alone() -> None:
    allow(True)
    with full_precision():
        pass
    allow(False)
    assert torch.get_float32_matmul_precision() == "highest"  # raises where some say otherwise


@pytest.mark.parametrize("tasks", ["loop", "vmap"])
@pytest.mark.parametrize(
    ("algorithm", "is_full"), [(MAML, False), (FOMAML, False), (HFMAML, True), (IMAML, False)]
)
def test_finite_differences_are_in_full_precision(
    algorithm: type[MAML], is_full: bool, tasks: Any
) -> None:
    model = algorithm(Watching(), 0.1, 2, tasks=tasks)
    model.meta_gradient(batch())
    SEEN.clear()  # the first look at a network is in full precision where it compares
    model.meta_gradient(batch())
    assert ({*SEEN} == {full()}) is is_full
    assert precision() != full()


def test_the_trial_of_stacking_compares_in_full_precision() -> None:
    model = MAML(Watching(), 0.1, 1)
    model._execution(batch())
    assert full() in SEEN


def test_constants_are_measured_in_full_precision() -> None:
    probe = MAML(Watching(), 0.1, 1).probe(batch())
    SEEN.clear()
    probe.constants(0.1, 1)
    assert {*SEEN} == {full()}


def test_newer_settings_count_where_there_are_any() -> None:
    assert bool(settings._NEWER) == hasattr(torch.backends.cudnn, "conv")


def rounded(x: Tensor) -> Tensor:
    """Round to TF32's ten bits, unless full precision was asked for."""
    if precision() == full():
        return x
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


class Rounding(nn.Module):
    """Rounds as a GPU's convolutions do; gradients pass."""

    def forward(self, x: Tensor) -> Tensor:
        return x + (rounded(x.detach()) - x.detach())


def test_hessian_free_gradients_keep_their_digits() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        Rounding(), nn.Linear(4, 8), nn.Tanh(), Rounding(), nn.Linear(8, 3), nn.Tanh()
    )
    exact = MAML(network, 0.5, 3, tasks="loop").meta_gradient(batch())
    found = HFMAML(network, 0.5, 3, tasks="loop", loss=F.cross_entropy).meta_gradient(batch())
    far = sum(float((found[name] - exact[name]).square().sum()) for name in exact) ** 0.5
    size = sum(float(tensor.square().sum()) for tensor in exact.values()) ** 0.5
    assert far < 2e-3 * size
