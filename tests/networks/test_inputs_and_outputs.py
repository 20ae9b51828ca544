"""Inputs that are dicts, tuples or lists of tensors, and outputs that are more than one tensor of
logits."""

from collections import UserDict
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from lightning import Trainer
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader

from helpers.networks import relative_error
from helpers.random_numbers import drawn_on_cpu
from helpers.trainers import on_device
from lightning_maml import ANIL, FOMAML, HFMAML, MAML, Episodes, ProtoNet, ResampledEpisodes
from lightning_maml.core.params import Params
from lightning_maml.core.rng import random_state
from lightning_maml.io.replay import load_step, save_step

WAYS, LENGTH, WORDS, WIDTH = 3, 5, 11, 8
RATE, STEPS = 0.3, 2


class NamedOutputs(NamedTuple):
    hidden: Tensor
    logits: Tensor


@dataclass
class Outputs:
    """What Hugging Face's models return is a dataclass too; this one is not known to torch's
    trees."""

    logits: Tensor
    hidden: Tensor


RETURNED = {
    "tensor": lambda logits, hidden: logits,
    "object": lambda logits, hidden: Outputs(logits, hidden),
    "namespace": lambda logits, hidden: SimpleNamespace(logits=logits, hidden=hidden, loss=None),
    "named tuple": lambda logits, hidden: NamedOutputs(hidden, logits),
    "dict": lambda logits, hidden: {"hidden": hidden, "logits": logits},
}
GIVEN = {
    "dict": lambda ids, mask: {"mask": mask, "ids": ids},
    "tuple": lambda ids, mask: (ids, mask),
    "list": lambda ids, mask: [ids, mask],
}


class Reader(nn.Module):
    """A transformer of one layer, as BERT has them, that looks at the words that its mask lets it
    see."""

    def __init__(self, returned: str = "object") -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH, padding_idx=0)
        self.queries, self.keys, self.values = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.norm = nn.LayerNorm(WIDTH)
        self.classifier = nn.Linear(WIDTH, WAYS)
        self._returned = RETURNED[returned]

    def forward(self, ids: Tensor, mask: Tensor) -> Any:
        x = self.embedding(ids)
        scores = self.queries(x) @ self.keys(x).mT / WIDTH**0.5
        attended = scores.masked_fill(~mask[:, None].bool(), -1e9).softmax(-1) @ self.values(x)
        hidden = F.gelu(self.norm(x + attended))
        pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return self._returned(self.classifier(pooled), hidden)


def reader(returned: str = "object") -> Reader:
    torch.manual_seed(0)
    return Reader(returned).double()


