"""Parts of a network that are named, as ``adapt=["head", "*.bias"]``."""

import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.data import DataLoader
from torchvision.models import VisionTransformer

from helpers.networks import (
    WAYS,
    build,
    leaves,
    make_episodes,
    plain_loss,
    relative_error,
    unrolled,
)
from helpers.random_numbers import drawn_on_cpu
from helpers.trainers import trainer_in_double as trainer
from lightning_maml import FOMAML, HFMAML, LSLR, MAML, Conv4, Episodes
from lightning_maml.cli import main
from lightning_maml.core.params import Params
from lightning_maml.functional.losses import Loss
from lightning_maml.networks.head_body import adapting

RATE, STEPS, RADIUS = 0.3, 3, 1e-2


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["head"], ["head.weight", "head.bias"]),
        (("head.bias",), ["head.bias"]),
        (["features.3", "*.bias"], None),
        (["features.[01].*"], None),
    ],
)
def test_names_of_modules_and_parameters_and_patterns(patterns, expected) -> None:
    network = Conv4(1, 5, 28)
    names = [name for name, _ in network.named_parameters()]
    if expected is None and "*.bias" in patterns:
        expected = [n for n in names if n.startswith("features.3.") or n.endswith(".bias")]
    elif expected is None:
        expected = [n for n in names if n.startswith(("features.0.", "features.1."))]
    assert list(adapting(network, patterns)) == expected
    assert expected


def test_frozen_parameters_that_fit_do_not_adapt() -> None:
    network = Conv4(1, 5, 28)
    network.features.requires_grad_(False)
    assert list(adapting(network, ["*.bias"])) == ["head.bias"]
    with pytest.warns(
        UserWarning, match=r"'\*.bias' fits 9 parameters, of which 8 are frozen and do not"
    ):
        MAML(network, 0.1, adapt=["head", "*.bias"])
    network.features.requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MAML(network, 0.1, adapt=["head", "*.bias"])


def test_a_parameter_that_layers_share_adapts_by_any_of_its_names() -> None:
    network = nn.ModuleDict({"one": nn.Linear(4, 4), "other": nn.Linear(4, 4)})
    network["other"].weight = network["one"].weight
    assert list(adapting(network, ["other"])) == ["one.weight", "other.bias"]


@pytest.mark.parametrize(
    ("adapt", "message"),
    [
        ("tail", "or a list of names of parameters and modules but got 'tail'; .* put it in a"),
        ([], "Expected `adapt` to name at least one parameter or module but got none"),
        (["*.bias", "tail"], "such as '1.weight', but got 'tail', which fits none"),
        (["1", "3"], "such as '3.weight', but got '1', which fits frozen ones only"),
        (["hea"], "but got 'hea', which fits none"),
        (["3.wieght"], "such as '3.weight', but got '3.wieght', which fits none"),
        ([1], r"or a list of names of parameters and modules but got \[1\]"),
        (3, "or a list of names of parameters and modules but got 3"),
    ],
)
def test_names_that_fit_nothing_are_refused(adapt, message: str) -> None:
    network = build("mlp")
    if adapt == ["1", "3"]:
        network[1].requires_grad_(False)
    with pytest.raises(ValueError, match=message):
        MAML(network, adapt=adapt)


def first_order(loss: Loss, w: Params, episodes: Episodes, names: list[str]) -> Params:
    """The gradient of the query losses at the adapted parameters, by all parameters."""
    total = torch.zeros((), dtype=torch.float64)
    for t in range(len(episodes.support_x)):
        adapted = w
        for _ in range(STEPS):
            value = loss(adapted, episodes.support_x[t], episodes.support_y[t])
            gradient = torch.autograd.grad(value, [adapted[name] for name in names])
            moved = zip(names, gradient, strict=True)
            adapted = adapted | {name: adapted[name] - RATE * g for name, g in moved}
        total = total + loss(adapted, episodes.query_x[t], episodes.query_y[t])
    total = total / len(episodes.support_x)
    return dict(zip(w, torch.autograd.grad(total, list(w.values())), strict=True))


