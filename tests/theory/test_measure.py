"""Measured constants against known ones, and against first principles on small networks."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from helpers.networks import build, flat, make_episodes, plain_loss
from helpers.random_numbers import drawn_on_cpu
from lightning_maml import MAML, Conv4, Episodes, ResampledEpisodes
from lightning_maml.core.params import Params
from lightning_maml.datamodules import GlyphsDataModule
from lightning_maml.networks.functional_network import FunctionalNetwork
from lightning_maml.theory.curvature import hessian_lipschitz, smoothness
from lightning_maml.theory.measure import Probe


def rotation(size: int) -> Tensor:
    return torch.linalg.qr(
        torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    )[0]


def at(w: Tensor) -> Params:
    """As two tensors, so that norms must run over all of them."""
    return {"first": w[:1], "rest": w[1:]}


def joined(params: Params) -> Tensor:
    return torch.cat([params["first"], params["rest"]])


def quadratic(params: Params) -> Tensor:
    curvatures = torch.tensor([3.0, -5.0, 1.0, 0.5, 4.5], dtype=torch.float64)
    return (curvatures * (rotation(5) @ joined(params)) ** 2).sum() / 2


WEIGHTS = torch.linspace(0.5, 3, 20, dtype=torch.float64)


def cosine_sum(params: Params) -> Tensor:
    return (WEIGHTS * torch.cos(rotation(20) @ joined(params))).sum()


def monkey_saddle(params: Params) -> Tensor:
    x, y = rotation(2) @ joined(params)
    return (x**3 - 3 * x * y**2) / 2


POINT = torch.linspace(-2, 2, 20, dtype=torch.float64)
KNOWN = {
    "quadratic": (quadratic, at(torch.ones(5, dtype=torch.float64)), 5.0, 0.0),
    "cosine_sum": (
        cosine_sum,
        at(rotation(20).T @ POINT),
        (WEIGHTS * POINT.cos()).abs().max(),
        (WEIGHTS * POINT.sin()).abs().max(),
    ),
    "monkey_saddle": (monkey_saddle, at(torch.tensor([0.3, 0.4], dtype=torch.float64)), 1.5, 3.0),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", KNOWN)
def test_smoothness_and_hessian_lipschitz_of_functions_with_known_constants(
    name: str, dtype: torch.dtype
) -> None:
    loss, w, L, rho = KNOWN[name]
    w = {key: tensor.to(dtype) for key, tensor in w.items()}

    def cast_loss(params: Params) -> Tensor:
        return loss({key: tensor.double() for key, tensor in params.items()}).to(dtype)

    measured = smoothness(cast_loss, w)
    assert measured.value == pytest.approx(float(L), rel=0.02)
    assert flat(measured.direction).norm() == pytest.approx(1)
    assert measured.gradient_evaluations < 250
    assert hessian_lipschitz(cast_loss, w).value == pytest.approx(
        float(rho), rel=0.05, abs=1e-8 if dtype == torch.float64 else 1e-2
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [100, 1000])
def test_one_large_eigenvalue_among_equal_ones_is_found(size: int, dtype: torch.dtype) -> None:
    """The first direction is nearly an eigenvector of the others, whatever it is."""
    for place in range(0, size, size // 50):

        def bent_at(params: Params, place: int = place) -> Tensor:
            return params["w"].square().sum() / 2 + 2 * params["w"][place].square()

        measured = smoothness(bent_at, {"w": torch.ones(size, dtype=dtype)}, tolerance=1e-2)
        assert measured.value == pytest.approx(5, rel=1e-2), place


@pytest.mark.parametrize("largest", [2.0, -1.3, 1.1])
def test_one_large_eigenvalue_among_few_others_is_found(largest: float) -> None:
    eigenvalues = torch.tensor([-1, 0, 0.5, 1.0]).double().repeat(25_000)
    eigenvalues[-1] = largest
    w = {"w": torch.zeros(100_000, dtype=torch.float64)}
    measured = smoothness(lambda p: (p["w"].square() * eigenvalues).sum() / 2, w, tolerance=1e-2)
    assert measured.value == pytest.approx(abs(largest), rel=1e-2)


@pytest.mark.parametrize("size", [1, 2, 3, 30])
@pytest.mark.parametrize("bend", [0.0, 1.0, -2.0])
def test_equal_eigenvalues_are_found_where_every_direction_is_their_own(
    size: int, bend: float
) -> None:
    w = {"w": torch.ones(size, dtype=torch.float64)}
    measured = smoothness(lambda params: bend / 2 * params["w"].square().sum(), w)
    assert measured.value == pytest.approx(abs(bend), rel=1e-9)
    assert flat(measured.direction).norm() == pytest.approx(1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("unit", [1e-6, 1e-3, 1.0, 1e3, 1e6])
def test_hessian_lipschitz_is_found_in_every_unit_of_the_parameters(
    unit: float, dtype: torch.dtype
) -> None:
    """With w = unit v, l(v) = sum cosh(v) has the rho max |sinh(v)| / unit^3."""
    v = torch.tensor([0.5, -1.5, 2.0], dtype=dtype)

    def loss(params: Params) -> Tensor:
        return torch.cosh(params["w"] / unit).sum()

    measured = hessian_lipschitz(loss, {"w": unit * v})
    assert measured.value == pytest.approx(math.sinh(2) / unit**3, rel=0.02)


@pytest.mark.parametrize("large", [1e2, 1e4, 1e6])
def test_large_parameters_do_not_hide_how_the_hessian_changes_along_others(large: float) -> None:
    w = {"w": torch.tensor([large, 0.0])}

    def loss(params: Params) -> Tensor:
        moved, still = params["w"][1], params["w"][0] / large
        return torch.sin(100 * moved + 0.3) + still.square() / 2

    assert hessian_lipschitz(loss, w).value == pytest.approx(1e6 * math.cos(0.3), rel=0.01)


def test_a_large_block_that_is_quadratic_does_not_hide_a_small_one() -> None:
    """Its rounding is larger than what changes along the first directions."""
    w = {"large": torch.ones(50), "small": torch.ones(3)}
    loss = lambda p: 0.5e6 * p["large"].square().sum() + (p["small"] ** 3).sum()
    assert hessian_lipschitz(loss, w).value == pytest.approx(6, rel=0.01)


@pytest.mark.parametrize("unit", [1.0, 1e6])
def test_a_search_of_one_step_finds_what_is_along_the_leading_direction(unit: float) -> None:
    """The radii that are tried before do not count as steps."""
    w = {"w": torch.tensor([0.5, -1.5, 2.0], dtype=torch.float64) * unit}
    loss = lambda params: torch.cosh(params["w"] / unit).sum()
    measured = hessian_lipschitz(loss, w, restarts=1, iterations=1)
    assert measured.value == pytest.approx(math.sinh(2) / unit**3, rel=0.02)


@pytest.mark.parametrize(("unit", "dtype"), [(1e-6, torch.float64), (1e-3, torch.float32)])
def test_a_loss_that_overflows_nearby_has_a_third_derivative(
    unit: float, dtype: torch.dtype
) -> None:
    """At 0 that of cosh is 0, so there is no length over which its Hessian changes."""
    measured = hessian_lipschitz(
        lambda params: torch.cosh(params["w"] / unit).sum(), {"w": torch.zeros(3, dtype=dtype)}
    )
    assert measured.value == pytest.approx(0, abs=1e-2 / unit**3)


def test_hessian_lipschitz_is_found_where_the_hessian_is_nearly_zero() -> None:
    """There the length L / rho is nearly zero too, but rounding is as large as elsewhere."""
    for off in (0.0, 1e-12, 1e-6):
        w = {"w": torch.tensor([math.pi / 2 + off], dtype=torch.float64)}
        measured = hessian_lipschitz(lambda params: params["w"].cos().sum(), w)
        assert measured.value == pytest.approx(1, rel=0.01)


def third_derivative_along(loss: Callable[[Params], Tensor], w: Params, u: Params) -> float:
    """By autograd, in float64."""
    leaves = {name: tensor.double().requires_grad_() for name, tensor in w.items()}
    along = [u[name].double() for name in leaves]
    value = loss(leaves)
    for _ in range(2):
        slopes = torch.autograd.grad(value, [*leaves.values()], create_graph=True)
        value = sum((slope * v).sum() for slope, v in zip(slopes, along, strict=True))
    found = torch.autograd.grad(value, [*leaves.values()])
    return float(torch.cat([part.flatten() for part in found]).norm())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("inputs", [64, 196, 784])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.GELU])
def test_hessian_lipschitz_with_images_of_bytes_is_that_of_autograd(
    activation: type[nn.Module], inputs: int, dtype: torch.dtype
) -> None:
    """With inputs of 0 to 255, the Hessian changes within a thousandth of a parameter."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(inputs, 8), activation(), nn.Linear(8, 3))
    w = {name: p.detach() for name, p in network.named_parameters()}
    x, y = torch.randint(256, (5, inputs)), torch.tensor([0, 1, 2, 0, 1])

    def loss(params: Params) -> Tensor:
        outputs = functional_call(network, params, (x.to(params["0.weight"]),))
        return nn.functional.cross_entropy(outputs, y)

    measured = hessian_lipschitz(loss, {name: p.to(dtype) for name, p in w.items()})
    expected = third_derivative_along(loss, w, measured.direction)
    # with 196 inputs the outputs are so far apart that float32 has few digits of the curvature
    few_digits = dtype == torch.float32 and inputs == 196
    assert measured.value == pytest.approx(expected, rel=0.5 if few_digits else 0.02)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("steepness", [1.0, 1e3, 1e5])
