"""Each algorithm trains, validates, tests and adapts under a trainer: the first thing to run after
a change."""

from pathlib import Path

import pytest
import torch

import lightning_maml
from helpers.public import PUBLIC
from helpers.runs import MODELS, WAYS, Noise
from helpers.trainers import trainer
from lightning_maml import AdaptiveMetaStepsize
from lightning_maml.algorithms.base import EpisodicModule


@pytest.mark.parametrize("name", MODELS)
def test_an_algorithm_trains_and_is_evaluated(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    before = [p.detach().clone() for p in model.network.parameters()]
    callbacks = [AdaptiveMetaStepsize(scale=1.0, tasks=2)] if "adaptive" in name else []
    run = trainer(tmp_path, max_steps=2, callbacks=callbacks)
    run.fit(model, Noise())
    assert run.global_step == 2
    after = [*model.network.parameters()]
    assert all(p.isfinite().all() for p in after)
    assert any(not torch.equal(p, q) for p, q in zip(after, before, strict=True))
    (tested,) = run.test(model, Noise(test_tasks=4), verbose=False)
    assert 0 <= tested["test/accuracy"] <= 1


@pytest.mark.parametrize("name", MODELS)
def test_an_algorithm_adapts_to_one_task_and_to_several(name: str) -> None:
    torch.manual_seed(0)
    x, y = torch.rand(2, 2 * WAYS, 1, 8, 8), torch.arange(WAYS).repeat(2, 2)
    model = MODELS[name]()
    each = [model.adapt(*task)(x[0]) for task in zip(x, y, strict=True)]
    together = model.adapt(x, y)(x[:1].expand_as(x))
    torch.testing.assert_close(together, torch.stack(each), rtol=1e-3, atol=1e-4)


def test_every_algorithm_is_tried_here() -> None:
    exported = [getattr(lightning_maml, name) for name in PUBLIC["lightning_maml"].split()]
    algorithms = {kind for kind in exported if isinstance(kind, type)}
    algorithms = {kind for kind in algorithms if issubclass(kind, EpisodicModule)}
    assert algorithms == {type(make()) for make in MODELS.values()}
