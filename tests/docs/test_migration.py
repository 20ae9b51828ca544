"""The migration page: its blocks run, and blocks that do the same give the same numbers."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from helpers.folders import ROOT
from helpers.networks import make_episodes, relative_error
from helpers.pipelines import EasyFSLLoader, NoiseTaskset, torchmeta_loader

PAGE = (ROOT / "docs" / "migration.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))


def blocks(section: str, kind: str) -> list[str]:
    return re.findall(rf"^```python {kind}\n(.*?)^```", SECTIONS[section], re.MULTILINE | re.DOTALL)


def network_for(shape: tuple[int, ...], outputs: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(torch.Size(shape).numel(), 6), nn.Tanh(), nn.Linear(6, outputs)
    ).double()


def names(section: str) -> dict:
    """What the blocks of a section find: the user's data and network."""
    tasksets = SimpleNamespace(
        train=NoiseTaskset(0), validation=NoiseTaskset(1), test=NoiseTaskset(2)
    )
    network = network_for((2,) if section in ("torchmeta", "easyfsl") else (1, 8, 8))
    episodes = make_episodes()
    found = {"tasksets": tasksets, "network": network, "episodes": episodes}
    found |= dict(
        zip(
            ("support_x", "support_y", "query_x", "query_y"),
            (tensor[0] for tensor in episodes),
            strict=True,
        )
    )
    if section == "easyfsl":
        found["loader"] = [
            (
                *(
                    tensor.double() if tensor.is_floating_point() else tensor
                    for tensor in batch[:4]
                ),
                [],
            )
            for batch in EasyFSLLoader(8)
        ]
    if section == "torchmeta":
        found["train_loader"] = [
            {part: (x.double(), y) for part, (x, y) in batch.items()}
            for batch in torchmeta_loader(3, 2)
        ]
    return found


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(block: str, found: dict) -> dict:
    exec(compile(block, "migration.md", "exec"), found)  # noqa: S102  it is our page
    return found


def test_every_block_belongs_to_a_section_that_is_run() -> None:
    assert PAGE.count("```python") == sum(
        len(blocks(section, r"(?:before \w+|after)")) for section in SECTIONS
    )
    assert [section for section in SECTIONS if blocks(section, "after")] == [
        *(
            "learn2learn, its Lightning classes",
            "learn2learn, one's own loop",
            "A loop written by hand",
            "A loop with copies of the network",
            "torchmeta",
            "easyfsl",
            "higher",
        )
    ]


@pytest.mark.parametrize("section", [section for section in SECTIONS if blocks(section, "after")])
def test_the_blocks_of_this_library_run(section: str) -> None:
    for block in blocks(section, "after"):
        found = names(section)
        before = copy.deepcopy(found["network"].state_dict())
        run(block, found)
        if "logits" in found:
            assert found["logits"].shape == (9, 3)
            assert set(found.get("predicted", ())) <= {"ape", "cat", "wolf"}
        elif section != "higher":
            assert any(
                not torch.equal(tensor, before[name])
                for name, tensor in found["network"].state_dict().items()
            )


def after_a_loop(block: str) -> dict[str, torch.Tensor]:
    return dict(run(block, names("learn2learn, one's own loop"))["network"].named_parameters())


def gradients_of_higher(block: str) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in run(block, names("higher"))["network"].named_parameters()}


@pytest.mark.parametrize(
    ("library", "section", "figures"),
    [
        ("torch", "A loop written by hand", after_a_loop),
        ("torch", "A loop with copies of the network", after_a_loop),
        ("learn2learn", "learn2learn, one's own loop", after_a_loop),
        ("higher", "higher", gradients_of_higher),
    ],
)
def test_both_blocks_give_the_same_numbers(
    library: str, section: str, figures: Callable[[str], dict]
) -> None:
    pytest.importorskip(library)
    theirs, ours = blocks(section, f"before {library}")[0], blocks(section, "after")[0]
    assert relative_error(figures(ours), figures(theirs)) < 1e-10


def test_what_is_imported_of_learn2learn_exists() -> None:
    pytest.importorskip("learn2learn")
    run(blocks("learn2learn, its Lightning classes", "before learn2learn")[0], {})
