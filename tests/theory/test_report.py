"""The report: conditions hold and fail where they should, and the command prints them."""

import importlib
import math
from pathlib import Path

import pytest
import torch

from helpers.folders import CONFIGS, SMALL_NETWORK
from lightning_maml import MAML, MLP, theory
from lightning_maml.cli import main
from lightning_maml.theory.measure import Constants
from lightning_maml.theory.report import Adaptive, Settings, conditions, coverage, report

CONSTANTS = Constants(
    L=2.0,
    rho=1.0,
    sigma=1.0,
    sample_sigma=1.0,
    hessian_sigma=1.0,
    b=0.5,
    mean_square_b=0.3,
    gradient_norm=1.0,
    gradient_evaluations=123,
)
GOOD = Settings(
    curvature="exact",
    inner_lr=0.05,
    steps=1,
    tasks=32,
    query=50,
    resampling=(50, 10),
    probe_radius=1e-3,
    stepsize=1e-6,
    kinks=[],
)


def failing(settings: Settings, constants: Constants = CONSTANTS) -> set[str]:
    return {f"{c.source}: {c.text}" for c in conditions(constants, settings) if c.holds is False}


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("resampling", [None, (50, 10)])
def test_good_settings_satisfy_every_condition(
    steps: int, resampling: tuple[int, int] | None
) -> None:
    settings = GOOD._replace(steps=steps, resampling=resampling, inner_lr=0.03)
    assert failing(settings) == set()
    of_hf = settings._replace(curvature="finite_difference")
    assert failing(of_hf) == set()
    kind = "Episodes" if resampling is None else "ResampledEpisodes"
    assert coverage(CONSTANTS, settings).startswith(f"MAML, N = {steps}, on {kind}, is covered by")
    assert f"No theorem covers HF-MAML, N = {steps}, on {kind}" in coverage(CONSTANTS, of_hf)


@pytest.mark.parametrize("steps", [1, 2])
def test_first_order_has_one_theorem_for_one_step_and_none_for_several(steps: int) -> None:
    settings = GOOD._replace(curvature="none", steps=steps, inner_lr=0.03)
    assert failing(settings) == set()
    found = conditions(CONSTANTS, settings)
    assert any(c.source == "Fallah, Theorem 4.15" for c in found) is (steps == 1)
    text = coverage(CONSTANTS, settings)
    if steps == 1:
        assert "is covered by Fallah, Theorem 4.15 if the conditions below hold" in text
    else:
        floor = theory.first_order_floor(2.0, 0.03, 2, 1.0)
        assert f"at most first_order_floor = {floor:.3g}" in text


def test_the_floor_of_a_finite_sum_counts_how_far_its_sets_are_apart() -> None:
    settings = GOOD._replace(curvature="none", resampling=None, inner_lr=0.03)
    floor = theory.first_order_floor(2.0, 0.03, 1, 1.0, b=0.5)
    assert f"at most first_order_floor = {floor:.3g}" in coverage(CONSTANTS, settings)


@pytest.mark.parametrize("resampling", [None, (50, 10)])
def test_the_error_of_hf_maml_is_bounded_at_the_adapted_parameters(
    resampling: tuple[int, int] | None,
) -> None:
    settings = GOOD._replace(curvature="finite_difference", steps=2, resampling=resampling)
    grown = (1 + 0.05 * 2) ** 2
    at_adapted = grown * 1.0 + (grown - 1) * 0.5
    error = theory.hessian_free_error(2.0, 1.0, 0.05, 2, 1e-3, at_adapted)
    assert f"here {error:.3g} (the query gradient is 1)" in coverage(CONSTANTS, settings)


def test_alpha_at_its_bound_is_allowed_by_one_paper_only() -> None:
    for alpha, source in (
        (1 / 12, "Fallah, Theorem 4.12"),
        (math.sqrt(2) / 2 - 0.5, "Ji, Theorem 5"),
    ):
        found = conditions(CONSTANTS, GOOD._replace(inner_lr=alpha))
        (judged,) = [c for c in found if c.source == source and c.text.startswith("alpha = ")]
        assert judged.holds is (source == "Fallah, Theorem 4.12")


ADAPTIVE = Adaptive("one_step", 1 / 12, 4)


