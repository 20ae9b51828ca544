"""The predictions P13 to P18: the papers' bounds with known constants, and two of their claims."""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_maml import MAML, Conv4, Episodes, ResampledEpisodes, meta_gradient, theory
from lightning_maml.batches.episodes import AnyEpisodes
from lightning_maml.core.hvp import hessian_vector_product
from lightning_maml.core.meta_gradient import task_meta_gradient, through_step
from lightning_maml.core.params import Params
from lightning_maml.core.task_axis import TaskAxis
from lightning_maml.datamodules import GlyphsDataModule
from lightning_maml.functional.losses import LossFunctions
from predictions import AT_ONCE, DOUBLE, Finding, Panel, Series, slope, vector

# Waves on the line: l_i(w; theta, zeta) = w^2 / 4 - (s_i + theta) w + (1 + zeta) cos(w + phi_i),
# with noise theta and zeta, so that L = 1.5 and rho = 1 in the mean, everywhere. In the finite-sum
# case there is no noise, and the query loss has other phases than the support loss.

L, RHO = 1.5, 1.0
SLOPES = vector(1, -0.5, -0.5)
PHASES = vector(0.3, 1.3, -1.2)
QUERY_PHASES = PHASES + vector(0.4, -0.3, 0.2)
NOISE, HESSIAN_NOISE = 0.3, 0.2
"""Standard deviations of theta and zeta."""
START = 3.0
CIRCLE = torch.linspace(0, 2 * math.pi, 20_001, dtype=DOUBLE)


def wave_loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
    """Return the loss of a batch; ``x`` ``[S, 2]`` is noise, ``y`` ``[S, 2]`` slope and phase."""
    w, (theta, zeta), (wave_slope, phase) = params["w"], x.unbind(-1), y.unbind(-1)
    return (w**2 / 4 - (wave_slope + theta) * w + (1 + zeta) * torch.cos(w + phase)).mean()


def wave_gradients(w: Tensor, phases: Tensor) -> Tensor:
    """Return the derivatives of the three mean losses at ``w`` ``[...]``, ``[..., 3]``."""
    return w[..., None] / 2 - SLOPES - torch.sin(w[..., None] + phases)


def exact_gradient(
    w: Tensor, alpha: float, steps: int, query_phases: Tensor, of: int = 3
) -> Tensor:
    """Return grad F at each of ``w``, by autograd through the unrolled loop of exact steps.

    F is that of the first ``of`` tasks.
    """

    def objective(w: Tensor) -> Tensor:
        u = w.expand(of)
        for _ in range(steps):
            u = u - alpha * (u / 2 - SLOPES[:of] - torch.sin(u + PHASES[:of]))
        return (u**2 / 4 - SLOPES[:of] * u + torch.cos(u + query_phases[:of])).mean()

    found: Tensor = torch.func.vmap(torch.func.grad(objective))(w)
    return found


def gap(alpha: float, steps: int, query_phases: Tensor) -> float:
    """Return ``F(START) - min F``, from grad F on a fine grid, which holds the minimum."""
    w = torch.linspace(-10, 10, 200_001, dtype=DOUBLE)
    gradient = exact_gradient(w, alpha, steps, query_phases)
    objective = torch.cumulative_trapezoid(gradient, w)
    start = int((w[1:] - START).abs().argmin())
    return float(objective[start] - objective.min())


def meta_gradients(w: Tensor, tasks: AnyEpisodes, alpha: float, steps: int) -> Tensor:
    """Return the exact meta-gradient of each of M tasks at a point of its own, ``[M]``."""
    losses = LossFunctions(wave_loss).of_task(tasks, steps, TaskAxis(len(w)))
    back = partial(through_step, hvp=hessian_vector_product("exact"))
    found = task_meta_gradient(losses, {"w": w[:, None]}, [{"w": alpha}] * steps, back)
    return found.grad["w"][:, 0]


