"""The check: right models are found right, wrong ones wrong, whatever cannot be compared is said,
and nothing is touched."""

import doctest
import importlib
import random
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from helpers.folders import CONFIGS
from helpers.networks import build, leaves, make_episodes, plain_loss, relative_error, unrolled
from lightning_maml import (
    FOMAML,
    HFMAML,
    IMAML,
    MAML,
    CheckReport,
    Conv4,
    Episodes,
    MAMLPlusPlus,
    MetaSGD,
    ProtoNet,
    Reptile,
    ResampledEpisodes,
    check,
)
from lightning_maml.cli import main
from lightning_maml.core.rng import generator_states
from lightning_maml.networks.kinks import weight_normed
from lightning_maml.verification.case import Case, copied_model
from lightning_maml.verification.cost import peak_bytes
from lightning_maml.verification.report import Look
from lightning_maml.verification.unrolled import unrolled_gradient, unrolled_way_back
from lightning_maml.verification.ways import explain_auto

WAYS = 3


def tasks(*shape: int, count: int = 4, ways: int = WAYS) -> Episodes:
    random_numbers = torch.Generator().manual_seed(1)
    labels = torch.arange(ways).repeat(count, 2)
    support, query = (
        torch.randn(count, 2 * ways, *(shape or (6,)), generator=random_numbers) for _ in range(2)
    )
    return Episodes(support, labels, query, labels)


def network(*layers: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), *layers, nn.GELU(), nn.Linear(8, WAYS))


def row(report: CheckReport, at: str) -> Look:
    (found,) = (row for row in report.rows if row.at == at)
    return found


# what the check compares with


def test_the_unrolled_gradient_has_a_closed_form_on_a_quadratic() -> None:
    w = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    line = nn.Linear(2, 1, bias=False).double()
    line.weight.data.copy_(w)
    episodes = Episodes(*(torch.randn(2, 5, width, dtype=torch.float64) for width in (2, 1, 2, 1)))
    rates = [{"weight": 0.1}, {"weight": 0.3}]
    expected, first_order, back = torch.zeros_like(w), torch.zeros_like(w), torch.zeros_like(w)
    for a, b, c, d in zip(*episodes, strict=True):
        hessian, adapted, jacobian = 2 * a.T @ a / 5, w, torch.eye(2, dtype=torch.float64)
        for rate in (0.1, 0.3):
            adapted = adapted - rate * (2 * (adapted @ a.T - b.T) @ a / 5)
            jacobian = jacobian @ (torch.eye(2) - rate * hessian)
        of_query = 2 * (adapted @ c.T - d.T) @ c / 5
        expected, first_order, back = (
            expected + of_query @ jacobian.T / 2,
            first_order + of_query / 2,
            back + (w - adapted) / 2,
        )
    torch.testing.assert_close(
        unrolled_gradient(line, F.mse_loss, episodes, rates)["weight"], expected
    )
    torch.testing.assert_close(
        unrolled_gradient(line, F.mse_loss, episodes, rates, curved=False)["weight"], first_order
    )
    torch.testing.assert_close(unrolled_way_back(line, F.mse_loss, episodes, rates)["weight"], back)


@pytest.mark.parametrize("name", ["mlp", "conv_batch_norm", "conv_max_pool"])
def test_the_unrolled_gradient_is_that_of_functional_calls(name: str) -> None:
    own, episodes = build(name), make_episodes()
    w = leaves(own)
    unrolled(plain_loss(build(name)), w, episodes, 0.2, 2).backward()
    found = unrolled_gradient(own, F.cross_entropy, episodes, [dict.fromkeys(w, 0.2)] * 2)
    assert relative_error(found, {name: p.grad for name, p in w.items()}) < 1e-12