@pytest.mark.parametrize(
    ("change", "constants", "sources"),
    [
        ({"inner_lr": 0.0626}, {}, ["Ji, Corollary 6: alpha"]),
        ({"inner_lr": 0.0834}, {}, ["Ji, Corollary 6: alpha", "Fallah, Theorem 4.12: alpha"]),
        ({"tasks": 19}, {}, ["Fallah, Theorem 4.12: B = 19 tasks per step, at least 20 needed"]),
        (
            {"kinks": ["2 (ReLU)"]},
            {},
            ["both papers: network and loss are twice differentiable; there are kinks in 2 (ReLU)"],
        ),
        ({"stepsize": 1.0}, {}, ["Fallah eq. 17: fixed beta", "Ji eq. 14: fixed beta"]),
        ({"stepsize": None}, {}, ["both papers: meta-steps must be those of plain SGD"]),
        ({"resampling": (1, 10)}, {"sample_sigma": 1.1}, ["Ji, Corollary 6: S = 1 samples"]),
        (
            {"resampling": (50, 0)},
            {},
            ["Ji, Corollary 6: D = 0 Hessian", "Fallah, Theorem 4.12: D_h = 0 Hessian"],
        ),
        ({"stepsize": ADAPTIVE._replace(scale=1.0)}, {}, ["Fallah, Theorem 4.12: scale = 1"]),
        ({"stepsize": ADAPTIVE}, {"sigma": 150.0}, ["Fallah eq. 17: B' = 4 tasks"]),
        (
            {"stepsize": ADAPTIVE, "query": 3},
            {"sample_sigma": 40.0},
            ["Fallah eq. 17: query samples = 3", "Ji, Corollary 6: S"],
        ),
        (
            {"stepsize": ADAPTIVE._replace(rule="finite_sum")},
            {},
            ["Ji eq. 22: AdaptiveMetaStepsize has rule 'finite_sum', which no theorem uses"],
        ),
    ],
)
def test_each_condition_fails_alone(change: dict, constants: dict, sources: list[str]) -> None:
    failed = failing(GOOD._replace(**change), CONSTANTS._replace(**constants))
    assert len(failed) == len(sources), failed
    assert all(any(text.startswith(source) for text in failed) for source in sources), failed


def test_an_inner_rate_a_rounding_below_the_limit_is_judged() -> None:
    limit = theory.largest_inner_lr(2.0, 2)
    for inner_lr in (math.nextafter(limit, 0), limit, math.nextafter(limit, 1)):
        failed = failing(GOOD._replace(inner_lr=inner_lr, steps=2, resampling=None))
        is_below = inner_lr < limit
        assert any("theta > 0 needed; there is none" in text for text in failed) is not is_below
        assert any(text.startswith("Ji, Theorem 9: alpha") for text in failed) is not is_below


def test_a_floor_that_is_infinite_is_no_knowledge() -> None:
    text = coverage(CONSTANTS, GOOD._replace(curvature="none", steps=5, inner_lr=0.4))
    assert text.endswith("first_order_floor, which is infinite at this alpha, so nothing is known")


def test_rows_stand_where_they_mean_something() -> None:
    """A finite sum has no Hessian batch, and 1 / (8 N L) is of corollaries on MAML."""
    of_finite_sum = report(CONSTANTS, GOOD._replace(resampling=None))
    assert "samples for a Hessian-vector product" not in of_finite_sum
    assert "samples for a Hessian-vector product" in report(CONSTANTS, GOOD)
    assert "1 / (8 N L), N = 1" in of_finite_sum
    assert "1 / (8 N L), for MAML, N = 1" in report(CONSTANTS, GOOD._replace(curvature="none"))


def test_an_adaptive_stepsize_satisfies_its_conditions() -> None:
    assert failing(GOOD._replace(stepsize=ADAPTIVE)) == set()


def test_an_inner_lr_beyond_the_theorems_is_reported() -> None:
    for settings in (GOOD._replace(inner_lr=0.3), GOOD._replace(inner_lr=0.3, resampling=None)):
        failed = failing(settings)
        assert any(
            "alpha = 0.3, less than (2^(1/2N) - 1) / L = 0.207 needed" in text for text in failed
        )
        assert any("theta > 0 needed; there is none while" in text for text in failed)


def test_theta_is_negative_with_too_few_tasks() -> None:
    assert any("theta = -" in text for text in failing(GOOD._replace(tasks=1, inner_lr=0.1)))