def finite_sum_tasks(which: Tensor) -> Episodes:
    """Return the tasks of these numbers ``[M]``, with support and query losses without noise."""
    none = torch.zeros(len(which), 1, 2, dtype=DOUBLE)
    support, query = (
        torch.stack([SLOPES[which], phases[which]], -1)[:, None]
        for phases in (PHASES, QUERY_PHASES)
    )
    return Episodes(none, support, none, query)


class Sizes(NamedTuple):
    """Samples of a task's batches: S, D and T."""

    support: int
    hessian: int
    query: int


def resampled_tasks(
    which: Tensor, steps: int, sizes: Sizes, random: torch.Generator
) -> ResampledEpisodes:
    """Return the tasks of these numbers ``[M]``, with fresh noise for every batch."""
    task = torch.stack([SLOPES[which], PHASES[which]], -1)

    def batch(*shape: int) -> tuple[Tensor, Tensor]:
        noise = torch.randn(len(which), *shape, 2, dtype=DOUBLE, generator=random)
        y = task.view(-1, *[1] * len(shape), 2).expand_as(noise)
        return noise * vector(NOISE, HESSIAN_NOISE), y

    return ResampledEpisodes(
        *batch(steps, sizes.support), *batch(steps, sizes.hessian), *batch(sizes.query)
    )


def deviation_of_tasks(phases: Tensor) -> float:
    """Return sigma: the largest deviation of the task gradients over all ``w``."""
    return float(wave_gradients(CIRCLE, phases).var(-1, correction=0).max().sqrt())


SAMPLE_SIGMA = math.hypot(NOISE, HESSIAN_NOISE)
"""sigma_g: the deviation of a sample's gradient where the wave is steepest."""
SIGMA, QUERY_SIGMA = deviation_of_tasks(PHASES), deviation_of_tasks(QUERY_PHASES)
DISTANCES = 2 * torch.sin((QUERY_PHASES - PHASES) / 2).abs()
"""b_i: the largest distance between the gradients of support and query loss."""
B, MEAN_SQUARE_B = float(DISTANCES.mean()), float(DISTANCES.square().mean())

TASKS, CHAINS = 20, 40
ITERATIONS = (250, 1000, 4000)


def random_iterates(
    rule: theory.Rule,
    steps: int,
    phases: Tensor,
    draw: Callable[[], AnyEpisodes],
    estimate: Callable[[Tensor], Tensor],
) -> list[float]:
    """Return E|grad F| at a random iterate, of runs of each of ``ITERATIONS``, N inner steps.

    Args:
        rule: The rule of the meta-stepsize, which has the papers' constant.
        steps: N, with alpha = 1 / (8 N L).
        phases: Those of the query losses.
        draw: Draws the tasks of a meta-batch for each chain.
        estimate: Estimates the mean norm of the task gradients at the point of each chain.
    """
    alpha = theory.recommended_inner_lr(L, steps)
    l_hat = partial(theory.meta_smoothness, rule, L, RHO, alpha, steps, b=B)
    w, norms = torch.full((CHAINS,), START, dtype=DOUBLE), []
    for _ in range(ITERATIONS[-1]):
        norms.append(float(exact_gradient(w, alpha, steps, phases).abs().mean()))
        gradients = meta_gradients(w.repeat_interleave(TASKS), draw(), alpha, steps)
        smoothness = l_hat(0.0) + (l_hat(1.0) - l_hat(0.0)) * estimate(w)
        w = w - theory.paper_scale(rule) / smoothness * gradients.view(CHAINS, -1).mean(1)
    return [sum(norms[:k]) / k for k in ITERATIONS]


class Compared(NamedTuple):
    """What was measured after each of ``ITERATIONS``, and the bounds on it."""

    measured: list[float]
    bounds: list[float]