def test_what_the_loss_and_the_rates_depend_on_gets_its_gradient() -> None:
    w, rate = (
        torch.tensor([[2.0]], dtype=torch.float64),
        torch.tensor(0.1, dtype=torch.float64, requires_grad=True),
    )
    line = nn.Linear(1, 1, bias=False).double()
    line.weight.data.copy_(w)
    episodes = Episodes(*(torch.randn(1, 5, 1, dtype=torch.float64) for _ in range(4)))

    def query_loss(rate: Tensor, w: Tensor) -> Tensor:
        (a, b, c, d) = (tensor[0] for tensor in episodes)
        return (c * (w - rate * 2 * ((w * a - b) * a).mean()) - d).square().mean()

    found = unrolled_gradient(
        line, F.mse_loss, episodes, [{"weight": rate}], besides={"rate": rate}
    )
    expected = torch.autograd.functional.jacobian(query_loss, (rate.detach(), w))
    torch.testing.assert_close((found["rate"], found["weight"]), expected)


def test_peak_memory_is_that_of_the_tensors_that_live_at_once() -> None:
    def held() -> Tensor:
        x = torch.ones(1000)
        y = x + 1  # the second
        x = y.view(10, 100)  # no memory of its own, and the first is freed
        return x * 2

    assert peak_bytes(held, torch.device("cpu")) == 8000
    assert peak_bytes(lambda: torch.ones(1000).mul_(2), torch.device("cpu")) == 4000
    before = torch.ones(1000)
    assert peak_bytes(lambda: before.mul_(2).view(10, 100), torch.device("cpu")) == 0


# what is right


@pytest.mark.parametrize("algorithm", [MAML, FOMAML, HFMAML, MetaSGD, MAMLPlusPlus, Reptile])
def test_every_algorithm_is_found_right(algorithm: type[MAML]) -> None:
    report = check(algorithm(network(), inner_lr=0.1, train_steps=2), tasks())
    assert report.ok, report
    assert (
        row(report, "exact meta-gradient, float64").verdict
        == row(report, "exact meta-gradient, float32").verdict
        == "right"
    )
    assert all(
        row(report, f"tasks in {way}").verdict == "right"
        for way in ("threads", "vmap", "chunks of 2")
    )
    assert row(report, "Hessian-free, float32").verdict == "right"
    if algorithm in (FOMAML, Reptile):
        assert row(report, f"{algorithm.__name__}'s gradient, float64").verdict == "right"


@pytest.mark.parametrize("policy", ["batch", "support", "running"])
def test_a_conv4_is_found_right_by_every_policy(policy: Any) -> None:
    torch.manual_seed(0)
    model = MAML(Conv4(1, WAYS, 16, channels=4), inner_lr=0.1, batch_norm=policy)
    report = check(model, tasks(1, 16, 16, count=2))
    assert row(report, "exact meta-gradient, float64").verdict == "right", report
    assert report.ok
    assert (
        row(report, "buffers written").found
        == f"none; batch norm's averages follow batch_norm={policy!r}"
    )
    others = (
        "do not depend on the other queries"
        if policy == "support"
        else "change with the other inputs of the batch"
    )
    assert row(report, "normalisation").found == f"outputs {others}"
    assert "features.0.2 (ReLU)" in row(report, "kinks").found
    assert row(report, "Hessian-free, float32").verdict == "note"
    assert "kinks in features.0.2 (ReLU)" in row(report, "Hessian-free, float32").found


def test_the_table_has_every_row_and_ends_with_the_verdict() -> None:
    report = check(MAML(network(), inner_lr=0.1), tasks())
    lines = str(report).splitlines()
    assert sum(line.startswith(("  right  ", "  wrong  ", "  note   ")) for line in lines) == len(
        report.rows
    )
    assert max(map(len, lines)) <= 104
    assert (
        lines[-1]
        == report.verdict
        == (
            "The gradients of MAML are right on this network, loss and batch (8 checks, none "
            "wrong; 8 notes)."
        )
    )


def test_the_example_of_the_docstring_runs() -> None:
    runner = doctest.DocTestRunner()
    (example,) = doctest.DocTestFinder().find(check, "check")
    assert runner.run(example) == (0, 4 + 2), "no failures"


