"""The project to copy: the commands of its page run, one after the other, and it learns."""

import csv
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from helpers.folders import ROOT

FEW = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ROOT / "examples" / "your_project", tmp_path / "project"))


def call(project: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "cli.py", *arguments, *FEW],
        cwd=project,
        env=os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_commands_of_the_page_run(project: Path) -> None:
    page = (ROOT / "docs" / "your_project.md").read_text()
    (block,) = re.findall(r"^```bash\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    commands = [shlex.split(line, comments=True) for line in block.splitlines()]
    enter, *calls = commands
    assert enter == ["cd", "examples/your_project"]
    assert [words[2] for words in calls] == ["fit", "fit", "test", "predict"]
    for program, file, *arguments in calls:
        assert (program, file) == ("python", "cli.py")
        printed = call(project, *arguments, "--data.train_tasks=48")
        if arguments[0] == "test":
            assert "test/accuracy_step_03" in printed
    last = torch.load(project / "runs/tones/version_1/checkpoints/last.ckpt", weights_only=True)
    assert last["epoch"] == 4
    rows = [*csv.reader((project / "predictions.csv").open())]
    assert len(rows) == 200
    assert {len(row) for row in rows} == {15}
    assert {value for row in rows for value in row} <= {"0", "1", "2"}
    metrics = [*csv.DictReader((project / "runs/tones/version_1/metrics.csv").open())]
    assert "train/gradient_norm" in metrics[0]


@pytest.mark.slow
def test_the_logger_that_the_config_mentions_works(project: Path) -> None:
    pytest.importorskip("wandb")
    config = project / "config.yaml"
    mentioned = config.read_text().replace("    # - class_path", "    - class_path")
    config.write_text(mentioned.replace("    #   init_args", "      init_args"))
    assert "#   init_args" not in config.read_text()
    call(project, "fit", "--config=config.yaml", "--trainer.max_epochs=1", "--data.train_tasks=32")
    end = time.monotonic() + 60  # another process writes its files, some time after
    while not (found := [*project.glob("runs/wandb/offline-run-*/*.wandb")]):
        assert time.monotonic() < end
        time.sleep(0.1)
    assert len(found) == 1


@pytest.mark.slow
def test_it_learns_what_the_page_says(project: Path) -> None:
    call(project, "fit", "--config=config.yaml")
    best = "--ckpt_path=runs/tones/version_0/checkpoints/best.ckpt"
    printed = call(project, "test", "--config=config.yaml", best)
    accuracy = re.search(r"test/accuracy\s+│\s*([0-9.]+)", printed)
    assert accuracy is not None
    assert float(accuracy[1]) == pytest.approx(0.85, abs=0.03)