def rate_finding(
    number: str, title: str, claim: str, formula: str, found: dict[int, Compared]
) -> Finding:
    """Return the finding of a theorem's bound, compared for each N."""
    ratios = [
        bound / value for compared in found.values() for value, bound in zip(*compared, strict=True)
    ]
    series = []
    for steps, (measured, bounds) in found.items():
        series += [
            Series(f"measured, N = {steps}", ITERATIONS, measured),
            Series(f"bound, N = {steps}", ITERATIONS, bounds, "k--" if steps == 1 else "k:"),
        ]
    return Finding(
        number,
        title,
        claim,
        formula,
        f"bound / measured = {min(ratios):.1f} .. {max(ratios):.1f} for N = 1, 5, B = {TASKS}, K "
        f"= {', '.join(map(str, ITERATIONS))}",
        min(ratios) >= 1,
        Panel("iterations K", "E|grad F(w_zeta)|", series),
    )


def finite_sum_rate() -> Finding:
    """P13: Ji's Theorem 9, its bound computed with known constants."""
    found = {}
    of_tasks = {"sigma": QUERY_SIGMA, "b": B}
    for steps in (1, 5):
        alpha = theory.recommended_inner_lr(L, steps)
        fresh = theory.stepsize_batches("finite_sum", L, RHO, alpha, steps, **of_tasks).tasks
        random = torch.Generator().manual_seed(steps)

        def draw(random: torch.Generator = random) -> Episodes:
            return finite_sum_tasks(torch.randint(3, (CHAINS * TASKS,), generator=random))

        def estimate(w: Tensor, fresh: int = fresh, random: torch.Generator = random) -> Tensor:
            which = torch.randint(3, (CHAINS, fresh), generator=random)
            return wave_gradients(w, QUERY_PHASES).abs().gather(1, which).mean(1)

        measured = random_iterates("finite_sum", steps, QUERY_PHASES, draw, estimate)
        convergence = theory.finite_sum_convergence(
            L, RHO, alpha, steps, **of_tasks, mean_square_b=MEAN_SQUARE_B, tasks=TASKS
        )
        delta = gap(alpha, steps, QUERY_PHASES)
        bounds = [theory.finite_sum_bound(convergence, delta, k, TASKS) for k in ITERATIONS]
        found[steps] = Compared(measured, bounds)
    return rate_finding(
        "P13",
        "Theorem 9 of Ji et al.",
        "with tasks of a finite sum, exact MAML with the adaptive meta-stepsize reaches E|grad F| "
        "at a random iterate below a bound (J Thm 9)",
        "E|grad F(w_zeta)| <= the bound, with L, rho, sigma, b known",
        found,
    )


def resampling_rate() -> Finding:
    """P14: Ji's Theorem 5, its bound computed with known constants."""
    found = {}
    of_tasks = {"sigma": SIGMA, "sample_sigma": SAMPLE_SIGMA}
    support, hessian = theory.resampling_batches(L, RHO, SAMPLE_SIGMA, HESSIAN_NOISE)
    sizes = Sizes(support, hessian, query=support)
    for steps in (1, 5):
        alpha = theory.recommended_inner_lr(L, steps)
        fresh = theory.stepsize_batches("resampling", L, RHO, alpha, steps, **of_tasks)
        random = torch.Generator().manual_seed(steps)

        def draw(steps: int = steps, random: torch.Generator = random) -> ResampledEpisodes:
            which = torch.randint(3, (CHAINS * TASKS,), generator=random)
            return resampled_tasks(which, steps, sizes, random)

        measured = random_iterates(
            "resampling", steps, PHASES, draw, partial(sampled_norms, sizes=fresh, random=random)
        )
        convergence = theory.resampling_convergence(
            L,
            RHO,
            alpha,
            steps,
            **of_tasks,
            hessian_sigma=HESSIAN_NOISE,
            tasks=TASKS,
            **sizes._asdict(),
        )
        delta = gap(alpha, steps, PHASES)
        bounds = [
            theory.resampling_bound(convergence, delta, k, TASKS, support) for k in ITERATIONS
        ]
        found[steps] = Compared(measured, bounds)
    return rate_finding(
        "P14",
        "Theorem 5 of Ji et al.",
        "with batches drawn afresh, exact MAML with the adaptive meta-stepsize reaches E|grad F| "
        "at a random iterate below a bound (J Thm 5)",
        "E|grad F(w_zeta)| <= the bound, with L, rho, sigma, sigma_g, sigma_H known",
        found,
    )


