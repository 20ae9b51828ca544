"""Accuracies from the shipped configs.

Train and test a row of the tables over several seeds, and write the tables anew.

    make reproduce ROW=omniglot_5w1s_maml

or, with all that can be set, to go on with a run that was cut off, to list the rows, and for the
tables alone:

    cd benchmarks
    python reproduce.py omniglot_5w1s_maml --root DATA --seeds 0 1 2 --iterations 3000
    python reproduce.py omniglot_5w1s_maml --seeds 1 --resume
    python reproduce.py --list
    python reproduce.py

A run writes its figures to benchmarks/accuracy/ROW-SEED-ITERATIONS.json, in place of those of an
earlier such run, and `git diff` shows whether they differ. On a GPU use --iterations 60000, as in
the papers.
"""

import argparse
import json
import os
import platform
import re
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import lightning
import torch
import yaml
from lightning.pytorch.callbacks import Timer
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import lightning_maml
from lightning_maml import keep_freed_memory
from lightning_maml.cli import last_checkpoint, run

HERE = Path(__file__).resolve().parent
CONFIGS, RUNS, PAGE = HERE.parent / "configs", HERE / "accuracy", HERE / "accuracy.md"
TASKS = (600, 10_000)

ALGORITHMS = {
    "maml": ["--model=MAML"],
    "hfmaml": ["--model=HFMAML"],
    "fomaml": ["--model=FOMAML"],
    "anil": ["--model=ANIL"],
    "metasgd": ["--model=MetaSGD"],
    "mamlplusplus": ["--model=MAMLPlusPlus", "--model.multi_step_epochs=2"],
}
OMNIGLOT = ("omniglot_5w1s", "omniglot_5w5s", "omniglot_20w1s", "omniglot_20w5s")
MINI_IMAGENET = ("mini_imagenet_5w1s", "mini_imagenet_5w5s")
COLOUR = (
    *MINI_IMAGENET,
    *("cifar_fs_5w1s", "cifar_fs_5w5s", "fc100_5w1s", "fc100_5w5s"),
    *("tiered_imagenet_5w1s", "tiered_imagenet_5w5s", "cub_5w1s", "cub_5w5s"),
)
"""Settings whose configs have the paper's network and a smooth one."""
SETTINGS = (*OMNIGLOT, "caltech_5w1s", "caltech_5w5s", *COLOUR)
# after 60,000 iterations or so, with ReLU; settings in the order of OMNIGLOT, then COLOUR, as far
# as figures of four convolutions are known
PUBLISHED = {
    # Finn et al. 2017; on CIFAR-FS Bertinetto et al. 2019
    "maml": (
        "98.7 ± 0.4",
        "99.9 ± 0.1",
        "95.8 ± 0.3",
        "98.9 ± 0.2",
        "48.70 ± 1.84",
        "63.11 ± 0.92",
        "58.9 ± 1.9",
        "71.5 ± 1.0",
    ),
    # Nichol et al. 2018; on mini-ImageNet Finn et al. 2017
    "fomaml": (
        "98.3 ± 0.5",
        "99.2 ± 0.2",
        "89.4 ± 0.5",
        "97.9 ± 0.1",
        "48.07 ± 1.75",
        "63.15 ± 0.91",
    ),
    "anil": ("", "", "96.2 ± 0.5", "98.0 ± 0.3", "46.7 ± 0.4", "61.5 ± 0.5"),  # Raghu et al. 2020
    # Li et al. 2017
    "metasgd": (
        "99.53 ± 0.26",
        "99.93 ± 0.09",
        "95.93 ± 0.38",
        "98.97 ± 0.19",
        "50.47 ± 1.87",
        "64.03 ± 0.94",
    ),
    # Antoniou et al. 2019
    "mamlplusplus": ("99.47", "99.93", "97.65", "99.33", "52.15 ± 0.26", "68.32 ± 0.44"),
}


def rows() -> dict[str, list[str]]:
    """Return the config of every row of the tables, and the arguments that change it."""
    found = {}
    for algorithm, chosen in ALGORITHMS.items():
        for setting in OMNIGLOT:
            found[f"{setting}_{algorithm}"] = [f"{CONFIGS / setting}_maml.yaml", *chosen]
            found[f"{setting}_{algorithm}_relu"] = [
                *found[f"{setting}_{algorithm}"],
                "--model.network.activation=relu",
            ]
        # Caltech-101 in mini-ImageNet's form: smooth network, 42 x 42 pixels
        config = (
            CONFIGS
            / f"mini_imagenet_quick_5w5s_{'fomaml' if algorithm == 'fomaml' else 'maml'}.yaml"
        )
        found[f"caltech_5w5s_{algorithm}"] = [str(config), *chosen]
        found[f"caltech_5w1s_{algorithm}"] = [str(config), *chosen, "--data.shots=1"]
        for setting in COLOUR:
            found[f"{setting}_{algorithm}"] = [f"{CONFIGS / setting}_maml.yaml", *chosen]
            found[f"{setting}_{algorithm}_smooth"] = [
                f"{CONFIGS / setting}_hfmaml_smooth.yaml",
                *chosen,
            ]
    return found


