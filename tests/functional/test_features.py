"""Where only the head adapts, the features are computed once per task, and nothing else changes."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.networks import build, leaves, make_episodes, plain_loss, relative_error, unrolled
from lightning_maml import (
    ANIL,
    FOMAML,
    HFMAML,
    IMAML,
    MAML,
    MAMLPlusPlus,
    ResampledEpisodes,
    meta_gradient,
)
from lightning_maml.core.params import Params
from lightning_maml.networks.functional_network import FunctionalNetwork

STEPS, RATE = 3, 0.3


class Renamed(nn.Module):
    """The same network, whose outputs are not those of its head but a view of them."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.network(x)
        return outputs.view_as(outputs)


def counted(network: nn.Sequential) -> Counter[str]:
    """Count the calls of the network's first layer and of its last."""
    calls: Counter[str] = Counter()
    for name, layer in (("body", network[0]), ("head", network[-1])):
        layer.register_forward_hook(lambda *_, name=name: calls.update([name]))
    return calls


@pytest.mark.parametrize("tasks", ["loop", "threads", "vmap"])
@pytest.mark.parametrize("batch_norm", ["batch", "support", "running"])
@pytest.mark.parametrize("curvature", ["exact", "none", "finite_difference"])
def test_the_meta_gradient_is_the_same(curvature: str, batch_norm: str, tasks: str) -> None:
    episodes = make_episodes()
    quick, plain = (
        ANIL(network, RATE, STEPS, batch_norm=batch_norm, tasks=tasks)
        for network in (build("conv_batch_norm"), Renamed(build("conv_batch_norm")))
    )
    gradient = quick.meta_gradient(episodes, curvature)
    expected = {
        name.removeprefix("network."): g
        for name, g in plain.meta_gradient(episodes, curvature).items()
    }
    assert gradient.keys() == expected.keys()
    assert relative_error(gradient, expected) < (
        1e-8 if curvature == "finite_difference" else 1e-12
    )
    for model in (quick, plain):
        model.eval()
    for found, wanted in zip(quick.evaluate(episodes), plain.evaluate(episodes), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_losses_on_the_way_and_learned_rates_are_the_same() -> None:
    episodes = make_episodes()
    gradients = []
    for network in (build("conv_batch_norm"), Renamed(build("conv_batch_norm"))):
        model = MAMLPlusPlus(network, RATE, STEPS, adapt="head", multi_step_epochs=0)
        model.step_weights = lambda epoch: [0.2, 0.3, 0.5]
        model.meta_loss(episodes).backward()
        gradients.append(
            {
                name.replace("network.network", "network"): p.grad
                for name, p in model.named_parameters()
            }
        )
    assert relative_error(*gradients) < 1e-12


@pytest.mark.parametrize(("keep_graphs", "evaluations"), [("never", 2 * STEPS), ("auto", STEPS)])
def test_the_body_is_called_once_for_each_set(keep_graphs: str, evaluations: int) -> None:
    network, tasks = build("conv_batch_norm"), 3
    calls = counted(network)
    model = ANIL(network, RATE, STEPS, tasks="loop", keep_graphs=keep_graphs)
    model.meta_loss(make_episodes(tasks))
    # written, policy, backward pass, outputs; twice loss, modes and hidden layers; thrice random
    # numbers and end
    looks = 16
    assert calls["body"] == looks + 2 * tasks
    assert calls["head"] == calls["body"] + 1 + tasks * (evaluations + 1), (
        "one look, N gradients, N products where no graph is kept, and the query loss"
    )
    calls.clear()
    model.evaluate(make_episodes(tasks))
    assert calls["body"] == 2 * tasks, "what the network is like is known by now"
    calls.clear()
    MAML(network, RATE, STEPS, tasks="loop").meta_loss(make_episodes(tasks))
    assert calls["body"] > tasks * 2 * STEPS


def test_a_proximal_term_is_the_heads() -> None:
    quick, plain = (
        IMAML(network, RATE, STEPS, adapt="head").eval()
        for network in (build("mlp"), Renamed(build("mlp")))
    )
    torch.testing.assert_close(quick.evaluate(make_episodes()), plain.evaluate(make_episodes()))


def test_what_ends_a_network() -> None:
    x = make_episodes().support_x[0]
    assert FunctionalNetwork(build("mlp")).ends_with("3", x)
    assert not FunctionalNetwork(build("mlp")).ends_with("1", x)
    assert not FunctionalNetwork(Renamed(build("mlp"))).ends_with("network.3", x)


@pytest.mark.parametrize(
    "head",
    [
        nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3)),
        nn.Sequential(nn.Linear(6, 3), nn.Softplus()),
    ],
)
def test_heads_of_several_layers(head: nn.Module, device: torch.device) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Tanh(), head).double().to(device)
    episodes = make_episodes()
    quick, plain = (
        ANIL(network, RATE, STEPS, head="3"),
        ANIL(Renamed(network), RATE, STEPS, head="network.3"),
    )
    gradients = quick.meta_gradient(episodes), plain.meta_gradient(episodes)
    assert (
        relative_error(
            gradients[0], {name.removeprefix("network."): g for name, g in gradients[1].items()}
        )
        < 1e-12
    )


