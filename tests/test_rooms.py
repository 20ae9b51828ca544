"""The rooms of the house: imports point one way, and what users import stays where it is."""

import ast
import importlib
from pathlib import Path

import pytest

from helpers.folders import ROOT
from helpers.public import PUBLIC

PACKAGE = ROOT / "lightning_maml"
ROOMS = [
    "errors",
    "batches",
    "core",
    "kernels",
    "networks",
    "checks",
    "execution",
    "functional",
    "theory",
    "io",
    "algorithms",
    "verification",
    "callbacks",
    "compat",
    "cli",
    "__main__",
]
"""Each imports only from those before it, and files of one room do not import each other in
circles."""

WITHOUT_LIGHTNING = ROOMS[: ROOMS.index("io")]


def imports(file: Path) -> set[str]:
    nodes = [*ast.walk(ast.parse(file.read_text()))]
    found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return found | {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}


def files_of(room: str) -> list[Path]:
    return sorted((PACKAGE / room).glob("*.py")) or [PACKAGE / f"{room}.py"]


def test_every_file_is_in_a_room() -> None:
    files = {file for file in PACKAGE.rglob("*.py") if "datamodules" not in file.parts}
    assert files == {PACKAGE / "__init__.py", *(file for room in ROOMS for file in files_of(room))}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_from_those_before_it(room: str) -> None:
    allowed = {*ROOMS[: ROOMS.index(room) + 1], *(["datamodules"] if room == "cli" else [])}
    for file in files_of(room):
        own = {name.split(".")[1] for name in imports(file) if name.startswith("lightning_maml.")}
        assert own <= allowed, file


@pytest.mark.parametrize("room", ROOMS)
def test_the_files_of_a_room_do_not_import_each_other_in_circles(room: str) -> None:
    waiting = {
        f"lightning_maml.{room}.{file.stem}": {
            name for name in imports(file) if name.startswith(f"lightning_maml.{room}.")
        }
        for file in files_of(room)
        if file.stem != "__init__"
    }
    while waiting:
        first = {name for name, needed in waiting.items() if not needed & waiting.keys()}
        assert first, waiting
        waiting = {name: needed for name, needed in waiting.items() if name not in first}


@pytest.mark.parametrize("room", WITHOUT_LIGHTNING)
def test_the_mathematics_imports_no_lightning(room: str) -> None:
    for file in files_of(room):
        roots = {name.split(".")[0] for name in imports(file)}
        assert not roots & {"lightning", "pytorch_lightning"}, file


def test_datamodules_import_only_episodes_errors_memory_files_and_each_other() -> None:
    allowed = ("batches", "datamodules", "errors", "execution.graphs", "io.safe_files")
    for file in (ROOT / "datamodules").rglob("*.py"):
        own = {name for name in imports(file) if name.startswith("lightning_maml")}
        own = {name.removeprefix("lightning_maml.") for name in own}
        assert all(name.startswith(allowed) for name in own), file


def test_tests_import_neither_each_other_nor_benchmarks() -> None:
    scripts = {file.stem for file in (ROOT / "benchmarks").glob("*.py")}
    for file in (ROOT / "tests").rglob("*.py"):
        roots = {name.split(".")[0] for name in imports(file)}
        assert not roots & scripts, file
        assert not any(root.startswith("test_") for root in roots), file


@pytest.mark.parametrize("module", PUBLIC)
def test_what_users_import_stays_where_it_is(module: str) -> None:
    found = importlib.import_module(module)
    missing = [name for name in PUBLIC[module].split() if not hasattr(found, name)]
    assert not missing