class Judged(NamedTuple):
    """Accuracy on test tasks, in percent, with the half-width of its 95 % confidence interval."""

    tasks: int
    accuracy: float
    ci95: float


class Run(NamedTuple):
    """One training and its tests.

    ``minutes`` are those of training and validation, summed over the parts of a run that was cut
    off.
    """

    row: str
    seed: int
    iterations: int
    meta_batch_size: int
    train_steps: int
    test_steps: int
    inner_lr: float
    test_queries: int
    batch_norm: str
    judged: list[Judged]
    minutes: float
    machine: str
    versions: str


def machine() -> str:
    """Return the name of the GPU, or else the cores and name of the CPU, that the run is on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = (
        re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        if Path("/proc/cpuinfo").exists()
        else []
    )
    return (
        f"{torch.get_num_threads()} of {os.cpu_count()} cores, "
        f"{names[0] if names else platform.processor()}"
    )


def reproduce(
    row: str, seed: int, iterations: int | None, root: str, *, resume: bool = False
) -> None:
    """Train, then test, and save the results after each of the tests.

    Training takes ``iterations``, or as many as the config says.

    With ``resume``, the newest such training that left a checkpoint goes on from there; one that
    had ended is only tested.
    """
    config, *chosen = rows()[row]
    epochs = yaml.safe_load(Path(config).read_text())["trainer"]["max_epochs"]
    length = [] if iterations is None else [f"--data.train_batches={-(-iterations // epochs)}"]
    folder = Path("runs", "reproduce", f"{row}-{seed}-{iterations or 'as-configured'}")
    settings = [
        f"--seed_everything={seed}",
        f"--data.seed={seed}",
        f"--trainer.default_root_dir={folder}",
        "--trainer.devices=1",
    ]
    last = last_checkpoint(folder) if resume else None
    start = [] if last is None else [f"--ckpt_path={last}"]
    timer = Timer()
    done = run(
        ["fit", f"--config={config}", f"--data.root={root}", *chosen, *settings, *length, *start],
        [timer],
    )
    minutes = timer.time_elapsed("train") / 60
    model, data, judged = done.model, done.datamodule, []
    versions = (
        f"lightning_maml {lightning_maml.__version__}, lightning {lightning.__version__}, torch "
        f"{torch.__version__}"
    )
    protocol = (
        model.train_steps,
        model.test_steps,
        model.inner_lr,
        data.test_queries,
        model.batch_norm,
    )
    found = Run(
        row,
        seed,
        epochs * data.train_batches,
        data.meta_batch_size,
        *protocol,
        judged,
        minutes,
        machine(),
        versions,
    )
    RUNS.mkdir(exist_ok=True)
    for data.test_tasks in TASKS:
        done.trainer.test(
            model,
            datamodule=data,
            ckpt_path=done.trainer.checkpoint_callback.best_model_path,
            verbose=False,
        )
        mean, ci95, tasks = model.adaptation
        judged.append(Judged(tasks, 100 * float(mean[-1]), 100 * float(ci95[-1])))
        (RUNS / f"{row}-{seed}-{found.iterations}.json").write_text(
            json.dumps(found._asdict(), indent=1) + "\n"
        )


def runs() -> list[Run]:
    """Return the runs whose figures are saved."""
    found = [Run(**json.loads(file.read_text())) for file in sorted(RUNS.glob("*.json"))]
    return [each._replace(judged=[Judged(*judged) for judged in each.judged]) for each in found]


def by_setting(found: Iterable[Run]) -> dict[str, list[list[Run]]]:
    """Return the runs of each setting in the order of the tables.

    Runs that differ only by their seed, and the versions of what they ran with, are grouped
    together.
    """
    groups = dict[str, list[Run]]()
    for each in found:
        # the same settings and machine
        alike = each._replace(seed=0, judged=[], minutes=0.0, versions="")
        groups.setdefault(str(alike), []).append(each)
    ordered = sorted(groups.values(), key=_place)
    of_settings = {
        setting: [seeds for seeds in ordered if seeds[0].row.startswith(f"{setting}_")]
        for setting in SETTINGS
    }
    return {setting: lines for setting, lines in of_settings.items() if lines}


def tables(found: Iterable[Run]) -> str:
    """Return a table for each setting: a line for each row, its seeds together."""
    lines = []
    for setting, groups in by_setting(found).items():
        lines += ["", f"## {setting}", "", _HEAD, "|---" * (_HEAD.count("|") - 1) + "|"]
        lines += [_line(setting, seeds) for seeds in groups]
    return "\n".join(lines)


def draw(found: Iterable[Run]) -> Figure:
    """Draw the accuracy of each setting, row and seed beside the published one.

    It is the accuracy on the most test tasks, with its interval.
    """
    settings = by_setting(found)
    heights = [1 + len(groups) for groups in settings.values()]
    figure = Figure(figsize=(9, 1 + 0.35 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(settings), squeeze=False, height_ratios=heights)[:, 0]
    for axes, (setting, groups) in zip(panels, settings.items(), strict=True):
        _draw_setting(axes, setting, groups)
    panels[-1].set_xlabel("test accuracy, %")
    handles = {
        label: handle
        for axes in panels
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, loc="outside lower right", ncols=2)
    return figure


def _draw_setting(axes: Axes, setting: str, groups: list[list[Run]]) -> None:
    for place, seeds in enumerate(groups):
        if published := re.match(r"[\d.]+", _published(setting, seeds[0])):
            axes.plot(
                float(published[0]),
                place,
                "D",
                color="0.6",
                fillstyle="none",
                label="published, of 60,000 iterations or so",
            )
        for each, shift in zip(
            seeds, torch.linspace(-0.2, 0.2, len(seeds) + 2)[1:-1].tolist(), strict=True
        ):
            _, accuracy, ci95 = each.judged[-1]
            axes.errorbar(
                accuracy,
                place + shift,
                xerr=ci95,
                fmt="C0o",
                markersize=4,
                label="here, a seed with its 95 % interval",
            )
    axes.set(title=setting, ylim=(len(groups) - 0.4, -0.6))
    axes.set_yticks(
        range(len(groups)),
        [f"{_algorithm(setting, seeds[0])}, {seeds[0].iterations} iterations" for seeds in groups],
    )


_HEAD = (
    "| row | iterations x tasks | N, K, inner rate | queries | batch norm | 600 tasks, each seed "
    "| 10,000 tasks, mean over seeds | each seed | published | minutes | machine |"
)


def _place(seeds: list[Run]) -> tuple[bool, int, int]:
    row = seeds[0].row
    algorithm = row.split("s_", 1)[1].split("_")[0]
    return row.endswith(("_relu", "_smooth")), [*ALGORITHMS].index(algorithm), seeds[0].iterations


def _algorithm(setting: str, one: Run) -> str:
    return one.row.removeprefix(f"{setting}_").replace("_", ", ")


def _published(setting: str, one: Run) -> str:
    algorithm = _algorithm(setting, one).split(",")[0]
    return dict(zip((*OMNIGLOT, *COLOUR), PUBLISHED.get(algorithm, ()), strict=False)).get(
        setting, ""
    )


def _line(setting: str, seeds: list[Run]) -> str:
    one = seeds[0]
    of_few = [each.judged[0] for each in seeds]
    # others were cut off before
    of_many = [each.judged[1] for each in seeds if len(each.judged) > 1]
    cells = (
        f"`{one.row}`",
        f"{one.iterations} x {one.meta_batch_size}",
        f"{one.train_steps}, {one.test_steps}, {one.inner_lr:g}",
        str(one.test_queries),
        one.batch_norm,
        ", ".join(f"{each.accuracy:.1f} ± {each.ci95:.1f}" for each in of_few),
        _mean(of_many) if of_many else "-",
        ", ".join(f"{each.accuracy:.2f} ± {each.ci95:.2f}" for each in of_many) or "-",
        _published(setting, one) or "-",
        f"{statistics.median(each.minutes for each in seeds):.0f}",
        one.machine,
    )
    return f"| {' | '.join(cells)} |"


def _mean(of_seeds: list[Judged]) -> str:
    mean = statistics.mean(each.accuracy for each in of_seeds)
    spread = (
        f", sd {statistics.stdev(each.accuracy for each in of_seeds):.2f}"
        if len(of_seeds) > 1
        else ""
    )
    return f"**{mean:.2f}** ({len(of_seeds)} seed{'s' if len(of_seeds) > 1 else ''}{spread})"


MARK = "<!-- what follows is written by benchmarks/reproduce.py -->\n"


def main() -> None:
    """Do the runs that are asked for, then write the tables."""
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    # without rows, argparse checks the empty list against the choices too
    parser.add_argument(
        "row", nargs="*", choices=[*rows(), []], metavar="ROW", help="one of --list"
    )
    parser.add_argument("--list", action="store_true", help="print the rows that there are")
    parser.add_argument("--root", default="data", help="folder of the images")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--iterations",
        type=int,
        help="meta-iterations, by default as many as the config has; the papers' are 60,000",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest checkpoint of such a run, where there is one",
    )
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(rows()))
        return
    for row in arguments.row:
        for seed in arguments.seeds:
            reproduce(row, seed, arguments.iterations, arguments.root, resume=arguments.resume)
    text = tables(runs())
    PAGE.write_text(PAGE.read_text().split(MARK)[0] + MARK + text + "\n")
    if text:
        draw(runs()).savefig(PAGE.with_suffix(".png"), dpi=110)
    print(text)


if __name__ == "__main__":
    main()