def test_hessian_lipschitz_is_found_where_the_loss_is_flat_on_both_sides(
    steepness: float, dtype: torch.dtype
) -> None:
    """And the steepest direction is quadratic."""

    def loss(params: Params) -> Tensor:
        bend = torch.tanh(steepness * params["b"] + 0.3).sum()
        return 10 * steepness**2 * params["a"].square().sum() + bend

    slope = 1 - math.tanh(0.3) ** 2
    expected = abs(slope * (6 * math.tanh(0.3) ** 2 - 2)) * steepness**3
    w = {"a": torch.zeros(1, dtype=dtype), "b": torch.zeros(1, dtype=dtype)}
    assert hessian_lipschitz(loss, w).value == pytest.approx(expected, rel=0.02)


def small_network() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(2)
    network = nn.Sequential(
        nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1)
    ).double()
    assert sum(p.numel() for p in network.parameters()) == 1761
    x = 10 * torch.rand(10, 1, dtype=torch.float64) - 5
    return network, x, 2 * torch.sin(x)


def small_loss() -> tuple[Callable[[Params], Tensor], Params]:
    network, x, y = small_network()
    return lambda params: (functional_call(network, params, (x,)) - y).square().mean(), {
        name: p.detach() for name, p in network.named_parameters()
    }


