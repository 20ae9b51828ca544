"""Prototypical networks against the paper's formulas, and under real trainers."""

import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader

from helpers.networks import WAYS, build, leaves, make_episodes, plain_loss, relative_error
from helpers.trainers import trainer_in_double as trainer
from lightning_maml import Conv4, Episodes, ProtoNet, ResampledEpisodes, ResNet12
from lightning_maml.core.params import Params
from lightning_maml.datamodules import GlyphsDataModule


def log_softmax_of_distances(support: Tensor, support_y: Tensor, query: Tensor) -> Tensor:
    """Snell et al. 2017, eqs. 1 and 2, one query and one class at a time."""
    prototypes = [
        torch.stack([z for z, y in zip(support, support_y, strict=True) if y == way]).mean(0)
        for way in range(WAYS)
    ]
    return torch.stack(
        [torch.stack([-((z - c) ** 2).sum() for c in prototypes]).log_softmax(0) for z in query]
    )


def paper_loss(network: nn.Module, w: Params, task: tuple[Tensor, ...]) -> Tensor:
    support_x, support_y, query_x, query_y = task
    embedded = functional_call(network, w, (torch.cat([support_x, query_x]),))
    log_p = log_softmax_of_distances(
        embedded[: len(support_x)], support_y, embedded[len(support_x) :]
    )
    return -log_p.gather(1, query_y[:, None]).mean()


@pytest.mark.parametrize("network_name", ["mlp", "conv_batch_norm"])
def test_an_sgd_step_follows_the_papers_loss(tmp_path: Path, network_name: str) -> None:
    network, episodes = build(network_name), make_episodes()
    w, plain = leaves(network), build(network_name)
    plain_loss(plain)  # statistics of the batch
    losses = torch.stack([paper_loss(plain, w, task) for task in zip(*episodes, strict=True)])
    gradient = torch.autograd.grad(losses.mean(), list(w.values()))
    expected = {name: p - 0.1 * g for (name, p), g in zip(w.items(), gradient, strict=True)}
    run = trainer(tmp_path)
    run.fit(
        ProtoNet(network, optimizer=partial(torch.optim.SGD, lr=0.1)),
        DataLoader([episodes], batch_size=None),
    )
    assert relative_error(dict(network.named_parameters()), expected) < 1e-12
    loss = losses.mean().detach().cpu()
    torch.testing.assert_close(run.callback_metrics["train/loss"].double(), loss)


@pytest.mark.parametrize("batch_norm", ["support", "running"])
def test_statistics_of_the_support_set_or_running_averages_make_queries_independent(
    batch_norm: str,
) -> None:
    model = ProtoNet(build("conv_batch_norm"), batch_norm=batch_norm).eval()
    episodes = make_episodes()
    together = model.evaluate(episodes).aux
    alone = model.evaluate(
        episodes._replace(query_x=episodes.query_x[:, :1], query_y=episodes.query_y[:, :1])
    ).aux
    torch.testing.assert_close(together[:, :, :1], alone)
    transductive = ProtoNet(build("conv_batch_norm")).evaluate(episodes).aux
    assert not torch.allclose(together, transductive)


@pytest.mark.parametrize("batch_norm", ["support", "running"])
def test_adapted_networks_classify_as_evaluation_does(batch_norm: str) -> None:
    model = ProtoNet(build("conv_batch_norm"), batch_norm=batch_norm).eval()
    episodes = make_episodes()
    expected = model.evaluate(episodes).aux[:, 0].log_softmax(-1)
    networks = model.adapt(*episodes[:2])
    torch.testing.assert_close(networks(episodes.query_x).log_softmax(-1), expected)
    one = model.adapt(episodes.support_x[1], episodes.support_y[1])
    torch.testing.assert_close(one(episodes.query_x[1]).log_softmax(-1), expected[1])


def test_tasks_one_by_one_are_the_same() -> None:
    episodes = make_episodes()
    together, one_by_one = (
        ProtoNet(build("conv_batch_norm"), tasks=tasks) for tasks in ("vmap", "loop")
    )
    torch.testing.assert_close(together.evaluate(episodes), one_by_one.evaluate(episodes))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.dropout = nn.LSTM(8, 6, batch_first=True), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.lstm(x.squeeze(1))[0][:, -1])


def test_a_network_that_vmap_does_not_take_is_run_one_by_one() -> None:
    episodes = make_episodes()
    auto, one_by_one = (
        ProtoNet(Recurrent()).double().eval(),
        ProtoNet(Recurrent(), tasks="loop").double().eval(),
    )
    one_by_one.load_state_dict(auto.state_dict())
    auto.train().meta_loss(episodes).backward()
    auto.eval()
    torch.testing.assert_close(auto.evaluate(episodes), one_by_one.evaluate(episodes))
    networks = auto.adapt(*episodes[:2])
    torch.testing.assert_close(
        networks(episodes.query_x).log_softmax(-1),
        auto.evaluate(episodes).aux[:, 0].log_softmax(-1),
    )


@pytest.mark.parametrize("frozen", [False, True])
def test_others_are_run_together(frozen: bool) -> None:
    calls = []

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.dropout = (
                build("conv_batch_norm").requires_grad_(not frozen),
                nn.Dropout(0.1),
            )

        def forward(self, x: Tensor) -> Tensor:
            calls.append(len(x))
            return self.dropout(self.body(x))

    model, episodes = ProtoNet(Watched(), loss=Unhashable()).double(), make_episodes()
    model.meta_loss(episodes)
    calls.clear()
    model.meta_loss(episodes)
    assert len(calls) == 1