def hessian_free(loss: Loss, w: Params, episodes: Episodes, names: list[str]) -> Params:
    """Algorithm 3 of Fallah et al. for many steps: one central difference for each, which gives
    the mixed derivatives too."""

    def gradient(params: Params, x: Tensor, y: Tensor) -> Params:
        params = {name: p.detach().requires_grad_() for name, p in params.items()}
        found = torch.autograd.grad(loss(params, x, y), list(params.values()))
        return dict(zip(params, found, strict=True))

    def beside(params: Params, direction: Params, size: float) -> Params:
        return {k: p + size * direction[k] if k in direction else p for k, p in params.items()}

    mean = {name: torch.zeros_like(p) for name, p in w.items()}
    for t in range(len(episodes.support_x)):
        support = episodes.support_x[t], episodes.support_y[t]
        path = [w]
        for _ in range(STEPS):
            g = gradient(path[-1], *support)
            path.append(beside(path[-1], {name: g[name] for name in names}, -RATE))
        v = gradient(path.pop(), episodes.query_x[t], episodes.query_y[t])
        for point in reversed(path):
            u = {name: RATE * v[name] for name in names}
            size = float(torch.cat([part.flatten() for part in u.values()]).norm())
            unit = {name: part / size for name, part in u.items()}
            ahead, behind = (gradient(beside(point, unit, h), *support) for h in (RADIUS, -RADIUS))
            v = {k: v[k] - size * (ahead[k] - behind[k]) / (2 * RADIUS) for k in v}
        mean = {k: mean[k] + v[k] / len(episodes.support_x) for k in v}
    return mean


def exact(loss: Loss, w: Params, episodes: Episodes, names: list[str]) -> Params:
    value = unrolled(loss, w, episodes, [dict.fromkeys(names, RATE)] * STEPS, STEPS)
    return dict(zip(w, torch.autograd.grad(value, list(w.values())), strict=True))


REFERENCES = {MAML: exact, FOMAML: first_order, HFMAML: hessian_free}


@pytest.mark.parametrize("tasks", ["loop", "threads", "vmap"])
@pytest.mark.parametrize(
    "patterns", [["*.bias"], ["0", "5.weight"], ["1.*"], ["*weight"]], ids=" ".join
)
@pytest.mark.parametrize("algorithm", REFERENCES)
def test_the_meta_gradient_has_the_mixed_terms(
    algorithm: type[MAML], patterns: list[str], tasks: str
) -> None:
    network, episodes = build("conv_batch_norm"), make_episodes()
    arguments = {"probe_radius": RADIUS} if algorithm is HFMAML else {}
    model = algorithm(network, RATE, STEPS, adapt=patterns, tasks=tasks, **arguments)
    found = model.meta_gradient(episodes)
    plain = build("conv_batch_norm")
    w, names = leaves(plain), list(adapting(plain, patterns))
    expected = REFERENCES[algorithm](plain_loss(plain), w, episodes, names)
    assert relative_error(found, expected) < 1e-12
    for name in w:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-8, atol=1e-12)


class LowRank(nn.Module):
    """Adds a matrix of low rank to a weight (LoRA, Hu et al. 2022)."""

    def __init__(self, weight: Tensor, rank: int = 2) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, weight.shape[1], dtype=weight.dtype) / 4)
        self.up = nn.Parameter(torch.randn(weight.shape[0], rank, dtype=weight.dtype) / 4)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


def low_rank_vit() -> VisionTransformer:
    """A small vision transformer, frozen but for its head and low-rank additions."""
    torch.manual_seed(0)
    network = VisionTransformer(16, 8, 2, 2, 8, 16, num_classes=WAYS).double().requires_grad_(False)
    nn.init.normal_(network.heads.head.weight)
    network.heads.requires_grad_(True)
    for block in network.encoder.layers:
        attention = block.self_attention
        register_parametrization(attention, "in_proj_weight", LowRank(attention.in_proj_weight))
        register_parametrization(block.mlp[0], "weight", LowRank(block.mlp[0].weight))
    return network


