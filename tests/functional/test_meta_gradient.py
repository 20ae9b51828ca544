"""The meta-gradient in float64 against independent references.

They are autograd through the unrolled loop, central differences and first principles.
"""

import weakref
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.networks import (
    NETWORKS,
    RATE,
    autograd_meta_gradient,
    build,
    flat,
    leaves,
    make_episodes,
    one_hot_mse,
    plain_loss,
    relative_error,
    unrolled,
)
from helpers.random_numbers import drawn_on_cpu
from lightning_maml import Episodes, ResampledEpisodes, meta_gradient
from lightning_maml.core.params import Params
from lightning_maml.execution.task_map import are_stacked
from lightning_maml.networks.functional_network import FunctionalNetwork

SMOOTH = ["mlp", "conv_group_norm", "conv_batch_norm"]


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
@pytest.mark.parametrize("name", SMOOTH)
def test_exact_equals_autograd_through_the_unrolled_loop(name: str, steps: int) -> None:
    network, episodes = build(name), make_episodes()
    result = meta_gradient(
        plain_loss(network), leaves(network), episodes, inner_lr=RATE, steps=steps
    )
    assert relative_error(result.grad, autograd_meta_gradient(network, episodes, steps)) < 1e-12
    one_by_one = [
        unrolled(
            plain_loss(network),
            leaves(network),
            Episodes(*(x[t : t + 1] for x in episodes)),
            RATE,
            steps,
        )
        for t in range(3)
    ]
    torch.testing.assert_close(result.query_loss, torch.stack(one_by_one).detach())


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("name", SMOOTH)
def test_exact_equals_central_differences_of_the_meta_objective(name: str, steps: int) -> None:
    network, episodes = build(name), make_episodes()
    w = leaves(network)
    loss = plain_loss(network)
    gradient = meta_gradient(loss, w, episodes, inner_lr=RATE, steps=steps).grad
    random = torch.Generator().manual_seed(2)
    for _ in range(3):
        direction = {
            k: drawn_on_cpu(torch.randn, v.shape, dtype=v.dtype, generator=random)
            for k, v in w.items()
        }
        length = flat(direction).norm()
        direction = {k: v / length for k, v in direction.items()}
        h = 1e-6
        ahead, behind = (
            {k: (w[k] + s * direction[k]).detach().requires_grad_() for k in w} for s in (h, -h)
        )
        slope = (
            unrolled(loss, ahead, episodes, RATE, steps)
            - unrolled(loss, behind, episodes, RATE, steps)
        ) / (2 * h)
        assert abs(flat(gradient) @ flat(direction) - slope.detach()) < 1e-7 * flat(gradient).norm()


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("name", SMOOTH)
def test_finite_difference_converges_at_second_order_in_the_radius(name: str, steps: int) -> None:
    network, episodes = build(name), make_episodes()
    expected = autograd_meta_gradient(network, episodes, steps)

    def error(radius: float) -> float:
        actual = meta_gradient(
            *(plain_loss(network), leaves(network), episodes),
            inner_lr=RATE,
            steps=steps,
            curvature="finite_difference",
            probe_radius=radius,
        )
        return relative_error(actual.grad, expected)

    errors = [error(radius) for radius in (4e-2, 2e-2, 1e-2)]
    orders = [torch.tensor(a / b).log2() for a, b in pairwise(errors)]
    assert all(1.9 < order < 2.1 for order in orders), errors


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-8), (torch.float32, 1e-3)])
@pytest.mark.parametrize("name", SMOOTH)
def test_finite_difference_is_close_at_its_default_radius(
    name: str, dtype: torch.dtype, bound: float
) -> None:
    network, episodes = build(name), make_episodes()
    expected = autograd_meta_gradient(network, episodes, 2)
    network.to(dtype)
    episodes = episodes._replace(
        support_x=episodes.support_x.to(dtype), query_x=episodes.query_x.to(dtype)
    )
    actual = meta_gradient(
        plain_loss(network),
        leaves(network),
        episodes,
        inner_lr=RATE,
        steps=2,
        curvature="finite_difference",
    ).grad
    assert relative_error({k: v.double() for k, v in actual.items()}, expected) < bound