@pytest.fixture(scope="module")
def largest_curvature_and_change_of_it() -> tuple[float, float]:
    """From the whole spectrum, and from a long run."""
    loss, w = small_loss()
    sizes = [p.numel() for p in w.values()]

    def of_vector(vector: Tensor) -> Tensor:
        return loss(
            {name: part.view_as(w[name]) for name, part in zip(w, vector.split(sizes), strict=True)}
        )

    hessian = torch.autograd.functional.hessian(
        of_vector, torch.cat([p.flatten() for p in w.values()]), vectorize=True
    )
    long = hessian_lipschitz(loss, w, restarts=30, iterations=100, tolerance=1e-5, seed=1000)
    return float(torch.linalg.matrix_norm(hessian, 2)), long.value


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_smoothness_and_hessian_lipschitz_of_a_network(
    seed: int, largest_curvature_and_change_of_it: tuple[float, float]
) -> None:
    """A random direction would give a rho tens of times too small."""
    loss, w = small_loss()
    curvature, change = largest_curvature_and_change_of_it
    assert smoothness(loss, w, seed=seed).value == pytest.approx(curvature, rel=1e-3)
    measured = hessian_lipschitz(loss, w, seed=seed)
    assert measured.value == pytest.approx(change, rel=0.1)
    u = {
        name: torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(seed))
        for name, p in w.items()
    }
    u = {name: p / flat(u).norm() for name, p in u.items()}

    def curvature_along_u(params: Params) -> Tensor:
        return torch.func.jvp(lambda q: torch.func.jvp(loss, (q,), (u,))[1], (params,), (u,))[1]

    assert measured.value > 20 * flat(torch.func.grad(curvature_along_u)(w)).norm()


