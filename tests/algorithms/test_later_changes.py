"""What users do to a model and its network after it was made, and around its calls."""

import copy
from contextvars import ContextVar
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fw
import torch.nn.functional as F
from lightning.pytorch.callbacks import BaseFinetuning
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader

from helpers.networks import RATE, autograd_meta_gradient, build, make_episodes, relative_error
from helpers.random_numbers import drawn_on_cpu
from helpers.trainers import trainer_in_double
from lightning_maml import LSLR, MAML, MLP, Episodes, ProtoNet
from lightning_maml.errors import UserValueError

STEPS = 2


def vectors(tasks: int = 4, numbers: int = 4) -> Episodes:
    random = torch.Generator().manual_seed(0)
    x = drawn_on_cpu(torch.randn, tasks, 6, numbers, dtype=torch.float64, generator=random)
    y = (torch.arange(6) % 3).repeat(tasks, 1)
    return Episodes(x, y, x.flip(1), y.flip(1))


def unrolled(network: nn.Module, episodes: Episodes) -> dict[str, Tensor]:
    return autograd_meta_gradient(network, episodes, STEPS, F.cross_entropy)


# what a network keeps of its parameters


class Cached(nn.Module):
    """Computes its weight once, until it is told to forget it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Parameter(torch.randn(4, 5))
        self.head = nn.Linear(5, 3)
        self.double()

    @cached_property
    def weight(self) -> Tensor:
        return torch.tanh(self.a)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x @ self.weight)


class CachedInEvaluation(Cached):
    """Computes its weight once in evaluation mode, as timm's LeViT does."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = None

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None or self.training:
            self.kept = torch.tanh(self.a)
        return self.head(x @ self.kept)


class Uncached(Cached):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(x @ torch.tanh(self.a))


@pytest.mark.parametrize("tasks", ["auto", "loop", "vmap"])
def test_a_direct_pass_between_steps_leaves_nothing_for_the_next(tasks: str) -> None:
    network, episodes = Cached(), vectors()
    right = unrolled(Uncached(), episodes)
    model = MAML(network, RATE, STEPS, tasks=tasks)
    for _ in range(2):
        assert relative_error(model.meta_gradient(episodes), right) < 1e-12
        with torch.no_grad():
            model(episodes.query_x[0])
    assert "weight" in vars(network), "the network itself is left alone"


@pytest.mark.parametrize("network", [Cached, CachedInEvaluation])
def test_a_direct_pass_between_evaluations_leaves_nothing(network: type[nn.Module]) -> None:
    episodes = vectors()
    model, plain = MAML(network(), RATE, STEPS).eval(), MAML(Uncached(), RATE, STEPS).eval()
    right = plain.evaluate(episodes).aux
    alone = plain.adapt(episodes.support_x[1], episodes.support_y[1])(episodes.query_x[1])
    for _ in range(2):
        torch.testing.assert_close(model.evaluate(episodes).aux, right, rtol=0, atol=1e-12)
        adapted = model.adapt(episodes.support_x[1], episodes.support_y[1])
        torch.testing.assert_close(adapted(episodes.query_x[1]), alone, rtol=0, atol=1e-12)
        many = model.adapt(episodes.support_x, episodes.support_y)
        torch.testing.assert_close(many.network(1)(episodes.query_x[1]), alone, rtol=0, atol=1e-12)
        with torch.no_grad():
            model(episodes.query_x[0])


class ItsOwnCopy(nn.Sequential):
    def __deepcopy__(self, memo: dict) -> "ItsOwnCopy":
        return self