def test_one_query_sample_leaves_conditions_undecided() -> None:
    constants = CONSTANTS._replace(sample_sigma=math.nan, hessian_sigma=math.nan)
    settings = GOOD._replace(stepsize=ADAPTIVE)
    unknown = [
        c.text
        for c in conditions(constants, settings)
        if c.holds is None and "two query samples" in c.text
    ]
    assert len(unknown) == 4
    text = report(constants, settings)
    assert "not known: one query sample" in text
    assert "of not known samples" in text
    assert "nan" not in text


def test_without_adaptation_the_meta_objective_is_reported_as_smooth() -> None:
    assert "C_L = 0, so F is smooth" in report(CONSTANTS, GOOD._replace(inner_lr=0.0))
    assert "to which the theory of SGD applies" in report(CONSTANTS, GOOD._replace(steps=0))


def test_every_condition_holds_where_rho_is_zero() -> None:
    assert failing(GOOD, CONSTANTS._replace(rho=0.0)) == set()


def test_the_report_shows_constants_implications_and_conditions() -> None:
    text = report(CONSTANTS, GOOD)
    assert "Measured with 123 gradient evaluations" in text
    smoothness = theory.meta_smoothness("one_step", 2.0, 1.0, 0.05, 1, 1.0)
    lines = text.splitlines()
    assert any(
        line.split()[:4] == ["beta,", "Fallah", "eq.", "17"]
        and f"{1 / (12 * smoothness):.3g}" in line
        for line in lines
    )
    assert any(line.split()[:3] == ["alpha", "to", "use"] and "0.0625" in line for line in lines)
    assert sum(line.startswith("  holds") for line in lines) == len(conditions(CONSTANTS, GOOD)) - 2
    assert any(line.startswith("  not decided") for line in lines)


SMALL = [*SMALL_NETWORK, "--data.queries=2", "--tasks=2"]


@pytest.mark.parametrize("regime", ["finite_sum", "resampling"])
def test_the_command_measures_a_config_and_a_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], regime: str
) -> None:
    arguments = [
        "measure",
        f"--config={CONFIGS / 'glyphs_hfmaml.yaml'}",
        f"--data.regime={regime}",
        *SMALL,
    ]
    main([*arguments, f"--trainer.default_root_dir={tmp_path}"])
    at_first = capsys.readouterr().out
    assert "HFMAML at the initial weights, 2 training tasks" in at_first
    assert "Conditions of the theorems" in at_first
    assert "The meta-gradient of HFMAML differs from the exact one by" in at_first
    assert ("Ji, Theorem 5" if regime == "resampling" else "Ji, Theorem 9") in at_first
    checkpoint = tmp_path / "some.ckpt"
    torch.save(
        {"state_dict": MAML(MLP(784, 3, hidden=[8], activation="gelu")).state_dict()},
        checkpoint,
    )
    main([*arguments, f"--ckpt_path={checkpoint}"])
    at_checkpoint = capsys.readouterr().out
    assert f"HFMAML at {checkpoint}" in at_checkpoint
    assert constants_of(at_checkpoint) != constants_of(at_first)


@pytest.mark.parametrize("regime", ["finite_sum", "resampling"])
def test_kinks_in_functional_activations_are_reported(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, regime: str
) -> None:
    monkeypatch.setattr(torch.nn.GELU, "forward", lambda self, x: torch.relu(x))
    main(["measure", f"--config={CONFIGS / 'glyphs_maml.yaml'}", f"--data.regime={regime}", *SMALL])
    assert "there are kinks in relu" in capsys.readouterr().out


TWO_RATES = """
import torch
from lightning_maml import MAML

class TwoRates(MAML):
    def configure_optimizers(self):
        weights, biases = ([p for p in self.parameters() if (p.ndim > 1) == of] for of in (1, 0))
        return [torch.optim.SGD([{"params": weights}, {"params": biases, "lr": 1.0}], lr=0.001)]
"""


@pytest.mark.parametrize(
    ("change", "is_fixed"),
    [
        (["--model.lr_scheduler=null"], True),
        (["--model.lr_scheduler=null", "--trainer.gradient_clip_val=1"], False),
        ([], False),  # the config has a cosine
        (["--model.lr_scheduler=null", "--model.optimizer.momentum=0.9"], False),
        (["--model=own_rates.TwoRates", "--model.lr_scheduler=null"], False),
    ],
)
def test_a_rate_that_does_not_stay_is_not_judged_as_fixed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: list[str],
    is_fixed: bool,
) -> None:
    (tmp_path / "own_rates.py").write_text(TWO_RATES)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = f"--config={CONFIGS / 'glyphs_maml.yaml'}"
    sgd = ["--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.001"]
    main(["measure", config, *sgd, *change, *SMALL])
    output = capsys.readouterr().out
    assert ("fixed beta" in output) == is_fixed
    assert ("must be those of plain SGD at one rate" in output) != is_fixed


