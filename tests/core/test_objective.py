"""One batch's loss and its derivatives, on a function whose derivatives are known."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_maml.core.hvp import finite_difference
from lightning_maml.core.objective import Objective
from lightning_maml.core.params import Params
from lightning_maml.core.task_axis import TaskAxis
from lightning_maml.errors import UserRuntimeError


def cubic(w: Params) -> tuple[Tensor, tuple[()]]:
    """Sum of w^3: gradient 3 w^2, Hessian diag(6 w)."""
    return (w["w"] ** 3).sum(), ()


def test_value_gradient_and_hessian_vector_product() -> None:
    w, v = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([1.0, -1.0])}
    value, _, gradient = Objective(cubic).value_and_gradient(w)
    assert value == 9
    assert gradient["w"].tolist() == [3, 12]
    assert Objective(cubic).hessian_vector_product(w, v)["w"].tolist() == [6, -12]


def test_a_kept_graph_serves_only_the_point_it_was_made_at() -> None:
    here, there, v = (
        {"w": torch.tensor([1.0])},
        {"w": torch.tensor([5.0])},
        {"w": torch.tensor([1.0])},
    )
    for points in ([there, here], [here, there], [here, here]):
        objective = Objective(cubic, keep_graph=True)
        assert objective.gradient(here)["w"] == 3
        assert [float(objective.hessian_vector_product(w, v)["w"]) for w in points] == [
            6 * float(w["w"]) for w in points
        ]


class _Refused(torch.autograd.Function):
    """Refuses a second derivative, as the project's own kernels do in a sentence of their own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise UserRuntimeError("Expected another backend.")
        return gradient


def test_an_error_with_a_sentence_of_its_own_is_not_taken_for_a_missing_derivative() -> None:
    objective, w = Objective(lambda w: (_Refused.apply(w["w"]).sum(), ())), {"w": torch.ones(2)}
    assert objective.gradient(w)["w"].tolist() == [1, 1]
    with pytest.raises(UserRuntimeError, match="Expected another backend"):
        objective.hessian_vector_product(w, w)


def test_results_carry_no_graph() -> None:
    w = {"w": torch.tensor([1.0])}
    objective = Objective(cubic)
    tensors = [
        *objective.value_and_gradient(w)[2].values(),
        *Objective(cubic, keep_graph=True).gradient(w).values(),
    ]
    assert not any(tensor.requires_grad for tensor in tensors)


def test_stacked_tasks_have_derivatives_of_their_own() -> None:
    w, v = ({"w": torch.randn(3, 2)} for _ in range(2))
    stacked = Objective(lambda w: (w["w"].pow(3).sum(1), ()), TaskAxis(3))
    value, _, gradient = stacked.value_and_gradient(w)
    each = [Objective(cubic).value_and_gradient({"w": row}) for row in w["w"]]
    torch.testing.assert_close(value, torch.stack([of_one[0] for of_one in each]))
    torch.testing.assert_close(gradient["w"], torch.stack([of_one[2]["w"] for of_one in each]))
    torch.testing.assert_close(stacked.hessian_vector_product(w, v)["w"], 6 * w["w"] * v["w"])


def test_finite_differences_of_stacked_tasks_probe_at_the_same_radius() -> None:
    """One task's direction is a million times the other's; the radius is no less its own."""
    w, v = (
        {"w": torch.tensor([[1.0, 2.0], [1.0, 2.0]]).double()},
        {"w": torch.tensor([[1e6, 0.0], [0.0, 1.0]]).double()},
    )
    probed: list[torch.Tensor] = []

    def loss(w: Params) -> tuple[Tensor, tuple[()]]:
        probed.append((w["w"].detach() - torch.tensor([1.0, 2.0])).norm(dim=1))
        return w["w"].pow(3).sum(1), ()

    product = finite_difference(Objective(loss, TaskAxis(2)), w, v, probe_radius=1e-3)["w"]
    torch.testing.assert_close(product, 6 * w["w"] * v["w"], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.cat(probed), torch.full((4,), 1e-3).double())


def test_the_death_of_a_loader_is_not_taken_for_a_missing_derivative() -> None:
    class Dying(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            if torch.is_grad_enabled():  # where a second derivative is prepared
                raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")
            return g

    objective = Objective(lambda w: ((Dying.apply(w["x"]) ** 3).sum(), ()))
    w = {"x": torch.ones(2)}
    with pytest.raises(RuntimeError, match=r"^DataLoader worker \(pid 1\) is killed"):
        objective.hessian_vector_product(w, w)
