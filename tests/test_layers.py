"""Imports point one way, and the algorithm does not know Lightning."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent
ORDER = [
    *("episodes", "functional", "metrics", "backbones", "objective", "learner", "curvature", "task_map", "adapt", "meta_gradient"),
    *("theory", "measure"),
    *("module", "callbacks", "cli", "__main__"),
]
WITHOUT_LIGHTNING = ORDER[: ORDER.index("module")]


def imports(file: Path) -> set[str]:
    nodes = ast.walk(ast.parse(file.read_text()))
    found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    nodes = ast.walk(ast.parse(file.read_text()))
    froms = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    return found | {node.module or "" for node in froms} | {f"{node.module}.{alias.name}" for node in froms for alias in node.names}


def test_every_file_has_its_place_in_the_order() -> None:
    assert {file.stem for file in (PACKAGE / "lightning_maml").glob("*.py")} == {*ORDER, "__init__"}


def test_files_import_only_files_before_them() -> None:
    for place, name in enumerate(ORDER):
        own = {
            module.split(".")[1] for module in imports(PACKAGE / "lightning_maml" / f"{name}.py") if module.startswith("lightning_maml.")
        }
        assert own <= {*ORDER[:place]} | ({"datamodules"} if name == "cli" else set()), name


def test_the_algorithm_imports_no_lightning() -> None:
    for name in WITHOUT_LIGHTNING:
        roots = {module.split(".")[0] for module in imports(PACKAGE / "lightning_maml" / f"{name}.py")}
        assert not roots & {"lightning", "pytorch_lightning"}, name


def test_datamodules_import_only_episodes_and_each_other() -> None:
    for file in (PACKAGE / "datamodules").glob("*.py"):
        own = {module for module in imports(file) if module.startswith("lightning_maml")}
        assert all(module.startswith(("lightning_maml.episodes", "lightning_maml.datamodules")) for module in own), file
