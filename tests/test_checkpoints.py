"""A checkpoint of any algorithm is loaded in another process, without running anything in it, and predicts the same."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from networks import make_episodes
from test_parts import trainer
from torch.utils.data import DataLoader

import lightning_maml
from lightning_maml import Conv4, MAMLPlusPlus
from lightning_maml.episodic_module import EpisodicModule


def subclasses(of: type) -> set[type]:
    return {of} | {name for direct in of.__subclasses__() for name in subclasses(direct)}


ALGORITHMS = sorted(cls.__name__ for cls in subclasses(EpisodicModule) if vars(lightning_maml).get(cls.__name__) is cls)
POLICIES = {"MAMLPlusPlus": "per_step", "ProtoNet": "running", "HFMAML": "running"}

LOADING = """
import sys, torch, lightning_maml
path, name, ways = sys.argv[1:]
assert torch.load(path, weights_only=True)["state_dict"]
network = lightning_maml.Conv4(1, None if name == "ProtoNet" else int(ways), 8, channels=4, activation="gelu")
model = getattr(lightning_maml, name).load_from_checkpoint(path, network=network, weights_only=True).eval()
batch = lightning_maml.Episodes(*torch.load(path + ".tasks", weights_only=True))
torch.save((model.evaluate(batch).aux, dict(model.hparams)), path + ".outputs")
"""


def test_every_algorithm_is_here() -> None:
    named = "ANIL BOIL FOMAML HFMAML IMAML LSLR MAML MAMLPlusPlus MetaSGD ProtoNet Reptile"
    assert named.split() == ALGORITHMS


@pytest.mark.parametrize("name", ALGORITHMS)
def test_another_process_loads_it(name: str, tmp_path: Path) -> None:
    algorithm, policy = vars(lightning_maml)[name], POLICIES.get(name, "batch")
    network = Conv4(1, None if name == "ProtoNet" else 3, 8, channels=4, activation="gelu")
    steps = {} if name == "ProtoNet" else {"inner_lr": 0.05, "train_steps": 2, "test_steps": 3}
    steps |= {"multi_step_epochs": 1} if algorithm is MAMLPlusPlus else {}
    model = algorithm(network, batch_norm=policy, optimizer=partial(torch.optim.Adam, lr=0.01), **steps)
    episodes = make_episodes()
    single = episodes._replace(support_x=episodes.support_x.float(), query_x=episodes.query_x.float())
    run = trainer(tmp_path, precision="32-true", max_epochs=2)
    run.fit(model, DataLoader([single], batch_size=None))
    path = tmp_path / "model.ckpt"
    run.save_checkpoint(path)
    torch.save(tuple(single), f"{path}.tasks")
    subprocess.run([sys.executable, "-c", LOADING, str(path), name, "3"], check=True, timeout=300, cwd=tmp_path)
    outputs, hparams = torch.load(f"{path}.outputs", weights_only=True)
    torch.testing.assert_close(outputs, model.eval().evaluate(single).aux, rtol=1e-5, atol=1e-5)
    assert hparams["batch_norm"] == policy
