"""What checks found is remembered for each kind of batch, and for a bounded number of kinds."""

from collections import Counter

import torch

from lightning_maml.checks.findings import KINDS, Findings


def test_as_many_kinds_as_are_remembered_are_each_checked_once_by_every_check() -> None:
    findings, runs, loss = Findings(), Counter[tuple[str, int]](), torch.nn.MSELoss()
    for _ in range(2):
        for kind in range(KINDS):
            for check in ("network", "loss", "stacking"):
                findings.once(check, (kind,), (loss,), lambda at=(check, kind): runs.update([at]))
    assert len(runs) == 3 * KINDS
    assert set(runs.values()) == {1}


def test_the_oldest_finding_of_a_check_is_the_one_that_is_forgotten() -> None:
    findings, ran = Findings(), []
    for kind in [*range(KINDS + 1), 1, KINDS, 0]:
        findings.once("network", (kind,), (), lambda kind=kind: ran.append(kind))
    assert ran == [*range(KINDS + 1), 0]
    assert len(findings) == KINDS


def test_a_loss_is_checked_anew_in_another_mode() -> None:
    findings, loss, modes = Findings(), torch.nn.Dropout(), []
    for training in (True, False, True):
        loss.train(training)
        findings.once("loss", (), (loss,), lambda: modes.append(loss.training))
    assert modes == [True, False]