@pytest.mark.slow
def test_the_network_of_a_shipped_config_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--data.ways=3", "--model.network.ways=3", "--model.network.channels=2", "--tasks=2"]
    main(["measure", f"--config={CONFIGS / 'glyphs_maml.yaml'}", *few])
    assert "Conditions of the theorems" in capsys.readouterr().out


def constants_of(output: str) -> list[str]:
    return [
        line
        for line in output.splitlines()
        if line.startswith(("  L ", "  rho ", "  sigma", "  b "))
    ]


def test_a_checkpoint_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        SystemExit,
        match=r"lightning-maml: Expected `ckpt_path` to be 'last' or the path of a checkpoint but "
        r"there is no '.*none\.ckpt'; those of a run are in its folder `checkpoints`",
    ):
        main(
            [
                "measure",
                f"--config={CONFIGS / 'glyphs_maml.yaml'}",
                *SMALL,
                f"--ckpt_path={tmp_path / 'none.ckpt'}",
            ]
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--tasks=1"],
            "Expected `tasks` to be at least 2, for a deviation between them, but got 1",
        ),
        (
            ["--data.regime=resampling", "--model.train_steps=2"],
            "give the datamodule the same `train_steps` as the model",
        ),
    ],
)
def test_mistakes_in_the_command_end_with_one_sentence(arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        main(["measure", f"--config={CONFIGS / 'glyphs_maml.yaml'}", *SMALL, *arguments])


def test_the_configured_batches_and_callback_are_judged(capsys: pytest.CaptureFixture[str]) -> None:
    sgd = [
        "--model.optimizer=torch.optim.SGD",
        "--model.optimizer.lr=0",
        "--trainer.callbacks=AdaptiveMetaStepsize",
    ]
    main(
        [
            "measure",
            f"--config={CONFIGS / 'glyphs_maml.yaml'}",
            *SMALL,
            *sgd,
            "--trainer.callbacks.rule=resampling",
            "--data.regime=resampling",
            "--trainer.accumulate_grad_batches=8",
        ]
    )
    output = capsys.readouterr().out
    assert "B = 128 tasks per step" in output
    assert "B' = 4 tasks for the stepsize" in output


FROZEN_NORM = """
from torch import nn

SEEN = set()


class FrozenNorm(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.BatchNorm1d(784), nn.Linear(784, 3), nn.Softplus())
        self[1].eval()

    def forward(self, x):
        SEEN.add(self[1].training)
        return super().forward(x)
"""


def test_layers_in_evaluation_mode_stay_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "frozen_norm.py").write_text(FROZEN_NORM)
    monkeypatch.syspath_prepend(str(tmp_path))
    network = ["--model.network=frozen_norm.FrozenNorm", "--model.batch_norm=running"]
    data = ["--data.ways=3", "--data.shots=1", "--data.queries=2", "--tasks=2"]
    main(["measure", f"--config={CONFIGS / 'glyphs_maml.yaml'}", *network, *data])
    assert {False} == importlib.import_module("frozen_norm").SEEN
    assert "Conditions of the theorems" in capsys.readouterr().out


def test_theta_is_that_of_the_runs_scale() -> None:
    # Theorem 9 needs C_beta = 1 / scale above A_1 / B + 1; Corollary 10 takes 1 / 80
    of_task = GOOD._replace(resampling=None, inner_lr=1 / 16)
    a_1, _ = theory.finite_sum_moments(2.0, 1 / 16, 1, sigma=1.0, b=0.5, mean_square_b=0.3)
    least = a_1 / of_task.tasks + 1
    for c_beta, theorem, corollary in ((0.9 * least, False, False), (1.1 * least, True, False)):
        stepsize = Adaptive("finite_sum", 1 / c_beta, 10**9)
        failed = failing(of_task._replace(stepsize=stepsize))
        assert any(text.startswith("Ji, Theorem 9: theta") for text in failed) != theorem
        assert any(text.startswith("Ji, Corollary 10: scale") for text in failed) != corollary
    assert not failing(of_task._replace(stepsize=Adaptive("finite_sum", 1 / 80, 10**9)))