def test_finite_difference_of_a_zero_direction_is_zero() -> None:
    def loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
        return ((params["w"] - x) ** 2).sum()

    x = torch.ones(1, 1, 2, dtype=torch.float64)
    y = torch.zeros(1, 1)
    result = meta_gradient(
        loss,
        {"w": x[0]},
        Episodes(x, y, x, y),
        inner_lr=0.1,
        steps=1,
        curvature="finite_difference",
    )
    assert torch.equal(result.grad["w"], torch.zeros(1, 2, dtype=torch.float64))


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_no_curvature_is_the_gradient_at_the_adapted_parameters_to_the_last_bit(steps: int) -> None:
    network = build("conv_group_norm")
    episodes = make_episodes(tasks=1)
    loss = plain_loss(network)
    w = leaves(network)
    optimizer = torch.optim.SGD(w.values(), RATE)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(w, episodes.support_x[0], episodes.support_y[0]).backward()
        optimizer.step()
    expected = torch.autograd.grad(
        loss(w, episodes.query_x[0], episodes.query_y[0]), list(w.values())
    )
    actual = meta_gradient(
        loss, leaves(network), episodes, inner_lr=RATE, steps=steps, curvature="none"
    ).grad
    assert all(torch.equal(a, e) for a, e in zip(actual.values(), expected, strict=True))


@pytest.mark.parametrize("criterion", [F.cross_entropy, one_hot_mse], ids=["cross_entropy", "mse"])
@pytest.mark.parametrize(
    ("tasks", "chunk_size"),
    [("loop", None), ("threads", None), ("vmap", None), ("vmap", 2), ("loop", 2), ("threads", 2)],
)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_execution_gives_the_same_meta_gradient(
    name: str, tasks: str, chunk_size: int | None, criterion
) -> None:
    network, episodes = build(name), make_episodes()
    functional = FunctionalNetwork(network, vectorised=are_stacked(tasks, chunk_size))

    def loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
        return criterion(functional(params, x), y)

    exact = autograd_meta_gradient(network, episodes, 2, criterion)
    for curvature, bound in (("exact", 1e-12), ("finite_difference", 1e-7)):
        how = {"curvature": curvature, "tasks": tasks, "chunk_size": chunk_size}
        actual = meta_gradient(loss, functional.params, episodes, inner_lr=RATE, steps=2, **how)
        assert relative_error(actual.grad, exact) < bound


@pytest.mark.usefixtures("two_threads")
def test_tasks_in_threads_do_not_change_the_number_of_threads() -> None:
    network, episodes = build("mlp"), make_episodes(tasks=5)
    functional = FunctionalNetwork(network)
    before = torch.get_num_threads()
    meta_gradient(
        lambda w, x, y: F.cross_entropy(functional(w, x), y),
        functional.params,
        episodes,
        inner_lr=RATE,
        steps=1,
        tasks="threads",
    )
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("tasks", ["loop", "vmap"])
def test_dropout_draws_the_same_masks_in_every_evaluation_of_a_step(tasks: str) -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Flatten(),
        torch.nn.Linear(64, 12),
        torch.nn.Tanh(),
        torch.nn.Dropout(0.5),
        torch.nn.Linear(12, 3),
    )
    network.double()
    episodes = make_episodes(tasks=1)

    def seeded(curvature: str) -> tuple[Params, Tensor]:
        torch.manual_seed(3)
        grad = meta_gradient(
            plain_loss(network),
            leaves(network),
            episodes,
            inner_lr=RATE,
            steps=3,
            curvature=curvature,
            tasks=tasks,
        ).grad
        return grad, torch.rand(1)

    (exact, after), (difference, after_difference) = seeded("exact"), seeded("finite_difference")
    assert relative_error(difference, exact) < 1e-7
    assert torch.equal(after, after_difference), (
        "masks are drawn once per step, however often it is evaluated"
    )
    if tasks == "loop":  # vmap draws the masks of its tasks in another order than the oracle
        torch.manual_seed(3)
        assert relative_error(exact, autograd_meta_gradient(network, episodes, 3)) < 1e-12


