"""The inner learning rates A: one number, or one for each parameter, or for each step."""

from collections.abc import Collection, Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lightning_maml.core.params import Diagonal, Params
from lightning_maml.errors import UserValueError

Rates = Diagonal
"""A in one step. Parameters that are not named do not adapt."""

InnerRates = float | Tensor | Rates | Sequence[Rates]
"""One rate for all parameters, rates by parameter, or such rates for each step, of which the last
serve all further steps."""

LearnedRatesName = Literal["per_layer", "per_layer_and_step", "per_parameter"]
InnerRatesName = Literal["fixed"] | LearnedRatesName


def check_inner_rates(inner_rates: str) -> None:
    """Check an argument called ``inner_rates``.

    Raises:
        ValueError: If it is unknown.
    """
    if inner_rates not in ("fixed", *get_args(LearnedRatesName)):
        names = ", ".join(map(repr, get_args(LearnedRatesName)))
        raise UserValueError(
            f"Expected `inner_rates` to be 'fixed', {names} but got {inner_rates!r}."
        )


class LearnedRates(nn.Module):
    """Inner rates as parameters, which all start from one value.

    Args:
        params: The parameters that adapt.
        inner_lr: The first value, or those by name, see :func:`rates_by_name`.
        kind: ``"per_layer"``: one for each parameter tensor; ``"per_layer_and_step"``: a separate
            set for each step (LSLR, Antoniou et al. 2019, section 4); ``"per_parameter"``: one for
            each element (Meta-SGD, Li et al. 2017, eq. 3).
        steps: N, the number of sets with ``"per_layer_and_step"``.

    Examples:
        >>> import torch
        >>> from lightning_maml.core.inner_rates import LearnedRates
        >>> params = {"weight": torch.zeros(3, 2)}
        >>> rates = LearnedRates(params, 0.5, "per_parameter", steps=1)
        >>> rates(["weight"])["weight"].shape
        torch.Size([3, 2])
        >>> each_step = LearnedRates(params, 0.5, "per_layer_and_step", steps=4)
        >>> len(each_step(["weight"]))
        4
    """

    def __init__(
        self,
        params: Params,
        inner_lr: float | Mapping[str, float],
        kind: LearnedRatesName,
        steps: int,
    ) -> None:
        super().__init__()
        self._names = list(params)
        self._each_step = kind == "per_layer_and_step"
        of_steps = [max(steps, 1)] if self._each_step else []

        def first_values(p: Tensor, rate: float) -> Tensor:
            shape = [*of_steps, *p.shape] if kind == "per_parameter" else of_steps
            return torch.full(shape, rate, dtype=p.dtype.to_real(), device=p.device)

        first_rates = rates_by_name(inner_lr, params).values()
        self.values = nn.ParameterList(map(first_values, params.values(), first_rates))

    def forward(self, names: Collection[str]) -> Rates | list[Rates]:
        """Return the rates of these parameters, with their graph.

        If each step has rates of its own, the result is a list of them by step.

        Raises:
            ValueError: If a parameter was not there, or frozen, when the rates were made.
        """
        if new := [name for name in names if name not in self._names]:
            raise UserValueError(
                f"Expected a learned inner rate for each parameter that adapts but {new} have "
                "none; unfreeze them before the model is made."
            )
        values = {
            name: value
            for name, value in zip(self._names, self.values, strict=True)
            if name in names
        }
        if not self._each_step:
            return values
        return [
            dict(zip(values, of_step, strict=True))
            for of_step in zip(*values.values(), strict=True)
        ]


