"""The examples of docstrings run, and every public class has one."""

import doctest
import importlib
import inspect

import pytest

from helpers.folders import ROOT
from helpers.public import PUBLIC

MODULES = sorted(
    ".".join(file.relative_to(ROOT).with_suffix("").parts).replace(".__init__", "")
    for file in (ROOT / "lightning_maml").rglob("*.py")
    if ">>>" in file.read_text() and "datamodules" not in file.parts
)
DATAMODULES = sorted(
    f"lightning_maml.{'.'.join(file.relative_to(ROOT).with_suffix('').parts)}"
    for file in (ROOT / "datamodules").rglob("*.py")
    if ">>>" in file.read_text()
)
CLASSES = [
    found
    for module, names in PUBLIC.items()
    for found in (getattr(importlib.import_module(module), name) for name in names.split())
    if inspect.isclass(found)
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("module", MODULES + DATAMODULES)
def test_the_examples_of_a_module_run(module: str) -> None:
    results = doctest.testmod(importlib.import_module(module))
    assert results.attempted > 0
    assert results.failed == 0


@pytest.mark.parametrize("public", sorted({*CLASSES}, key=lambda found: found.__name__))
def test_a_public_class_has_an_example(public: type) -> None:
    assert ">>> " in inspect.cleandoc(public.__doc__ or "")