def sentences(*sizes: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Return word ids and masks ``[*sizes, LENGTH]``; sentences have different lengths."""
    random = torch.Generator().manual_seed(seed)
    lengths = drawn_on_cpu(torch.randint, 1, LENGTH + 1, (*sizes, 1), generator=random)
    mask = torch.arange(LENGTH) < lengths
    return drawn_on_cpu(
        torch.randint, 1, WORDS, (*sizes, LENGTH), generator=random
    ) * mask, mask.long()


def labels(tasks: int, per_class: int) -> Tensor:
    return torch.arange(WAYS).repeat_interleave(per_class).repeat(tasks, 1)


def episodes(given: str = "dict", tasks: int = 5) -> Episodes:
    support, query = sentences(tasks, 2 * WAYS), sentences(tasks, WAYS, seed=2)
    return Episodes(
        GIVEN[given](*support), labels(tasks, 2), GIVEN[given](*query), labels(tasks, 1)
    )


def logits(network: Reader, w: Params, x: tuple[Tensor, Tensor]) -> Tensor:
    """Return what the network's classifier gives, whatever the network makes of it."""
    outputs = functional_call(network, w, x)
    found = (
        outputs
        if isinstance(outputs, Tensor)
        else outputs["logits"]
        if isinstance(outputs, dict)
        else outputs.logits
    )
    assert isinstance(found, Tensor)
    return found


def task(
    given: Episodes, t: int
) -> tuple[tuple[Tensor, Tensor], Tensor, tuple[Tensor, Tensor], Tensor]:
    """Return one task of episodes of dicts, with its inputs as tuples."""
    support_x, query_x = ((x["ids"][t], x["mask"][t]) for x in (given.support_x, given.query_x))
    return support_x, given.support_y[t], query_x, given.query_y[t]


def adapted(
    network: Reader, w: Params, x: Any, y: Tensor, names: list[str], create_graph: bool
) -> Params:
    for _ in range(STEPS):
        value = F.cross_entropy(logits(network, w, x), y)
        gradient = torch.autograd.grad(
            value, [w[name] for name in names], create_graph=create_graph
        )
        w = w | {name: w[name] - RATE * g for name, g in zip(names, gradient, strict=True)}
    return w


def expected_gradient(network: Reader, names: list[str] | None = None) -> Params:
    """Return the gradient by autograd through the unrolled inner loop."""
    w = {name: p.detach().clone().requires_grad_() for name, p in network.named_parameters()}
    found = episodes()
    values = []
    for t in range(len(found.support_y)):
        support_x, support_y, query_x, query_y = task(found, t)
        start = {name: p.view_as(p) for name, p in w.items()}
        end = adapted(network, start, support_x, support_y, names or [*w], create_graph=True)
        values.append(F.cross_entropy(logits(network, end, query_x), query_y))
    return dict(zip(w, torch.autograd.grad(torch.stack(values).mean(), [*w.values()]), strict=True))


WAYS_TO_RUN: dict[str, dict[str, Any]] = {
    "auto": {},
    "loop": {"tasks": "loop"},
    "threads": {"tasks": "threads"},
    "vmap": {"tasks": "vmap"},
    "chunks": {"tasks": "vmap", "chunk_size": 2},
}


def ways_to_run() -> list[dict[str, Any]]:
    """Return all of them on the CPU; threads do not inherit torch's default device."""
    on_cpu = torch.get_default_device().type == "cpu"
    return [way for way in WAYS_TO_RUN.values() if on_cpu or way.get("tasks") != "threads"]


@pytest.mark.parametrize("way", WAYS_TO_RUN)
@pytest.mark.parametrize("returned", RETURNED)
def test_exact_gradient_is_that_of_the_unrolled_loop(returned: str, way: str) -> None:
    network = reader(returned)
    model = MAML(network, RATE, STEPS, **WAYS_TO_RUN[way])
    assert relative_error(model.meta_gradient(episodes()), expected_gradient(network)) < 1e-10


@pytest.mark.parametrize("given", GIVEN)
def test_each_form_of_inputs_gives_the_same(given: str) -> None:
    network = reader()
    model = MAML(network, RATE, STEPS)
    assert relative_error(model.meta_gradient(episodes(given)), expected_gradient(network)) < 1e-10


def test_hessian_free_gradient_is_near_and_first_order_is_that_of_the_adapted_point() -> None:
    network = reader()
    found = episodes()
    hessian_free = HFMAML(network, RATE, STEPS).meta_gradient(found)
    assert relative_error(hessian_free, expected_gradient(network)) < 1e-5

    w = {name: p.detach().clone().requires_grad_() for name, p in network.named_parameters()}
    gradients = []
    for t in range(len(found.support_y)):
        support_x, support_y, query_x, query_y = task(found, t)
        end = adapted(network, w, support_x, support_y, [*w], create_graph=False)
        end = {name: p.detach().requires_grad_() for name, p in end.items()}
        gradients.append(
            torch.autograd.grad(
                F.cross_entropy(logits(network, end, query_x), query_y), [*end.values()]
            )
        )
    mean = {
        name: torch.stack(of_tasks).mean(0)
        for name, of_tasks in zip(w, zip(*gradients, strict=True), strict=True)
    }
    assert relative_error(FOMAML(network, RATE, STEPS).meta_gradient(found), mean) < 1e-10


@pytest.mark.parametrize("returned", ["tensor", "object"])
def test_head_alone_adapts(returned: str, recwarn: pytest.WarningsRecorder) -> None:
    network = reader(returned)
    model = ANIL(network, RATE, STEPS)
    expected = expected_gradient(network, ["classifier.weight", "classifier.bias"])
    assert relative_error(model.meta_gradient(episodes()), expected) < 1e-10
    assert not [warning for warning in recwarn if "head" in str(warning.message)]


def regularised(outputs: Outputs, y: Tensor) -> Tensor:
    """A loss of one's own, which is given what the network returned."""
    return F.cross_entropy(outputs.logits, y) + 0.1 * outputs.hidden.square().mean()


def test_own_loss_is_given_what_the_network_returned() -> None:
    network = reader()
    w = {name: p.detach().clone().requires_grad_() for name, p in network.named_parameters()}
    found = episodes()
    values = []
    for t in range(len(found.support_y)):
        support_x, support_y, query_x, query_y = task(found, t)
        end = {name: p.view_as(p) for name, p in w.items()}
        for _ in range(STEPS):
            value = regularised(functional_call(network, end, support_x), support_y)
            gradient = torch.autograd.grad(value, [*end.values()], create_graph=True)
            end = {name: p - RATE * g for (name, p), g in zip(end.items(), gradient, strict=True)}
        values.append(regularised(functional_call(network, end, query_x), query_y))
    expected = dict(
        zip(w, torch.autograd.grad(torch.stack(values).mean(), [*w.values()]), strict=True)
    )
    for way in ways_to_run():
        model = MAML(network, RATE, STEPS, loss=regularised, **way)
        assert relative_error(model.meta_gradient(found), expected) < 1e-10


def test_evaluation_and_adaptation_are_those_of_plain_torch() -> None:
    network = reader()
    w = {name: p.detach().clone().requires_grad_() for name, p in network.named_parameters()}
    found = episodes()
    expected = []
    for t in range(len(found.support_y)):
        support_x, support_y, query_x, _ = task(found, t)
        end = adapted(network, w, support_x, support_y, [*w], create_graph=False)
        expected.append(logits(network, end, query_x).detach())
    model = MAML(network, RATE, STEPS)
    torch.testing.assert_close(
        model.evaluate(found).aux[:, -1], torch.stack(expected), rtol=1e-10, atol=1e-12
    )

    of_all = model.adapt(found.support_x, found.support_y)
    torch.testing.assert_close(
        of_all(found.query_x).logits, torch.stack(expected), rtol=1e-10, atol=1e-12
    )
    support_x, support_y, query_x, _ = task(found, 1)
    alone = model.adapt({"ids": support_x[0], "mask": support_x[1]}, support_y)
    torch.testing.assert_close(alone(*query_x).logits, expected[1], rtol=1e-10, atol=1e-12)


def first_tasks(found: Episodes, count: int) -> Episodes:
    return Episodes(
        *(
            {name: x[:count] for name, x in part.items()}
            if isinstance(part, dict)
            else part[:count]
            for part in found
        )
    )


def loader(found: Episodes) -> DataLoader:
    """Tasks as a loader collates them."""
    tasks = [
        Episodes(
            *(
                {name: x[t] for name, x in part.items()} if isinstance(part, dict) else part[t]
                for part in found
            )
        )
        for t in range(len(found.support_y))
    ]
    return DataLoader(tasks, batch_size=2)


def trainer(folder: Path, **arguments: Any) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return Trainer(default_root_dir=folder, **on_device(), max_epochs=1, **(quiet | arguments))


def test_a_run_trains_validates_tests_and_predicts(tmp_path: Path) -> None:
    network = reader()
    found = episodes(tasks=6)
    model = MAML(network, RATE, STEPS, optimizer=lambda params: torch.optim.SGD(params, 0.1))
    start = {name: p.detach().clone() for name, p in network.named_parameters()}
    gradient = model.meta_gradient(first_tasks(found, 2))
    trainer(tmp_path, limit_train_batches=1).fit(model, loader(found), loader(found))
    moved = {name: p.detach() for name, p in network.named_parameters()}
    torch.testing.assert_close(moved, {name: p - 0.1 * gradient[name] for name, p in start.items()})

    (tested,) = trainer(tmp_path).test(model, loader(found), verbose=False)
    network.eval()
    outputs = []
    for t in range(6):
        support_x, support_y, query_x, _ = task(found, t)
        w = {name: p.detach().clone().requires_grad_() for name, p in network.named_parameters()}
        end = adapted(network, w, support_x, support_y, [*w], create_graph=False)
        outputs.append(logits(network, end, query_x).detach())
    correct = (torch.stack(outputs).argmax(-1) == found.query_y).double().mean()
    assert tested["test/accuracy"] == pytest.approx(float(correct))
    predicted = trainer(tmp_path).predict(model, loader(found))
    torch.testing.assert_close(torch.cat(predicted), torch.stack(outputs), rtol=1e-9, atol=1e-11)


class WithMetadata(nn.Module):
    """Images and numbers beside them, with batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.beside, self.head = nn.Linear(2, 4), nn.Linear(8, WAYS)

    def forward(self, image: Tensor, numbers: Tensor) -> Outputs:
        hidden = F.softplus(self.norm(self.convolution(image))).mean((2, 3))
        return Outputs(self.head(torch.cat([hidden, self.beside(numbers)], 1)), hidden)


class OfOneTensor(WithMetadata):
    """The same network with the numbers in the last row of the image, so that its inputs and
    outputs are single tensors."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, :, :-1], x[:, 0, -1, :2]).logits


@pytest.mark.parametrize("policy", ["batch", "support", "running", "per_step"])
def test_batch_norm_policies_hold_for_several_inputs(policy: str) -> None:
    random = torch.Generator().manual_seed(0)
    x = drawn_on_cpu(torch.rand, 2, 2, 2 * WAYS, 1, 7, 6, dtype=torch.float64, generator=random)
    whole = Episodes(x[0], labels(2, 2), x[1], labels(2, 2))
    parts = [{"image": part[..., :-1, :], "numbers": part[:, :, 0, -1, :2]} for part in x]
    split = Episodes(parts[0], labels(2, 2), parts[1], labels(2, 2))
    found = []
    for kind, given in ((WithMetadata, split), (OfOneTensor, whole)):
        torch.manual_seed(0)
        model = MAML(kind().double(), RATE, STEPS, batch_norm=policy)
        model.meta_loss(given).backward()
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.eval()
        gradient = {name: p.grad for name, p in model.named_parameters()}
        networks = model.adapt(given.support_x, given.support_y)
        outputs = networks(given.query_x)
        found.append(
            (
                gradient,
                state,
                model.evaluate(given).aux,
                outputs if isinstance(outputs, Tensor) else outputs.logits,
            )
        )
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)


