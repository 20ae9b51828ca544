"""Targets and labels as people have them give the right value, or one sentence before the first
step."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning import Trainer
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, Dataset

import lightning_maml
from helpers.networks import (
    WAYS,
    autograd_meta_gradient,
    build,
    leaves,
    make_episodes,
    one_hot_mse,
    plain_loss,
    relative_error,
    unrolled,
)
from helpers.random_numbers import drawn_on_cpu
from helpers.trainers import QUIET, on_device
from lightning_maml import FOMAML, MAML, MLP, Episodes, ResampledEpisodes
from lightning_maml.core.params import Params
from lightning_maml.datamodules import GlyphsDataModule


def trainer(**settings: Any) -> Trainer:
    return Trainer(max_epochs=1, **on_device(), **QUIET, **settings)


class OwnMSE(nn.Module):
    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return ((outputs - targets) ** 2).mean()


def standardised(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - (targets - targets.mean()) / targets.std()).abs().mean()


def in_place(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.new_zeros(len(outputs), len(targets)).add_(outputs).sub_(targets).square().mean()


BROADCASTING = {
    "mse": F.mse_loss,
    "l1": nn.L1Loss(),
    "huber": F.huber_loss,
    "lambda": lambda o, t: ((o - t) ** 2).mean(),
    "module": OwnMSE(),
    "poisson": F.poisson_nll_loss,
    "poisson module": nn.PoissonNLLLoss(),
    "gaussian": lambda o, t: F.gaussian_nll_loss(o, t, torch.ones_like(o)),
    "log cosh": lambda o, t: torch.log(torch.cosh(o - t)).mean(),
    "kl": lambda o, t: F.kl_div(o, t, reduction="sum"),
    "soft margin": F.soft_margin_loss,
    "quantile": lambda o, t: torch.max(0.9 * (t - o), -0.1 * (t - o)).mean(),
    "standardised": standardised,
    "in place": in_place,
    "weighted": lambda o, t: (F.mse_loss(o[:, 0], t, reduction="none") * (1 + t[:, None])).mean(),
}


def regression(*shape: int) -> Episodes:
    """Return two tasks of five examples whose targets have ``shape``."""
    random = torch.Generator().manual_seed(0)
    x, y = (drawn_on_cpu(torch.rand, 2, 5, *of, generator=random) for of in ((3,), shape))
    return Episodes(x, y, x, y)


@pytest.mark.parametrize("name", BROADCASTING)
@pytest.mark.parametrize("algorithm", [MAML, FOMAML])
def test_targets_that_any_loss_broadcasts_are_refused(name: str, algorithm: type[MAML]) -> None:
    with pytest.raises(ValueError, match="Expected targets of the shape of the network's outputs"):
        algorithm(MLP(3, 1), 0.1, loss=BROADCASTING[name]).meta_loss(regression())


@pytest.mark.parametrize("squeezed", ["outputs", "targets"])
def test_dimensions_of_one_that_only_one_side_has_are_refused(squeezed: str) -> None:
    network = nn.Sequential(MLP(3, 1), nn.Flatten(0)) if squeezed == "outputs" else MLP(3, 1)
    with pytest.raises(ValueError, match="Expected targets of the shape"):
        MAML(network, 0.1, loss=F.mse_loss, tasks="loop").evaluate(
            regression(*([1] if squeezed == "outputs" else []))
        )
    with pytest.raises(ValueError, match="Expected targets of the shape"):
        MAML(MLP(3, 4), 0.1, loss=F.mse_loss).meta_loss(regression(1))


@pytest.mark.parametrize(
    "loss", [F.mse_loss, OwnMSE(), nn.L1Loss(), lambda o, y: (o - y.to(o)).square().sum(-1).mean()]
)
@pytest.mark.parametrize("per_class", [1, 2])
def test_labels_in_an_elementwise_loss_are_refused(loss, per_class: int) -> None:
    # with one example per class, [3] broadcasts over [3, 3]
    episodes = make_episodes(shots=per_class, queries=1)
    with pytest.raises(ValueError, match=r"loss=lightning_maml\.one_hot_mse"):
        MAML(build("mlp"), 0.1, loss=loss).meta_loss(episodes)


def contrastive(outputs: Tensor, y: Tensor) -> Tensor:
    similar = F.normalize(outputs, dim=-1) @ F.normalize(outputs, dim=-1).T
    same = y[:, None] == y[None]
    return -torch.where(same, similar, -similar).mean()


def of_prototypes(outputs: Tensor, y: Tensor) -> Tensor:
    members = F.one_hot(y, WAYS).to(outputs)
    means = (members.T[:, :, None] * outputs).sum(1) / members.sum(0)[:, None].clamp(min=1)
    return F.cross_entropy(-(outputs[:, None] - means).square().sum(-1), y)


LABELLED = {
    "cross-entropy": F.cross_entropy,
    "one-hot": one_hot_mse,
    "shipped": lightning_maml.one_hot_mse,
    "nll": lambda o, y: F.nll_loss(o.log_softmax(-1), y),
    "gather": lambda o, y: -o.log_softmax(-1).gather(1, y[:, None]).mean(),
    "margin": F.multi_margin_loss,
    "contrastive": contrastive,
    "prototypes": of_prototypes,
    "masked": lambda o, y: (
        (F.cross_entropy(o, y, reduction="none") * (y != 1)).sum() / (y != 1).sum()
    ),
    "multi-label margin": lambda o, y: F.multilabel_margin_loss(o, F.one_hot(y, WAYS)),
    "focal": lambda o, y: ((1 - (-F.cross_entropy(o, y, reduction="none")).exp()) ** 2).mean(),
    "fixed": lambda o, y: F.cross_entropy(o.reshape(6, WAYS), y),
}


@pytest.mark.parametrize("name", LABELLED)
def test_losses_of_labels_are_not_refused(name: str) -> None:
    MAML(build("mlp"), 0.1, loss=LABELLED[name], tasks="loop").evaluate(
        make_episodes(shots=2, queries=2)
    )


TARGETED = {
    "mse": F.mse_loss,
    "probabilities": F.cross_entropy,
    "bce": F.binary_cross_entropy_with_logits,
    "weights": lambda o, t: ((o - t) ** 2 * (1 + t[:, :1])).mean(),
    "pairs": lambda o, t: ((o[:, None] - o[None]) - (t[:, None] - t[None])).square().mean(),
    "energy": lambda o, t: (o[:, None] - t[None]).square().sum(-1).mean(),
    "one output": lambda o, t: (o[:, 0] - t[:, 0]).square().mean(),
    "mean and variance": lambda o, t: F.gaussian_nll_loss(o[:, :1], t[:, :1], o[:, 1:2].exp()),
    "quantiles": lambda o, t: torch.max(0.9 * (t[:, :1] - o), -0.1 * (t[:, :1] - o)).mean(),
    "scale": lambda o, t: (o - t).square().mean() / t.var(),
}


@pytest.mark.parametrize("name", TARGETED)
def test_losses_of_targets_are_not_refused(name: str) -> None:
    MAML(MLP(3, 4), 0.1, loss=TARGETED[name], tasks="loop").evaluate(regression(4))


def penalised(outputs: Tensor, y: Tensor) -> Tensor:
    """The cross-entropy and the squared norm of its gradient."""
    value = F.cross_entropy(outputs, y)
    (gradient,) = torch.autograd.grad(value, outputs, create_graph=True)
    return value + gradient.square().sum()


def penalised_anywhere(outputs: Tensor, y: Tensor) -> Tensor:
    with torch.enable_grad():
        if not outputs.requires_grad:
            outputs = outputs.detach().requires_grad_()
        return penalised(outputs, y)


@pytest.mark.parametrize("tasks", ["auto", "loop", "threads"])
def test_a_loss_that_differentiates_is_told_how_to_do_so_where_gradients_are_off(
    tasks: str,
) -> None:
    episodes = make_episodes()
    with pytest.raises(ValueError, match="Expected a loss that can be called where no gradients"):
        MAML(build("mlp"), 0.3, loss=penalised, tasks=tasks).meta_loss(episodes)
    model = MAML(build("mlp"), 0.3, 2, loss=penalised_anywhere, tasks=tasks)
    expected = autograd_meta_gradient(build("mlp"), episodes, 2, penalised)
    assert relative_error(model.meta_gradient(episodes), expected) < 1e-12
    before, adapted = (model.evaluate(episodes).loss[:, step].mean() for step in (0, 2))
    w = leaves(build("mlp"))
    start = unrolled(plain_loss(build("mlp"), penalised), w, episodes, 0.3, 0)
    end = unrolled(plain_loss(build("mlp"), penalised), w, episodes, 0.3, 2)
    torch.testing.assert_close(
        torch.stack([before, adapted]), torch.stack([start, end]).detach(), rtol=1e-12, atol=0
    )


def test_another_loss_is_looked_at_anew() -> None:
    model = MAML(MLP(3, 1), 0.1, loss=lambda o, t: (o[:, 0] - t).square().mean())
    model.meta_loss(regression())
    model.loss = F.mse_loss
    with pytest.raises(ValueError, match="Expected targets of the shape"):
        model.meta_loss(regression())


class Counting(nn.Module):
    """A loss that counts its calls in a buffer, draws random numbers and has a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, outputs: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return (outputs * self.scale - y + 0 * torch.randn(())).square().mean()


