"""The rooms of the house: imports point one way, and what users import stays where it is."""

import ast
import importlib
from pathlib import Path

import pytest

from helpers.folders import ROOT

PACKAGE = ROOT / "lightning_maml"
ROOMS = [
    "batches",
    "core",
    "kernels",
    "networks",
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

PUBLIC = {
    "lightning_maml": """
        ANIL AdaptationCurve AdaptedNetworks AdaptiveMetaStepsize BOIL CheckReport CheckpointOnInterrupt Conv4 Episodes FOMAML HFMAML
        IMAML KeepBestCheckpoints LSLR MAML MAMLPlusPlus MLP MetaGradient MetaSGD ProtoNet Reptile ResNet12 ResampledEpisodes
        SkipNonFinite StationarityMonitor adaptation_curve check keep_freed_memory meta_gradient one_hot_mse
    """,
    "lightning_maml.callbacks": """
        AdaptiveMetaStepsize CheckpointOnInterrupt EpisodePictures Fidelity KeepBestCheckpoints LossMapPicture MetaGradientMonitor
        SkipNonFinite StationarityMonitor TrainingPictures compare draw_adaptation draw_episode draw_fidelity draw_learning
        draw_loss_map loss_map
    """,
    "lightning_maml.datamodules": """
        ClassImages EasyFSLDataModule EpisodeTransforms EpisodicDataModule FewShotDataModule GlyphsDataModule ImageFolderDataModule
        Learn2LearnDataModule MiniImageNetDataModule OmniglotDataModule TorchmetaDataModule load_images meta_batch relabelled
        task_of_examples
    """,
    "lightning_maml.theory": """
        Convergence MomentConstants PathError ResamplingBatches Rule Sizes SmoothnessConstants StepsizeBatches adaptation_gap
        finite_sum_bound finite_sum_convergence finite_sum_sizes first_order_floor hessian_batch hessian_free_error largest_inner_lr
        largest_one_step_inner_lr meta_smoothness meta_stepsize moment_constants one_step_bias paper_scale path_error
        printed_probe_radius probe_radius recommended_inner_lr resampling_batches resampling_bound resampling_convergence
        resampling_sizes smoothness_constants stepsize_batches
    """,
    "lightning_maml.compat.learn2learn": "EpisodicBatcher LightningANIL LightningEpisodicModule LightningMAML",
}


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


def test_datamodules_import_only_episodes_files_and_each_other() -> None:
    allowed = (
        "lightning_maml.batches",
        "lightning_maml.datamodules",
        "lightning_maml.io.safe_files",
    )
    for file in (ROOT / "datamodules").rglob("*.py"):
        own = {name for name in imports(file) if name.startswith("lightning_maml")}
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
