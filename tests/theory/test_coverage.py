"""The table of docs/theory.md is what the functions, `measure` and the callback say."""

import re
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from lightning import Trainer
from torch.utils.data import DataLoader

from helpers.folders import CONFIGS, ROOT, SMALL_NETWORK
from helpers.networks import build, make_episodes
from helpers.trainers import on_device
from lightning_maml import (
    FOMAML,
    HFMAML,
    MAML,
    AdaptiveMetaStepsize,
    Episodes,
    ResampledEpisodes,
    theory,
)
from lightning_maml.cli import main

ALGORITHMS = {"MAML": MAML, "FO-MAML": FOMAML, "HF-MAML": HFMAML}
RULES = {"Fallah, Theorem 4.12": "one_step", "Fallah, Theorem 4.15": "one_step"}
RULES |= {"Ji, Theorem 5": "resampling", "Ji, Theorem 9": "finite_sum"}


class Row(NamedTuple):
    """A row of the table."""

    algorithm: str
    steps: int
    tasks: str
    theorems: list[str]
    known_instead: str


def rows() -> list[Row]:
    found = []
    for line in (ROOT / "docs/theory.md").read_text().splitlines():
        cells = [cell.strip(" `") for cell in line.strip("|").split("|")]
        if cells[0] in ALGORITHMS:
            names = [] if cells[3] == "none" else cells[3].split("; ")
            found.append(Row(cells[0], int(cells[1][0]), cells[2], names, cells[5]))
    return found


def name_of(row: Row) -> str:
    return "-".join(map(str, row[:3]))


every_row = pytest.mark.parametrize("row", rows(), ids=name_of)


def test_the_table_has_every_combination() -> None:
    kinds = {(row.algorithm, row.steps, row.tasks) for row in rows()}
    assert len(kinds) == len(rows()) == 12


@every_row
def test_the_functions_name_the_theorems_of_the_table(row: Row) -> None:
    curvature = ALGORITHMS[row.algorithm](build("mlp")).curvature
    data = "finite_sum" if row.tasks == "Episodes" else "resampling"
    for steps in (1,) if row.steps == 1 else (2, 5):
        found = theory.theorems(curvature, steps, data)
        assert [theorem.name for theorem in found] == row.theorems
        assert [theorem.rule for theorem in found] == [RULES[name] for name in row.theorems]
        assert (theory.known_instead(curvature, steps, data) == "") == bool(row.theorems)
    assert bool(row.known_instead) != bool(row.theorems)


def test_no_theorem_is_about_no_inner_steps() -> None:
    for curvature in ("exact", "none", "finite_difference"):
        assert theory.theorems(curvature, 0, "finite_sum") == []
        assert "the theory of SGD applies" in theory.known_instead(curvature, 0, "finite_sum")


@every_row
def test_measure_judges_by_the_theorems_of_the_table(
    row: Row, capsys: pytest.CaptureFixture[str]
) -> None:
    name = ALGORITHMS[row.algorithm].__name__
    regime = "finite_sum" if row.tasks == "Episodes" else "resampling"
    data = [f"--data.regime={regime}", f"--data.train_steps={row.steps}", "--data.queries=2"]
    main(
        [
            "measure",
            f"--config={CONFIGS / f'glyphs_{name.lower()}.yaml'}",
            f"--model.train_steps={row.steps}",
            "--epsilon=0.1",
            "--tasks=2",
            *SMALL_NETWORK,
            *data,
        ]
    )
    covered, judged = capsys.readouterr().out.split("Conditions of the theorems")
    named = set(re.findall(r"(?:Fallah|Ji), Theorem [\d.]+(?:, on MAML)?(?=  )", judged))
    name = f"{row.algorithm}, N = {row.steps}, on {row.tasks}"
    if row.theorems:
        theorems = " and ".join(row.theorems)
        assert f"{name}, is covered by {theorems} if the conditions below hold" in covered
    else:
        assert f"No theorem covers {name}: " in covered
    if row.algorithm == "HF-MAML":
        of_maml = next(r for r in rows() if r[:3] == ("MAML", row.steps, row.tasks))
        assert named == {f"{theorem}, on MAML" for theorem in of_maml.theorems}
        assert "hessian_free_error" in covered
    else:
        assert named == set(row.theorems)
        has_floor = row.algorithm == "FO-MAML" and not row.theorems
        assert ("first_order_floor" in covered) is has_floor
    if named:
        assert "Sizes for E|grad F| <= 0.1 by" in judged
    else:
        assert "No theorem gives sizes for E|grad F| <= 0.1" in judged


def resampled(episodes: Episodes, steps: int) -> ResampledEpisodes:
    x, y, query_x, query_y = episodes
    support = [torch.stack([tensor] * steps, 1) for tensor in (x, y)]
    return ResampledEpisodes(*support, *support, query_x, query_y)


@every_row
@pytest.mark.parametrize("rule", ["one_step", "resampling", "finite_sum"])
def test_the_callback_warns_where_the_table_has_no_theorem(
    row: Row, rule: theory.Rule, tmp_path: Path
) -> None:
    if rule == "one_step" and row.steps > 1:
        pytest.skip("this rule is refused for several steps")
    finite = row.tasks == "Episodes"
    episodes = make_episodes() if finite else resampled(make_episodes(), row.steps)
    model = ALGORITHMS[row.algorithm](
        build("mlp"), 0.01, train_steps=row.steps, optimizer=torch.optim.SGD
    )
    stepsize = AdaptiveMetaStepsize(rule, L=1.0, rho=1.0, b=0.0, episodes=[episodes])
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        default_root_dir=tmp_path,
        callbacks=[stepsize],
        max_epochs=1,
        precision="64-true",
        **quiet,
        **on_device(),
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(model, DataLoader([episodes] * 2, batch_size=None))
    said = [str(w.message) for w in caught if "no theorem covers" in str(w.message)]
    assert len(said) == (0 if rule in [RULES[name] for name in row.theorems] else 1)
    for sentence in said:
        assert f"{row.algorithm}, N = {row.steps}, on {row.tasks} with rule {rule!r}" in sentence
