"""Mini-batches of the support set: what is drawn, and the gradient of an own loop over them."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from helpers.networks import build, leaves, make_episodes, plain_loss, relative_error
from helpers.runs import Noise, network
from helpers.trainers import trainer, trainer_in_double
from lightning_maml import FOMAML, MAML, Episodes, InnerSGD, mini_batches

STEPS, RATE = 5, 0.2


def numbered(tasks: int, examples: int) -> Episodes:
    """Inputs and labels that say where they come from."""
    x = torch.arange(tasks * examples).view(tasks, examples)
    return Episodes({"a": x[..., None], "b": x}, x, {"a": x[..., None], "b": x}, x)


def test_each_pass_goes_through_the_support_set_in_another_order() -> None:
    drawn = mini_batches(numbered(3, 7), size=3, steps=5)
    assert drawn.support_x["a"].shape == (3, 5, 3, 1)
    assert torch.equal(drawn.support_x["a"][..., 0], drawn.support_y)
    assert torch.equal(drawn.support_x["b"], drawn.support_y)
    assert drawn.hessian_y is drawn.support_y
    orders = []
    for task, batches in enumerate(drawn.support_y - 7 * torch.arange(3)[:, None, None]):
        for of_pass in (batches[:2].flatten(), batches[2:4].flatten(), batches[4]):
            assert of_pass.unique().numel() == len(of_pass), task
            assert set(of_pass.tolist()) <= set(range(7))
            orders.append(tuple(of_pass.tolist()))
    assert len(set(orders)) == len(orders)


def test_a_generator_repeats_them() -> None:
    one, other, third = (
        mini_batches(numbered(2, 6), 2, 4, torch.Generator().manual_seed(seed)).support_y
        for seed in (1, 1, 2)
    )
    assert torch.equal(one, other)
    assert not torch.equal(one, third)


@pytest.mark.parametrize("tasks", ["loop", "threads", "vmap"])
def test_the_exact_meta_gradient_is_autograd_through_the_loop(tasks: str) -> None:
    batches = mini_batches(make_episodes(shots=3), size=4, steps=STEPS)
    w, loss = leaves(build("mlp")), plain_loss(build("mlp"), F.cross_entropy)
    total = torch.zeros((), dtype=torch.float64)
    for t in range(3):
        now = w
        for x, y in zip(batches.support_x[t], batches.support_y[t], strict=True):
            gradient = torch.autograd.grad(loss(now, x, y), [*now.values()], create_graph=True)
            now = {name: p - RATE * g for (name, p), g in zip(now.items(), gradient, strict=True)}
        total = total + loss(now, batches.query_x[t], batches.query_y[t]) / 3
    expected = dict(zip(w, torch.autograd.grad(total, [*w.values()]), strict=True))
    model = MAML(build("mlp"), RATE, STEPS, tasks=tasks)
    assert relative_error(model.meta_gradient(batches), expected) < 1e-12


class OnMiniBatches(MAML):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return mini_batches(batch, 2, self.train_steps if self.training else self.test_steps)


def test_a_model_draws_them_in_training_and_in_evaluation(tmp_path: Path) -> None:
    model = OnMiniBatches(build("mlp"), RATE, 3, 5, inner_optimizer=InnerSGD(momentum=0.5))
    run = trainer_in_double(tmp_path)
    loader = DataLoader([make_episodes()], batch_size=None)
    run.fit(model, loader, loader)
    assert len(model.adaptation.mean) == 6
    assert run.predict(model, loader)[0].shape[:2] == (3, 9)


@pytest.mark.parametrize(("size", "steps"), [(0, 1), (7, 1), (1, -1), (2.5, 1)])
def test_other_sizes_are_refused(size: int, steps: int) -> None:
    with pytest.raises(ValueError, match=f"but got {size} and {steps}"):
        mini_batches(numbered(2, 6), size, steps)
    with pytest.raises(TypeError, match="to be Episodes or a list of tasks but got tuple"):
        mini_batches((1, 2), 1, 1)


def test_they_are_drawn_from_every_form_of_a_meta_batch() -> None:
    episodes = make_episodes()
    for batch in (list(episodes), [tuple(x[t] for x in episodes) for t in range(3)]):
        assert mini_batches(batch, 2, 4).support_x.shape[:3] == (3, 4, 2)
    tasks = [tuple(x[0] for x in make_episodes(1, shots)) for shots in (1, 2, 1)]
    drawn = mini_batches(tasks, 2, 4)
    assert [part.support_y.shape for part in drawn.parts] == [(2, 4, 2), (1, 4, 2)]
    OnMiniBatches(build("mlp"), RATE, 4).meta_loss(drawn)
    assert mini_batches(episodes, 2, 0) is episodes


def test_a_hook_that_the_datamodule_has_too_is_refused(tmp_path: Path) -> None:
    class OnMiniBatches(FOMAML):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return mini_batches(batch, size=1, steps=1)

    with pytest.raises(TypeError, match="but both have it, of which Lightning calls the datamod"):
        trainer(tmp_path).fit(OnMiniBatches(network()), Noise())


class InMiniBatches(Noise):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        batch = super().on_after_batch_transfer(batch, dataloader_idx)
        batch = mini_batches(batch, size=2, steps=3 if self.trainer.training else 2)
        self.drawn.add((self.trainer.training, batch.support_y.shape[1]))
        return batch


def test_a_datamodule_may_draw_them(tmp_path: Path) -> None:
    data = InMiniBatches()
    data.drawn = set()
    trainer(tmp_path).fit(FOMAML(network(), train_steps=3, test_steps=2), data)
    assert data.drawn == {(True, 3), (False, 2)}


def test_a_hook_beside_the_datamodule_of_an_earlier_run_is_called(tmp_path: Path) -> None:
    calls = []

    class Counting(FOMAML):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            calls.append(batch)
            return batch

    run = trainer(tmp_path)
    run.fit(FOMAML(network()), Noise())
    data = Noise()
    data.setup()
    batch = data.prepared(next(iter(data.train_dataloader())), training=True)
    run.fit_loop.max_epochs = 2
    run.fit(Counting(network()), DataLoader([batch], batch_size=None))
    assert calls