def rates_by_name(
    inner_lr: float | Mapping[str, float], names: Collection[str]
) -> dict[str, float]:
    """Return the rate of each parameter.

    Args:
        inner_lr: One rate for all; or rates by the names of parameters and of modules, of which the
            longest that fits counts. ``""`` is the whole network.
        names: The parameters that adapt.

    Raises:
        ValueError: If a parameter has no rate.

    Examples:
        >>> from lightning_maml.core.inner_rates import rates_by_name
        >>> rates_by_name({"": 0.1, "head": 0.5}, ["body.weight", "head.weight", "head.bias"])
        {'body.weight': 0.1, 'head.weight': 0.5, 'head.bias': 0.5}
    """
    if not isinstance(inner_lr, Mapping):
        return dict.fromkeys(names, inner_lr)
    fitting = {name: [key for key in inner_lr if _fits(key, name)] for name in names}
    if without := [name for name, keys in fitting.items() if not keys]:
        raise UserValueError(
            f"Expected `inner_lr` to have a rate for every parameter that adapts but {without} "
            "have none; name them or their module, or give the rate of all others as ''. A rate of "
            "0 keeps a layer as it is."
        )
    return {name: inner_lr[max(keys, key=len)] for name, keys in fitting.items()}


def check_rate_names(
    inner_lr: float | Mapping[str, float], names: Collection[str], shared: Mapping[str, str]
) -> None:
    """Check that rates by name are those of parameters or modules.

    Args:
        inner_lr: As for :func:`rates_by_name`.
        names: All parameters of the network, also those that do not adapt now.
        shared: The further names of parameters that modules share, and the first name of each.

    Raises:
        ValueError: If a name is none of these, or the names of a shared parameter have different
            rates.
    """
    if not isinstance(inner_lr, Mapping):
        return
    for other, first in shared.items():
        rates = [
            inner_lr[max(keys, key=len)]
            for name in (first, other)
            if (keys := [key for key in inner_lr if _fits(key, name)])
        ]
        named = any(key and _fits(key, other) for key in inner_lr)
        if named and (len(rates) == 1 or rates[0] != rates[1]):
            raise UserValueError(
                f"Expected `inner_lr` to have one rate for a parameter that modules share but "
                f"{other!r} is {first!r} too, whose rate would count; name both, with one rate."
            )
    every = [*names, *shared]
    if unknown := [key for key in inner_lr if not any(_fits(key, name) for name in every)]:
        raise UserValueError(
            f"Expected `inner_lr` to name parameters of the network, or modules that have some, "
            f"but {unknown} are none; the parameters are {[*names]}."
        )


def _fits(key: str, name: str) -> bool:
    """Return whether ``key`` is a parameter's name, or that of a module that it lies in."""
    return key in ("", name) or name.startswith(f"{key}.")


def rates_of_steps(inner_lr: InnerRates, params: Params, steps: int) -> list[Rates]:
    """Return the rates of each of ``steps`` inner steps.

    Raises:
        ValueError: If a rate is a number that is negative or not finite, belongs to no parameter or
            does not broadcast to its parameter, or if there are no rates.
    """
    if isinstance(inner_lr, int | float | Tensor):
        inner_lr = dict.fromkeys(params, inner_lr)
    given = [inner_lr] if isinstance(inner_lr, Mapping) else list(inner_lr)
    if not given:
        raise UserValueError(
            "Expected `inner_lr` to hold the rates of at least one inner step but it is empty."
        )
    for rates in given:
        _check(rates, params)
    return [dict(given[min(step, len(given) - 1)]) for step in range(steps)]


def tensor_rates(rates: Rates) -> Params:
    """Return the rates that have a gradient: the tensors among them."""
    return {name: rate for name, rate in rates.items() if isinstance(rate, Tensor)}


def _check(rates: Rates, params: Params) -> None:
    if not rates:
        raise UserValueError(
            "Expected `inner_lr` to hold the rate of at least one parameter but it is empty; "
            "nothing would adapt."
        )
    if unknown := [name for name in rates if name not in params]:
        raise UserValueError(f"Expected `inner_lr` to name parameters but {unknown} are none.")
    for name, rate in rates.items():
        if isinstance(rate, Tensor):
            shape = params[name].shape
            if not _broadcasts(rate.shape, shape):
                raise UserValueError(
                    f"Expected the inner rate of {name!r} to broadcast to its shape {list(shape)} "
                    f"but got shape {list(rate.shape)}."
                )
        elif not 0 <= rate < float("inf"):
            raise UserValueError(
                f"Expected `inner_lr` to be a finite number of at least 0 but got {rate}."
            )


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    return len(shape) <= len(to) and all(
        a in (1, b) for a, b in zip(reversed(shape), reversed(to), strict=False)
    )
