"""Imports point one way, and the algorithm does not know Lightning."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent
ORDER = [
    *(
        "inputs",
        "episodes",
        "functional",
        "plain",
        "allocator",
        "metrics",
        "losses",
        "outputs",
        "backbones",
        "convolutions",
        "second_derivatives",
        "stack",
        "randomness",
        "targets",
        "objective",
        "batch_statistics",
        "layers",
        "learner",
        "curvature",
        "rates",
        "parts",
        "task_map",
        "trial",
        "execution",
        "compilation",
        "first_look",
    ),
    *("adapt", "meta_gradient", "reptile", "implicit", "deploy"),
    *("theory", "measure", "report"),
    *("smooth", "yaml_configs", "archives", "checkpoints", "repro", "episodic_module", "module", "algorithms", "protonet"),
    *("callbacks.independent_tasks", "callbacks.monitor", "callbacks.meta_stepsize", "callbacks.stationarity", "callbacks.fidelity"),
    *("callbacks.pictures", "callbacks.loss_map", "callbacks.training_pictures", "callbacks.interrupt", "callbacks.skip_non_finite"),
    "callbacks.best_checkpoints",
    "callbacks",
    *("compat.learn2learn", "compat"),
    *("cli", "__main__"),
]
WITHOUT_LIGHTNING = ORDER[: ORDER.index("checkpoints")]


def imports(file: Path) -> set[str]:
    nodes = ast.walk(ast.parse(file.read_text()))
    found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    nodes = ast.walk(ast.parse(file.read_text()))
    froms = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    return found | {node.module or "" for node in froms} | {f"{node.module}.{alias.name}" for node in froms for alias in node.names}


def file_of(name: str) -> Path:
    path = PACKAGE / "lightning_maml" / name.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def test_every_file_has_its_place_in_the_order() -> None:
    files = {
        *(PACKAGE / "lightning_maml").glob("*.py"),
        *(PACKAGE / "lightning_maml").glob("callbacks/*.py"),
        *(PACKAGE / "lightning_maml").glob("compat/*.py"),
    }
    assert files == {*map(file_of, ORDER), PACKAGE / "lightning_maml" / "__init__.py"}


def test_files_import_only_files_before_them() -> None:
    for place, name in enumerate(ORDER):
        own = {module.removeprefix("lightning_maml.") for module in imports(file_of(name)) if module.startswith("lightning_maml.")}
        allowed = [*ORDER[:place], *(["datamodules"] if name == "cli" else [])]
        assert all(any(module == before or module.startswith(f"{before}.") for before in allowed) for module in own), name


def test_the_algorithm_imports_no_lightning() -> None:
    for name in WITHOUT_LIGHTNING:
        roots = {module.split(".")[0] for module in imports(file_of(name))}
        assert not roots & {"lightning", "pytorch_lightning"}, name


def test_datamodules_import_only_episodes_archives_and_each_other() -> None:
    for file in (PACKAGE / "datamodules").glob("*.py"):
        own = {module for module in imports(file) if module.startswith("lightning_maml")}
        assert all(
            module.startswith(("lightning_maml.archives", "lightning_maml.episodes", "lightning_maml.datamodules")) for module in own
        ), file
