"""Is one method better than another on the same items? A paired test over items, and an interval over items and seeds.

Both compare means over the tasks, each task counting the same. Marks are tensors (seeds, items) of 0 and 1 by task; the
two methods' seeds and items are the same.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

Marks = Mapping[str, Tensor]


def compare(first: Marks, second: Marks, *, draws: int = 10_000) -> dict[str, float]:
    """The difference of the mean accuracies, first − second, its 95 % interval, and the two-sided p of no difference.

    The interval is a bootstrap over items and, where there are several, seeds; p is for the seeds as they are.
    """
    differences = {task: first[task].double() - second[task].double() for task in first}
    weighted = [d.mean(0) / (d.shape[1] * len(differences)) for d in differences.values()]
    low, high = _interval(list(differences.values()), draws)
    difference = sum(d.mean().item() for d in differences.values()) / len(differences)
    return {"difference": difference, "low": low, "high": high, "p": sign_flip_p(torch.cat(weighted), draws=draws)}


def sign_flip_p(differences: Tensor, *, draws: int = 10_000) -> float:
    """Two-sided p that paired differences, 1-D, have no direction: how often random signs give as large a sum."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (draws, len(differences)), generator=generator, dtype=torch.float64) * 2 - 1
    sums = signs @ differences.double()
    as_large = (sums.abs() >= differences.double().sum().abs() - 1e-12).sum().item()
    return (as_large + 1) / (draws + 1)


def _interval(differences: list[Tensor], draws: int) -> tuple[float, float]:
    generator = torch.Generator().manual_seed(0)
    seeds = differences[0].shape[0]
    chosen = torch.randint(seeds, (draws, seeds), generator=generator)
    means = torch.zeros(draws, dtype=torch.float64)
    for d in differences:
        items = torch.randint(d.shape[1], (draws, d.shape[1]), generator=generator)
        for seed in chosen.T:
            means += d[seed[:, None], items].mean(1) / (seeds * len(differences))
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