@pytest.mark.parametrize(
    "seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]
)
def test_float32_gives_the_same_curvature_as_float64_on_a_convolutional_network(seed: int) -> None:
    data = GlyphsDataModule(ways=5, seed=seed)
    data.setup("fit")
    episodes = data.on_after_batch_transfer(data.independent_episodes("measure", 0, 2), 0)
    torch.manual_seed(seed)
    module = MAML(Conv4(1, 5, 28, channels=16, activation="gelu"))
    single = module.probe(episodes).curvature(restarts=1)
    double = Episodes(
        episodes.support_x.double(), episodes.support_y, episodes.query_x.double(), episodes.query_y
    )
    exact = module.double().probe(double).curvature(restarts=1)
    assert (single.L, single.rho) == (
        pytest.approx(exact.L, rel=1e-3),
        pytest.approx(exact.rho, rel=0.02),
    )


def test_hessian_lipschitz_ends_where_the_hessian_changes_at_a_kink_alone() -> None:
    """The larger radii cross the kink of Huber's loss from this point, and the others do not."""
    near = 1 - 0.5 * torch.finfo(torch.float64).eps ** (1 / 3)
    loss = lambda w: torch.nn.functional.huber_loss(w["w"], torch.zeros(1).double())
    measured = hessian_lipschitz(loss, {"w": torch.tensor([near], dtype=torch.float64)})
    assert measured.value > 0
    assert measured.gradient_evaluations < 3000


def test_parameters_in_half_precision_are_refused() -> None:
    w = {"w": W["w"].bfloat16()}
    with pytest.raises(
        ValueError, match="parameters in float32 or float64 to measure with but got torch"
    ):
        Probe(least_squares, w, regression_tasks())


def test_a_single_parameter_in_half_precision_is_refused() -> None:
    w = {"first": torch.zeros(1, dtype=torch.float64), "second": torch.zeros(1).half()}
    with pytest.raises(ValueError, match=r"measure with but got torch.float16 in 'second'"):
        Probe(least_squares, w, regression_tasks())


def test_constants_are_nan_where_a_loss_is_not_finite() -> None:
    w = {"w": torch.tensor([1e38], dtype=torch.float32)}
    assert math.isnan(hessian_lipschitz(lambda p: (p["w"] ** 4).sum(), w).value)
    assert math.isnan(smoothness(lambda p: (p["w"] ** 4).sum(), w).value)
    start = torch.ones(2, 1, 2, dtype=torch.float64)
    diverging = Probe(
        quartic, {"w": 2 * start[0, 0]}, Episodes(start, start, start, start)
    ).curvature(inner_lr=1e200, steps=2)
    assert math.isnan(diverging.L)
    assert math.isnan(diverging.rho)


@pytest.mark.parametrize("tasks", ["loop", "threads"])
def test_a_network_with_attention_can_be_measured(tasks: str) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(1).unflatten(1, (16, 4))
            return self.head(self.attend(x, x, x, need_weights=False)[0].mean(1))

    module = MAML(Attention().double(), tasks=tasks)
    assert module.probe(make_episodes()).constants(0.1, 1).L > 0


def regression_tasks(tasks: int = 6, samples: int = 8, seed: int = 0) -> Episodes:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(2, tasks, samples, 3, dtype=torch.float64, generator=random)
    y = torch.randn(2, tasks, samples, dtype=torch.float64, generator=random)
    return Episodes(x[0], y[0], x[1], y[1])


