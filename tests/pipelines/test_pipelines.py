"""Pipelines as people have them, before and after they take the library's model.

Each folder has a loop of its own in ``before.py``, written out in torch, and the same pipeline in
``after.py``. They end with the same parameters and the same figures of evaluation, and few lines
differ.
"""

import difflib
import runpy
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
PIPELINES = sorted(path.parent.name for path in HERE.glob("*/before.py"))


def lines(name: str, version: str) -> list[str]:
    """Return the lines of code, without the docstring on top."""
    _, _, code = (HERE / name / f"{version}.py").read_text().split('"""', 2)
    return [line for line in code.splitlines() if line.strip()]


def test_there_are_six() -> None:
    assert len(PIPELINES) == 6


@pytest.mark.parametrize("name", PIPELINES)
def test_both_versions_give_the_same_numbers(name: str, tmp_path: Path) -> None:
    if name == "manual_optimization":
        pytest.importorskip("torchopt")
    before, after = (
        runpy.run_path(str(HERE / name / f"{version}.py"))["run"](tmp_path)
        for version in ("before", "after")
    )
    assert before.keys() == after.keys()
    for key, expected in before.items():
        found = after[key].detach().double()
        torch.testing.assert_close(found, expected.detach().double(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", PIPELINES)
def test_at_most_ten_lines_are_new(name: str) -> None:
    compared = difflib.ndiff(lines(name, "before"), lines(name, "after"))
    new = [line for line in compared if line.startswith("+ ")]
    assert len(new) <= 10, "\n".join(new)
