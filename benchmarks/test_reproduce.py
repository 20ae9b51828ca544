"""Accuracy tables: the configs of their rows, the page, and one run.

Configs must parse, the page must show what the runs found, and one row runs from end to end.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.cli import LightningCLI

import reproduce
from lightning_maml import MAML, Conv4
from lightning_maml.cli import run
from lightning_maml.datamodules import GlyphsDataModule
from reproduce import MARK, PAGE, Judged, Run, draw, rows, runs, tables

ONE = Run(
    "omniglot_5w1s_maml",
    0,
    3000,
    32,
    1,
    3,
    0.4,
    1,
    "batch",
    [Judged(600, 98.0, 0.5), Judged(10_000, 98.5, 0.12)],
    12.4,
    "a machine",
    "versions",
)


QUICK = [
    row
    for row in rows()
    if row.startswith("omniglot_20w1s") or row.endswith(("_maml", "_hfmaml_relu"))
]


@pytest.mark.parametrize(
    "row", [row if row in QUICK else pytest.param(row, marks=pytest.mark.slow) for row in rows()]
)
def test_rows_are_configs(row: str, capsys: pytest.CaptureFixture[str]) -> None:
    config, *changed = rows()[row]
    with pytest.raises(SystemExit) as ended:
        run(["fit", f"--config={config}", *changed, "--print_config"])
    assert ended.value.code in (None, 0)
    printed = capsys.readouterr().out
    is_of_photos = row.startswith(reproduce.COLOUR) and not row.endswith("_smooth")
    assert ("activation: relu" in printed) == (row.endswith("_relu") or is_of_photos)
    named = next(argument for argument in changed if argument.startswith("--model=")).removeprefix(
        "--model="
    )
    assert f"class_path: lightning_maml.{named}\n" in printed


def test_a_table_has_every_seed_their_mean_and_the_published_figure() -> None:
    second = ONE._replace(
        seed=1,
        judged=[Judged(600, 97.0, 0.6), Judged(10_000, 97.5, 0.13)],
        minutes=14.4,
        versions="later ones",
    )
    other = ONE._replace(row="omniglot_5w1s_hfmaml_relu")
    elsewhere = ONE._replace(machine="a GPU")
    lines = tables([other, second, ONE, elsewhere]).splitlines()
    assert lines[1] == "## omniglot_5w1s"
    assert [cell.strip() for cell in lines[5].split("|")[1:-1]] == [
        *(
            "`omniglot_5w1s_maml`",
            "3000 x 32",
            "1, 3, 0.4",
            "1",
            "batch",
            "97.0 ± 0.6, 98.0 ± 0.5",
            "**98.00** (2 seeds, sd 0.71)",
        ),
        *("97.50 ± 0.13, 98.50 ± 0.12", "98.7 ± 0.4", "13", "a machine"),
    ]
    assert "(1 seed)" in lines[6]
    assert lines[6].endswith("| a GPU |"), "other machines have lines of their own"
    assert lines[7].startswith("| `omniglot_5w1s_hfmaml_relu` |")
    assert len(lines) == 8
    cut_off = ONE._replace(judged=ONE.judged[:1])
    assert [cell.strip() for cell in tables([cut_off]).splitlines()[5].split("|")[6:9]] == [
        "98.0 ± 0.5",
        "-",
        "-",
    ]
    assert "**97.50** (1 seed)" in tables([cut_off, second])


def test_the_picture_has_every_seed_with_its_interval_beside_the_published_figure() -> None:
    second = ONE._replace(seed=1, judged=[Judged(600, 97.0, 0.6), Judged(10_000, 97.5, 0.13)])
    unpublished = ONE._replace(row="omniglot_5w1s_hfmaml")
    of_setting, other = draw([ONE._replace(row="caltech_5w1s_maml"), second, unpublished, ONE]).axes
    assert (of_setting.get_title(), other.get_title()) == ("omniglot_5w1s", "caltech_5w1s")
    assert [label.get_text() for label in of_setting.get_yticklabels()] == [
        "maml, 3000 iterations",
        "hfmaml, 3000 iterations",
    ]
    marks = sorted(
        (float(x), round(float(y))) for line in of_setting.lines for x, y in [line.get_xydata()[0]]
    )
    assert marks == [(97.5, 0), (98.5, 0), (98.5, 1), (98.7, 0)]
    intervals = sorted(
        tuple(part[:, 0]) for bars in of_setting.collections for part in bars.get_segments()
    )
    assert intervals == [
        pytest.approx((mean - ci, mean + ci))
        for mean, ci in ((97.5, 0.13), (98.5, 0.12), (98.5, 0.12))
    ]


def test_the_page_has_what_the_runs_found() -> None:
    assert PAGE.read_text().split(MARK)[1] == tables(runs()) + "\n"


@pytest.fixture
def on_glyphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Has a row on generated characters, which need no folder."""

    def run_without_root(arguments: list[str], callbacks: list[Callback]) -> LightningCLI:
        return run([word for word in arguments if not word.startswith("--data.root")], callbacks)

    short = [
        "--trainer.enable_progress_bar=false",
        "--data.val_tasks=4",
        "--data.meta_batch_size=2",
    ]
    glyphs = [str(reproduce.CONFIGS / "glyphs_maml.yaml"), "--model=MAML", *short]
    monkeypatch.setattr(reproduce, "rows", lambda: {"glyphs_maml": glyphs})
    monkeypatch.setattr(reproduce, "RUNS", tmp_path / "accuracy")
    monkeypatch.setattr(reproduce, "TASKS", (6, 10))
    monkeypatch.setattr(reproduce, "run", run_without_root)
    monkeypatch.chdir(tmp_path)
    return monkeypatch