def least_squares(params: Params, x: Tensor, y: Tensor) -> Tensor:
    return (x @ params["w"] - y).square().mean() / 2


W = {"w": torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)}


def gradients(x: Tensor, y: Tensor) -> Tensor:
    """Of least squares at W, one row per sample."""
    return x * (x @ W["w"] - y)[..., None]


@pytest.mark.parametrize("tasks", ["loop", "threads"])
def test_spread_of_least_squares_is_its_closed_form(tasks: str) -> None:
    episodes = regression_tasks()
    spread = Probe(least_squares, W, episodes, tasks=tasks).spread()
    support, query = gradients(*episodes[:2]).mean(1), gradients(*episodes[2:]).mean(1)
    assert spread.gradient_norm == pytest.approx(float(query.norm(dim=1).mean()))
    assert spread.sigma == pytest.approx(float(query.var(0, correction=1).sum().sqrt()))
    gaps = (support - query).norm(dim=1)
    assert spread.b == pytest.approx(float(gaps.mean()))
    assert spread.mean_square_b == pytest.approx(float(gaps.square().mean()))
    assert spread.gradient_evaluations == 6 * 4


def test_sample_sigma_is_unbiased() -> None:
    episodes = regression_tasks(tasks=400, samples=6)
    expected = float(gradients(*episodes[2:]).var(1, correction=1).sum(-1).mean().sqrt())
    assert Probe(least_squares, W, episodes).spread().sample_sigma == pytest.approx(
        expected, rel=0.1
    )
    one = Probe(least_squares, W, regression_tasks(samples=1)).spread()
    assert math.isnan(one.sample_sigma)
    assert one.gradient_evaluations == 6 * 2


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_deviations_over_samples_do_not_depend_on_the_order_of_classes(seed: int) -> None:
    """Query sets come with their classes in the same order in all tasks."""

    def loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
        """The gradient of a sample is 1 + x at 1, and its Hessian too."""
        return ((1 + x) * params["w"].square()).mean() / 2

    x = torch.tensor([-1.0, -1, 1, 1]).double()[None, :, None].repeat(200, 1, 1)
    w = {"w": torch.ones(1, dtype=torch.float64)}
    probe = Probe(loss, w, Episodes(x, x[..., 0], x, x[..., 0]), seed=seed)
    deviation = float((1 + x[0]).std())
    assert probe.spread().sample_sigma == pytest.approx(deviation, rel=0.15)
    assert probe.hessian_deviation()[0] == pytest.approx(deviation, rel=0.15)


def test_sigma_excludes_sampling_noise_when_resampling() -> None:
    """Tasks that are all the same differ only by their samples: sigma is 0."""
    finite = regression_tasks(tasks=400, samples=16)
    resampled = ResampledEpisodes(
        finite.support_x[:, None],
        finite.support_y[:, None],
        finite.support_x[:, None],
        finite.support_y[:, None],
        *finite[2:],
    )
    with_sampling = Probe(least_squares, W, finite).spread()
    assert with_sampling.sigma == pytest.approx(with_sampling.sample_sigma / 4, rel=0.1)
    assert Probe(least_squares, W, resampled).spread().sigma < 0.3 * with_sampling.sigma


def test_hessian_deviation_of_least_squares_is_its_closed_form() -> None:
    episodes = regression_tasks(tasks=300, samples=6)
    value, evaluations = Probe(least_squares, W, episodes).hessian_deviation()
    hessians = episodes.query_x[..., None] * episodes.query_x[..., None, :]
    deviations = []
    for task in hessians:
        leading = torch.linalg.eigh(task.mean(0)).eigenvectors[:, -1]
        deviations.append((task @ leading).var(0, correction=1).sum())
    assert value == pytest.approx(float(torch.stack(deviations).mean().sqrt()), rel=0.15)
    assert evaluations > 300 * 10
    assert math.isnan(Probe(least_squares, W, regression_tasks(samples=1)).hessian_deviation()[0])