def test_the_look_leaves_random_numbers_and_the_losses_buffers_as_they_are() -> None:
    model = MAML(MLP(3, 4), 0.1, loss=Counting(), tasks="loop")
    before = torch.get_rng_state()
    episodes = regression(4)
    with pytest.raises(
        ValueError,
        match=r"Expected a loss that leaves its tensors as they are but it writes to \['calls'\]",
    ):
        model._plan(episodes)
    assert torch.equal(before, torch.get_rng_state())
    assert model.loss.calls == 0


def of_unrolled(network: nn.Module, loss, episodes: Episodes) -> Params:
    """Return the meta-gradient of two inner steps at a rate of 0.1, by autograd through the
    unrolled loop."""
    w = dict(network.named_parameters())
    value = unrolled(
        lambda params, x, y: loss(functional_call(network, params, (x,)), y), w, episodes, 0.1, 2
    )
    return dict(zip(w, torch.autograd.grad(value, [*w.values()]), strict=True))


@pytest.mark.parametrize("tasks", ["loop", "vmap"])
def test_the_mean_squared_error_of_classes_is_that_of_one_hot_labels(tasks: str) -> None:
    episodes, network = make_episodes(), build("mlp")

    def written_out(outputs: Tensor, y: Tensor) -> Tensor:
        one_hot = torch.tensor(
            [[float(label == number) for number in range(WAYS)] for label in y.tolist()]
        )
        return ((outputs - one_hot) ** 2).sum() / len(y)

    expected = of_unrolled(network, written_out, episodes)
    found = MAML(
        network, 0.1, train_steps=2, loss=lightning_maml.one_hot_mse, tasks=tasks
    ).meta_gradient(episodes)
    assert relative_error(found, expected) < 1e-12