def test_resampled_episodes_of_dicts() -> None:
    network = reader()
    found = episodes()
    twice = {name: torch.stack([x, x], 1) for name, x in found.support_x.items()}
    labels_twice = torch.stack([found.support_y] * 2, 1)
    resampled = ResampledEpisodes(
        twice, labels_twice, twice, labels_twice, found.query_x, found.query_y
    )
    # with D_j = S_j the estimate is the gradient of the finite-sum case
    for way in ways_to_run():
        gradient = MAML(network, RATE, STEPS, **way).meta_gradient(resampled)
        assert relative_error(gradient, expected_gradient(network)) < 1e-10


def test_prototypes_of_dicts() -> None:
    network, found = reader(), episodes()
    expected = []
    for t in range(len(found.support_y)):
        support_x, support_y, query_x, _ = task(found, t)
        w = dict(network.named_parameters())
        embedded = logits(network, w, support_x)
        means = torch.stack([embedded[support_y == c].mean(0) for c in range(WAYS)])
        expected.append(-torch.cdist(logits(network, w, query_x), means).square())
    model = ProtoNet(network)
    torch.testing.assert_close(
        model.evaluate(found).aux[:, 0], torch.stack(expected), rtol=1e-9, atol=1e-9
    )
    adapted_networks = model.adapt(found.support_x, found.support_y)
    torch.testing.assert_close(
        adapted_networks(found.query_x).argmax(-1), torch.stack(expected).argmax(-1)
    )


