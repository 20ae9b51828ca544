"""The migration page: its blocks run, and blocks that do the same give the same numbers."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler

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


class Points(Dataset):
    """A dataset as easyfsl's sampler takes it."""

    def get_labels(self) -> list[int]:
        return [number % 5 for number in range(40)]

    def __len__(self) -> int:
        return 40

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
        return torch.tensor([number % 5, number / 40.0], dtype=torch.float64), number % 5


def easyfsl_loader() -> list:
    def double(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.double() if tensor.is_floating_point() else tensor

    return [(*map(double, batch[:4]), []) for batch in EasyFSLLoader(8)]


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=8,
        num_labels=2,
    )
    return BertForSequenceClassification(config).double().eval()


def texts() -> list[tuple]:
    random = torch.Generator().manual_seed(0)

    def sentences(count: int) -> tuple[dict, torch.Tensor]:
        mask = (torch.arange(6) < torch.randint(3, 7, (count, 1), generator=random)).long()
        ids = torch.randint(20, (count, 6), generator=random) * mask
        return {"input_ids": ids, "attention_mask": mask}, torch.arange(count) % 2

    return [(*sentences(6), *sentences(4)) for _ in range(3)]


def names(section: str) -> dict:
    """What the blocks of a section find: the user's data and network."""
    tasksets = SimpleNamespace(
        train=NoiseTaskset(0), validation=NoiseTaskset(1), test=NoiseTaskset(2)
    )
    network = network_for((2,) if section in ("torchmeta", "easyfsl") else (1, 8, 8))
    if section == "easyfsl's prototypical networks":
        network = network[:2]
    episodes = make_episodes()
    found = {"tasksets": tasksets, "network": network, "episodes": episodes}
    found |= dict(
        zip(
            ("support_x", "support_y", "query_x", "query_y"),
            (tensor[0] for tensor in episodes),
            strict=True,
        )
    )
    found["loader"] = DataLoader([episodes], batch_size=None)
    found["tasks"] = [
        tuple(x[0] for x in make_episodes(1, shots, seed=shots)) for shots in (1, 2, 3, 2)
    ]
    if section == "easyfsl":
        found |= {"dataset": Points(), "loader": easyfsl_loader()}
    if section.startswith("A BERT"):
        pytest.importorskip("transformers")
        found |= {"bert": bert(), "texts": texts(), "random": torch.Generator().manual_seed(3)}
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
            "A LightningModule with manual optimization",
            "pytorch_lightning",
            "Tasks of different sizes",
            "A loop with copies of the network",
            "A BERT, with AdamW and mini-batches inside",
            "torchmeta",
            "easyfsl",
            "easyfsl's prototypical networks",
            "higher",
            "torchopt",
        )
    ]


@pytest.mark.parametrize("section", [section for section in SECTIONS if blocks(section, "after")])
def test_the_blocks_of_this_library_run(section: str) -> None:
    for block in blocks(section, "after"):
        found = names(section)
        trained = found.get("bert", found["network"])
        before = copy.deepcopy(trained.state_dict())
        run(block, found)
        if "logits" in found:
            assert found["logits"].shape == (9, 3)
            assert set(found.get("predicted", ())) <= {"ape", "cat", "wolf"}
        elif section not in ("higher", "easyfsl's prototypical networks"):
            assert any(
                not torch.equal(tensor, before[name])
                for name, tensor in trained.state_dict().items()
            )


def parameters(found: dict) -> dict[str, torch.Tensor]:
    return dict(found.get("bert", found["network"]).named_parameters())


def gradients(found: dict) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in found["network"].named_parameters()}


def predictions(found: dict) -> dict[str, torch.Tensor]:
    return {"predicted": found["predicted"].double()}


@pytest.mark.parametrize(
    ("library", "section", "figures"),
    [
        ("torch", "A loop written by hand", parameters),
        ("torch", "A LightningModule with manual optimization", parameters),
        ("torch", "Tasks of different sizes", parameters),
        ("torch", "A loop with copies of the network", parameters),
        ("transformers", "A BERT, with AdamW and mini-batches inside", parameters),
        ("learn2learn", "learn2learn, one's own loop", parameters),
        ("easyfsl", "easyfsl's prototypical networks", predictions),
        ("higher", "higher", gradients),
        ("torchopt", "torchopt", parameters),
    ],
)
def test_both_blocks_give_the_same_numbers(
    library: str, section: str, figures: Callable[[dict], dict]
) -> None:
    pytest.importorskip(library)
    theirs, ours = blocks(section, f"before {library}")[0], blocks(section, "after")[0]
    expected, found = (figures(run(block, names(section))) for block in (theirs, ours))
    assert relative_error(found, expected) < 1e-10


@pytest.mark.parametrize(
    ("library", "section"),
    [
        ("learn2learn", "learn2learn, its Lightning classes"),
        ("pytorch_lightning", "pytorch_lightning"),
    ],
)
def test_what_is_imported_of_the_other_library_exists(library: str, section: str) -> None:
    pytest.importorskip(library)
    run(blocks(section, f"before {library}")[0], {})


def test_easyfsls_sampler_runs_and_its_loader_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("easyfsl")
    monkeypatch.setattr(Sampler, "__init__", Sampler.__init__)  # put back at the end
    found = names("easyfsl")
    run(blocks("easyfsl", "before easyfsl")[0], found)
    assert len(found["loader"]) == 8
    before = copy.deepcopy(found["network"].state_dict())
    run(blocks("easyfsl", "after")[0], found)
    assert not torch.equal(found["network"].state_dict()["1.weight"], before["1.weight"])
