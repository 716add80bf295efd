"""A step's examples as batches: one packed row, or bins of equal length, without an attention mask in either case."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from multilora_fast.demo.scoring import Encoded
from multilora_fast.demo.training import pack
from multilora_fast.training import packing
from multilora_fast.training.data import IGNORED, Example


def tokens(examples: Sequence[Encoded]) -> int:
    """The tokens that the model reads: each example without the last token of its answer."""
    return sum(len(row["input_ids"]) for row in map(_row, examples))


def batches(examples: Sequence[Encoded], limit: int | None, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """Keyword arguments of a causal LM. The losses add up to the mean over all answer tokens of ``examples``."""
    made = [pack(examples)] if limit is None else binned(examples, limit)
    answered = torch.tensor(sum(len(example.options[example.answer]) for example in examples))
    for batch in made:
        batch["num_items_in_batch"] = answered
        yield {name: tensor.to(device) for name, tensor in batch.items()}


def binned(examples: Sequence[Encoded], limit: int) -> Iterator[dict[str, Tensor]]:
    """Batches (B, T) of whole examples packed into bins as long as the longest of them, with B · T at most ``limit`` or
    B = 1.

    Positions restart at each example and at the padding behind the last, which keeps attention inside each. Logits are
    asked for at positions at which some bin predicts an answer.
    """
    rows = [_row(example) for example in examples]
    length = max(len(row["input_ids"]) for row in rows)
    bins = packing.pack(rows, length)
    count = max(limit // length, 1)
    for start in range(0, len(bins), count):
        filled = [_filled(rows, length) for rows in bins[start : start + count]]
        ids, positions, labels = (torch.tensor(part) for part in zip(*filled, strict=True))
        keep = (labels != IGNORED).any(0).nonzero()[:, 0]
        labels = labels[:, keep]
        yield {
            "input_ids": ids, "position_ids": positions, "logits_to_keep": keep, "labels": labels,
            "shift_labels": labels,
        }  # fmt: skip


def _row(example: Encoded) -> Example:
    """Labels stand at the positions that predict them."""
    answer = example.options[example.answer]
    return {
        "input_ids": example.prompt + answer[:-1],
        "labels": [IGNORED] * (len(example.prompt) - 1) + answer,
    }


def _filled(rows: Sequence[Example], length: int) -> tuple[list[int], list[int], list[int]]:
    """The ids, positions and labels of a bin."""
    sizes = [len(row["input_ids"]) for row in rows]
    left = length - sum(sizes)
    return (
        [token for row in rows for token in row["input_ids"]] + [0] * left,
        [position for size in (*sizes, left) for position in range(size)],
        [label for row in rows for label in row["labels"]] + [IGNORED] * left,
    )