def test_embeddings_of_words_are_found_right() -> None:
    torch.manual_seed(0)
    words = nn.Sequential(nn.Embedding(9, 4, padding_idx=0), nn.Flatten(), nn.Linear(8, WAYS))
    labels = torch.arange(WAYS).repeat(3, 2)
    episodes = Episodes(
        torch.randint(0, 9, (3, 6, 2)), labels, torch.randint(0, 9, (3, 6, 2)), labels
    )
    report = check(MAML(words, inner_lr=0.1), episodes)
    assert report.ok, report
    assert (
        row(report, "exact meta-gradient, float64").verdict
        == row(report, "tasks in vmap").verdict
        == "right"
    )


def test_a_hessian_free_gradient_that_is_far_off_is_wrong_for_hfmaml_alone() -> None:
    torch.manual_seed(0)
    bent = Conv4(1, 5, 28, channels=8, activation="relu", downsample="max")
    labels, images = torch.arange(5).repeat(2, 1), torch.rand(2, 2, 5, 1, 28, 28)
    episodes = Episodes(images[0], labels, images[1], labels)
    found = {
        algorithm: check(algorithm(bent, inner_lr=0.4), episodes) for algorithm in (HFMAML, MAML)
    }
    looks = {
        algorithm: next(row for row in report.rows if row.at.startswith("Hessian-free"))
        for algorithm, report in found.items()
    }
    assert (looks[HFMAML].verdict, looks[MAML].verdict) == ("wrong", "note"), looks
    assert not found[HFMAML].ok
    assert found[MAML].ok, found[MAML]