def sampled_norms(w: Tensor, sizes: theory.StepsizeBatches, random: torch.Generator) -> Tensor:
    """Return the mean norm of B' task gradients on fresh samples, at each of ``w``."""
    which = torch.randint(3, (len(w), sizes.tasks), generator=random)
    theta, zeta = (
        noise * torch.randn(*which.shape, sizes.samples, dtype=DOUBLE, generator=random).mean(-1)
        for noise in (NOISE, HESSIAN_NOISE)
    )
    wave = torch.sin(w[:, None] + PHASES[which])
    return (w[:, None] / 2 - SLOPES[which] - theta - (1 + zeta) * wave).abs().mean(1)


DRAWS = 200_000
POINTS = (-4.0, -1.0, 0.5, 2.0, 5.0)


def moments_of_the_estimate() -> Finding:
    """P15: bias and second moment of the meta-gradient, Propositions 3, 4 and 8."""
    sizes = Sizes(support=2, hessian=1, query=2)
    biases, squares, finite, series = [], [], [], []
    for steps in (1, 5):
        alpha = theory.recommended_inner_lr(L, steps)
        constants = theory.moment_constants(
            L, RHO, alpha, steps, SAMPLE_SIGMA, HESSIAN_NOISE, sizes.hessian
        )
        of_sum = theory.finite_sum_moments(
            L, alpha, steps, sigma=QUERY_SIGMA, b=B, mean_square_b=MEAN_SQUARE_B
        )
        random = torch.Generator().manual_seed(steps)
        for point in POINTS:
            w = torch.full((DRAWS,), point, dtype=DOUBLE)
            which = torch.arange(DRAWS) % 3  # each task as often as the others
            exact = float(exact_gradient(w[:1], alpha, steps, PHASES).abs())
            tasks = resampled_tasks(which, steps, sizes, random)
            found = meta_gradients(w, tasks, alpha, steps)
            bias = float((found.mean() - exact_gradient(w[:1], alpha, steps, PHASES)).abs())
            bound = (constants.err1 + constants.err2 * (exact + SIGMA)) / sizes.support**0.5
            biases.append(bias / bound)
            most = constants.squ1 / sizes.query + constants.squ2 / sizes.support
            most += constants.squ3 * (exact**2 + SIGMA**2)
            squares.append(float(found.square().mean()) / most)
            exact = float(exact_gradient(w[:1], alpha, steps, QUERY_PHASES).abs())
            found = meta_gradients(w[:3], finite_sum_tasks(which[:3]), alpha, steps)
            most = of_sum.squ1 * exact**2 + of_sum.squ2
            finite.append(float(found.square().mean()) / most)
        count = len(POINTS)
        series += [
            Series(f"bias, N = {steps}", POINTS, biases[-count:]),
            Series(f"second moment, N = {steps}", POINTS, squares[-count:], "s--"),
            Series(f"finite sum, N = {steps}", POINTS, finite[-count:], "^:"),
        ]
    return Finding(
        "P15",
        "moments of the meta-gradient",
        "the sampled meta-gradient has a bias of at most C_err1 / sqrt S + ..., and bounded second "
        "moments (J Props 3, 4; finite sum: J Prop 8; constants as in the proofs)",
        "|E G - grad F| <= (C_err1 + C_err2 (|grad F| + sigma)) / sqrt S; E|G|^2 <= C_squ1 / T + "
        "C_squ2 / S + C_squ3 (|grad F|^2 + sigma^2); E|G|^2 <= A_squ1 |grad F|^2 + A_squ2",
        f"at most {max(biases):.3f}, {max(squares):.2f} and {max(finite):.2f} of the three bounds, "
        f"at {len(POINTS)} points, N = 1, 5",
        max(biases + squares + finite) <= 1,
        Panel("w", "measured / bound", series, ("linear", "log")),
    )


