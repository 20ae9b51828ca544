"""A label for each pixel or token: meta-gradient, accuracy, ignored positions, and refusals."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader

from helpers.networks import relative_error
from helpers.random_numbers import drawn_on_cpu
from helpers.trainers import trainer_in_double
from lightning_maml import FOMAML, HFMAML, MAML, Episodes, ProtoNet, ResampledEpisodes, one_hot_mse
from lightning_maml.callbacks import EpisodePictures

WAYS, RATE, IGNORED = 3, 0.3, 255
border_aside = nn.CrossEntropyLoss(ignore_index=IGNORED)


def segmenter() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3, padding=1), nn.GELU(), nn.Conv2d(4, WAYS, 1)
    return nn.Sequential(*layers).double()


class Tagger(nn.Module):
    """Labels words; with the classes last, as Hugging Face's models have them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(11, 4)
        self.mix = nn.Conv1d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, WAYS)
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        mixed = self.mix(self.words(ids).movedim(-1, 1)).movedim(1, -1)
        return self.head(torch.tanh(mixed))


class TaggerOfClassesSecond(Tagger):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).movedim(-1, 1)


def images(tasks: int = 4) -> Episodes:
    """Masks whose left column is not labelled, and one query mask that is hardly labelled."""
    random = torch.Generator().manual_seed(1)

    def of(examples: int) -> tuple[Tensor, Tensor]:
        x = drawn_on_cpu(
            torch.rand, tasks, examples, 1, 6, 5, dtype=torch.float64, generator=random
        )
        y = (x[:, :, 0] * WAYS).long()
        y[..., 0] = IGNORED
        return x, y

    support, query = of(2), of(3)
    query[1][1, :, 1:] = IGNORED
    return Episodes(*support, *query)


def words(tasks: int = 4) -> Episodes:
    random = torch.Generator().manual_seed(2)
    x = drawn_on_cpu(torch.randint, 11, (tasks, 5, 7), generator=random)
    y = x % WAYS
    return Episodes(x[:, :2], y[:, :2], x[:, 2:], y[:, 2:])


def unrolled(network: nn.Module, loss, episodes: Episodes, curved: bool = True) -> dict:
    """The meta-gradient of two steps by autograd through the unrolled loop."""
    params = {name: p.detach().requires_grad_() for name, p in network.named_parameters()}
    total = 0
    for support_x, support_y, query_x, query_y in zip(*episodes, strict=True):
        w = params
        for _ in range(2):
            value = loss(functional_call(network, w, (support_x,)), support_y)
            gradient = torch.autograd.grad(value, [*w.values()], create_graph=True)
            gradient = gradient if curved else [g.detach() for g in gradient]
            w = {n: p - RATE * g for (n, p), g in zip(w.items(), gradient, strict=True)}
        total = total + loss(functional_call(network, w, (query_x,)), query_y)
    mean = total / len(episodes.query_y)
    return dict(zip(params, torch.autograd.grad(mean, [*params.values()]), strict=True))


@pytest.mark.parametrize("tasks", ["loop", "threads", "vmap"])
@pytest.mark.parametrize(
    ("network", "loss", "episodes"),
    [
        (segmenter, border_aside, images),
        (segmenter, partial(F.cross_entropy, ignore_index=IGNORED), images),
        (TaggerOfClassesSecond, F.cross_entropy, words),
        (TaggerOfClassesSecond, one_hot_mse, words),
    ],
)
@pytest.mark.parametrize(("algorithm", "bound"), [(MAML, 1e-12), (FOMAML, 1e-12), (HFMAML, 1e-6)])
def test_meta_gradients_are_those_of_autograd(
    network, loss, episodes, algorithm: type[MAML], bound: float, tasks: str
) -> None:
    expected = unrolled(network(), loss, episodes(), curved=algorithm is not FOMAML)
    model = algorithm(network(), RATE, 2, loss=loss, tasks=tasks)
    assert relative_error(model.meta_gradient(episodes()), expected) < bound


def test_one_hot_mse_of_positions_is_that_of_all_positions_as_examples() -> None:
    outputs, labels = torch.randn(2, WAYS, 4, 5), torch.randint(WAYS, (2, 4, 5))
    labels[0, 1] = -100
    as_examples = one_hot_mse(outputs.movedim(1, -1).flatten(0, 2), labels.flatten())
    torch.testing.assert_close(one_hot_mse(outputs, labels), as_examples)