def padded_episodes() -> Episodes:
    """Return tasks in whose sets some examples are padding, which have label -100."""
    episodes = make_episodes(shots=2, queries=3)
    support_y, query_y = episodes.support_y.clone(), episodes.query_y.clone()
    support_y[0, 1:3] = -100
    query_y[1, :4] = -100
    return episodes._replace(support_y=support_y, query_y=query_y)


def of_counted(outputs: Tensor, y: Tensor) -> Tensor:
    counts = y != -100
    return F.cross_entropy(outputs[counts], y[counts])


IGNORING = {
    "function": F.cross_entropy,
    "module": nn.CrossEntropyLoss(),
    "partial": partial(F.cross_entropy, reduction="mean"),
}


@pytest.mark.parametrize("tasks", ["auto", "loop", "vmap"])
@pytest.mark.parametrize("name", IGNORING)
def test_padding_that_the_loss_ignores_has_no_part_in_the_meta_gradient(
    name: str, tasks: str
) -> None:
    episodes, network = padded_episodes(), build("mlp")
    expected = of_unrolled(network, of_counted, episodes)
    found = MAML(network, 0.1, train_steps=2, loss=IGNORING[name], tasks=tasks).meta_gradient(
        episodes
    )
    assert relative_error(found, expected) < 1e-12