def test_a_row_is_trained_tested_and_kept(tmp_path: Path, on_glyphs: pytest.MonkeyPatch) -> None:
    reproduce.reproduce("glyphs_maml", 3, 5, "data")
    checkpoint = next((tmp_path / "runs").rglob("best.ckpt"))
    file = tmp_path / "accuracy" / "glyphs_maml-3-8.json"  # four epochs of two
    found = json.loads(file.read_text())
    data, model = (
        GlyphsDataModule(seed=3, test_tasks=10),
        MAML.load_from_checkpoint(checkpoint, network=Conv4(1, 5, 28, 32, "gelu")),
    )
    data.setup("test")
    tasks = [data.on_after_batch_transfer(batch, 0) for batch in data.test_dataloader()]
    right = torch.cat(
        [
            (model.evaluate(task).aux[:, -1].argmax(-1) == task.query_y).double().mean(-1)
            for task in tasks
        ]
    )
    assert found["judged"][1] == [
        10,
        pytest.approx(100 * float(right.mean())),
        pytest.approx(196 * float(right.std()) / 10**0.5),
    ]
    assert found["judged"][0][:2] == [6, pytest.approx(100 * float(right[:6].mean()))]
    assert (found["seed"], found["iterations"], found["test_steps"]) == (3, 8, 3)
    on_glyphs.setattr(reproduce, "TASKS", (6, 0))
    with pytest.raises(ValueError, match="Expected `test_tasks` to be at least 1"):
        reproduce.reproduce("glyphs_maml", 3, 5, "data")
    assert json.loads(file.read_text())["judged"] == found["judged"][:1], (
        "what was found before it broke off is kept"
    )


class CutOff(Callback):
    """As if the machine went down in the third epoch."""

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.current_epoch == 2:
            raise ZeroDivisionError


def test_a_run_that_was_cut_off_goes_on(tmp_path: Path, on_glyphs: pytest.MonkeyPatch) -> None:
    reproduce.reproduce("glyphs_maml", 3, 5, "data", resume=True)  # there is nothing to go on with
    file = tmp_path / "accuracy" / "glyphs_maml-3-8.json"
    whole = json.loads(file.read_text())
    file.unlink()
    trainings = reproduce.run
    on_glyphs.setattr(
        reproduce, "run", lambda arguments, callbacks: trainings(arguments, [*callbacks, CutOff()])
    )
    with pytest.raises(ZeroDivisionError):
        reproduce.reproduce("glyphs_maml", 3, 5, "data")
    on_glyphs.setattr(reproduce, "run", trainings)
    with warnings.catch_warnings():
        # Lightning's, where it forgets the best checkpoint
        warnings.filterwarnings("error", "The dirpath has changed")
        reproduce.reproduce("glyphs_maml", 3, 5, "data", resume=True)
    assert json.loads(file.read_text())["judged"] == whole["judged"]
    on_glyphs.setattr(
        reproduce, "run", lambda arguments, callbacks: trainings(arguments, [*callbacks, CutOff()])
    )
    # does not train: nothing is left of it but its tests
    reproduce.reproduce("glyphs_maml", 3, 5, "data", resume=True)
    assert json.loads(file.read_text())["judged"] == whole["judged"]