BATCHES = (1, 4, 16)


def floors_of_samples() -> Finding:
    """P16: what the samples of support and query batches leave, eq. 23 of Fallah et al."""
    alpha, tasks, many = theory.largest_one_step_inner_lr(L, "exact"), 4, 1024
    floors: dict[str, list[float]] = {"D_in": [], "D_o": []}
    for name, batch in itertools.product(floors, BATCHES):
        support, query = (batch, many) if name == "D_in" else (many, batch)
        sizes, random = Sizes(support, many, query), torch.Generator().manual_seed(batch)
        w, norms = torch.full((CHAINS,), 2.6, dtype=DOUBLE), []
        for k in range(300):
            which = torch.zeros(CHAINS * tasks, dtype=torch.long)  # one task, so that sigma = 0
            gradients = meta_gradients(
                w.repeat_interleave(tasks), resampled_tasks(which, 1, sizes, random), alpha, 1
            )
            w = w - 0.1 * gradients.view(CHAINS, -1).mean(1)
            if k >= 100:
                norms.append(float(exact_gradient(w, alpha, 1, PHASES, of=1).abs().mean()))
        floors[name].append(sum(norms) / len(norms))
    terms = {
        "D_in": [SAMPLE_SIGMA / math.sqrt(batch) for batch in BATCHES],
        "D_o": [SAMPLE_SIGMA / math.sqrt(tasks * batch) for batch in BATCHES],
    }
    exponents = {name: slope(BATCHES, values) for name, values in floors.items()}
    ratios = [
        floor / term
        for name in floors
        for floor, term in zip(floors[name], terms[name], strict=True)
    ]
    return Finding(
        "P16",
        "samples per task",
        "larger support and query batches lower MAML's floor as 1 / sqrt(D_in) and 1 / sqrt(B D_o) "
        "(F Thm 4.12, eq 23)",
        "floor <= O(sqrt(sigma~^2 / (B D_o) + sigma~^2 / D_in)) with sigma = 0",
        f"with one task, B = {tasks} and a fixed beta: exponent of D_o {exponents['D_o']:.2f}, of "
        f"D_in {exponents['D_in']:.2f}; floor / its term = {min(ratios):.3f} .. {max(ratios):.2f}",
        max(ratios) <= 1 and all(-0.6 < exponent < -0.3 for exponent in exponents.values()),
        Panel(
            "samples",
            "mean |grad F|",
            [Series(name, BATCHES, floors[name]) for name in floors]
            + [Series(f"term of {name}", BATCHES, terms[name], "k--") for name in terms],
        ),
    )


POWER = 0.1


def slow_loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
    """Return a loss whose gradient falls so slowly that 1 / epsilon^2 iterations are needed."""
    return (1 + (params["w"] - x) ** 2).pow(-POWER / 2).sum()