def photographs() -> Episodes:
    random = torch.Generator().manual_seed(3)
    labels = torch.arange(WAYS).repeat(2, 2)
    support, query = drawn_on_cpu(
        torch.rand, 2, 2, 2 * WAYS, 3, 16, 16, generator=random, dtype=torch.float64
    )
    return Episodes(support, labels, query, labels)


@pytest.mark.parametrize("tasks", ["loop", "vmap"])
@pytest.mark.parametrize("algorithm", REFERENCES)
def test_low_rank_additions_to_a_vision_transformer_adapt(
    algorithm: type[MAML], tasks: str
) -> None:
    network, episodes = low_rank_vit(), photographs()
    arguments = {"probe_radius": RADIUS} if algorithm is HFMAML else {}
    patterns = ["*.down", "*.up"]
    model = algorithm(network, RATE, STEPS, adapt=patterns, tasks=tasks, **arguments)
    found = model.meta_gradient(episodes)
    w = {name: p for name, p in leaves(network).items() if name in found}
    assert w.keys() - adapting(network, patterns).keys() == {"heads.head.weight", "heads.head.bias"}

    def loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):  # which can be differentiated twice
            return F.cross_entropy(torch.func.functional_call(network, params, (x,)), y)

    expected = REFERENCES[algorithm](loss, w, episodes, list(adapting(network, patterns)))
    assert relative_error(found, expected) < 1e-12


def test_low_rank_additions_train_and_the_rest_stays(tmp_path: Path) -> None:
    network = low_rank_vit()
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    model = MAML(network, 0.1, 2, adapt=["*.down", "*.up", "heads"], test_steps=3)
    data = DataLoader([photographs()], batch_size=None)
    run = trainer(tmp_path, max_epochs=2)
    run.fit(model, data)
    for name, p in network.named_parameters():
        assert torch.equal(before[name], p) != p.requires_grad, name
    run.test(model, data, verbose=False)
    run.save_checkpoint(tmp_path / "last.ckpt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one that adapts otherwise would warn
        again = MAML.load_from_checkpoint(
            tmp_path / "last.ckpt",
            network=low_rank_vit(),
            adapt=("*.down", "*.up", "heads"),
            weights_only=True,
        )
    assert again.adapted_part == ["*.down", "*.up", "heads"]


def test_names_in_a_config_and_on_the_command_line(tmp_path: Path, capsys) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        """
model:
  class_path: MAML
  init_args:
    network: {class_path: Conv4, init_args: {in_channels: 1, ways: 5, image_size: 28}}
    adapt: [head, "*.bias"]
data: {class_path: GlyphsDataModule}
"""
    )

    def adapt_of(*arguments: str) -> list[str]:
        with pytest.raises(SystemExit):
            main(["fit", f"--config={config}", *arguments, "--print_config"])
        return yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["adapt"]

    assert adapt_of() == ["head", "*.bias"]
    assert adapt_of("--model.adapt=body") == "body"
    assert adapt_of("""--model.adapt=["features.0", "*.weight"]""") == ["features.0", "*.weight"]


def test_a_head_beside_names_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected no `head` where `adapt` names what adapts"):
        MAML(build("mlp"), adapt=["3"], head="1")


def test_rates_of_named_parameters_are_learned() -> None:
    names = (name for name in ["*.bias"])
    model = LSLR(build("conv_batch_norm"), RATE, STEPS, adapt=names).double()
    assert model.adapted_part == ["*.bias"]
    assert len(model.learned_rates.values) == 3
    model.meta_loss(make_episodes()).backward()
    assert all((rate.grad != 0).all() for rate in model.learned_rates.values)


def test_a_name_is_no_pattern_where_it_is_that_of_a_module() -> None:
    network = nn.Sequential(nn.ModuleDict({"a[0]": nn.Linear(4, 4), "a0": nn.Linear(4, 4)}))
    assert [*adapting(network, ["0.a[0]"])] == ["0.a[0].weight", "0.a[0].bias"]
    assert [*adapting(network, ["0.a[0-9]"])] == ["0.a0.weight", "0.a0.bias"]
