"""A step's examples as batches: one packed row, or rows of similar lengths without an attention mask."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from multilora_fast.demo.scoring import Encoded
from multilora_fast.demo.training import pack

IGNORED = -100


def tokens(examples: Sequence[Encoded]) -> int:
    """That the model reads of them."""
    return sum(_length(example) for example in examples)


def batches(examples: Sequence[Encoded], limit: int | None, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """Keyword arguments of a causal LM. The losses add up to the mean over all answer tokens of ``examples``."""
    made = [pack(examples)] if limit is None else [padded(group) for group in groups(examples, limit)]
    answered = torch.tensor(sum(len(example.options[example.answer]) for example in examples))
    for batch in made:
        yield {name: tensor.to(device) for name, tensor in (batch | {"num_items_in_batch": answered}).items()}


def groups(examples: Sequence[Encoded], limit: int) -> Iterator[list[Encoded]]:
    """By length, the longest first, each with at most ``limit`` tokens after padding, or a single example."""
    group: list[Encoded] = []
    for example in sorted(examples, key=_length, reverse=True):
        if group and (len(group) + 1) * _length(group[0]) > limit:
            yield group
            group = []
        group.append(example)
    if group:
        yield group


def padded(examples: Sequence[Encoded]) -> dict[str, Tensor]:
    """Padding on the right, which nothing before it sees in a causal model. Logits are asked for at positions at which
    some row predicts its answer."""
    answers = [example.options[example.answer] for example in examples]
    rows = [example.prompt + answer[:-1] for example, answer in zip(examples, answers, strict=True)]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    labels = torch.full_like(ids, IGNORED)
    for i, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        ids[i, : len(row)] = torch.tensor(row)
        labels[i, len(row) - len(answer) : len(row)] = torch.tensor(answer)
    keep = (labels != IGNORED).any(0).nonzero()[:, 0]
    return {"input_ids": ids, "logits_to_keep": keep, "labels": labels[:, keep], "shift_labels": labels[:, keep]}


def _length(example: Encoded) -> int:
    return len(example.prompt) + len(example.options[example.answer]) - 1
