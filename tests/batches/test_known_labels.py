"""Labels are read on the CPU, where they were before a batch was moved."""

import copy
import gc
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_maml import MAML, MLP, Episodes, ProtoNet
from lightning_maml.batches.known_labels import KnownLabels
from lightning_maml.datamodules import GlyphsDataModule


def batch() -> Episodes:
    """Return a batch on the CPU, as loaders do."""
    with torch.device("cpu"):
        x, y = torch.rand(2, 3, 4), torch.tensor([[0, 1, 2]] * 2)
    return Episodes(x, y, x.clone(), y.clone())


def elsewhere() -> torch.device:
    """Return the device that batches are moved to: if the test has none, one without memory."""
    device = torch.get_default_device()
    return torch.device("meta") if device.type == "cpu" else device


def test_what_was_moved_is_known() -> None:
    known, here = KnownLabels(), batch()
    there = Episodes(*(tensor.to(elsewhere()) for tensor in here))
    known.note(here, there)
    assert torch.equal(known.on_cpu(there.support_y), here.support_y)
    assert torch.equal(known.of(there, ("query_y",)).query_y, here.query_y)
    assert known.of(there, ("query_y",)).support_y is there.support_y


@pytest.mark.parametrize("form", [tuple, list, dict])
def test_batches_of_every_form(form: Any) -> None:
    known, here = KnownLabels(), batch()
    there = [tensor.to(elsewhere()) for tensor in here]
    names = Episodes._fields
    pack = (lambda of: dict(zip(names, of, strict=True))) if form is dict else form
    known.note(pack(here), pack(there))
    assert torch.equal(known.on_cpu(there[1]), here.support_y)


def test_what_is_not_known_or_has_changed_is_fetched() -> None:
    known, here = KnownLabels(), batch()
    there = here.support_y.to(elsewhere())
    with pytest.raises(NotImplementedError, match="meta"):  # there is nothing to fetch from
        known.on_cpu(there)
    known.note(here.support_y, there)
    there.add_(1)
    with pytest.raises(NotImplementedError, match="meta"):
        known.on_cpu(there)


def test_labels_are_forgotten_with_their_batch() -> None:
    known, here = KnownLabels(), batch()
    there = here.support_y.to(elsewhere())
    known.note(here.support_y, there)
    del there
    gc.collect()
    assert len(known._known) == 0


def test_models_with_known_labels_can_be_copied() -> None:
    model = MAML(MLP(4, 3))
    model.known_labels.note(torch.tensor([0], device="cpu"), torch.tensor([0], device=elsewhere()))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(other.known_labels._known) == 0


@pytest.mark.parametrize("algorithm", [MAML, ProtoNet])
@pytest.mark.parametrize("name", ["support_y", "query_y"])
def test_labels_are_checked_as_they_were_on_the_cpu(
    algorithm: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = torch.tensor([[0, 1, 7]] * 2, device="cpu")
    right = KnownLabels.on_cpu

    def on_cpu(self: KnownLabels, labels: Tensor) -> Tensor:
        return wrong if labels is getattr(episodes, name) else right(self, labels)

    model = algorithm(nn.Sequential(MLP(4, 3)))
    episodes = Episodes(*(tensor.to(model.device) for tensor in batch()))
    monkeypatch.setattr(KnownLabels, "on_cpu", on_cpu)
    with pytest.raises(ValueError, match=r"0 to 7|all 8 classes"):
        model.meta_loss(episodes)


def test_a_datamodule_lets_the_model_note_what_it_moves() -> None:
    data, model = GlyphsDataModule(ways=3, meta_batch_size=2), MAML(MLP(4, 3))
    data.trainer = SimpleNamespace(lightning_module=model)
    here = batch()
    there = data.transfer_batch_to_device(here, elsewhere(), 0)
    assert there.support_y.device.type == elsewhere().type
    assert torch.equal(model.known_labels.on_cpu(there.query_y), here.query_y)


def test_batches_of_inference_mode_are_not_noted() -> None:
    with torch.inference_mode():
        labels = torch.tensor([0, 1], device="cpu")
        KnownLabels().note(labels, labels.to(elsewhere()))


def test_a_loader_may_use_its_memory_again() -> None:
    known, labels = KnownLabels(), torch.tensor([0, 1], device="cpu")
    there = labels.to(elsewhere())
    known.note(labels, there)
    labels.add_(5)
    assert known.on_cpu(there).tolist() == [0, 1]