@dataclass
class Unhashable:
    def __call__(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, labels)


def test_adapting_leaves_the_model_as_it_is() -> None:
    class Casting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = build("mlp").float()

        def forward(self, x: Tensor) -> Tensor:
            return self.network(x.float())

    model, episodes = ProtoNet(Casting()), make_episodes()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    networks = model.adapt((255 * episodes.support_x).byte(), episodes.support_y)
    assert networks((255 * episodes.query_x).byte()).dtype == torch.float32
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}


def test_it_learns_with_more_ways_than_it_is_tested_on_and_resumes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = GlyphsDataModule(
        ways=10,
        shots=1,
        queries=2,
        test_ways=5,
        meta_batch_size=2,
        train_batches=30,
        val_tasks=20,
        test_tasks=100,
    )
    run = trainer(tmp_path, max_epochs=2, precision="32-true")
    model = ProtoNet(Conv4(1, None, 28, channels=16))
    run.fit(model, data)
    figures = run.test(model, data, verbose=False)[0]
    assert figures["test/accuracy"] - figures["test/accuracy_ci95"] > 0.4
    checkpoint = tmp_path / "last.ckpt"
    run.save_checkpoint(checkpoint)
    loaded = ProtoNet.load_from_checkpoint(
        checkpoint, network=Conv4(1, None, 28, channels=16), weights_only=True
    )
    assert relative_error(dict(loaded.named_parameters()), dict(model.named_parameters())) == 0


@pytest.mark.parametrize(
    "make",
    [lambda ways: Conv4(1, ways, 16, channels=8), lambda ways: ResNet12(1, ways, widths=(4, 8))],
)
def test_backbones_without_a_head_give_features(make) -> None:
    features = make(None)(torch.rand(2, 1, 16, 16))
    assert features.shape == (2, 8)
    assert make(3)(torch.rand(2, 1, 16, 16)).shape == (2, 3)


def test_drop_block_is_drawn(tmp_path: Path) -> None:
    network = ResNet12(1, None, widths=(4, 8), drop_block=0.5, drop_block_size=1)
    model = ProtoNet(network)
    episodes = make_episodes()
    single = episodes._replace(
        support_x=episodes.support_x.float(), query_x=episodes.query_x.float()
    )
    assert model.meta_loss(single) != model.meta_loss(single)


def test_episodes_and_options_without_prototypes_are_refused() -> None:
    model, episodes = ProtoNet(build("mlp")), make_episodes()
    lacking = episodes.support_y.clone()
    lacking[1].clamp_(max=1)
    with pytest.raises(ValueError, match="to hold examples of all 3 classes"):
        model.evaluate(episodes._replace(support_y=lacking))
    with pytest.raises(ValueError, match="ProtoNet only classifies"):
        model.evaluate(episodes._replace(support_y=episodes.support_y.double()))
    with pytest.raises(ValueError, match="Expected labels from 0 to 2"):
        model.evaluate(episodes._replace(query_y=episodes.query_y + 1))
    resampled = ResampledEpisodes(*(tensor[:, None] for tensor in episodes[:2] * 2), *episodes[2:])
    with pytest.raises(TypeError, match="regime='finite_sum'"):
        model.evaluate(resampled)
    with pytest.raises(FloatingPointError, match="Expected a finite query loss but got"):
        model.meta_loss(episodes._replace(query_x=torch.full_like(episodes.query_x, torch.nan)))
    with pytest.raises(
        ValueError, match="Expected `tasks` to be 'auto', 'loop' or 'vmap' but got 'threads'"
    ):
        ProtoNet(build("mlp"), tasks="threads")
    with pytest.raises(ValueError, match=r"return logits \[examples, ways\]"):
        ProtoNet(nn.Conv2d(1, 2, 1).double()).evaluate(episodes)


def test_images_of_several_channels_under_vmap() -> None:
    torch.manual_seed(0)
    labels = torch.arange(2).repeat(2, 2)
    episodes = Episodes(torch.rand(2, 4, 3, 16, 16), labels, torch.rand(2, 4, 3, 16, 16), labels)
    network = Conv4(3, None, 16, channels=4, downsample="max")
    curves = [ProtoNet(network, tasks=tasks).evaluate(episodes) for tasks in ("vmap", "loop")]
    torch.testing.assert_close(*(curve.loss for curve in curves))


def test_fitting_frozen_features_is_refused(tmp_path: Path) -> None:
    model = ProtoNet(build("conv_batch_norm").requires_grad_(False))
    with pytest.raises(ValueError, match="trainable parameters to fit but all of them are frozen"):
        trainer(tmp_path).fit(model, train_dataloaders=[make_episodes()])


class Attention(nn.Module):
    """Attention over the numbers of an image, whose fused kernel has no rule for ``vmap``."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x.view(len(x), 1, -1, 8)).chunk(3, -1)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).mean((1, 2))


def test_tasks_over_which_vmap_would_loop_are_not_stacked() -> None:
    x, y = torch.rand(2, 6, 32), torch.arange(3).repeat(2, 2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*batching rule")
        ProtoNet(Attention()).meta_loss(Episodes(x, y, x, y))


def test_labels_in_a_list_are_refused() -> None:
    with pytest.raises(TypeError, match="`support_y` to be a tensor but got list; make it one"):
        ProtoNet(build("mlp")).adapt(make_episodes().support_x[0], [0, 1, 2])
