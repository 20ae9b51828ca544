"""Targets and labels as people have them give the right value, or one sentence before the first step."""

import pytest
import torch
import torch.nn.functional as F
from networks import WAYS, build, make_episodes, one_hot_mse, relative_error, unrolled
from torch import Tensor, nn
from torch.func import functional_call

import lightning_maml
from lightning_maml import FOMAML, MAML, MLP, Episodes
from lightning_maml.functional import Params


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
    x, y = (torch.rand(2, 5, *of, generator=random) for of in ((3,), shape))
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
        MAML(network, 0.1, loss=F.mse_loss, tasks="loop").evaluate(regression(*([1] if squeezed == "outputs" else [])))
    with pytest.raises(ValueError, match="Expected targets of the shape"):
        MAML(MLP(3, 4), 0.1, loss=F.mse_loss).meta_loss(regression(1))


@pytest.mark.parametrize("loss", [F.mse_loss, OwnMSE(), nn.L1Loss(), lambda o, y: (o - y.to(o)).square().sum(-1).mean()])
@pytest.mark.parametrize("per_class", [1, 2])
def test_labels_in_an_elementwise_loss_are_refused(loss, per_class: int) -> None:
    episodes = make_episodes(shots=per_class, queries=1)  # with one example per class, [3] broadcasts over [3, 3]
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
    "masked": lambda o, y: (F.cross_entropy(o, y, reduction="none") * (y != 1)).sum() / (y != 1).sum(),
    "multi-label margin": lambda o, y: F.multilabel_margin_loss(o, F.one_hot(y, WAYS)),
    "focal": lambda o, y: ((1 - (-F.cross_entropy(o, y, reduction="none")).exp()) ** 2).mean(),
    "fixed": lambda o, y: F.cross_entropy(o.reshape(6, WAYS), y),
}


@pytest.mark.parametrize("name", LABELLED)
def test_losses_of_labels_are_not_refused(name: str) -> None:
    MAML(build("mlp"), 0.1, loss=LABELLED[name], tasks="loop").evaluate(make_episodes(shots=2, queries=2))


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
    model._check(model._learner(episodes), episodes)
    assert torch.equal(before, torch.get_rng_state())
    assert model.loss.calls == 0


def of_unrolled(network: nn.Module, loss, episodes: Episodes) -> Params:
    """Return the meta-gradient of two inner steps at a rate of 0.1, by autograd through the unrolled loop."""
    w = dict(network.named_parameters())
    value = unrolled(lambda params, x, y: loss(functional_call(network, params, (x,)), y), w, episodes, 0.1, 2)
    return dict(zip(w, torch.autograd.grad(value, [*w.values()]), strict=True))


@pytest.mark.parametrize("tasks", ["loop", "vmap"])
def test_the_mean_squared_error_of_classes_is_that_of_one_hot_labels(tasks: str) -> None:
    episodes, network = make_episodes(), build("mlp")

    def written_out(outputs: Tensor, y: Tensor) -> Tensor:
        one_hot = torch.tensor([[float(label == number) for number in range(WAYS)] for label in y.tolist()])
        return ((outputs - one_hot) ** 2).sum() / len(y)

    expected = of_unrolled(network, written_out, episodes)
    found = MAML(network, 0.1, train_steps=2, loss=lightning_maml.one_hot_mse, tasks=tasks).meta_gradient(episodes)
    assert relative_error(found, expected) < 1e-12