class Pair(nn.Module):
    """Takes two tensors, keeps features by a hook whose closure knows them, and returns an object
    with logits."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(2, 4), nn.Linear(3, 4), nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 3)
        self.kept: dict[str, Tensor] = {}
        self.norm.register_forward_hook(
            lambda _, inputs, outputs: self.kept.update(features=outputs)
        )

    def forward(self, one: Tensor, other: Tensor) -> SimpleNamespace:
        self.norm(self.first(one) + self.second(other))
        return SimpleNamespace(logits=self.head(torch.tanh(self.kept["features"])))


@pytest.mark.parametrize("policy", ["batch", "support"])
def test_dicts_and_objects_are_found_right(policy: Any) -> None:
    x = {"one": torch.rand(4, 6, 2), "other": torch.rand(4, 6, 3)}
    labels = torch.arange(3).repeat(4, 2)
    report = check(
        MAML(Pair(), 0.1, 2, batch_norm=policy),
        Episodes(x, labels, {name: part.flip(1) for name, part in x.items()}, labels),
    )
    (exact,) = (row for row in report.rows if row.at == "exact meta-gradient, float64")
    assert report.ok, report
    assert exact.verdict == "right", report


def test_random_numbers_are_drawn_alike_and_named() -> None:
    report = check(MAML(network(nn.Dropout(0.5)), inner_lr=0.1), tasks())
    assert report.ok, report
    assert row(report, "exact meta-gradient, float64").verdict == "right"
    assert row(report, "random numbers").found == "drawn from torch"
    assert row(report, "tasks in threads").found.startswith(
        "refused: Expected a network and a loss that draw no random numbers"
    )
    assert row(report, "tasks in vmap").found.startswith(
        "not compared, as each task draws random numbers of its own"
    )
    assert (
        row(report, "tasks='auto' chooses").found
        == "loop, because threads would share the random generator of torch"
    )


def test_dropout_after_convolutions_draws_in_the_order_of_the_library() -> None:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(1, 4, 3, padding=1),
        nn.GELU(),
        nn.Dropout(0.4),
        nn.Flatten(),
        nn.Linear(256, WAYS),
    ]
    report = check(MAML(nn.Sequential(*layers), 0.1), tasks(1, 8, 8))
    assert report.ok, report
    assert (
        row(report, "exact meta-gradient, float64").verdict
        == row(report, "exact meta-gradient, float32").verdict
        == "right"
    )


class DrawsMore(nn.Conv2d):
    """Draws once more where its forward pass was replaced, as the library does."""

    def __init__(self) -> None:
        super().__init__(1, 4, 3, padding=1)
        self.inner = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        if "forward" in vars(self.inner):
            torch.rand(1)
        return self.inner(super().forward(x)) * torch.rand(1)


def test_random_numbers_that_are_others_in_the_library_are_not_compared() -> None:
    torch.manual_seed(0)
    report = check(
        MAML(nn.Sequential(DrawsMore(), nn.Flatten(), nn.Linear(256, WAYS)), 0.1), tasks(1, 8, 8)
    )
    assert report.ok, report
    assert (
        "draws its random numbers in another order"
        in row(report, "exact meta-gradient, float64").found
    )


class Marking(nn.Module):
    """Writes to a buffer what it had from the beginning, to another one past autograd; not to NaN."""

    mark: Tensor
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mark", torch.ones(()))
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("unknown", torch.tensor(float("nan")))

    def forward(self, x: Tensor) -> Tensor:
        self.mark.fill_(1.0)
        self.calls.data.add_(1.0)
        return x


def test_buffers_that_a_forward_pass_writes_are_named() -> None:
    normed = parametrizations.spectral_norm(nn.Linear(6, WAYS))
    network = nn.Sequential(normed, Marking())
    report = check(MAML(network, inner_lr=0.1), tasks())
    assert (
        row(report, "buffers written").found
        == "0.parametrizations.weight.0._u, 0.parametrizations.weight.0._v, 1.mark, 1.calls"
    )
    assert row(report, "exact meta-gradient, float64").verdict == "right", report


class Reversing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        if x.requires_grad:
            x.register_hook(lambda gradient: gradient / len(gradient))
        return x


def test_a_refused_stack_is_no_mistake() -> None:
    report = check(MAML(network(Reversing()), inner_lr=0.1), tasks())
    assert report.ok, report
    assert row(report, "exact meta-gradient, float64").verdict == "right"
    for way in ("vmap", "chunks of 2"):
        assert row(report, f"tasks in {way}").verdict == "note"
        assert row(report, f"tasks in {way}").found.startswith(
            "refused: Expected a network and a loss whose tasks can be stacked"
        )
    assert "hooks on tensors" in row(report, "tasks='auto' chooses").found


def test_parameters_that_nothing_moves_are_named() -> None:
    class Idle(nn.Linear):
        def __init__(self) -> None:
            super().__init__(6, WAYS)
            self.idle = nn.Parameter(torch.ones(2))

    report = check(MAML(Idle(), inner_lr=0.1), tasks())
    assert row(report, "a training step")[:3] == (
        "a training step",
        "no gradient for network.idle: not used, detached, or behind what is zero on this batch",
        "note",
    )
    assert report.ok


@pytest.mark.parametrize(
    ("size", "count", "chosen"),
    [
        (6, 4, "vmap, because a task has only 72 numbers in its inputs"),
        (6, 3, "loop, because 3 tasks are too few to stack"),
        (
            6000,
            4,
            (
                "threads, because a task, with 72000 numbers in its inputs and 18003 in its "
                "parameters, is too large to be stacked"
            ),
        ),
        (600, 20, "threads in chunks of 5, because a task has only 7200 numbers in its inputs"),
        (
            90000,
            2,
            "loop, because one task, with 1080000 numbers in its inputs, keeps all cores busy",
        ),
    ],
)
@pytest.mark.usefixtures("two_threads")
def test_what_auto_chooses_is_what_a_model_does(size: int, count: int, chosen: str) -> None:
    model, episodes = MAML(nn.Linear(size, WAYS), inner_lr=1e-4), tasks(size, count=count)
    (look,) = explain_auto(Case(copied_model(model), episodes, generator_states(model.device)), ())
    assert look.found == chosen
    way, chunk_size = model._execution(episodes)
    assert chosen.startswith(f"{way} in chunks of {chunk_size}," if chunk_size else f"{way},")


class Temperature(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, outputs: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(outputs * self.log_scale.exp(), y)


class Rounding(nn.Module):
    """A mean in float32 whose last digits depend on the order of its summands."""

    def forward(self, x: Tensor) -> Tensor:
        return ((x.float() + 1000).mean((2, 3)) - 1000).to(x)


class InFloat32(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.eye(8)


EXACT = "exact meta-gradient"
NONE = "not compared: "


@pytest.mark.parametrize(
    ("model", "at", "found"),
    [
        (lambda: IMAML(network(), train_steps=2), EXACT, f"{NONE}iMAML's is implicit"),
        (
            lambda: MAML(network(nn.BatchNorm1d(8)), 0.1, batch_norm="per_step"),
            EXACT,
            f"{NONE}batch_norm='per_step'",
        ),
        (
            lambda: FOMAML(network(nn.Hardsigmoid()), 0.1),
            EXACT,
            f"{NONE}Expected a network and a loss with second derivatives",
        ),
        (lambda: FOMAML(network(nn.Hardsigmoid()), 0.1), "FOMAML's gradient, float64", ""),
        (lambda: MAML(torch.jit.script(network()), 0.1), f"{EXACT}, float64", ""),
        (lambda: MAML(network(InFloat32()), 0.1), f"{EXACT}, float32", ""),
        (lambda: MAML(network().bfloat16(), 0.1), f"{EXACT}, bfloat16", ""),
        (lambda: MAML(network(), 0.1, loss=Temperature()), f"{EXACT}, float64", ""),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_what_cannot_be_compared_is_said_and_not_called_wrong(
    model: Callable[[], MAML], at: str, found: str
) -> None:
    own = model()
    dtype = next(own.network.parameters()).dtype
    x, y, query_x, query_y = tasks()
    report = check(own, Episodes(x.to(dtype), y, query_x.to(dtype), query_y))
    assert report.ok, report
    assert row(report, at).verdict == ("note" if found else "right")
    assert row(report, at).found.startswith(found)


def test_a_network_that_rounds_to_float32_is_not_called_wrong_in_float64() -> None:
    torch.manual_seed(0)
    report = check(
        MAML(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), Rounding(), nn.Linear(4, WAYS)), 0.1),
        tasks(1, 16, 16),
    )
    assert report.ok, report
    assert float(row(report, f"{EXACT}, float64").found.split()[0]) > 1e-6, (
        "or the network does not round"
    )


def test_a_gradient_that_was_not_compared_is_not_called_right() -> None:
    report = check(IMAML(network(), train_steps=2), tasks())
    assert report.ok, report
    assert report.verdict.startswith("Nothing was found wrong with IMAML on this network")
    assert report.verdict.endswith("but its gradient was not compared with autograd.")


def test_fresh_samples_for_every_step_are_not_compared() -> None:
    x, y, query_x, query_y = tasks()
    report = check(
        MAML(network(), 0.1),
        ResampledEpisodes(x[:, None], y[:, None], x[:, None], y[:, None], query_x, query_y),
    )
    assert report.ok, report
    assert row(report, EXACT).found.startswith(f"{NONE}with ResampledEpisodes")


@pytest.mark.parametrize(
    "result", [lambda w: {name: p * float("nan") for name, p in w.items()}, lambda w: 1 / 0]
)
def test_where_autograd_fails_nothing_is_called_wrong(
    result: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    patched(monkeypatch, "verification.case", "unrolled_gradient", result)
    report = check(MAML(network(), 0.1), tasks())
    assert report.ok
    assert row(report, f"{EXACT}, float64").verdict == "note"
    assert row(report, f"{EXACT}, float64").found.startswith("not compared")


# what is wrong


def patched(
    monkeypatch: pytest.MonkeyPatch, module: str, name: str, change: Callable[[Any], Any]
) -> None:
    """Let a function of the library return something else."""
    where = importlib.import_module(f"lightning_maml.{module}")
    right = getattr(where, name)
    monkeypatch.setattr(where, name, lambda *arguments, **named: change(right(*arguments, **named)))


def negative(params: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: -tensor for name, tensor in params.items()}


@pytest.mark.parametrize(
    ("algorithm", "module", "function", "at"),
    [
        # the curvature's sign
        (MAML, "core.hvp", "exact", "exact meta-gradient, float64"),
        (
            FOMAML,
            "core.inner_loop",
            "sgd_step",
            "FOMAML's gradient, float64",
        ),  # another inner path
        (Reptile, "functional.reptile", "subtract", "Reptile's gradient, float64"),
        (MetaSGD, "core.meta_gradient", "_rate_gradients", "exact meta-gradient, float64"),
    ],
)
def test_a_wrong_gradient_is_found(
    algorithm: type[MAML], module: str, function: str, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    patched(monkeypatch, module, function, negative)
    report = check(algorithm(network(), inner_lr=0.1), tasks())
    assert not report.ok
    assert row(report, at).verdict == "wrong", report
    assert report.verdict.startswith(
        f"{algorithm.__name__} is wrong on this network, loss or batch, see '"
    )


def test_a_wrong_gradient_in_the_own_precision_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def rough(params: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: tensor * (1.0 if tensor.dtype == torch.float64 else 1.5)
            for name, tensor in params.items()
        }

    patched(monkeypatch, "core.hvp", "exact", rough)
    report = check(MAML(network(), inner_lr=1.0), tasks())
    assert [found.at for found in report.rows if found.verdict == "wrong"] == [
        "exact meta-gradient, float32"
    ], report


def test_a_way_of_running_tasks_that_gives_something_else_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def doubled(results: Any) -> Any:
        return (
            found._replace(grad={name: 2 * tensor for name, tensor in found.grad.items()})
            for found in results
        )

    patched(monkeypatch, "execution.task_map", "_in_threads", doubled)
    report = check(MAML(network(), inner_lr=0.1), tasks())
    assert [found.at for found in report.rows if found.verdict == "wrong"] == [
        "tasks in threads"
    ], report


def with_a_wrong_label() -> Episodes:
    episodes = tasks()
    episodes.query_y[-1, -1] = WAYS
    return episodes


@pytest.mark.parametrize(
    ("model", "episodes", "at", "sentence"),
    [
        (
            lambda: MAML(nn.Linear(6, 2)),
            tasks(),
            "labels and shapes",
            "Expected labels from 0 to 1, the outputs of `network`, but got 0",
        ),
        (
            lambda: MAML(nn.Linear(5, WAYS)),
            tasks(),
            "labels and shapes",
            "mat1 and mat2 shapes cannot be multiplied",
        ),
        (
            lambda: MAML(nn.Linear(6, WAYS)),
            3,
            "labels and shapes",
            "Expected a batch of `lightning_maml.Episodes` but got int",
        ),
        (
            lambda: MAML(network(Reversing()), 0.1, tasks="vmap"),
            tasks(),
            "a training step",
            "Expected a network and a loss whose tasks",
        ),
        (
            lambda: MAML(nn.Linear(6, WAYS)),
            with_a_wrong_label(),
            "labels and shapes",
            "Expected labels from 0 to 2, the outputs",
        ),
        (
            lambda: MAML(nn.Linear(6, WAYS), 1e38, 3),
            tasks(),
            "a training step",
            "Expected a finite query loss but got",
        ),
        (
            lambda: MAML(network(nn.Hardsigmoid())),
            tasks(),
            "a training step",
            "Expected a network and a loss with second derivatives",
        ),
    ],
)
def test_what_cannot_be_trained_ends_the_report_with_its_sentence(
    model: Callable[[], MAML], episodes: Any, at: str, sentence: str
) -> None:
    report = check(model(), episodes)
    assert not report.ok
    assert (report.rows[-1].at, report.rows[-1].verdict) == (at, "wrong")
    assert report.rows[-1].found.startswith(sentence)
    assert (
        report.verdict
        == f"MAML is wrong on this network, loss or batch, see '{at}': {report.rows[-1].found}"
    )


def test_torchs_wrong_second_derivative_of_weight_norm_is_told() -> None:
    normed = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(6, 8)), nn.GELU(), nn.Linear(8, WAYS)
    )
    if not weight_normed(normed):
        pytest.skip("this torch gets it right")
    assert [
        found.at for found in check(MAML(normed, 0.1), tasks()).rows if found.verdict == "wrong"
    ] == ["weight norm"]
    assert check(FOMAML(normed, 0.1), tasks()).ok


def test_a_model_without_an_inner_loop_is_refused() -> None:
    with pytest.raises(
        TypeError,
        match="Expected MAML or one of its variants, whose inner loop is checked, but got ProtoNet",
    ):
        check(ProtoNet(network()), tasks())


# what it leaves as it is


def everything(model: MAML) -> Any:
    """Return all that the check must leave alone, in a form that can be compared."""
    tensors = {
        name: (tensor.clone(), tensor._version)
        for name, tensor in model.state_dict(keep_vars=True).items()
    }
    gradients = {
        name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()
    }
    modes = [module.training for module in model.modules()]
    generators = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
    kept = {
        name: repr(value)
        for name, value in vars(model).items()
        if name not in ("_parameters", "_buffers", "_modules")
    }
    attributes = [sorted(vars(module)) for module in model.modules()]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    return (
        tensors,
        gradients,
        modes,
        generators,
        kept,
        attributes,
        hooks,
        torch.get_num_threads(),
        model._executor,
    )


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(
            same(value, other[key]) for key, value in one.items()
        )
    return bool(one == other)


class Numpy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * float(np.random.rand()) * random.random()


def draws_and_fails(case: Any) -> None:
    case.model.network(tasks().support_x[0])
    raise ZeroDivisionError


@pytest.mark.parametrize("fails", [False, True])
def test_model_and_generators_are_left_as_they_are(
    fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    normed = parametrizations.spectral_norm(nn.Linear(8, 8))
    model = MAML(
        network(normed, nn.BatchNorm1d(8), nn.Dropout(0.1), Numpy()),
        inner_lr=0.1,
        batch_norm="running",
    )
    model.network[2].eval()
    model.meta_loss(tasks()).backward()
    if fails:
        monkeypatch.setattr(
            importlib.import_module("lightning_maml.verification.check"),
            "_first_step",
            draws_and_fails,
        )
    before = everything(model)
    with pytest.raises(ZeroDivisionError) if fails else nullcontext():
        check(model, tasks())
    assert same(before, everything(model))


# the command


SMALL = [
    "--data.ways=3",
    "--model.network.ways=3",
    "--model.network.channels=2",
    "--data.meta_batch_size=2",
    "--data.queries=2",
]


def test_the_command_prints_the_table_of_a_config_and_a_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "check",
        f"--config={CONFIGS / 'glyphs_maml.yaml'}",
        *SMALL,
        f"--trainer.default_root_dir={tmp_path}",
    ]
    main(arguments)
    at_first = capsys.readouterr().out
    assert "MAML at the initial weights, the first training batch" in at_first
    assert "2 tasks of 3 support and 6 query examples, outputs [3] for each" in at_first
    assert "The gradients of MAML are right on this network, loss and batch" in at_first
    checkpoint = tmp_path / "some.ckpt"
    torch.save(
        {"state_dict": MAML(Conv4(1, 3, 28, channels=2, activation="gelu")).state_dict()},
        checkpoint,
    )
    main([*arguments, f"--ckpt_path={checkpoint}", "--trainer.precision=bf16-mixed"])
    mixed = capsys.readouterr().out
    assert f"MAML at {checkpoint}" in mixed
    assert "right  exact meta-gradient, mixed bfloat16" in mixed


def test_the_command_ends_with_status_1_if_something_is_wrong(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as exit:
        main(
            ["check", f"--config={CONFIGS / 'glyphs_maml.yaml'}", *SMALL, "--model.network.ways=4"]
        )
    assert exit.value.code == 1
    assert (
        "Expected `network` to have 3 outputs, one per way of the episode, but got 4"
        in " ".join(capsys.readouterr().out.split())
    )


@pytest.mark.parametrize(
    ("model", "at"),
    [
        (lambda: HFMAML(network(), 0.1, probe_radius=3.0), "Hessian-free"),
        (lambda: MAMLPlusPlus(network(), 0.1, 2), "MAMLPlusPlus's gradient"),
    ],
    ids=["a large radius", "annealed"],
)
def test_a_gradient_that_may_be_another_is_not_called_right(model: Any, at: str) -> None:
    report = check(model(), tasks())
    assert report.ok, report
    assert f"gradient was not found to be right, see '{at}" in report.verdict