@pytest.mark.parametrize("tasks", ["loop", "auto"])
def test_buffers_are_written_with_dicts(tasks: str) -> None:
    class Counting(Reader):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros((), dtype=torch.float64))

        def forward(self, ids: Tensor, mask: Tensor) -> Any:
            if self.training:
                self.seen += mask.sum()
            return super().forward(ids, mask)

    torch.manual_seed(0)
    network = Counting().double()
    found = episodes()
    MAML(network, RATE, STEPS, tasks=tasks).meta_loss(found).backward()
    assert network.seen == found.support_x["mask"].sum() + found.query_x["mask"].sum()


class Sum(nn.Module):
    """As small as a network of two inputs can be."""

    def __init__(self) -> None:
        super().__init__()
        self.of_first, self.of_second = nn.Linear(2, WAYS), nn.Linear(3, WAYS)

    def forward(self, first: Tensor, second: Tensor) -> Outputs:
        hidden = self.of_first(first) * self.of_second(second)
        return Outputs(hidden.tanh(), hidden)


def test_compiled_program_takes_dicts() -> None:
    random = torch.Generator().manual_seed(0)
    x = [
        {
            "first": drawn_on_cpu(torch.rand, 2, WAYS, 2, generator=random),
            "second": drawn_on_cpu(torch.rand, 2, WAYS, 3, generator=random),
        }
        for _ in range(2)
    ]
    found = Episodes(x[0], labels(2, 1), x[1], labels(2, 1))
    network = Sum()
    expected = MAML(network, RATE, 1, tasks="loop").meta_gradient(found)
    assert (
        relative_error(MAML(network, RATE, 1, compiled=True).meta_gradient(found), expected) < 1e-5
    )


