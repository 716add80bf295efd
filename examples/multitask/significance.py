"""Is one method better than another on the same items? Paired tests over items and over seeds, and an interval.

All compare means over the tasks, each task counting the same. Marks are tensors (seeds, items) of 0 and 1 by task; the
two methods' seeds and items are the same.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Marks = Mapping[str, Tensor]


def compare(first: Marks, second: Marks, *, draws: int = 10_000) -> dict[str, float]:
    """The difference of the mean accuracies, first − second, its 95 % interval, and the two-sided p of no difference.

    The interval is a bootstrap over items and, where there are several, seeds; p is for the seeds as they are, and
    p_seeds, where there are several, for seeds that are drawn as the items are.
    """
    differences = {task: first[task].double() - second[task].double() for task in first}
    weighted = [d.mean(0) / (d.shape[1] * len(differences)) for d in differences.values()]
    low, high = _interval(list(differences.values()), draws)
    difference = sum(d.mean().item() for d in differences.values()) / len(differences)
    found = {"difference": difference, "low": low, "high": high, "p": sign_flip_p(torch.cat(weighted), draws=draws)}
    if next(iter(first.values())).shape[0] > 1:
        found["p_seeds"] = crossed(differences).p(difference)
    return found


@dataclass(frozen=True)
class Crossed:
    """Variance of a mean of differences over tasks, where S seeds and all items are drawn at random."""

    by_seed: float  # of the seeds' means, over S: the seeds' own share and the residual
    by_item: float  # of the items' means, summed over items and tasks: their own share and the residual
    residual: float
    seeds: int
    items: int

    @property
    def variance(self) -> float:
        return max(self.by_seed + self.by_item - self.residual, self.by_seed, self.by_item)

    def p(self, difference: float) -> float:
        """Two-sided p of no difference, by t with Satterthwaite's degrees of freedom."""
        if not self.variance:
            return float(difference == 0)
        freedom = self.variance**2 / (self.by_seed**2 / (self.seeds - 1) + self.by_item**2 / (self.items - 1))
        return t_p(abs(difference) / math.sqrt(self.variance), freedom)


def crossed(differences: Mapping[str, Tensor]) -> Crossed:
    """Of differences (seeds, items) by task, seeds at least 2."""
    tasks, seeds = len(differences), next(iter(differences.values())).shape[0]
    means = torch.stack([d.mean(1) for d in differences.values()]).mean(0)
    by_item = residual = 0.0
    for d in differences.values():
        count = d.shape[1] * tasks**2
        by_item += d.mean(0).var().item() / count
        left = d - d.mean(0) - d.mean(1, keepdim=True) + d.mean()
        residual += left.square().sum().item() / ((seeds - 1) * (d.shape[1] - 1)) / (seeds * count)
    items = sum(d.shape[1] for d in differences.values())
    return Crossed(means.var().item() / seeds, by_item, residual, seeds, items)


def t_p(t: float, freedom: float) -> float:
    """Two-sided p of Student's t, by its integral over the angle atan(t / √freedom); from 300 on that of a normal."""
    if freedom > 300:
        return math.erfc(t / math.sqrt(2))

    def area(start: float) -> float:
        angles = torch.linspace(start, math.pi / 2, 4001, dtype=torch.float64)
        return torch.trapezoid(angles.cos().clamp(min=0) ** (freedom - 1), angles).item()

    return area(math.atan(t / math.sqrt(freedom))) / area(0.0)


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