@pytest.mark.parametrize("tasks", ["loop", "vmap"])
def test_the_function_takes_any_encoder(tasks: str) -> None:
    w, episodes = leaves(build("mlp")), make_episodes()

    def features(params: Params, x: Tensor) -> Tensor:
        return torch.tanh(F.linear(x.flatten(1), params["1.weight"], params["1.bias"]))

    def loss(params: Params, z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(z, params["3.weight"], params["3.bias"]), y)

    rates = {"3.weight": 0.4, "3.bias": 0.2}
    result = meta_gradient(
        loss,
        w,
        episodes,
        inner_lr=rates,
        steps=STEPS,
        tasks=tasks,
        encode=lambda params, task: (
            features(params, task.support_x),
            features(params, task.query_x),
        ),
    )
    value = unrolled(plain_loss(build("mlp")), w, episodes, [rates] * STEPS, STEPS)
    torch.testing.assert_close(result.query_loss.mean(), value.detach())
    assert (
        relative_error(
            result.grad, dict(zip(w, torch.autograd.grad(value, list(w.values())), strict=True))
        )
        < 1e-12
    )


def test_rates_of_a_part_of_the_head() -> None:
    w, episodes = leaves(build("mlp")), make_episodes()

    def features(params: Params, x: Tensor) -> Tensor:
        return torch.tanh(F.linear(x.flatten(1), params["1.weight"], params["1.bias"]))

    def loss(params: Params, z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(z, params["3.weight"], params["3.bias"]), y)

    encode = lambda params, task: (features(params, task.support_x), features(params, task.query_x))
    result = meta_gradient(
        loss, w, episodes, inner_lr={"3.weight": 0.4}, steps=STEPS, encode=encode
    )
    value = unrolled(plain_loss(build("mlp")), w, episodes, [{"3.weight": 0.4}] * STEPS, STEPS)
    assert (
        relative_error(
            result.grad, dict(zip(w, torch.autograd.grad(value, list(w.values())), strict=True))
        )
        < 1e-12
    )
    resampled = ResampledEpisodes(*(tensor[:, None] for tensor in episodes[:2] * 2), *episodes[2:])
    for data, changed in (
        (resampled, {}),
        (episodes, {"sample": lambda w, x, y: (x, y)}),
        (episodes, {"loss": [loss, loss]}),
    ):
        arguments = {
            "loss": loss,
            "params": w,
            "episodes": data,
            "inner_lr": 0.1,
            "steps": 1,
            "encode": encode,
        } | changed
        with pytest.raises(
            ValueError,
            match=r"^Expected `encode` with Episodes, .* but got other data or losses\.$",
        ):
            meta_gradient(**arguments)


