"""The monitor of meta-gradients has the figures of autograd, and keeps them in a resumed run."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from torch import nn
from torch.utils.data import DataLoader

from helpers.networks import build, flat, leaves, make_episodes, plain_loss, unrolled
from helpers.trainers import on_device
from lightning_maml import FOMAML, HFMAML, IMAML, MAML, Conv4, MAMLPlusPlus, ProtoNet, Reptile
from lightning_maml.callbacks import MetaGradientMonitor, StationarityMonitor, compare
from lightning_maml.datamodules import GlyphsDataModule

RATE, STEPS = 0.3, 2
QUIET: dict[str, Any] = {
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "logger": False,
    "enable_checkpointing": False,
}


def fit(
    folder: Path,
    module: Any,
    *callbacks: Callback,
    checkpoint: Path | None = None,
    **arguments: Any,
) -> Trainer:
    run = Trainer(
        default_root_dir=folder,
        **on_device(),
        callbacks=[*callbacks],
        **(QUIET | {"max_epochs": 1} | arguments),
    )
    run.fit(
        module,
        DataLoader([make_episodes(seed=k) for k in range(4)], batch_size=None),
        ckpt_path=checkpoint,
    )
    return run


def still(algorithm: type[MAML], network: nn.Module) -> MAML:
    return algorithm(
        network, inner_lr=RATE, train_steps=STEPS, optimizer=partial(torch.optim.SGD, lr=0.0)
    )


def expected_first_order() -> tuple[torch.Tensor, torch.Tensor]:
    """The exact and the first-order meta-gradient of one meta-batch, by autograd."""
    network, episodes = build("conv_group_norm"), make_episodes(seed=9)
    loss, w = plain_loss(network), leaves(network)
    exact = torch.autograd.grad(unrolled(loss, w, episodes, RATE, STEPS), [*w.values()])
    first_order = [torch.zeros_like(p) for p in w.values()]
    for t in range(len(episodes.support_x)):
        adapted = w
        for _ in range(STEPS):
            gradient = torch.autograd.grad(
                loss(adapted, episodes.support_x[t], episodes.support_y[t]), [*adapted.values()]
            )
            adapted = {
                name: (p - RATE * g).detach().requires_grad_()
                for (name, p), g in zip(adapted.items(), gradient, strict=True)
            }
        gradient = torch.autograd.grad(
            loss(adapted, episodes.query_x[t], episodes.query_y[t]), [*adapted.values()]
        )
        first_order = [
            total + g / len(episodes.support_x)
            for total, g in zip(first_order, gradient, strict=True)
        ]
    return flat(dict(zip(w, exact, strict=True))), flat(dict(zip(w, first_order, strict=True)))


@pytest.mark.parametrize("algorithm", [MAML, FOMAML, HFMAML])
def test_figures_are_those_of_autograd_whatever_the_algorithm(
    tmp_path: Path, algorithm: type[MAML]
) -> None:
    monitor = MetaGradientMonitor(every_n_steps=2, episodes=[make_episodes(seed=9)])
    run = fit(tmp_path, still(algorithm, build("conv_group_norm")), monitor, precision="64-true")
    exact, first_order = expected_first_order()
    cosine, error = (
        float(exact @ first_order / exact.norm() / first_order.norm()),
        float((first_order - exact).norm() / exact.norm()),
    )
    assert list(monitor.history) == [2, 4]
    found = monitor.history[4]
    assert found["first_order"] == (pytest.approx(cosine, rel=1e-9), pytest.approx(error, rel=1e-9))
    assert found["hessian_free"].error < 1e-7
    assert found["hessian_free"].cosine == pytest.approx(1, abs=1e-12)
    assert 0.5 < cosine < 0.9999, "first order is seen to be off"
    logged = {name: float(value) for name, value in run.callback_metrics.items()}
    assert logged["train/first_order_cosine"] == pytest.approx(cosine)
    assert logged["train/hessian_free_error"] == pytest.approx(found["hessian_free"].error)


def test_hessian_free_error_is_large_on_a_network_with_kinks(tmp_path: Path) -> None:
    errors = {}
    for activation in ("gelu", "relu"):
        torch.manual_seed(0)
        module = still(MAML, Conv4(1, 3, 28, channels=8, activation=activation))
        monitor = MetaGradientMonitor(every_n_steps=1, tasks=4)
        run = Trainer(
            default_root_dir=tmp_path,
            **on_device(),
            max_epochs=1,
            callbacks=[monitor],
            limit_val_batches=0,
            **QUIET,
        )
        run.fit(module, GlyphsDataModule(ways=3, meta_batch_size=4, train_batches=1))
        errors[activation] = monitor.history[1]["hessian_free"].error
    assert errors["gelu"] < 0.01
    assert errors["relu"] > 0.1


@pytest.mark.parametrize(
    "algorithm",
    [
        partial(MAML, adapt="head"),
        partial(MAML, batch_norm="per_step"),
        partial(MAML, inner_rates="per_layer_and_step"),
        partial(Reptile, adapt="all"),
        partial(IMAML, inner_rates="fixed"),
        partial(MAMLPlusPlus, multi_step_epochs=1),
    ],
)
def test_monitor_works_with_every_kind_of_adaptation(tmp_path: Path, algorithm: Any) -> None:
    monitor = MetaGradientMonitor(every_n_steps=4, episodes=[make_episodes(seed=9)])
    module = algorithm(
        build("conv_batch_norm"),
        inner_lr=0.05,
        train_steps=2,
        optimizer=partial(torch.optim.SGD, lr=0.01),
    )
    fit(tmp_path, module, monitor, precision="64-true")
    assert monitor.history[4]["hessian_free"].error < 1e-4


def test_monitor_works_with_resampled_tasks(tmp_path: Path) -> None:
    monitor = MetaGradientMonitor(every_n_steps=2, tasks=2)
    data = GlyphsDataModule(
        ways=3, meta_batch_size=2, train_batches=2, regime="resampling", train_steps=2
    )
    module = MAML(Conv4(1, 3, 28, channels=4, activation="gelu"), inner_lr=0.1, train_steps=2)
    watched: dict[str, Any] = {
        "callbacks": [monitor],
        "limit_val_batches": 0,
        "precision": "64-true",
    }
    Trainer(default_root_dir=tmp_path, **on_device(), max_epochs=1, **watched, **QUIET).fit(
        module, data
    )
    assert monitor.history[2]["hessian_free"].error < 1e-6


def test_monitors_do_not_change_the_trained_weights(tmp_path: Path) -> None:
    def trained(*callbacks: Callback) -> torch.Tensor:
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 50), nn.Tanh(), nn.Dropout(0.5), nn.Linear(50, 3)
        ).double()
        torch.manual_seed(1)
        fit(
            tmp_path,
            MAML(network, RATE, optimizer=partial(torch.optim.SGD, lr=0.1)),
            *callbacks,
            precision="64-true",
        )
        return flat(dict(network.named_parameters()))

    tasks = [make_episodes(seed=k) for k in range(9)]
    alone = trained()
    assert torch.equal(alone, trained(MetaGradientMonitor(every_n_steps=1, episodes=tasks)))
    assert torch.equal(
        alone, trained(StationarityMonitor(every_n_steps=1, meta_batches=3, episodes=tasks))
    )


def test_compared_meta_gradients_have_the_same_dropout(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 50), nn.Tanh(), nn.Dropout(0.5), nn.Linear(50, 3)
    ).double()
    monitor = MetaGradientMonitor(every_n_steps=4, episodes=[make_episodes(seed=9)])
    fit(tmp_path, still(MAML, network), monitor, precision="64-true")
    assert monitor.history[4]["hessian_free"].error < 1e-6


def test_a_resumed_run_keeps_the_history(tmp_path: Path) -> None:
    def monitor() -> MetaGradientMonitor:
        return MetaGradientMonitor(
            every_n_steps=2, episodes=[make_episodes(seed=k) for k in range(9)]
        )

    def module() -> MAML:
        return MAML(build("mlp").float(), inner_lr=RATE, optimizer=partial(torch.optim.SGD, lr=0.1))

    whole, half, rest = monitor(), monitor(), monitor()
    arguments = {"precision": "64-true"}
    fit(tmp_path, module(), whole, max_epochs=2, **arguments)
    fit(tmp_path, module(), half, **arguments).save_checkpoint(tmp_path / "half.ckpt")
    fit(tmp_path, module(), rest, max_epochs=2, checkpoint=tmp_path / "half.ckpt", **arguments)
    assert list(rest.history) == [2, 4, 6, 8]
    for step, found in whole.history.items():
        assert rest.history[step]["first_order"] == pytest.approx(found["first_order"], rel=1e-5)


def test_compare_gives_nan_for_zero_gradients() -> None:
    zero, one = {"w": torch.zeros(2)}, {"w": torch.ones(2)}
    assert all(math.isnan(value) for value in (*compare(one, zero), *compare(zero, one)))


def test_bad_interval_and_other_modules_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected `every_n_steps` to be at least 1 but got 0"):
        MetaGradientMonitor(every_n_steps=0)
    with pytest.raises(
        TypeError,
        match="Expected MAML or one of its variants for MetaGradientMonitor but got ProtoNet",
    ):
        fit(tmp_path, ProtoNet(build("mlp")), MetaGradientMonitor(episodes=[make_episodes()]))