def counted_least_squares(params: Params, x: Tensor, y: Tensor) -> Tensor:
    """Least squares in which targets of -100 do not count."""
    counts = y != -100
    return (torch.where(counts, x @ params["w"] - y, 0).square().sum() / 2) / counts.sum()


def test_samples_that_the_loss_ignores_are_no_samples() -> None:
    """The spread is that of the tasks without them, also where that leaves a single one."""
    episodes = regression_tasks(tasks=400, samples=6)
    padding = torch.full((400, 6), -100.0, dtype=torch.float64)
    padded = episodes._replace(
        query_x=torch.cat([episodes.query_x, torch.randn(400, 6, 3).double()], 1),
        query_y=torch.cat([episodes.query_y, padding], 1),
    )
    expected = gradients(*episodes[2:]).var(1, correction=1).sum(-1).mean().sqrt()
    probe = Probe(counted_least_squares, W, padded, ignored=-100)
    assert probe.spread().sample_sigma == pytest.approx(float(expected), rel=0.1)
    plain = Probe(least_squares, W, episodes)
    assert probe.hessian_deviation()[0] == pytest.approx(plain.hessian_deviation()[0], rel=0.1)

    one_left = padded.query_y.clone()
    one_left[:200, 1:6] = -100
    half = Probe(counted_least_squares, W, padded._replace(query_y=one_left), ignored=-100)
    of_others = gradients(*episodes[2:])[200:].var(1, correction=1).sum(-1).mean().sqrt()
    assert half.spread().sample_sigma == pytest.approx(float(of_others), rel=0.1)
    assert half.spread().gradient_evaluations == 400 * 2 + 200 * 2


def test_the_module_says_which_labels_its_loss_ignores() -> None:
    torch.manual_seed(0)
    episodes = make_episodes()
    padding = torch.full_like(episodes.query_y, -100)
    padded = episodes._replace(
        query_x=torch.cat([episodes.query_x, 9 * torch.rand_like(episodes.query_x)], 1),
        query_y=torch.cat([episodes.query_y, padding], 1),
    )
    module = MAML(build("mlp"))
    expected, found = (module.probe(tasks).constants(0.1, 1) for tasks in (episodes, padded))
    assert found[:-1] == pytest.approx(expected[:-1])


def test_a_task_that_is_not_finite_makes_the_deviations_nan() -> None:
    episodes = regression_tasks()
    episodes.query_x[1, 0] = math.nan
    probe = Probe(least_squares, W, episodes)
    assert math.isnan(probe.spread().sample_sigma)
    assert math.isnan(probe.spread().sigma)
    assert math.isnan(probe.hessian_deviation()[0])


def test_sigma_of_fresh_batches_counts_the_noise_of_small_ones() -> None:
    """Where the tasks are alike, sigma is what sampling does not explain: nearly nothing."""
    finite = regression_tasks(tasks=400, samples=16)
    y = finite.query_y.clone()
    y[:200, 1:] = -100  # half of the tasks have one sample left
    support = [finite.support_x[:, None], finite.support_y[:, None]]
    resampled = ResampledEpisodes(*support, *support, finite.query_x, y)
    probe = Probe(counted_least_squares, W, resampled, ignored=-100)
    gradients_of_tasks = torch.stack(
        [
            gradients(x[counts], targets[counts]).mean(0)
            for x, targets, counts in zip(finite.query_x, y, y != -100, strict=True)
        ]
    )
    whole = float(gradients_of_tasks.var(0).sum().sqrt())
    assert probe.spread().sigma < 0.5 * whole


def test_sigma_in_float32_is_not_rounding() -> None:
    """Tasks (w - c)^2 / 2 whose gradients are 1e4 and differ by hundredths."""
    centres = torch.linspace(0, 0.1, 20)[:, None, None].expand(-1, 4, 1)

    def loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
        return (params["w"] - x).square().mean() / 2

    w = {"w": torch.tensor([1e4])}
    spread = Probe(loss, w, Episodes(centres, centres, centres, centres)).spread()
    gradients_of_tasks = w["w"] - centres[:, 0, 0]  # with the rounding of float32
    assert spread.sigma == pytest.approx(float(gradients_of_tasks.double().std()), rel=0.02)


