"""Sizes for an accuracy: they are those of the formulas, and the command prints them."""

import math

import pytest
import torch

from helpers.folders import CONFIGS
from lightning_maml import Episodes, theory
from lightning_maml.cli import main
from lightning_maml.theory.measure import Constants, Probe
from lightning_maml.theory.report import Settings
from lightning_maml.theory.sizes_report import sizes_report

CONSTANTS = Constants(2.0, 3.0, 1.5, 1.2, 1.0, 0.5, 0.3, 1.0, gradient_evaluations=9)
SETTINGS = Settings("exact", 0.05, 1, 32, 50, (40, 10), 1e-3, stepsize=1e-6, kinks=[])


def values(text: str) -> dict[str, str]:
    return {line.split()[0]: line.split()[1] for line in text.splitlines() if line[:2] == "  "}


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("curvature", ["exact", "finite_difference"])
def test_sizes_of_a_finite_sum_are_those_of_corollary_10(steps: int, curvature: str) -> None:
    settings = SETTINGS._replace(curvature=curvature, steps=steps, resampling=None)
    text = sizes_report(2.0, CONSTANTS, settings, lambda alpha: 0.7)
    sizes = theory.finite_sum_sizes(
        2.0, 2.0, 3.0, steps, sigma=1.5, b=0.5, mean_square_b=0.3, gap=0.7
    )
    shown = values(text)
    assert "Ji, Corollary 10" in text
    assert ("on MAML" in text) is (curvature == "finite_difference")
    assert float(shown["K"]) == pytest.approx(sizes.iterations, rel=5e-3)
    assert float(shown["B"]) == pytest.approx(sizes.tasks, rel=5e-3)
    assert float(shown["alpha"]) == pytest.approx(1 / (16 * steps), rel=5e-3)
    assert set(shown) == {"K", "B", "alpha"}


def test_sizes_of_fresh_batches_are_those_of_corollaries_6_and_4_13() -> None:
    text = sizes_report(2.0, CONSTANTS, SETTINGS, lambda alpha: 0.7)
    one_step, several = text.split("Sizes for")[1:]
    sizes = theory.resampling_sizes(
        2.0, 2.0, 3.0, 1, sigma=1.5, sample_sigma=1.2, hessian_sigma=1.0, gap=0.7
    )
    shown = values(several)
    assert "Ji, Corollary 6" in several
    expected = (sizes.iterations, sizes.tasks, sizes.support, sizes.query, sizes.hessian)
    assert [float(shown[name]) for name in "KBSTD"] == pytest.approx(expected, rel=5e-3)
    assert "Fallah, Corollary 4.13" in one_step
    shown = values(one_step)
    assert [shown[name] for name in ("K", "B", "D_in", "D_h")] == ["1", "20", "1", "1"]
    noise = math.sqrt(1.5**2 / 32 + 1.2**2 / (32 * 50) + 1.2**2 / 40)
    assert float(shown["noise"]) == pytest.approx(noise, rel=5e-3)


def test_first_order_maml_has_an_accuracy_of_its_own() -> None:
    text = sizes_report(0.1, CONSTANTS, SETTINGS._replace(curvature="none"), lambda alpha: 0.7)
    floor = 0.05 * 2.0 * 1.5
    shown = values(text)
    assert float(shown["accuracy"]) == pytest.approx(floor)
    assert "above the 0.1" in text
    assert int(shown["B"]) == math.ceil(1 / (0.05 * 2) ** 2)
    assert int(shown["D_in"]) == math.ceil(1.2**2 / floor**2)
    noise = math.sqrt(1.5**2 * (0.1**2 + 1 / 32) + 1.2**2 / (32 * 50) + 1.2**2 / 40)
    assert float(shown["noise"]) == pytest.approx(noise, rel=5e-3)


def test_the_distance_is_that_of_the_objective_with_the_rate_of_each_theorem() -> None:
    """Ji's corollaries have alpha = 1 / (8 N L), and F depends on it."""
    text = sizes_report(2.0, CONSTANTS, SETTINGS, objective=lambda alpha: alpha)
    one_step, several = text.split("Sizes for")[1:]
    assert "with F(w) = 0.05 for F(w) - inf F" in one_step
    assert "with F(w) = 0.0625 for F(w) - inf F" in several
    negative = sizes_report(2.0, CONSTANTS, SETTINGS, objective=lambda alpha: -1.0)
    assert negative.count("the loss can be negative") == 2


def test_what_gives_no_sizes_is_said() -> None:
    uncovered = SETTINGS._replace(curvature="none", steps=2)
    assert "No theorem gives sizes" in sizes_report(0.1, CONSTANTS, uncovered, lambda alpha: 0.7)
    alike = sizes_report(
        0.1, CONSTANTS._replace(sigma=0.0), SETTINGS._replace(curvature="none"), lambda _: 1.0
    )
    assert values(alike)["accuracy"] == "0"
    assert values(alike)["K"] == "unbounded"
    flat = CONSTANTS._replace(rho=0.0)
    assert "rho = 0" in sizes_report(0.1, flat, SETTINGS._replace(steps=2), lambda alpha: 0.7)
    unknown = CONSTANTS._replace(sample_sigma=math.nan, hessian_sigma=math.nan)
    text = sizes_report(0.1, unknown, SETTINGS, lambda alpha: 0.7)
    assert text.count("at least two query samples") == 2
    assert "nan" not in text


def test_the_objective_is_the_query_loss_after_the_inner_steps() -> None:
    """On l(w) = (w - c)^2 / 2 the distance to c shrinks by 1 - alpha in each step."""

    def loss(params: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (params["w"] - x).square().sum() / 2

    x = torch.tensor([[[1.0]], [[3.0]]], dtype=torch.float64)
    probe = Probe(loss, {"w": torch.zeros(1, dtype=torch.float64)}, Episodes(x, x, x, x))
    for steps in (0, 1, 3):
        shrunk = 0.9 ** (2 * steps)
        assert probe.objective(0.1, steps) == pytest.approx(shrunk * (1 + 9) / 4, rel=1e-12)
    with pytest.raises(ValueError, match="Expected `steps` to be at least 0 but got -3"):
        probe.objective(0.1, -3)


@pytest.mark.parametrize("resampling", [None, (40, 10)])
def test_accuracies_of_any_size_have_sizes_or_are_refused(
    resampling: tuple[int, int] | None,
) -> None:
    settings = SETTINGS._replace(resampling=resampling)

    def iterations(epsilon: float) -> float:
        text = sizes_report(epsilon, CONSTANTS, settings, lambda alpha: 0.7)
        return float(values(text.split("Sizes for")[-1])["K"])

    assert iterations(1e300) == iterations(1e160) == 1
    assert iterations(1e-100) == pytest.approx(1e120 * iterations(1e-40), rel=1e-2)
    for epsilon in (1e-160, 1e-300):
        with pytest.raises(ValueError, match="Expected `epsilon` to be an accuracy within reach"):
            sizes_report(epsilon, CONSTANTS, settings, lambda alpha: 0.7)


@pytest.mark.parametrize("epsilon", ["0", "-1"])
def test_an_accuracy_that_is_none_is_refused_before_measuring(epsilon: str) -> None:
    with pytest.raises(SystemExit, match="Expected `epsilon` to be a positive number but got"):
        main(["measure", f"--config={CONFIGS / 'glyphs_maml.yaml'}", f"--epsilon={epsilon}"])
