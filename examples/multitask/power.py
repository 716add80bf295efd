"""Power analysis: items, seeds and tokens for a difference of one point. ``python -m examples.multitask.power`` writes
it on the study's page from the finished runs.

The difference of two methods' marks on one item has three random parts: of the seed, shared by all items of a task; of
the item, shared by all seeds; and the rest. Their variances come from the records. The difference of the mean
accuracies then has the variance τ²/S + (item + rest/S) · Σ 1/mₜ / K², with S seeds, K tasks and mₜ items in task t.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from examples.multitask.plan import Results, Study
from examples.multitask.significance import crossed, t_p

POINT, LEVEL, WANTED = 0.01, 0.05, 0.8
PAIRS = (("multilora-3", "lora"), ("multilora-5", "lora"))


@dataclass(frozen=True)
class Spread:
    """Variance components of the difference of two methods' marks."""

    seed: float  # τ²
    item: float
    rest: float
    tokens: float  # of the runs

    def at(self, tokens: float) -> "Spread":
        """The spread at ``tokens`` a run, if τ² is inversely proportional to the tokens."""
        return replace(self, seed=self.seed * self.tokens / tokens)


def spread(differences: Sequence[Mapping[str, Tensor]], tokens: float) -> Spread:
    """The mean spread over pairs of methods, from differences (seeds, items) by task."""
    found = []
    for pair in differences:
        parts = crossed(pair)
        inverse = _inverse([d.shape[1] for d in pair.values()])
        found.append(
            (
                (parts.by_seed - parts.residual) * parts.seeds,
                (parts.by_item - parts.residual) / inverse,
                parts.residual * parts.seeds / inverse,
            )
        )
    seed, item, rest = (max(sum(values) / len(found), 0.0) for values in zip(*found, strict=True))
    return Spread(seed, item, rest, tokens)


def standard_error(of: Spread, seeds: int, items: Sequence[int]) -> float:
    """Standard error of the difference of the mean accuracies, with ``items`` test items by task."""
    return math.sqrt(of.seed / seeds + (of.item + of.rest / seeds) * _inverse(items))


def power(of: Spread, seeds: int, items: Sequence[int], difference: float = POINT, *, draws: int = 4000) -> float:
    """Power of the test over items and seeds to find ``difference``, by simulation."""
    generator = torch.Generator().manual_seed(0)
    rest = of.rest / seeds * _inverse(items)
    by_item = of.item * _inverse(items) + rest
    by_seed = of.seed / seeds + rest
    normal = torch.randn(draws, seeds, generator=generator, dtype=torch.float64)
    seen = by_seed * normal.var(1)  # independent of the mean, as in every normal sample
    error = standard_error(of, seeds, items)
    found = difference + error * torch.randn(draws, generator=generator, dtype=torch.float64)
    variance = (seen + by_item - rest).clamp(min=max(by_item, 1e-12))
    variance = torch.maximum(variance, seen)
    freedom = variance**2 / (seen**2 / (seeds - 1) + by_item**2 / (sum(items) - 1))
    return (found > variance.sqrt() * torch.from_numpy(_critical(freedom.numpy()))).double().mean().item()


def _critical(freedom: np.ndarray) -> np.ndarray:
    """Critical values of Student's t at LEVEL, interpolated."""
    return np.interp(np.log(freedom), *_exact())


@cache
def _exact() -> tuple[list[float], list[float]]:
    logs, values = [i / 20 for i in range(121)], []  # up to 400
    for log in logs:
        low, high = 1.0, 20.0
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (middle, high) if t_p(middle, math.exp(log)) > LEVEL else (low, middle)
        values.append(high)
    return logs, values


def seeds_needed(of: Spread, items: Sequence[int], *, most: int = 64) -> int | None:
    """The fewest seeds with power WANTED for one point, or None beyond ``most``."""
    low, high = 2, most
    if power(of, most, items) < WANTED:
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if power(of, middle, items) >= WANTED else (middle + 1, high)
    return low


