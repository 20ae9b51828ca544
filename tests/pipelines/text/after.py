"""The same with the library's model."""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from lightning_maml import FOMAML, InnerAdam, mini_batches
from lightning_maml.datamodules import meta_batch

WAYS, STEPS, SIZE = 2, 4, 3
Task = tuple[dict[str, Tensor], Tensor, dict[str, Tensor], Tensor]


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=8,
        num_labels=WAYS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config).double()


def sentences(count: int, random: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    ids = torch.randint(20, (count, 6), generator=random)
    lengths = torch.randint(3, 7, (count, 1), generator=random)
    mask = (torch.arange(6) < lengths).long()
    return {"input_ids": ids * mask, "attention_mask": mask}, torch.arange(count) % WAYS


def task(number: int) -> Task:
    random = torch.Generator().manual_seed(number)
    return *sentences(6, random), *sentences(4, random)


def run(folder: Path) -> dict[str, Tensor]:
    network, random = bert(), torch.Generator().manual_seed(1)
    inner = InnerAdam(weight_decay=0.01, decoupled_weight_decay=True)
    model = FOMAML(network, 1e-2, STEPS, inner_optimizer=inner)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for iteration in range(2):
        optimizer.zero_grad()
        tasks = meta_batch([task(3 * iteration + number) for number in range(3)])
        model.meta_loss(mini_batches(tasks, SIZE, STEPS, random)).backward()
        optimizer.step()
    tests = mini_batches(meta_batch([task(50), task(51)]), SIZE, STEPS, random)
    logits = model.evaluate(tests).aux[:, -1]
    return {**dict(network.named_parameters()), "logits": logits}
