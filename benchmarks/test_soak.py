"""A sample of benchmarks/soak.py: runs that are killed at random moments."""

from collections.abc import Iterable

import pytest

from helpers.runs import MODELS
from soak import PHASES, soak

QUICK = ("MAML with dropout", "MAML, adaptive meta-stepsize")


@pytest.mark.parametrize(
    "names", [QUICK, pytest.param(MODELS, marks=pytest.mark.slow)], ids=["two", "all"]
)
def test_runs_that_are_killed_go_on_from_the_last_checkpoint(names: Iterable[str]) -> None:
    outcomes = {outcome for _, outcome in soak(kills=4, processes=1, seed=0, names=names)}
    assert outcomes <= {*PHASES, "too early", "too late"}
    assert outcomes & {*PHASES}
