"""The README's example runs as it stands, and what it names exists."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torchvision
from PIL import Image
from torchvision.datasets import FakeData

from lightning_maml.cli import run

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_the_example_runs_as_it_stands(tmp_path: Path) -> None:
    example = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    run = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    accuracy = re.search(r"test/accuracy\s+│?\s*([0-9.]+)", run.stdout)
    assert accuracy is not None, run.stdout
    assert float(accuracy[1]) > 0.7, "an untrained network gets under 0.6"


def write_photos(folder: Path) -> None:
    for number in range(40):
        (folder / f"class {number}").mkdir(parents=True)
        for image in range(20):
            Image.new("RGB", (90, 70), (6 * number, 12 * image, 0)).save(folder / f"class {number}" / f"{image}.jpg")


def test_ones_own_images_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_photos(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    fake = FakeData(size=2600, image_size=(3, 8, 8), num_classes=100)
    monkeypatch.setattr(torchvision.datasets, "CIFAR100", lambda root, download: fake)
    (example,) = (block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "CIFAR100" in block)
    names: dict = {}
    for statement in ast.parse(example).body:
        exec(compile(ast.Module([statement], []), "README.md", "exec"), names)  # noqa: S102  it is our README
        if isinstance(statement, ast.Assign) and statement.targets[0].id == "data":
            names["data"].small_classes = "drop"  # FakeData has classes of all sizes
            names["data"].prepare_data()
            names["data"].setup()
            batch = names["data"].on_after_batch_transfer(next(iter(names["data"].train_dataloader())), 0)
            assert batch.support_x.shape[:2] == (4, 25)


def test_ones_own_images_in_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_photos(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    (text,) = (block for block in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL) if "ImageFolderDataModule" in block)
    model = (
        "{class_path: FOMAML, init_args: {network: {class_path: Conv4, init_args: {in_channels: 3, ways: 5, image_size: 84, channels: 4}}}}"
    )
    Path("own.yaml").write_text(f"{text}\nmodel: {model}\n")
    cli = run(["fit", "--config=own.yaml", "--trainer.fast_dev_run=1", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"])
    assert cli.datamodule.transforms.normalize == "imagenet"


def test_links_and_make_targets_exist() -> None:
    for link in re.findall(r"\]\(([^)]+)\)", README):
        assert link.startswith(("https://", "#")) or (ROOT / link).is_file(), link
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE))
    assert {"demo", "test", "check", "test-all"} <= named <= targets