def test_attention_has_an_exact_meta_gradient() -> None:
    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.head = torch.nn.Linear(8, 24), torch.nn.Linear(64, 3)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x.flatten(1, 2)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            return self.head(F.scaled_dot_product_attention(q, k, v).flatten(1))

    torch.manual_seed(0)
    network, episodes = Attention().double(), make_episodes(tasks=2)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = autograd_meta_gradient(network, episodes, 2)
    for tasks in ("loop", "vmap"):
        actual = meta_gradient(
            plain_loss(network), leaves(network), episodes, inner_lr=RATE, steps=2, tasks=tasks
        ).grad
        assert relative_error(actual, expected) < 1e-12


@pytest.mark.usefixtures("two_threads")
def test_threads_refuse_a_loss_that_draws_random_numbers() -> None:
    network, episodes = build("mlp"), make_episodes()
    with pytest.raises(RuntimeError, match="use tasks='loop'"):
        meta_gradient(
            lambda w, x, y: plain_loss(network)(w, x + torch.rand(()), y),
            leaves(network),
            episodes,
            inner_lr=RATE,
            steps=1,
            tasks="threads",
        )


@pytest.mark.parametrize("tasks", ["loop", "threads", "vmap"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_works_without_grad_mode(mode, tasks: str) -> None:
    network, episodes = build("conv_group_norm"), make_episodes()
    functional = FunctionalNetwork(network, vectorised=tasks == "vmap")
    expected = autograd_meta_gradient(network, episodes, 2)
    with mode():
        here = Episodes(*(tensor.clone() for tensor in episodes))
        actual = meta_gradient(
            lambda w, x, y: F.cross_entropy(functional(w, x), y),
            functional.params,
            here,
            inner_lr=RATE,
            steps=2,
            tasks=tasks,
        )
    assert relative_error(actual.grad, expected) < 1e-12


class SavedForBackward(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that graphs hold at once."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        super().__init__(self.pack, lambda holder: holder[0])

    def pack(self, tensor: Tensor) -> list[Tensor]:
        class Holder(list):
            pass

        size = tensor.numel() * tensor.element_size()
        self.now += size
        self.peak = max(self.peak, self.now)
        holder = Holder([tensor])
        weakref.finalize(holder, self.free, size)
        return holder

    def free(self, size: int) -> None:
        self.now -= size


def test_the_graphs_of_exact_curvature_do_not_grow_with_the_steps() -> None:
    network, episodes = build("conv_batch_norm"), make_episodes(tasks=1)
    peaks = {}
    for steps in (1, 2, 10):
        ours, oracle = SavedForBackward(), SavedForBackward()
        with ours:
            meta_gradient(
                plain_loss(network), leaves(network), episodes, inner_lr=RATE, steps=steps
            )
        with oracle:
            autograd_meta_gradient(network, episodes, steps)
        peaks[steps] = (ours.peak, oracle.peak)
    assert peaks[10][1] > 4 * peaks[1][1], "the unrolled loop keeps every step's graph"
    assert peaks[10][0] == peaks[2][0], "the recursion keeps one"
    assert peaks[10][0] < peaks[1][0], "and one step's, kept for speed, beside the query loss's"


@pytest.mark.parametrize("tasks", ["loop", "threads"])
def test_autocast_keeps_no_copies_of_the_inner_steps_parameters(tasks: str) -> None:
    network, episodes = build("mlp").float(), make_episodes()
    episodes = episodes._replace(
        support_x=episodes.support_x.float(), query_x=episodes.query_x.float()
    )
    functional = FunctionalNetwork(network)
    seen: list[weakref.ref[Tensor]] = []

    def loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
        seen.append(weakref.ref(params["1.weight"]))
        outputs = functional(params, x)
        assert outputs.dtype == torch.bfloat16
        return F.cross_entropy(outputs, y)

    with torch.autocast("cpu", torch.bfloat16):
        meta_gradient(
            loss, functional.params, episodes, inner_lr=RATE, steps=4, curvature="none", tasks=tasks
        )
        assert len(seen) == 15
        assert not any(reference() is not None for reference in seen)


def test_unused_parameters_get_a_zero_meta_gradient() -> None:
    network, episodes = build("mlp"), make_episodes()
    w = leaves(network) | {"unused": torch.ones(2, dtype=torch.float64)}

    def loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
        return plain_loss(network)({k: v for k, v in params.items() if k != "unused"}, x, y)

    for tasks in ("loop", "vmap"):
        for curvature in ("exact", "none", "finite_difference"):
            grad = meta_gradient(
                loss, w, episodes, inner_lr=RATE, steps=2, curvature=curvature, tasks=tasks
            ).grad
            assert torch.equal(grad.pop("unused"), torch.zeros(2, dtype=torch.float64))
            assert all(g.abs().sum() > 0 for g in grad.values())


def test_a_loss_linear_in_the_parameters_has_no_curvature() -> None:
    def loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
        return (params["w"] * x).sum()

    x = torch.tensor([[[2.0, 3.0]]])
    episodes = Episodes(x, torch.zeros(1, 1), x, torch.zeros(1, 1))
    assert torch.equal(
        meta_gradient(loss, {"w": torch.zeros(1, 2)}, episodes, inner_lr=0.1, steps=2).grad["w"],
        x[0],
    )


def test_aux_of_the_query_loss_comes_back_per_task() -> None:
    network, episodes = build("mlp"), make_episodes()

    def loss(params: Params, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        outputs = torch.func.functional_call(network, params, (x,))
        return F.cross_entropy(outputs, y), outputs

    for tasks in ("loop", "vmap"):
        result = meta_gradient(
            loss, leaves(network), episodes, inner_lr=RATE, steps=1, has_aux=True, tasks=tasks
        )
        assert result.aux.shape == (3, 9, 3)
        assert not result.aux.requires_grad
        losses = torch.stack(
            [F.cross_entropy(o, y) for o, y in zip(result.aux, episodes.query_y, strict=True)]
        )
        torch.testing.assert_close(result.query_loss, losses)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inner_lr": -0.1}, "`inner_lr` to be a finite number of at least 0 but got -0.1"),
        ({"inner_lr": float("nan")}, "`inner_lr`"),
        ({"steps": -1}, "`steps` to be at least 0 but got -1"),
        (
            {"curvature": "hessian"},
            "`curvature` to be 'exact', 'none' or 'finite_difference' but got 'hessian'",
        ),
        ({"curvature": "finite_difference", "probe_radius": 0.0}, "`probe_radius`"),
        ({"probe_radius": 0.1}, "`probe_radius`"),
        ({"tasks": "parallel"}, "`tasks` to be 'loop', 'threads' or 'vmap' but got 'parallel'"),
        ({"tasks": "vmap", "chunk_size": 0}, "`chunk_size` to be at least 1 but got 0"),
    ],
)
def test_arguments_out_of_range_are_refused(change: dict, message: str) -> None:
    network = build("mlp")
    with pytest.raises(ValueError, match=message):
        meta_gradient(
            plain_loss(network),
            leaves(network),
            make_episodes(),
            **({"inner_lr": 0.1, "steps": 1} | change),
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"support_y": torch.zeros(3, 5)},
            "`support_x` and `support_y` to hold the same number of examples but got 6 and 5",
        ),
        ({"query_y": torch.zeros(2, 9)}, "same number of tasks"),
        ({"support_x": torch.zeros(6)}, "at least the dimensions"),
        (
            {"support_x": torch.zeros(3, 0, 64), "support_y": torch.zeros(3, 0)},
            "`support_x` to hold at least one example per task",
        ),
        (
            {"query_x": torch.zeros(3, 0, 64), "query_y": torch.zeros(3, 0)},
            "`query_x` to hold at least one example per task",
        ),
    ],
)
def test_episodes_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    network = build("mlp")
    with pytest.raises(ValueError, match=message):
        meta_gradient(
            plain_loss(network),
            leaves(network),
            make_episodes()._replace(**change),
            inner_lr=0.1,
            steps=1,
        )