def test_accuracy_is_the_share_of_correct_positions_that_count(tmp_path) -> None:
    episodes = images()
    model = MAML(segmenter(), RATE, 2, loss=border_aside)
    trainer_in_double(tmp_path).test(model, DataLoader([episodes], batch_size=None), verbose=False)
    logged = model.trainer.callback_metrics
    for step, name in ((0, "test/accuracy_before"), (2, "test/accuracy")):
        predicted = model.evaluate(episodes).aux[:, step].argmax(2)
        shares = [
            (of_task == y)[y != IGNORED].double().mean()
            for of_task, y in zip(predicted, episodes.query_y, strict=True)
        ]
        torch.testing.assert_close(logged[name].double(), sum(shares).cpu() / 4, rtol=1e-6, atol=0)


def test_networks_adapted_to_many_tasks_are_those_of_each() -> None:
    episodes = images()
    model = MAML(segmenter(), RATE, 2, loss=border_aside)
    found = model.adapt(episodes.support_x, episodes.support_y)(episodes.query_x)
    torch.testing.assert_close(found, model.evaluate(episodes).aux[:, -1], rtol=0, atol=1e-12)


def test_pictures_are_of_adaptation_alone(tmp_path) -> None:
    model = MAML(segmenter(), RATE, loss=border_aside)
    run = trainer_in_double(tmp_path, callbacks=[EpisodePictures()])
    run.test(model, DataLoader([images()], batch_size=None), verbose=False)
    assert [path.name for path in tmp_path.rglob("*.png")] == ["adaptation.png"]


def test_a_support_batch_without_any_label_is_refused_in_the_resampling_case() -> None:
    of_task = images()
    x, y = (tensor[:, None].repeat(1, 2, *[1] * (tensor.ndim - 1)) for tensor in of_task[:2])
    batches = ResampledEpisodes(x, y, x, y, of_task.query_x, of_task.query_y)
    model = MAML(segmenter(), RATE, 2, loss=border_aside)
    model.meta_loss(batches)
    y[3, 1] = IGNORED
    with pytest.raises(ValueError, match=r"label in `support_y` of each task .* in tasks \[3\]"):
        model.meta_loss(batches)


@pytest.mark.parametrize(
    ("network", "episodes", "message"),
    [
        (
            segmenter,
            lambda: Episodes(*(t[:, :, None] if t.ndim == 4 else t for t in images())),
            r"logits \[examples, ways, 1, 6, 5\] .* leave the labels' channel out, y.squeeze\(1\)",
        ),
        (Tagger, words, r"logits \[examples, ways, 7\] .* got \[2, 7, 3\]; .*outputs.movedim"),
        (
            lambda: nn.Sequential(segmenter(), nn.MaxPool2d(2)),
            images,
            r"logits \[examples, ways, 6, 5\] .* got \[2, 3, 3, 2\]; give a label for each position",
        ),
        (
            lambda: nn.Sequential(segmenter(), nn.Flatten()),
            images,
            r"logits \[examples, ways, 6, 5\] for labels \[2, 6, 5\], .* but got \[2, 90\]",
        ),
    ],
)
def test_logits_that_do_not_fit_the_labels_are_refused(network, episodes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MAML(network(), RATE, loss=border_aside).meta_loss(episodes())


def test_labels_of_255_are_named_for_what_they_may_be() -> None:
    whole = images()
    whole.support_y[0, 0, 0, 0] = 255
    with pytest.raises(ValueError, match=r"got 0 to 255; for padding .* or by functools.partial"):
        MAML(segmenter(), RATE).meta_loss(whole)


def test_query_labels_that_do_not_fit_are_refused() -> None:
    whole = images()
    episodes = whole._replace(query_y=whole.query_y[..., :4])
    with pytest.raises(ValueError, match=r"logits \[examples, ways, 6, 4\]"):
        MAML(segmenter(), RATE, loss=border_aside).meta_loss(episodes)


def test_labels_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Expected labels from 0 to 2, .* but got 0 to 255"):
        MAML(segmenter(), RATE).meta_loss(images())


def test_prototypes_are_of_one_label_per_example() -> None:
    with pytest.raises(ValueError, match=r"one label per example, .* but got shape \[4, 2, 6, 5\]"):
        ProtoNet(segmenter()).meta_loss(images())