def test_a_broken_step_is_saved_and_loaded(tmp_path: Path) -> None:
    model, found = MAML(reader(), RATE, STEPS), episodes()
    model.trainer = trainer(tmp_path)
    path = save_step(model, found, random_state(torch.device("cpu")), tmp_path)
    loaded, _ = load_step(model, path)
    assert type(loaded) is Episodes
    torch.testing.assert_close(tuple(loaded), tuple(found), rtol=0, atol=0)


class Scores(Reader):
    def forward(self, ids: Tensor, mask: Tensor) -> Any:
        return {"scores": super().forward(ids, mask).logits}


def test_logits_under_another_name_need_one_method() -> None:
    class OfScores(MAML):
        @staticmethod
        def logits(outputs: Any) -> Any:
            return outputs["scores"]

    torch.manual_seed(0)
    network = Scores().double()
    model = OfScores(network, RATE, STEPS)
    assert relative_error(model.meta_gradient(episodes()), expected_gradient(reader())) < 1e-10
    with pytest.raises(
        ValueError, match=r"return logits \[examples, ways\].*but got dict.*static method `logits"
    ):
        MAML(network, RATE, STEPS).meta_loss(episodes())


def test_objects_of_a_regression_without_logits_are_refused() -> None:
    class Regressor(Reader):
        def forward(self, ids: Tensor, mask: Tensor) -> Any:
            return SimpleNamespace(mean=super().forward(ids, mask).logits)

    found = episodes()
    targets = [
        torch.zeros(*y.shape, WAYS, dtype=torch.float64) for y in (found.support_y, found.query_y)
    ]
    model = MAML(
        Regressor().double(), RATE, STEPS, loss=lambda outputs, y: F.mse_loss(outputs.mean, y)
    )
    with pytest.raises(ValueError, match="or outputs with `logits`, but got SimpleNamespace"):
        model.meta_loss(found._replace(support_y=targets[0], query_y=targets[1]))


def test_targets_that_broadcast_are_seen_inside_of_objects() -> None:
    found = episodes()
    targets = [torch.zeros(*y.shape, dtype=torch.float64) for y in (found.support_y, found.query_y)]
    model = MAML(
        reader(), RATE, STEPS, loss=lambda outputs, y: (outputs.logits[:, :1] - y).square().mean()
    )
    with pytest.raises(ValueError, match="Expected targets of the shape"):
        model.meta_loss(found._replace(support_y=targets[0], query_y=targets[1]))


def _with(**x: Any) -> Episodes:
    found = episodes()
    return found._replace(support_x=found.support_x | x, query_x=found.query_x)


@pytest.mark.parametrize(
    ("wrong", "error", "sentence"),
    [
        (
            _with(mask=None),
            TypeError,
            r"Expected `support_x\['mask'\]` to be a tensor, or a dict.* but got NoneType",
        ),
        (
            _with(more=torch.zeros(5, 6)),
            ValueError,
            r"the same tensors in `support_x` and `query_x`.*support_x\['more'\]",
        ),
        (
            _with(mask=torch.zeros(5, 6, LENGTH)),
            ValueError,
            "to be of one type but got torch.float32 and torch.int64",
        ),
        (
            _with(mask=torch.zeros(4, 6, LENGTH).long()),
            ValueError,
            r"same number of tasks but got .*\['mask'\]\": 4",
        ),
        (
            _with(mask=torch.zeros(5, 7, LENGTH).long()),
            ValueError,
            r"support_x\['mask'\]` and `support_y` .* examples but got 7 and 6",
        ),
        (
            _with(mask=torch.zeros(5).long()),
            ValueError,
            r"support_x\['mask'\]` to have at least the dimensions \[tasks, examples\]",
        ),
        (
            episodes()._replace(support_x=UserDict(episodes().support_x)),
            TypeError,
            r"but got UserDict; dict\(...\) of it is one",
        ),
        (
            episodes()._replace(support_x={}),
            TypeError,
            "Expected `support_x` to be a tensor, or a dict",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_named(
    wrong: Episodes, error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        MAML(reader(), RATE, STEPS).meta_loss(wrong)
