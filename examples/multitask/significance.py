"""Paired tests of two methods on the same items, over items and over seeds, and an interval of the difference.

All compare means over tasks, with equal weight per task. Marks are tensors (seeds, items) of 0 and 1 by task, with the
same seeds and items for both methods.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Marks = Mapping[str, Tensor]


def compare(first: Marks, second: Marks, *, draws: int = 10_000) -> dict[str, float]:
    """The difference of the mean accuracies, first − second, its 95 % interval, and two-sided p values.

    The interval is a bootstrap over items and seeds. ``p`` takes the seeds as fixed. ``p_seeds``, given for several
    seeds, takes seeds and items as random.
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
    """Variance of a mean difference over tasks, with random seeds and items."""

    by_seed: float  # variance of the seeds' means over S, which includes the residual
    by_item: float  # variance of the items' means, summed over items and tasks, which includes the residual
    residual: float
    seeds: int
    items: int

    @property
    def variance(self) -> float:
        return max(self.by_seed + self.by_item - self.residual, self.by_seed, self.by_item)

    def p(self, difference: float) -> float:
        """Two-sided p of ``difference`` by a t test with Satterthwaite's degrees of freedom."""
        if not self.variance:
            return float(difference == 0)
        freedom = self.variance**2 / (self.by_seed**2 / (self.seeds - 1) + self.by_item**2 / (self.items - 1))
        return t_p(abs(difference) / math.sqrt(self.variance), freedom)


def crossed(differences: Mapping[str, Tensor]) -> Crossed:
    """Variance components of differences (seeds, items) by task, with at least 2 seeds."""
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
    """Two-sided p of Student's t, by integration over the angle atan(t / √freedom), or of the normal from 300 on."""
    if freedom > 300:
        return math.erfc(t / math.sqrt(2))

    def area(start: float) -> float:
        angles = torch.linspace(start, math.pi / 2, 4001, dtype=torch.float64)
        return torch.trapezoid(angles.cos().clamp(min=0) ** (freedom - 1), angles).item()

    return area(math.atan(t / math.sqrt(freedom))) / area(0.0)


def sign_flip_p(differences: Tensor, *, draws: int = 10_000) -> float:
    """Two-sided p of a sign-flip test on paired differences (1-D): how often random signs give as large a sum."""
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
