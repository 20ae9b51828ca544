"""One batch's loss and its derivatives, on a function whose derivatives are known."""

import pytest
import torch
from torch import Tensor

from lightning_maml.functional import Params
from lightning_maml.objective import AutogradObjective, FunctionalObjective, Objective


def cubic(w: Params) -> tuple[Tensor, tuple[()]]:
    """Sum of w^3: gradient 3 w^2, Hessian diag(6 w)."""
    return (w["w"] ** 3).sum(), ()


@pytest.mark.parametrize("kind", [AutogradObjective, FunctionalObjective])
def test_value_gradient_and_hessian_vector_product(kind: type[Objective]) -> None:
    w, v = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([1.0, -1.0])}
    value, _, gradient = kind(cubic).value_and_gradient(w)
    assert value == 9
    assert gradient["w"].tolist() == [3, 12]
    assert kind(cubic).hessian_vector_product(w, v)["w"].tolist() == [6, -12]


@pytest.mark.parametrize("kind", [AutogradObjective, FunctionalObjective])
def test_a_kept_graph_serves_only_the_point_it_was_made_at(kind: type[Objective]) -> None:
    here, there, v = {"w": torch.tensor([1.0])}, {"w": torch.tensor([5.0])}, {"w": torch.tensor([1.0])}
    for points in ([there, here], [here, there], [here, here]):
        objective = kind(cubic)
        assert objective.gradient(here, keep_graph=True)["w"] == 3
        assert [float(objective.hessian_vector_product(w, v)["w"]) for w in points] == [6 * float(w["w"]) for w in points]


@pytest.mark.parametrize("kind", [AutogradObjective, FunctionalObjective])
def test_results_carry_no_graph(kind: type[Objective]) -> None:
    w = {"w": torch.tensor([1.0])}
    objective = kind(cubic)
    tensors = [*objective.value_and_gradient(w)[2].values(), *objective.gradient(w, keep_graph=True).values()]
    assert not any(tensor.requires_grad for tensor in tensors)
