"""How many items, seeds and tokens tell a difference of one point? ``python -m examples.multitask.power`` computes it
from the runs that there are, and writes it on the study's page.

A mark is right or wrong, and the difference of two methods' marks on one item has three parts: the seed's, which all
items of a task share, the item's, which all seeds share, and the rest. Their variances come from the records; the
difference of the mean accuracies then has the variance τ²/S + (item + rest/S) · Σ 1/mₜ / K², with S seeds, K tasks and
mₜ items in task t.
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
    """Variances of the difference of two methods' marks: τ² of seeds, of items, of the rest."""

    seed: float
    item: float
    rest: float
    tokens: float  # of a run in which it was seen

    def at(self, tokens: float) -> "Spread":
        """If seeds differ because they draw other examples, τ² falls as their number grows."""
        return replace(self, seed=self.seed * self.tokens / tokens)


def spread(differences: Sequence[Mapping[str, Tensor]], tokens: float) -> Spread:
    """The mean over pairs of methods of the differences (seeds, items) by task."""
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
    """Of the difference of the mean accuracies over as many tasks as ``items`` has counts."""
    return math.sqrt(of.seed / seeds + (of.item + of.rest / seeds) * _inverse(items))


def power(of: Spread, seeds: int, items: Sequence[int], difference: float = POINT, *, draws: int = 4000) -> float:
    """How often the verdict's test over items and seeds finds ``difference``, by drawing what it will see."""
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
    """Student's t at the level, between exact values at some degrees of freedom."""
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
    """The fewest seeds with the wanted power for one point, None beyond ``most``."""
    low, high = 2, most
    if power(of, most, items) < WANTED:
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if power(of, middle, items) >= WANTED else (middle + 1, high)
    return low


def items_needed(of: Spread, seeds: int, tasks: int, *, most: int = 20_000) -> int | None:
    """The fewest items a task, to two digits, with the wanted power for one point, None beyond ``most``."""
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
    """Of the study's runs at the chosen learning rates.

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
    """The page's section: what the records show, what one point takes, and what the GPU profile can tell."""
    from bench.report import table

    tasks = len(items)
    falling = f"falling with tokens, at {tokens / 1e6:g} M"
    known = {"as recorded": seen, falling: seen.at(tokens), "none": replace(seen, seed=0.0)}
    rows = []
    for label, of in known.items():
        for seeds in (3, 5, 10):
            needed = items_needed(of, seeds, tasks)
            rows.append(
                [label, f"{of.seed**0.5 * 100:.2f}", str(seeds), f"{needed:,}" if needed else "none are enough",
                 f"{power(of, seeds, items):.0%}", f"{2.8 * standard_error(of, seeds, items) * 100:.2f}"]
            )  # fmt: skip
    header = ["the seeds' own spread", "τ, points", "seeds", f"items in each of {tasks} tasks", "power for one point",
              "detectable, points"]  # fmt: skip
    counts = " + ".join(f"{count:,}" for count in items)
    enough = seeds_needed(seen, items)
    return (
        f"The marks of MultiLoRA and LoRA on one item differ with a variance of {seen.item:.3f} for the item, "
        f"{seen.rest:.3f} for what item and seed do together; seeds shift the difference of the means by "
        f"τ = {seen.seed**0.5 * 100:.2f} points at {seen.tokens:,.0f} tokens, estimated from three seeds and so known "
        f"only roughly. One point at p < {LEVEL}, by the test over items and seeds, with {WANTED:.0%} power takes:\n\n"
        f"{table(header, rows)}\n\n"
        f"The last two columns are for the test items of the GPU profile that count, {counts}. If τ stays as it was, "
        f"one point takes {enough or 'more than 64'} seeds with these items. Tokens are not in the records' spread: "
        "that seeds draw other examples, and that τ² therefore falls as one over their number, is an assumption, which "
        "the runs will show right or wrong. Detectable: 2.8 standard errors, without the allowance for few seeds."
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