def test_padding_has_no_part_in_the_mean_squared_error_of_classes() -> None:
    episodes, network = padded_episodes(), build("mlp")

    def written_out(outputs: Tensor, y: Tensor) -> Tensor:
        counts = y != -100
        return (outputs[counts] - F.one_hot(y[counts], WAYS)).square().sum() / counts.sum()

    expected = of_unrolled(network, written_out, episodes)
    found = MAML(network, 0.1, train_steps=2, loss=lightning_maml.one_hot_mse).meta_gradient(
        episodes
    )
    assert relative_error(found, expected) < 1e-12


@pytest.mark.parametrize(
    ("loss", "ignored"), [(F.cross_entropy, -100), (nn.CrossEntropyLoss(ignore_index=255), 255)]
)
def test_accuracy_is_of_the_queries_that_count(loss, ignored: int) -> None:
    episodes = make_episodes(tasks=2, shots=2, queries=2)
    query_y = episodes.query_y.clone()
    query_y[0, 2:] = ignored
    model = MAML(build("mlp"), 0.1, loss=loss)
    trainer().test(
        model, DataLoader([episodes._replace(query_y=query_y)], batch_size=None), verbose=False
    )
    logged = model.trainer.callback_metrics["test/accuracy"]
    correct = model.evaluate(episodes).aux[:, -1].argmax(-1) == episodes.query_y
    torch.testing.assert_close(
        logged, (correct[0, :2].double().mean() + correct[1].double().mean()) / 2
    )


@pytest.mark.parametrize("name", ["support_y", "query_y"])
def test_a_set_of_padding_alone_is_refused(name: str) -> None:
    labels = getattr(make_episodes(), name).clone()
    labels[1] = -100
    episodes = make_episodes()._replace(**{name: labels})
    with pytest.raises(
        ValueError,
        match=rf"Expected a label in `{name}` of each task .* but got -100 alone in tasks \[1\]",
    ):
        MAML(build("mlp"), 0.1).meta_loss(episodes)


def test_a_support_batch_of_padding_alone_is_refused_in_the_resampling_case() -> None:
    x, y = torch.randn(3, 2, 4, 5), torch.arange(4).repeat(3, 2, 1)
    padded = y.clone()
    padded[2, 1] = -100
    model = FOMAML(MLP(5, 4), 0.1, train_steps=2)
    none = ResampledEpisodes(x, y, x[:, :, :0], y[:, :, :0], x[:, 0], y[:, 0])
    model.meta_loss(none)
    with pytest.raises(
        ValueError, match=r"Expected a label in `support_y` of each task .* in tasks \[2\]"
    ):
        model.meta_loss(none._replace(support_y=padded))
    some = padded.clone()
    some[2, 1, 0] = 0
    model.meta_loss(none._replace(support_y=some))


def test_padding_is_refused_where_the_loss_does_not_say_that_it_ignores_it() -> None:
    with pytest.raises(
        ValueError,
        match=r"Expected labels from 0 to 2.* got -100 to 2; for padding take a loss that says",
    ):
        MAML(
            build("mlp"), 0.1, loss=lambda o, y: -o.log_softmax(-1).gather(1, y[:, None]).mean()
        ).meta_loss(padded_episodes())


@pytest.mark.parametrize("of", ["loss", "support_loss"])
@pytest.mark.parametrize("query_in_eval", [False, True])
def test_labels_are_checked_before_a_loss_gets_them(of: str, query_in_eval: bool) -> None:
    """On a GPU, cross-entropy of a label that has no output ends all work of the process."""

    class Recording(nn.Module):
        def forward(self, outputs: Tensor, y: Tensor) -> Tensor:
            seen.append(int(y.max()))
            return F.cross_entropy(outputs, y)

    seen: list[int] = []
    x, y = torch.rand(2, 6, 4), torch.arange(6).repeat(2, 1)
    model = MAML(MLP(4, 3), 0.1, query_in_eval=query_in_eval, **{of: Recording()})
    with pytest.raises(ValueError, match="Expected labels from 0 to 2"):
        model.meta_loss(Episodes(x, y, x, y))
    assert not seen
    model.meta_loss(Episodes(x, y % 3, x, y % 3))
    assert seen


