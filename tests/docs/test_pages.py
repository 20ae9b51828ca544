"""The README and the pages: code runs, commands parse, and links lead somewhere."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from lightning import Trainer
from PIL import Image
from torchvision.datasets import FakeData

from helpers import another_process
from helpers.folders import ROOT
from lightning_maml import MAML, MLP, Conv4, Episodes
from lightning_maml.cli import run
from lightning_maml.datamodules import ImageFolderDataModule

README = (ROOT / "README.md").read_text()
PAGES = sorted((ROOT / "docs").glob("*.md"))
MARKDOWN = [*ROOT.glob("*.md"), *PAGES, *(ROOT / "benchmarks").glob("*.md")]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def run_python(code: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_first_example_runs_as_it_stands(tmp_path: Path) -> None:
    printed = run_python(blocks(README, "python")[0], tmp_path)
    accuracy = re.search(r"test/accuracy\s+│?\s*([0-9.]+)", printed)
    assert accuracy is not None, printed
    assert float(accuracy[1]) > 0.7, "an untrained network gets under 0.6"


SHORT = """
import functools, lightning
lightning.Trainer = functools.partial(lightning.Trainer, limit_train_batches=3, limit_val_batches=1, limit_test_batches=1)
"""


def test_the_blocks_of_the_readme_run(tmp_path: Path) -> None:
    names: dict = {"model": MAML(MLP(4, 3), inner_lr=0.1)}
    support, query = torch.rand(2, 3, 4), torch.rand(2, 6, 4)
    names |= {
        "support_x": support,
        "support_y": torch.arange(3).repeat(2, 1),
        "query_x": query,
        "query_y": torch.arange(3).repeat(2, 2),
    }
    example, episodes, adapt = blocks(README, "python")
    run_python(SHORT + example, tmp_path)
    exec(compile(episodes, "README.md", "exec"), names)  # noqa: S102  it is our README
    assert isinstance(names["episodes"], Episodes)
    names |= {
        "many_support_x": support,
        "many_support_y": names["support_y"],
        "support_x": support[0],
        "support_y": torch.arange(3),
    }
    exec(compile(adapt, "README.md", "exec"), names)  # noqa: S102
    assert names["network"](query[0]).shape == (6, 3)
    assert names["networks"](query).shape == (2, 6, 3)


WITHOUT_TESTS = """
import sys
sys.path = [folder for folder in sys.path if not folder.endswith(("tests", "benchmarks"))]
"""


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if blocks(page.read_text(), "python")],
    ids=lambda page: page.stem,
)
def test_the_python_of_each_page_runs_from_top_to_bottom(tmp_path: Path, page: Path) -> None:
    another_process.output(
        WITHOUT_TESTS + SHORT + "\n".join(blocks(page.read_text(), "python")), folder=tmp_path
    )


def test_every_block_is_run_by_a_test() -> None:
    elsewhere = {
        "migration": r"(before \w+|after)",
        "own_data": "own",
        "start": "shapes.py",
        "schedules": "schedules.py",
        "deployment": "photos",
        "many_processes": "on eight GPUs",
    }  # test_migration.py, below, below, below, below, none
    for page in PAGES:
        kinds = set(re.findall(r"^```python(.*)$", page.read_text(), re.MULTILINE))
        for kind in kinds - {""}:
            assert re.fullmatch(elsewhere.get(page.stem, "-"), kind.strip()), (page, kind)


def commands(text: str) -> list[list[str]]:
    lines = (
        "".join(blocks(text, "bash"))
        .replace("\\\n", "")
        .replace("$RUN", "RUN")
        .replace("$NAME", "omniglot_5w1s_maml")
        .splitlines()
    )
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.parametrize(
    "page",
    [page for page in MARKDOWN if blocks(page.read_text(), "bash")],
    ids=lambda page: page.stem,
)
def test_commands_parse(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    folder = ROOT
    for words in commands(page.read_text()):
        if words[:1] == ["cd"]:
            folder = ROOT / words[1]
        if words[:1] == ["make"]:
            assert words[1] in targets, words
        for word in words:
            assert (
                not re.fullmatch(r"(benchmarks|examples|configs)/.*\.\w+", word)
                or (ROOT / word).is_file()
            ), words
        if "lightning-maml" in words:
            arguments = words[words.index("lightning-maml") + 1 :]
            if (
                any(word.startswith(("RUN/", "runs/")) for word in arguments)
                or "replay" in arguments
            ):
                continue  # the config of a run that is not there
            monkeypatch.chdir(folder)
            with pytest.raises(SystemExit) as ended:
                run(
                    [
                        *arguments[:1],
                        *[word for word in arguments[1:] if not word.startswith("--ckpt_path")],
                        "--print_config",
                    ]
                )
            assert ended.value.code in (None, 0), (words, capsys.readouterr().err)


def test_links_lead_to_files() -> None:
    for page in MARKDOWN:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            assert (
                link.startswith(("https://", "#")) or (page.parent / link.split("#")[0]).exists()
            ), (page, link)


def test_tests_that_pages_name_exist() -> None:
    found: dict[str, str] = {}
    for folder in ("tests", "benchmarks"):
        for file in (ROOT / folder).rglob("test_*.py"):
            found[file.name] = found.get(file.name, "") + file.read_text()
    for page in MARKDOWN:
        for name, function in re.findall(r"(test_\w+\.py)(?:::(test_\w+))?", page.read_text()):
            assert f"def {function}" in found.get(name, ""), (page, name, function)


def write_photos(folder: Path) -> None:
    for number in range(40):
        (folder / f"class {number}").mkdir(parents=True)
        for image in range(20):
            Image.new("RGB", (90, 70), (6 * number, 12 * image, 0)).save(
                folder / f"class {number}" / f"{image}.jpg"
            )


def test_a_trained_model_classifies_photographs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_photos(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    data = ImageFolderDataModule(
        "photos", queries=2, meta_batch_size=1, train_batches=1, val_tasks=1
    )
    network = Conv4(in_channels=3, ways=5, image_size=84, channels=32, activation="gelu")
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(max_epochs=1, accelerator="cpu", **quiet)
    trainer.fit(MAML(network, inner_lr=0.1), data)
    trainer.save_checkpoint("trained.ckpt")
    for number in range(5):
        kind = Path("five new kinds", f"kind {number}")
        kind.mkdir(parents=True)
        for image in range(1 + number % 2):
            (kind / f"{image}.jpg").hardlink_to(Path("photos", f"class {number}", f"{image}.jpg"))
    Path("unknown").symlink_to(Path("photos", "class 7").resolve())
    (example,) = blocks((ROOT / "docs" / "deployment.md").read_text(), "python photos")
    names: dict = {}
    exec(compile(example, "deployment.md", "exec"), names)  # noqa: S102
    assert set(names["names"]) <= {f"kind {number}" for number in range(5)}
    assert len(names["names"]) == 20
    data.setup()
    of_all = 255 * names["load_images"](sorted(Path("photos").glob("*/*.jpg")), 84)
    for image in data.class_images("train").images[:20]:
        assert (of_all == image).flatten(1).all(1).any(), (
            "they are read as the datamodule reads them"
        )


OWN_DATA = (ROOT / "docs" / "own_data.md").read_text()


def test_ones_own_images_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_photos(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    fake = FakeData(size=2600, image_size=(3, 8, 8), num_classes=100)
    monkeypatch.setattr(torchvision.datasets, "CIFAR100", lambda root, download: fake)
    (example,) = blocks(OWN_DATA, "python own")
    names: dict = {}
    for statement in ast.parse(example).body:
        exec(compile(ast.Module([statement], []), "own_data.md", "exec"), names)  # noqa: S102  it is our page
        if isinstance(statement, ast.Assign) and statement.targets[0].id == "data":
            names["data"].small_classes = "drop"  # FakeData has classes of all sizes
            names["data"].prepare_data()
            names["data"].setup()
            batch = names["data"].on_after_batch_transfer(
                next(iter(names["data"].train_dataloader())), 0
            )
            assert batch.support_x.shape[:2] == (4, 25)


def test_ones_own_images_in_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_photos(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    (text,) = blocks(OWN_DATA, "yaml")
    Path("own.yaml").write_text(text)
    cli = run(
        [
            "fit",
            "--config=own.yaml",
            "--trainer.fast_dev_run=1",
            "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false",
        ]
    )
    assert cli.datamodule.transforms.normalize == "imagenet"


def test_the_project_of_ones_own_is_trained_tested_and_resumed(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "start.md").read_text()
    (tmp_path / "shapes.py").write_text(blocks(page, "python shapes.py")[0])
    (tmp_path / "shapes.yaml").write_text(blocks(page, "yaml shapes.yaml")[0])
    command = Path(sys.executable).with_name("lightning-maml")
    for arguments in (["fit"], ["test", "--ckpt_path=last"], ["fit", "--ckpt_path=last"]):
        done = subprocess.run(
            [command, *arguments, "--config=shapes.yaml", "--trainer.accelerator=cpu"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("cosine", [0.05]),
        ("one_cycle", [0.00506]),
        ("plateau", [0.001]),
        ("warm_up", [0.00011]),
        ("two_rates", [0.001, 0.01]),
    ],
)
def test_every_schedule_has_a_config(
    name: str, rates: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After two epochs of five steps."""
    page = (ROOT / "docs" / "schedules.md").read_text()
    (tmp_path / "schedules.py").write_text(blocks(page, "python schedules.py")[0])
    (tmp_path / f"{name}.yaml").write_text(blocks(page, f"yaml {name}.yaml")[0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-maml"])
    size = ["--data.train_batches=5", "--data.meta_batch_size=2", "--data.val_tasks=2"]
    cli = run(
        [
            "fit",
            f"--config={ROOT}/configs/glyphs_maml.yaml",
            f"--config={name}.yaml",
            *size,
            "--trainer.max_epochs=2",
            "--trainer.accelerator=cpu",
        ]
    )
    groups = cli.trainer.optimizers[0].param_groups
    assert [group["lr"] for group in groups] == pytest.approx(rates, rel=0.02)
