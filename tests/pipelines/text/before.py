"""First-order MAML on a BERT: copies of the network, AdamW and mini-batches inside."""

import copy
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

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


def inner_loop(network: nn.Module, task: Task, random: torch.Generator) -> nn.Module:
    x, y, _, _ = task
    fast_model = copy.deepcopy(network).train()
    inner = torch.optim.AdamW(fast_model.parameters(), lr=1e-2, weight_decay=0.01)
    done = 0
    while done < STEPS:
        for batch in torch.randperm(len(y), generator=random).split(SIZE):
            inner.zero_grad()
            of_batch = {name: tensor[batch] for name, tensor in x.items()}
            fast_model(**of_batch, labels=y[batch]).loss.backward()
            inner.step()
            done += 1
    return fast_model.eval()


def run(folder: Path) -> dict[str, Tensor]:
    network, random = bert(), torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for iteration in range(2):
        gradients = [torch.zeros_like(p) for p in network.parameters()]
        for number in range(3):
            _, _, x, y = tasks = task(3 * iteration + number)
            fast_model = inner_loop(network, tasks, random)
            loss = fast_model(**x, labels=y).loss
            found = torch.autograd.grad(loss, [*fast_model.parameters()])
            gradients = [total + g / 3 for total, g in zip(gradients, found, strict=True)]
        for p, g in zip(network.parameters(), gradients, strict=True):
            p.grad = g
        optimizer.step()
    logits = []
    for number in (50, 51):
        tasks = task(number)
        fast_model = inner_loop(network, tasks, random)
        logits.append(fast_model(**tasks[2]).logits)
    return {**dict(network.named_parameters()), "logits": torch.stack(logits)}