def test_a_network_adapts_to_fewer_classes_than_it_has_outputs() -> None:
    episodes, network = make_episodes(tasks=1), build("mlp")
    keep = episodes.support_y[0] != WAYS - 1
    x, y = episodes.support_x[0, keep], episodes.support_y[0, keep]
    w = dict(network.named_parameters())
    gradient = torch.autograd.grad(F.cross_entropy(network(x), y), [*w.values()])
    stepped = {name: p - 0.1 * g for (name, p), g in zip(w.items(), gradient, strict=True)}
    expected = functional_call(network, stepped, (episodes.query_x[0],))
    torch.testing.assert_close(MAML(network, 0.1).adapt(x, y)(episodes.query_x[0]), expected)


def test_a_datamodule_with_other_ways_than_the_network_has_outputs_is_refused() -> None:
    data = {"shots": 1, "queries": 1, "meta_batch_size": 2, "train_batches": 1}
    model = MAML(nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 4)), 0.1)
    with pytest.raises(
        ValueError,
        match="Expected `network` to have 3 outputs, one per way of the episode, but got 4",
    ):
        trainer().fit(model, datamodule=GlyphsDataModule(ways=3, **data))
    with pytest.raises(
        ValueError,
        match="Expected `network` to have 3 outputs, one per way of the episode, but got 4",
    ):
        trainer().test(model, datamodule=GlyphsDataModule(ways=4, test_ways=3, **data))


class Uneven(Dataset[Episodes]):
    """Tasks with support sets of different sizes and different numbers of classes."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, number: int) -> Episodes:
        random = torch.Generator().manual_seed(number)
        sets = []
        for size in (3 + number, 4):
            sets += [
                drawn_on_cpu(torch.randn, size, 8, generator=random, dtype=torch.float64),
                torch.arange(size) % (2 + number),
            ]
        return Episodes(*sets)


def test_uneven_tasks_one_by_one_have_the_mean_of_their_meta_gradients() -> None:
    network, tasks = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4)).double(), Uneven()
    alone = [
        of_unrolled(network, F.cross_entropy, Episodes(*(tensor[None] for tensor in tasks[number])))
        for number in range(3)
    ]
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    sgd = partial(torch.optim.SGD, lr=1.0)
    model = MAML(network, 0.1, train_steps=2, optimizer=sgd)
    trainer(accumulate_grad_batches=3, precision="64-true").fit(
        model, DataLoader(tasks, batch_size=1)
    )
    found = {name: before[name] - p.detach() for name, p in network.named_parameters()}
    assert (
        relative_error(found, {name: sum(each[name] for each in alone) / 3 for name in before})
        < 1e-12
    )


@pytest.mark.parametrize("labels", [2, 5])
def test_several_integer_labels_per_example_are_refused(labels: int) -> None:
    x, y = torch.randn(4, 10, 3), torch.randint(2, (4, 10, labels))
    model = MAML(
        MLP(3, labels), 0.1, loss=lambda o, t: F.binary_cross_entropy_with_logits(o, t.float())
    )
    message = rf"Expected .* logits \[examples, ways, {labels}\] .* give floats, y\.float\(\), with"
    with pytest.raises(ValueError, match=message):
        model.meta_loss(Episodes(x, y, x, y))
    with pytest.raises(ValueError, match=message):
        model.meta_loss(Episodes(x, y.float(), x, y))


def test_labels_with_a_last_dimension_of_one_are_refused() -> None:
    x, y = torch.randn(4, 10, 3), torch.randint(2, (4, 10, 1))
    with pytest.raises(ValueError, match=r"leave the last dimension out, y\[\.\.\., 0\]"):
        MAML(MLP(3, 2), 0.1).adapt(x, y)


def test_arrays_are_refused() -> None:
    episodes = make_episodes()
    with pytest.raises(
        TypeError, match=r"Expected `support_y` to be a tensor but got ndarray; .*torch\.from_numpy"
    ):
        MAML(build("mlp"), 0.1).meta_loss(
            episodes._replace(support_y=episodes.support_y.cpu().numpy())
        )


class Weighted(nn.Module):
    """A loss with the same weight for all classes, in one place of memory."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.tensor(2.0, dtype=torch.float64).expand(3)

    def forward(self, outputs: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(outputs, y, self.weight)


def test_a_loss_with_an_expanded_weight() -> None:
    found = MAML(build("mlp"), 0.1, loss=Weighted()).meta_loss(make_episodes())
    plain = MAML(build("mlp"), 0.1).meta_loss(make_episodes())
    torch.testing.assert_close(found, plain)
