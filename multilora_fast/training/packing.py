"""Packing: whole rows in bins without padding. Rows of a bin do not attend to each other."""

from bisect import bisect_left, insort
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import DataCollatorWithFlattening

from multilora_fast.training.data import Example, collate
from multilora_fast.training.trainer import by_row

Bin = list[Example]


def pack(rows: Sequence[Example], length: int) -> list[Bin]:
    """Best-fit decreasing: rows in bins of at most ``length`` tokens, each row in the fullest bin that has room."""
    bins: list[Bin] = []
    room: list[tuple[int, int]] = []  # free tokens of each bin and its index, ascending
    for row in sorted(rows, key=lambda row: -len(row["input_ids"])):
        size = len(row["input_ids"])
        at = bisect_left(room, (size, 0))
        left, i = room.pop(at) if at < len(room) else (length, len(bins))
        if i == len(bins):
            bins.append([])
        bins[i].append(row)
        insort(room, (left - size, i))
    return bins


def flatten(items: Sequence[Bin] | Sequence[Example], pad: int) -> dict[str, Tensor]:
    """A batch of bins as one sequence (1, T) whose positions restart at every row. Rows outside of bins, as in an
    evaluation, are padded by :func:`collate`."""
    if isinstance(items[0], dict):
        return collate(items, pad)  # type: ignore[arg-type]
    return DataCollatorWithFlattening(return_tensors="pt")([row for rows in items for row in rows])


@torch.no_grad()
def check_bins(model: nn.Module, bins: Sequence[Bin]) -> None:
    """Raise ValueError if the loss of a bin differs from that of its rows, so that the rows attend to each other."""
    several = (rows for rows in bins if len(rows) > 1)
    rows = min(several, key=lambda rows: sum(len(row["input_ids"]) for row in rows), default=None)
    if rows is None:
        return
    model.eval()
    first = next(model.parameters())

    def loss(batch: dict[str, Tensor]) -> float:
        batch = {name: tensor.to(first.device) for name, tensor in batch.items()}
        return float(by_row(model(**batch).logits, batch["labels"])[:, 0].sum())

    together, alone = loss(flatten([rows], 0)), sum(loss(collate([row], 0)) for row in rows)
    if not abs(together - alone) <= (1e-4 if first.dtype == torch.float32 else 2e-2) * alone:
        raise ValueError(
            f"--packing: the rows of a bin see each other in this model, whose loss is {together:.6g} over a bin and "
            f"{alone:.6g} over its rows: leave --packing out."
        )