def quartic(params: Params, x: Tensor, y: Tensor) -> Tensor:
    """|w - x|^4 / 4: L = 3 |w - x|^2 and rho = 6 |w - x|."""
    return (params["w"] - x).square().sum().square() / 4


def test_curvature_is_the_largest_over_tasks_sets_and_path() -> None:
    support = torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]], dtype=torch.float64)
    query = torch.tensor([[[-1.0, 0.0]], [[0.0, -3.0]]], dtype=torch.float64)
    labels = torch.zeros(2, 1)
    w = {"w": torch.zeros(2, dtype=torch.float64)}
    probe = Probe(quartic, w, Episodes(support, labels, query, labels))
    here = probe.curvature()
    assert (here.L, here.rho) == (pytest.approx(27, rel=1e-3), pytest.approx(18, rel=1e-3))
    one_step_towards_the_support = 0.05 * 2**3
    along = probe.curvature(inner_lr=0.05, steps=1)
    distance = 3 + one_step_towards_the_support
    assert (along.L, along.rho) == (
        pytest.approx(3 * distance**2, rel=1e-3),
        pytest.approx(6 * distance, rel=1e-3),
    )
    assert along.gradient_evaluations > here.gradient_evaluations > 0


@pytest.mark.parametrize("tasks", ["loop", "threads", "vmap"])
@pytest.mark.parametrize("inference", [False, True])
def test_gradient_norms_are_those_of_autograd(tasks: str, inference: bool) -> None:
    network, episodes = build("conv_group_norm"), make_episodes()
    loss, w = plain_loss(network), {name: p.detach() for name, p in network.named_parameters()}
    expected = [
        flat(torch.func.grad(loss)(w, x, y)).norm()
        for x, y in zip(episodes.query_x, episodes.query_y, strict=True)
    ]
    functional = FunctionalNetwork(network, vectorised=tasks == "vmap")
    with torch.inference_mode(inference):
        actual = Probe(
            lambda w, x, y: nn.functional.cross_entropy(functional(w, x), y),
            w,
            episodes,
            tasks=tasks,
        ).gradient_norms()
    torch.testing.assert_close(actual, torch.stack(expected))


def balanced(samples: int, spread: float, within: float, tasks: int = 400) -> ResampledEpisodes:
    """Tasks whose gradients are their centres; query sets of two classes, 10 apart."""
    random = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return drawn_on_cpu(torch.randn, *shape, dtype=torch.float64, generator=random)

    y = torch.arange(2).repeat_interleave(samples).repeat(tasks, 1)
    x = spread * noise(tasks, 1) + 10.0 * y + within * noise(tasks, 2 * samples)
    s, s_y = x[:, None, :, None], y[:, None]
    return ResampledEpisodes(s, s_y, s, s_y, x[..., None], y)


def mean_of(params: Params, x: Tensor, y: Tensor) -> Tensor:
    """A loss whose gradient at a sample is the sample."""
    return (params["w"] * x).mean()


@pytest.mark.parametrize("samples", [2, 3, 8])
def test_sigma_of_balanced_query_sets_leaves_out_what_sampling_adds(samples: int) -> None:
    tasks = balanced(samples, spread=1.0, within=2.0)
    found = Probe(mean_of, {"w": torch.zeros(1).double()}, tasks).spread()
    assert found.sigma == pytest.approx(1.0, rel=0.15)
    # of a sample drawn from all classes
    assert found.sample_sigma == pytest.approx(
        math.sqrt(25 * 2 * samples / (2 * samples - 1) + 4), rel=0.1
    )
    assert found.gradient_evaluations == 400 * 6


def test_sigma_is_an_upper_bound_where_each_class_has_one_sample() -> None:
    tasks = balanced(1, spread=1.0, within=2.0)
    found = Probe(mean_of, {"w": torch.zeros(1).double()}, tasks).spread()
    assert found.sigma == pytest.approx(math.sqrt(1 + 4 / 2), rel=0.1)