def test_a_network_that_is_its_own_copy_is_refused_and_left_alone() -> None:
    network = ItsOwnCopy(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    before = [*network.state_dict()]
    with pytest.raises(TypeError, match="copy of ItsOwnCopy shares modules with it; take out"):
        MAML(network, RATE).meta_gradient(vectors())
    assert [*network.state_dict()] == before


# the loss that is returned


@pytest.mark.parametrize(
    "outer", [lambda loss: loss, lambda loss: loss**2, torch.log], ids=["loss", "square", "log"]
)
def test_a_penalty_on_the_meta_gradient_is_refused(outer) -> None:
    network = build("mlp")
    loss = outer(MAML(network, RATE).meta_loss(make_episodes()))
    gradient = torch.autograd.grad(loss, [*network.parameters()], create_graph=True)
    penalty = sum(g.square().sum() for g in gradient)
    with pytest.raises(RuntimeError, match="Expected one derivative of the meta-loss"):
        (loss + penalty).backward()


def test_a_graph_of_the_backward_pass_may_be_made_if_it_is_not_used() -> None:
    network = build("mlp")
    model = MAML(network, RATE)
    model.meta_loss(make_episodes()).backward(create_graph=True)
    found = {name: p.grad.detach() for name, p in network.named_parameters()}
    assert relative_error(found, model.meta_gradient(make_episodes())) < 1e-12


# what a thread has of its own

GAIN: ContextVar[float] = ContextVar("gain", default=1.0)


class Gain(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        of_device = 2.0 if torch.get_default_device().type == "meta" else 1.0
        return super().forward(x) * GAIN.get() * of_device


@pytest.fixture
def two_threads() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_threads_have_the_context_variables_of_their_caller() -> None:
    network, episodes = Gain(4, 3).double(), vectors()
    token = GAIN.set(0.1)
    try:
        loop, threads = (
            MAML(network, RATE, STEPS, tasks=tasks).meta_gradient(episodes)
            for tasks in ("loop", "threads")
        )
    finally:
        GAIN.reset(token)
    assert relative_error(threads, loop) == 0
    assert relative_error(MAML(network, RATE, STEPS).meta_gradient(episodes), loop) > 0.1


@pytest.mark.usefixtures("two_threads")
def test_no_threads_are_used_where_torch_has_a_default_device() -> None:
    # large enough that each task would have a thread of its own
    network, episodes = Gain(2**14, 3).double(), vectors(numbers=2**14)
    open_model, threads = MAML(network, RATE), MAML(network, RATE, tasks="threads")
    assert open_model._execution(episodes).tasks == "threads"
    with torch.device("meta"):
        assert open_model._execution(episodes).tasks == "loop"
        with pytest.raises(ValueError, match=r"Expected no mode of torch .*tasks='threads'"):
            threads.meta_gradient(episodes)


def test_tasks_are_stacked_under_another_default_device() -> None:
    network, episodes = build("mlp"), make_episodes()
    right = MAML(network, RATE, tasks="loop").meta_gradient(episodes)
    with torch.device("meta"):
        found = MAML(network, RATE, tasks="vmap").meta_gradient(episodes)
    assert relative_error(found, right) < 1e-12


# compiled models and other changes of the network


@pytest.mark.parametrize("change", ["hook", "forward", "builtin", "class"])
def test_a_changed_network_is_compiled_anew(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda program: program)
    network, episodes = build("mlp"), make_episodes()
    compiled = MAML(network, RATE, compiled=True)
    compiled.meta_gradient(episodes)
    if change == "hook":
        network[1].register_forward_hook(lambda module, inputs, outputs: 2 * outputs)
    elif change == "forward":
        network[2].forward = lambda x: torch.sin(x)
    elif change == "builtin":
        network[2].forward = torch.sin
    else:
        network[2].__class__ = nn.Sigmoid
    right = MAML(network, RATE, tasks="loop").meta_gradient(episodes)
    assert relative_error(compiled.meta_gradient(episodes), right) < 1e-12


def test_a_network_of_another_type_is_checked_anew() -> None:
    model, episodes = MAML(build("mlp").float(), RATE), make_episodes()
    single = episodes._replace(
        support_x=episodes.support_x.float(), query_x=episodes.query_x.float()
    )
    model.meta_gradient(single)
    model.double()
    with pytest.raises(ValueError, match="Expected inputs of the network's type"):
        model.meta_gradient(single)


class Thawing(BaseFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.network[1])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.network[1], optimizer)


def test_frozen_layers_need_no_gradient_of_their_learned_rate(tmp_path) -> None:
    model = MAML(build("mlp"), RATE, STEPS, inner_rates="per_layer")
    frozen = model.network[1].weight.detach().clone()
    run = trainer_in_double(tmp_path, max_epochs=2, callbacks=[Thawing()])
    run.fit(model, DataLoader([make_episodes()], batch_size=None))
    assert not torch.equal(model.network[1].weight, frozen)


class Tangent(nn.Module):
    """Its outputs are a derivative by forward-mode differentiation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Conv1d(2, 4, 3), nn.Linear(16, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        with fw.dual_level():
            outputs = torch.tanh(self.body(fw.make_dual(x, torch.ones_like(x))))
            return self.head(fw.unpack_dual(outputs).tangent.flatten(1))


@pytest.mark.parametrize("tasks", ["auto", "loop"])
def test_networks_that_differentiate_forwards(tasks: str) -> None:
    x = torch.randn(3, 6, 2, 6, dtype=torch.float64)
    y = (torch.arange(6) % 3).repeat(3, 1)
    episodes = Episodes(x, y, x.flip(1), y)
    found = MAML(Tangent(), RATE, STEPS, tasks=tasks).meta_gradient(episodes)
    assert relative_error(found, unrolled(Tangent(), episodes)) < 1e-12


# one task of a regression


@pytest.mark.parametrize("loss", [F.mse_loss, nn.L1Loss()])
def test_a_network_is_adapted_to_one_task_of_a_regression(loss) -> None:
    x, y = torch.rand(10, 4, dtype=torch.float64), torch.rand(10, 2, dtype=torch.float64)
    network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    model = MAML(network, RATE, STEPS, loss=loss)
    w = {name: p.detach().requires_grad_() for name, p in network.named_parameters()}
    for _ in range(STEPS):
        gradient = torch.autograd.grad(loss(functional_call(network, w, (x,)), y), [*w.values()])
        w = {
            name: (p - RATE * g).detach().requires_grad_()
            for (name, p), g in zip(w.items(), gradient, strict=True)
        }
    adapted = model.adapt(x, y, many=False)
    torch.testing.assert_close(adapted(x), functional_call(network, w, (x,)), rtol=0, atol=1e-12)
    of_many = model.adapt(x[None], y[None])
    torch.testing.assert_close(of_many(x[None])[0], adapted(x), rtol=0, atol=1e-12)


def test_errors_about_targets_say_that_they_were_taken_for_many_tasks() -> None:
    x, y = torch.rand(10, 4), torch.rand(10, 2)
    model = MAML(nn.Linear(4, 2), RATE, loss=F.mse_loss)
    with pytest.raises(ValueError, match="number of examples but got 4 and 2") as guessed:
        model.adapt(x, y)
    assert "for one task say many=False" in guessed.value.__notes__[0]
    with pytest.raises(ValueError, match="number of examples but got 4 and 2") as said:
        model.adapt(x, y, many=True)
    assert not hasattr(said.value, "__notes__")


def test_integer_labels_of_many_tasks_may_be_said_to_be_many() -> None:
    episodes = make_episodes()
    model = MAML(build("mlp"), RATE)
    of_many = model.adapt(episodes.support_x, episodes.support_y, many=True)
    assert of_many(episodes.query_x).shape == (3, 9, 3)
    with pytest.raises(ValueError, match="at least the dimensions"):
        model.adapt(episodes.support_x[0], episodes.support_y[0], many=True)


# sentences


def adam() -> torch.optim.Optimizer:
    return torch.optim.Adam([nn.Parameter(torch.zeros(1))])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: MAML(nn.Linear),
            r"`network` to be a module but got the class Linear; .*Linear\(\)",
        ),
        (lambda: MAML(lambda x: x), "`network` to be a module but got function"),
        (lambda: ProtoNet(None), "`network` to be a module but got NoneType"),
        (
            lambda: MAML(MLP(4, 3), optimizer=adam()),
            "`optimizer` to be a function .* got a Adam; .*SGD",
        ),
        (lambda: MAML(MLP(4, 3), optimizer="adam"), "`optimizer` to be .* but got 'adam'"),
        (
            lambda: ProtoNet(
                MLP(4, 3), lr_scheduler=torch.optim.lr_scheduler.StepLR(adam(), step_size=1)
            ),
            "`lr_scheduler` to be a function that makes one but got a StepLR; .*StepLR, step_size",
        ),
        (
            lambda: MAML(build("mlp")).adapt(*make_episodes()[:2], steps=1.5),
            "`steps` to be a whole number but got 1.5",
        ),
    ],
)
def test_arguments_of_another_type_are_refused_where_they_are_given(make, message: str) -> None:
    with pytest.raises(TypeError, match=f"Expected {message}"):
        make()


def test_factories_in_other_forms_are_taken() -> None:
    optimizer, scheduler = partial(torch.optim.SGD, lr=0.1), torch.optim.lr_scheduler.ConstantLR
    configured = MAML(MLP(4, 3), optimizer=optimizer, lr_scheduler=scheduler).configure_optimizers()
    assert configured["optimizer"].param_groups[0]["initial_lr"] == 0.1


@pytest.mark.parametrize("tasks", ["loop", "vmap"])
def test_batch_norm_of_one_example_alone_is_refused(tasks: str) -> None:
    network = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    episodes = vectors()
    message = r"several values in each channel, .* got one example; .*batch_norm='support'"
    one_query = episodes._replace(query_x=episodes.query_x[:, :1], query_y=episodes.query_y[:, :1])
    with pytest.raises(ValueError, match=message):
        MAML(network, RATE, tasks=tasks).meta_gradient(one_query)
    cured = MAML(network, RATE, batch_norm="support", tasks=tasks)
    cured.meta_gradient(one_query)
    adapted = cured.adapt(episodes.support_x[0], episodes.support_y[0])
    assert adapted(episodes.query_x[0, :1]).shape == (1, 3)


def test_transposed_outputs_are_refused() -> None:
    class Transposed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).T

    with pytest.raises(ValueError, match=r"logits \[examples, ways\] .* but got \[3, 6\]"):
        MAML(Transposed(4, 3).double(), RATE).meta_gradient(vectors())


def test_complex_labels_are_refused() -> None:
    episodes = vectors()
    complex_y = episodes.support_y * 1j
    with pytest.raises(ValueError, match="`support_y` to hold integers or real floats"):
        MAML(MLP(4, 3).double(), RATE).meta_gradient(episodes._replace(support_y=complex_y))


def test_a_model_that_was_frozen_says_how_to_thaw_it() -> None:
    model = MAML(build("mlp"), RATE)
    model.freeze()
    with pytest.raises(ValueError, match=r"all of them are frozen, .*model.unfreeze\(\)"):
        model.adapt(*make_episodes()[:2])


def test_prototypes_of_logits_are_warned_of() -> None:
    episodes = vectors()
    with pytest.warns(
        UserWarning, match="those of this network have 3 numbers, .*leave the head out"
    ):
        ProtoNet(MLP(4, 3).double()).meta_loss(episodes)


def test_a_long_list_of_losses_is_cut_short() -> None:
    episodes = vectors(tasks=20)
    broken = episodes._replace(query_x=episodes.query_x * float("inf"))
    with pytest.raises(FloatingPointError, match=r"tasks \[0, 1, 2, 3, 4, \.\.\.\] at step 0"):
        MAML(MLP(4, 3).double()).meta_loss(broken)


def test_losses_may_go_backward_after_the_parameters_have_moved() -> None:
    network = build("mlp")
    model, optimizer = MAML(network, RATE), torch.optim.SGD(network.parameters(), lr=0.1)
    right = model.meta_gradient(make_episodes(seed=2))
    first, second = (model.meta_loss(make_episodes(seed=seed)) for seed in (1, 2))
    first.backward()
    optimizer.step()
    optimizer.zero_grad()
    second.backward()
    found = {name: p.grad for name, p in network.named_parameters()}
    assert relative_error(found, right) < 1e-12


class Keeping(nn.Module):
    """Keeps what it returned last, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.calls = None, 0

    def forward(self, x: Tensor) -> Tensor:
        self.last, self.calls = x, self.calls + 1
        return x


def test_a_layer_that_kept_something_may_be_replaced() -> None:
    network, episodes = build("mlp"), make_episodes()
    head = network[3]
    network[3] = nn.Sequential(Keeping(), head)
    model = MAML(network, RATE, STEPS)
    model.meta_gradient(episodes)
    network[3] = head
    assert relative_error(model.meta_gradient(episodes), unrolled(build("mlp"), episodes)) < 1e-12


def test_adaptation_uses_no_threads_where_torch_has_a_default_device(two_threads: Any) -> None:
    episodes = vectors(numbers=2**15)
    model = MAML(Gain(2**15, 3).double(), RATE)
    model.adapt(episodes.support_x, episodes.support_y)
    support = episodes._replace(query_x=episodes.support_x, query_y=episodes.support_y)
    chosen = partial(
        model._executor.of_adaptation, model.network, torch.device("cpu"), support, (), bool
    )
    assert chosen().tasks == "threads"
    with torch.device("meta"):
        assert chosen().tasks == "loop"


class CachedOutOfTraining(CachedInEvaluation):
    """The same, but training passes leave nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return Uncached.forward(self, x) if self.training else super().forward(x)


def test_a_copy_of_a_trained_model_is_checked_in_each_mode_anew() -> None:
    episodes = vectors()
    model = MAML(CachedOutOfTraining(), RATE, STEPS)
    model.meta_loss(episodes)
    right = model.eval().evaluate(episodes).loss
    copied = copy.deepcopy(model).train()
    copied.meta_loss(episodes)
    torch.testing.assert_close(copied.eval().evaluate(episodes).loss, right)


# settings that are changed on the model


@pytest.mark.parametrize("adapt", ["all", "head"])
def test_a_checkpoint_has_the_settings_as_they_were_changed(adapt: Any, tmp_path: Path) -> None:
    def network() -> nn.Module:
        return MLP(4, 3, hidden=(5,), activation="tanh").double()

    model = MAML(network(), RATE, 1)
    model.inner_lr, model.train_steps, model.test_steps = 2 * RATE, 2, 3
    model.adapted_part = adapt
    run = trainer_in_double(tmp_path)
    run.fit(model, DataLoader([vectors()], batch_size=None))
    run.save_checkpoint(tmp_path / "changed.ckpt")
    loaded = MAML.load_from_checkpoint(tmp_path / "changed.ckpt", network=network())
    assert loaded.train_steps == 2
    assert loaded.adapted_part == adapt
    expected = model.eval().evaluate(vectors()).loss
    assert loaded.eval().evaluate(vectors()).loss.equal(expected)


def test_learned_rates_are_not_changed_by_where_they_started() -> None:
    model = LSLR(MLP(4, 3, hidden=(5,)).double(), RATE, STEPS)
    with pytest.raises(UserValueError, match="its rates are learned"):
        model.inner_lr = 2 * RATE
    assert model.inner_lr == RATE


class Own(MAML):
    """Saves arguments of its own, under names of the library's."""

    def __init__(self, width: int, head: str = "linear", inner_lr: float = 0.2) -> None:
        network = MLP(4, 3, hidden=(width,), activation="tanh")
        super().__init__(network.double(), inner_lr=inner_lr / 2)
        self.save_hyperparameters()


def saved_and_loaded(model: MAML, folder: Path, **arguments: Any) -> MAML:
    run = trainer_in_double(folder)
    run.fit(model, DataLoader([vectors()], batch_size=None))
    run.save_checkpoint(folder / "model.ckpt")
    return type(model).load_from_checkpoint(folder / "model.ckpt", **arguments)


def test_arguments_of_a_subclass_are_saved_as_they_are(tmp_path: Path) -> None:
    model = Own(5, head="cosine")
    model.inner_lr = 0.3  # of which the argument, twice the rate, knows nothing
    loaded = saved_and_loaded(model, tmp_path)
    assert loaded.inner_lr == 0.1
    assert loaded.hparams["head"] == "cosine"


def test_learned_rates_are_loaded_though_steps_were_changed(tmp_path: Path) -> None:
    network = MLP(4, 3, hidden=(5,), activation="tanh").double()
    model = LSLR(network, RATE, 3)
    model.train_steps = 2
    loaded = saved_and_loaded(model, tmp_path, network=copy.deepcopy(network))
    assert loaded.train_steps == 3
    assert loaded.learned_rates.state_dict().keys() == model.learned_rates.state_dict().keys()
