"""A step's examples as batches of bins, the attention mask of a batch, and the loss on its answers."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from multilora_fast.demo.scoring import Encoded
from multilora_fast.training import packing
from multilora_fast.training.data import IGNORED, Example

ROWS, ANSWERS = 2, 1024  # a batch's bins and answer tokens are padded to multiples of these, which makes few shapes


def tokens(examples: Sequence[Encoded]) -> int:
    """The tokens that the model reads: each example without the last token of its answer."""
    return sum(len(row["input_ids"]) for row in map(_row, examples))


def batches(examples: Sequence[Encoded], limit: int | None, length: int) -> Iterator[dict[str, Tensor]]:
    """Whole examples in bins of ``length`` tokens, in batches of at most ``limit`` tokens with the padding, or without
    a limit in one bin as long as all of them, without padding. The batches' losses add up to the mean over all answer
    tokens.

    ``ids`` and ``positions`` (B, length): positions restart at each example and at the padding behind the last.
    ``at`` and ``labels`` (A): the places in the flattened batch that predict an answer token, and that token.
    ``answered``: the number of answer tokens in all batches.
    """
    rows = [_row(example) for example in examples]
    several, answers = ROWS, ANSWERS
    if limit is None:
        limit = length = sum(len(row["input_ids"]) for row in rows)
        several = answers = 1
    bins = packing.pack(rows, length)
    bins += [[]] * (-len(bins) % several)
    answered = torch.tensor(sum(label != IGNORED for row in rows for label in row["labels"]))
    count = max(limit // length, 1)
    for start in range(0, len(bins), count):
        filled = [_filled(rows, length) for rows in bins[start : start + count]]
        ids, positions, labels = (torch.tensor(part) for part in zip(*filled, strict=True))
        at = (labels.flatten() != IGNORED).nonzero()[:, 0]
        short = -len(at) % answers
        yield {
            "ids": ids,
            "positions": positions,
            "at": F.pad(at, (0, short)),
            "labels": F.pad(labels.flatten()[at], (0, short), value=IGNORED),
            "answered": answered,
        }


def mask(positions: Tensor) -> Tensor:
    """What each place of a bin sees, (B, 1, T, T): itself and those before it in its example."""
    example = (positions == 0).cumsum(1)
    same = example[:, None, :, None] == example[:, None, None, :]
    return same & same.new_ones(same.shape[-2:]).tril()


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """A batch's part of the mean loss over the answer tokens, with logits of these alone. Does not wait for the
    device."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = causal.base_model(
        input_ids=batch["ids"], attention_mask=mask(batch["positions"]), position_ids=batch["positions"]
    ).last_hidden_state
    logits = causal.get_output_embeddings()(hidden.flatten(0, 1).index_select(0, batch["at"]))
    total = F.cross_entropy(logits.float(), batch["labels"], ignore_index=IGNORED, reduction="sum")
    return total / batch["answered"]


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