@pytest.mark.parametrize("tasks", ["loop", "vmap"])
def test_a_loss_that_is_no_scalar_is_refused(tasks: str) -> None:
    functional = FunctionalNetwork(build("mlp"), vectorised=tasks == "vmap")
    loss = lambda w, x, y: F.cross_entropy(functional(w, x), y, reduction="none")
    with pytest.raises(
        ValueError, match=r"to be a scalar but got shape \[6\]; use reduction='mean'"
    ):
        meta_gradient(loss, functional.params, make_episodes(), inner_lr=RATE, steps=1, tasks=tasks)


def test_losses_on_the_way_draw_their_data_at_their_points() -> None:
    """A task that moves its images with the parameters: each loss sees them where it is taken."""
    network, episodes, weights = build("mlp"), make_episodes(), [0.2, 0.3, 0.5]
    loss, name = plain_loss(network), next(iter(dict(network.named_parameters())))

    def sample(w: Params, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x + 10 * w[name].detach().mean(), y

    w = leaves(network)
    total = torch.zeros((), dtype=torch.float64)
    for s_x, s_y, q_x, q_y in zip(*episodes, strict=True):
        point = w
        for weight in weights:
            gradient = torch.autograd.grad(
                loss(point, *sample(point, s_x, s_y)), list(point.values()), create_graph=True
            )
            point = {key: p - RATE * g for (key, p), g in zip(point.items(), gradient, strict=True)}
            total = total + weight * loss(point, *sample(point, q_x, q_y)) / 3
    expected = dict(zip(w, torch.autograd.grad(total, list(w.values())), strict=True))
    found = meta_gradient(
        loss, leaves(network), episodes, inner_lr=RATE, steps=3, step_weights=weights, sample=sample
    )
    assert relative_error(found.grad, expected) < 1e-12


@pytest.mark.parametrize(
    ("curvature", "batches"), [("exact", 5), ("none", 3), ("finite_difference", 5)]
)
def test_each_batch_is_drawn_once_and_without_curvature_no_hessian_batch_is(
    curvature: str, batches: int
) -> None:
    """S_0, S_1 and the query batch, and with curvature D_0 and D_1, each at its point."""
    network, drawn = build("mlp"), []
    support_x, support_y, query_x, query_y = make_episodes(1)
    x = torch.arange(1.0, 5.0).double().reshape(2, 1, 2, 1, 1, 1, 1) * support_x[:, None]
    y = support_y.expand(1, 2, -1)
    episodes = ResampledEpisodes(x[0], y, x[1], y, query_x, query_y)

    def sample(w: Params, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        drawn.append((flat(w), x))
        return x, y

    meta_gradient(
        plain_loss(network),
        leaves(network),
        episodes,
        inner_lr=RATE,
        steps=2,
        curvature=curvature,
        sample=sample,
    )
    in_order = [x[0, 0, 0], x[0, 0, 1], query_x[0], x[1, 0, 1], x[1, 0, 0]][:batches]
    assert [found.tolist() for _, found in drawn] == [of.tolist() for of in in_order]
    # D_j is drawn at w_j, where S_j was
    at = [w for w, _ in drawn]
    assert all(torch.equal(at[3 + number], at[1 - number]) for number in range(batches - 3))


def test_without_weights_the_losses_on_the_way_are_not_computed() -> None:
    network, episodes, judged = build("mlp"), make_episodes(2), []
    loss = plain_loss(network)

    def query_loss(w: Params, task: Episodes) -> Tensor:
        judged.append(task)
        return loss(w, task.query_x, task.query_y)

    meta_gradient(loss, leaves(network), episodes, inner_lr=RATE, steps=3, query_loss=query_loss)
    assert len(judged) == 2