def items_needed(of: Spread, seeds: int, tasks: int, *, most: int = 20_000) -> int | None:
    """The fewest items per task, to two digits, with power WANTED for one point, or None beyond ``most``."""
    counts = [digits * 10**zeros for zeros in (1, 2, 3) for digits in range(10, 100)] + [most]
    low, high = 0, len(counts) - 1
    if power(of, seeds, [most] * tasks) < WANTED:
        return None
    while low < high:
        middle = (low + high) // 2
        enough = power(of, seeds, [counts[middle]] * tasks) >= WANTED
        low, high = (low, middle) if enough else (middle + 1, high)
    return counts[low]


def recorded(study: Study, done: Results) -> Spread:
    """The spread of the study's runs at the chosen learning rates.

    Raises:
        ValueError: fewer than two seeds of the methods that are compared.
    """
    from examples.multitask.summary import finals, marks

    records = {method: finals(study, method, done) for pair in PAIRS for method in pair}
    if min(map(len, records.values())) < 2:
        raise ValueError("the spread over seeds takes two seeds of LoRA and of both MultiLoRAs.")
    seen = {method: marks(list(runs.values())) for method, runs in records.items()}
    differences = [{task: (seen[a][task] - seen[b][task]).double() for task in seen[a]} for a, b in PAIRS]
    tokens = [run["tokens"] for runs in records.values() for run in runs.values()]
    return spread(differences, sum(tokens) / len(tokens))


def _inverse(items: Sequence[int]) -> float:
    return sum(1 / count for count in items) / len(items) ** 2


def section(seen: Spread, items: Sequence[int], tokens: float) -> str:
    """The section of the page: recorded spread, what one point takes, and the power of the GPU profile."""
    from bench.report import table

    tasks = len(items)
    falling = f"scaled to {tokens / 1e6:g} M tokens"
    known = {"as recorded": seen, falling: seen.at(tokens), "none": replace(seen, seed=0.0)}
    rows = []
    for label, of in known.items():
        for seeds in (3, 5, 10):
            needed = items_needed(of, seeds, tasks)
            rows.append(
                [label, f"{of.seed**0.5 * 100:.2f}", str(seeds), f"{needed:,}" if needed else "not reachable",
                 f"{power(of, seeds, items):.0%}", f"{2.8 * standard_error(of, seeds, items) * 100:.2f}"]
            )  # fmt: skip
    header = ["spread over seeds", "τ, points", "seeds", f"items in each of {tasks} tasks", "power for one point",
              "detectable, points"]  # fmt: skip
    counts = " + ".join(f"{count:,}" for count in items)
    enough = seeds_needed(seen, items)
    return (
        f"The difference of MultiLoRA's and LoRA's marks on one item has variance {seen.item:.3f} over items and "
        f"{seen.rest:.3f} over items and seeds jointly. Seeds shift the difference of the means by "
        f"τ = {seen.seed**0.5 * 100:.2f} points at {seen.tokens:,.0f} tokens, a rough estimate from three seeds. "
        f"One point at p < {LEVEL}, by the test over items and seeds, with {WANTED:.0%} power takes:\n\n"
        f"{table(header, rows)}\n\n"
        f"The last two columns are for the counted test items of the GPU profile, {counts}. If τ does not change, one "
        f"point takes {enough or 'more than 64'} seeds with these items. The scaled rows assume that seeds differ by "
        "the examples they draw, so that τ² is inversely proportional to the tokens; only the runs can tell. "
        "Detectable: 2.8 standard errors, without a correction for few seeds."
    )


def main() -> None:
    from examples.multitask.execute import read_results
    from examples.multitask.page import between
    from examples.multitask.profile import COUNTED, TOKENS

    here = Path(__file__).parent / "results"
    parser = argparse.ArgumentParser(prog="python -m examples.multitask.power", description=__doc__)
    parser.add_argument("--output", type=Path, default=here, help="folder of the results")
    folder = parser.parse_args().output
    study = Study()
    text = section(recorded(study, read_results(folder / "runs", study)), COUNTED, TOKENS)
    between(folder / "README.md", "power", text)
    print(text)


if __name__ == "__main__":
    main()
