"""The report: each condition holds and fails where it should, and the command prints it for a config and a checkpoint."""

import math
from pathlib import Path

import pytest
import torch

from lightning_maml import MAML, Conv4, theory
from lightning_maml.cli import main, run
from lightning_maml.measure import Constants
from lightning_maml.report import Settings, conditions, report

CONFIGS = Path(__file__).resolve().parent.parent / "configs"

CONSTANTS = Constants(
    L=2.0, rho=1.0, sigma=1.0, sample_sigma=1.0, hessian_sigma=1.0, b=0.5, mean_square_b=0.3, gradient_norm=1.0, gradient_evaluations=123
)
GOOD = Settings(
    curvature="finite_difference",
    inner_lr=0.05,
    steps=1,
    meta_batch_size=32,
    resampling=(50, 10, 50),
    probe_radius=1e-3,
    stepsize=1e-6,
    kinks=[],
)


def failing(settings: Settings, constants: Constants = CONSTANTS) -> set[str]:
    return {f"{c.source}: {c.text}" for c in conditions(constants, settings) if not c.holds}


@pytest.mark.parametrize("curvature", ["exact", "none", "finite_difference"])
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("resampling", [None, (50, 10, 50)])
def test_good_settings_satisfy_every_condition(curvature: str, steps: int, resampling: tuple[int, int, int] | None) -> None:
    settings = GOOD._replace(curvature=curvature, steps=steps, resampling=resampling, inner_lr=0.03)
    assert failing(settings) == set()


@pytest.mark.parametrize(
    ("change", "sources"),
    [
        ({"inner_lr": 0.0626}, ["Ji, Corollary 6: alpha"]),
        ({"inner_lr": 0.0834}, ["Ji, Corollary 6: alpha", "Fallah, Theorem 4.17: alpha"]),
        ({"meta_batch_size": 19}, ["Fallah, Theorem 4.17: B = 19"]),
        ({"kinks": ["2 (ReLU)"]}, ["both papers, assumptions: the network is twice differentiable; it has kinks in 2 (ReLU)"]),
        ({"probe_radius": 3.4}, ["Fallah, Theorem 4.17: probing radius h"]),
        ({"stepsize": 1.0}, ["Fallah eq. 17: meta-stepsize", "Ji eq. 14: meta-stepsize"]),
        ({"stepsize": None}, ["Fallah eq. 17: the meta-optimizer", "Ji eq. 14: the meta-optimizer"]),
        ({"resampling": (0, 10, 50)}, ["Ji, Corollary 6: S = 0 samples"]),
        ({"resampling": (50, 0, 50)}, ["Ji, Corollary 6: D = 0 Hessian", "Fallah, Theorem 4.17: D_h = 0 Hessian"]),
    ],
)
def test_each_condition_fails_alone(change: dict, sources: list[str]) -> None:
    settings = GOOD._replace(**({"resampling": (50, 10, 50)} | change))
    if change.get("resampling", (1,))[0] == 0:
        settings = settings._replace(resampling=(1, 10, 50))
        constants = CONSTANTS._replace(sample_sigma=1.1)
        sources = ["Ji, Corollary 6: S = 1 samples"]
    else:
        constants = CONSTANTS
    failed = failing(settings, constants)
    assert len(failed) == len(sources)
    assert all(any(text.startswith(source) for text in failed) for source in sources), failed


def test_a_rate_beyond_the_theory_is_said_so() -> None:
    for settings in (GOOD._replace(inner_lr=0.3), GOOD._replace(inner_lr=0.3, resampling=None)):
        failed = failing(settings)
        assert any("alpha = 0.3, at most (2^(1/2N) - 1) / L = 0.207 needed" in text for text in failed)
        assert any("theta > 0 needed; it does not exist while" in text for text in failed)


def test_too_few_tasks_leave_no_theorem() -> None:
    assert any("theta = -" in text for text in failing(GOOD._replace(meta_batch_size=1, inner_lr=0.1)))


def test_large_radii_err() -> None:
    constants = CONSTANTS._replace(rho=1e4)
    assert any(text.startswith("Fallah, eq. 9: finite differences err by at most 0.25") for text in failing(GOOD, constants))


def test_what_one_query_sample_leaves_open_is_said() -> None:
    constants = CONSTANTS._replace(sample_sigma=math.nan, hessian_sigma=math.nan)
    unknown = [c for c in conditions(constants, GOOD) if c.holds is None]
    assert [c.source for c in unknown] == ["Ji, Theorem 5", "Ji, Corollary 6"]
    text = report(constants, GOOD)
    assert "not known: one query sample" in text
    assert "not known" in text


def test_flat_curvature_needs_no_bound() -> None:
    assert failing(GOOD, CONSTANTS._replace(rho=0.0)) == set()


def test_the_report_shows_constants_implications_and_conditions() -> None:
    text = report(CONSTANTS, GOOD)
    assert "Measured with 123 gradient evaluations" in text
    smoothness = theory.meta_smoothness("one_step", 2.0, 1.0, 0.05, 1, 1.0)
    lines = text.splitlines()
    assert any(line.split()[:4] == ["beta,", "Fallah", "eq.", "17"] and f"{1 / (25 * smoothness):.3g}" in line for line in lines)
    assert any(line.split()[:3] == ["alpha", "to", "use"] and "0.0625" in line for line in lines)
    assert sum(line.startswith("  holds") for line in lines) == len(conditions(CONSTANTS, GOOD))


SMALL = ["--data.ways=3", "--model.network.ways=3", "--model.network.channels=2", "--tasks=2"]


@pytest.mark.parametrize("regime", ["finite_sum", "resampling"])
def test_the_command_measures_a_config_and_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str], regime: str) -> None:
    arguments = ["measure", f"--config={CONFIGS / 'glyphs_hfmaml.yaml'}", f"--data.regime={regime}", "--data.queries=2", *SMALL]
    main([*arguments, f"--trainer.default_root_dir={tmp_path}"])
    at_first = capsys.readouterr().out
    assert "HFMAML at the initial weights, 2 training tasks" in at_first
    assert "Conditions of the theorems" in at_first
    assert ("Ji, Theorem 5" if regime == "resampling" else "Ji, Theorem 9") in at_first
    command = run([*arguments, f"--trainer.default_root_dir={tmp_path}"])
    other = MAML(Conv4(1, 3, 28, channels=2, activation="gelu"))
    checkpoint = tmp_path / "some.ckpt"
    torch.save({"state_dict": other.state_dict()}, checkpoint)
    capsys.readouterr()
    main([*arguments, f"--ckpt_path={checkpoint}"])
    at_checkpoint = capsys.readouterr().out
    assert f"HFMAML at {checkpoint}" in at_checkpoint
    assert constants_of(at_checkpoint) != constants_of(at_first)
    torch.save({"state_dict": command.model.state_dict()}, checkpoint)
    main([*arguments, f"--ckpt_path={checkpoint}"])
    assert constants_of(capsys.readouterr().out) == constants_of(at_first), "the same weights, the same constants"


def constants_of(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith(("  L ", "  rho ", "  sigma", "  b "))]


def test_a_checkpoint_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="lightning-maml: Expected `ckpt_path` to be a checkpoint but there is no file"):
        main(["measure", f"--config={CONFIGS / 'glyphs_maml.yaml'}", *SMALL, f"--ckpt_path={tmp_path / 'none.ckpt'}"])