def iterations_for_an_accuracy() -> Finding:
    """P17: the number of iterations grows as 1 / epsilon^2."""
    accuracies = (0.005, 0.0025, 0.00125, 0.000625)
    centres = torch.tensor([[[-1.0]], [[1.0]]], dtype=DOUBLE)
    tasks = Episodes(centres, centres, centres, centres)
    smooth = POWER  # the largest second derivative, at the centre
    alpha, w, reached, k = 1 / (8 * smooth), vector(3), [], 0
    while len(reached) < len(accuracies):
        found = meta_gradient(slow_loss, {"w": w}, tasks, inner_lr=alpha, steps=1, **AT_ONCE)
        gradient = found.grad["w"]
        if float(gradient.norm()) <= accuracies[len(reached)]:
            reached.append(k)
            continue
        w, k = w - gradient / (2 * smooth), k + 1
    exponent = -slope(accuracies, reached)
    products = [k * epsilon**2 / smooth for k, epsilon in zip(reached, accuracies, strict=True)]
    predicted = (POWER + 2) / (POWER + 1)
    return Finding(
        "P17",
        "iterations for an accuracy",
        "MAML finds |grad F| <= epsilon within O(1 / epsilon^2) iterations (F Table 1, Cor 4.13)",
        f"K epsilon^2 bounded; on tasks (1 + (w - c)^2)^(-{POWER / 2:g}) it should be "
        f"K ~ epsilon^-{predicted:.2f}",
        f"with a fixed beta, K = {', '.join(map(str, reached))} for epsilon = "
        f"{', '.join(map(str, accuracies))}: exponent -{exponent:.2f}; K epsilon^2 / L = "
        f"{min(products):.2f} .. {max(products):.2f}",
        exponent <= 2 and abs(exponent - predicted) < 0.15 and products[-1] <= products[0] * 1.5,
        Panel(
            "epsilon",
            "iterations",
            [
                Series("measured", accuracies, reached),
                Series(
                    "1 / epsilon^2",
                    accuracies,
                    [reached[0] * (accuracies[0] / epsilon) ** 2 for epsilon in accuracies],
                    "k--",
                ),
            ],
        ),
    )


def train_on_glyphs(inner_lr: float) -> tuple[list[float], list[float]]:
    """Return L at every twentieth iteration of a training of 5-way 1-shot, and its query losses."""
    torch.manual_seed(0)
    settings = {"ways": 5, "shots": 1, "queries": 1}
    data = GlyphsDataModule(**settings, meta_batch_size=8, train_batches=60)
    others = GlyphsDataModule(**settings, meta_batch_size=2, seed=1)
    # the hook, which a trainer calls, makes numbers of bytes
    tasks = others.on_after_batch_transfer(next(iter(others.train_dataloader())), 0)
    network = Conv4(1, 5, 28, channels=16, activation="gelu")
    model = MAML(network, inner_lr, train_steps=1)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    measured, losses = [], []
    for k, batch in enumerate(data.train_dataloader()):
        episodes = data.on_after_batch_transfer(batch, 0)
        if k % 20 == 0:
            measured.append(model.probe(tasks).curvature(restarts=0).L)
        optimizer.zero_grad()
        loss = model.meta_loss(episodes)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return measured, losses


def inner_rates_in_practice() -> Finding:
    """P18: whether classification bears a large inner rate because its Hessians are small."""
    alpha = 0.4
    found, losses = train_on_glyphs(alpha)
    measured = [alpha * L for L in found]
    allowed = theory.recommended_inner_lr(found[0], 1)
    _, losses_of_allowed = train_on_glyphs(allowed)
    first, last, last_of_allowed = (
        sum(part) / 10 for part in (losses[:10], losses[-10:], losses_of_allowed[-10:])
    )
    limit = theory.largest_inner_lr(1.0, 1)
    return Finding(
        "P18",
        "inner rates in practice",
        "classification has small Hessians and therefore bears large alpha (J Sec 1.1, and after "
        "Thm 5)",
        f"alpha L < {limit:.2f} at a rate that trains well",
        f"5-way 1-shot glyphs, one network, alpha = {alpha}: alpha L = {min(measured):.0f} .. "
        f"{max(measured):.0f} along 60 iterations, which take the query loss from {first:.2f} to "
        f"{last:.2f}; with alpha = 1 / (8 L) = {allowed:.1g} it ends at {last_of_allowed:.2f}",
        max(measured) < limit,
        Panel(
            "iteration",
            "alpha L",
            [
                Series("measured", range(0, 60, 20), measured),
                Series("Ji's condition", range(0, 60, 20), [limit] * 3, "k--"),
            ],
            ("linear", "log"),
        ),
        expected=False,
    )


BOUNDS = (
    finite_sum_rate,
    resampling_rate,
    moments_of_the_estimate,
    floors_of_samples,
    iterations_for_an_accuracy,
    inner_rates_in_practice,
)