def test_features_may_have_a_query_loss_of_their_own() -> None:
    """Of labels smoothed on the query set alone."""
    w, episodes = leaves(build("mlp")), make_episodes()

    def features(params: Params, x: Tensor) -> Tensor:
        return torch.tanh(F.linear(x.flatten(1), params["1.weight"], params["1.bias"]))

    def loss(params: Params, z: Tensor, y: Tensor, smoothing: float = 0.0) -> Tensor:
        return F.cross_entropy(
            F.linear(z, params["3.weight"], params["3.bias"]), y, label_smoothing=smoothing
        )

    rates = {"3.weight": 0.4, "3.bias": 0.2}
    result = meta_gradient(
        loss,
        w,
        episodes,
        inner_lr=rates,
        steps=1,
        query_loss=lambda params, task: loss(params, task.query_x, task.query_y, 0.5),
        encode=lambda params, task: (
            features(params, task.support_x),
            features(params, task.query_x),
        ),
    )
    assert result.inner_lr == [{}], "fixed rates have no gradient"
    value = torch.zeros((), dtype=torch.float64)
    for s_x, s_y, q_x, q_y in zip(*episodes, strict=True):
        gradient = torch.autograd.grad(
            loss(w, features(w, s_x), s_y), [w[name] for name in rates], create_graph=True
        )
        adapted = w | {
            name: w[name] - rates[name] * g for name, g in zip(rates, gradient, strict=True)
        }
        value = value + loss(adapted, features(w, q_x), q_y, 0.5) / 3
    assert (
        relative_error(
            result.grad, dict(zip(w, torch.autograd.grad(value, list(w.values())), strict=True))
        )
        < 1e-12
    )


def test_without_inner_steps_it_is_the_gradient_of_the_query_loss() -> None:
    w, loss, episodes = leaves(build("mlp")), plain_loss(build("mlp")), make_episodes()
    gradient = torch.autograd.grad(unrolled(loss, w, episodes, 0.1, 0), list(w.values()))
    assert (
        relative_error(
            ANIL(build("mlp"), RATE, 0).meta_gradient(episodes), dict(zip(w, gradient, strict=True))
        )
        < 1e-12
    )


def test_dropout_in_the_body_is_drawn_in_each_step() -> None:
    network = build("conv_batch_norm")
    network.insert(5, nn.Dropout(0.5))
    calls = counted(network)
    ANIL(network, RATE, STEPS, tasks="loop").meta_loss(make_episodes(1))
    assert calls["body"] > 2 * STEPS
    calls.clear()
    ANIL(network.eval(), RATE, STEPS, tasks="loop").meta_loss(make_episodes(1))
    assert calls["body"] == 2 + 16, "sixteen of them to look at the network"


def test_a_head_that_is_called_with_more_than_features_is_called_so() -> None:
    class Scaling(nn.Linear):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return scale * super().forward(x)

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = (
                nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Tanh()),
                Scaling(6, 3),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x), scale=10.0)

    model, episodes = ANIL(Network().double(), RATE, STEPS), make_episodes()
    torch.testing.assert_close(
        model.evaluate(episodes).aux[:, 0],
        torch.stack([model(x) for x in episodes.query_x]).detach(),
    )


@pytest.mark.parametrize("algorithm", [ANIL, FOMAML, HFMAML])
@pytest.mark.parametrize("tasks", ["loop", "threads", "vmap"])
def test_autocast(algorithm: type[MAML], tasks: str) -> None:
    torch.manual_seed(0)
    network, episodes = (
        nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, 3)),
        make_episodes(),
    )
    single = episodes._replace(
        support_x=episodes.support_x.float(), query_x=episodes.query_x.float()
    )
    model = algorithm(network, RATE, STEPS, adapt="head", tasks=tasks)
    expected = model.meta_gradient(single)
    with torch.autocast("cpu", torch.bfloat16):
        found = model.meta_gradient(single)
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert relative_error(found, expected) < 0.05


@pytest.mark.parametrize("tasks", ["loop", "threads"])
def test_a_body_that_only_autograd_can_differentiate(tasks: str) -> None:
    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 6)

        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(
                lambda x: torch.tanh(self.layer(x.flatten(1))), x, use_reentrant=False
            )

    torch.manual_seed(0)
    network = nn.Sequential(Body(), nn.Linear(6, 3)).double()
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    gradients = [
        ANIL(net, RATE, STEPS, tasks=tasks).meta_gradient(make_episodes())
        for net in (network, plain)
    ]
    assert (
        relative_error(
            dict(enumerate(gradients[0].values())), dict(enumerate(gradients[1].values()))
        )
        < 1e-12
    )
