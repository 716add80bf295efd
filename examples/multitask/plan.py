"""The study's scale, its runs in order, and the learning rate that a method's sweep chose."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Literal


@dataclass(frozen=True)
class Method:
    """A training method: full fine-tuning, LoRA, MultiLoRA of ``n`` branches, or the sum of single-task LoRAs."""

    label: str
    kind: Literal["full", "lora", "multilora", "sum"]
    n: int = 1
    scaling: Literal["vector", "scalar"] = "vector"
    start: Literal["scales", "B"] = "scales"  # initialized to zero; with B, the scales are initialized to one
    task: str | None = None  # trained on this task alone


ALONE = "BoolQ"
METHODS = {
    "full": Method("full fine-tuning", "full"),
    "lora": Method("LoRA", "lora"),
    "multilora-3": Method("MultiLoRA, n = 3", "multilora", 3),
    "lora-160": Method("LoRA, rank 160", "lora"),
    "multilora-5": Method("MultiLoRA, n = 5", "multilora", 5),
    "task-arithmetic": Method("LoRA per task, summed", "sum"),
    "lora-alone": Method(f"LoRA, {ALONE} alone", "lora", task=ALONE),
    "multilora-3-alone": Method(f"MultiLoRA, n = 3, {ALONE} alone", "multilora", 3, task=ALONE),
    "multilora-3-scalar": Method("MultiLoRA, n = 3, scalar scales", "multilora", 3, "scalar"),
    "multilora-3-zero": Method("MultiLoRA, n = 3, B zero", "multilora", 3, start="B"),
    "multilora-3-scalar-zero": Method("MultiLoRA, n = 3, scalar scales, B zero", "multilora", 3, "scalar", "B"),
}
MAIN = ("lora", "multilora-3")
FIRST = (*MAIN, "lora-160", "multilora-5", "full")
ZERO_SHOT, COST = "zero-shot", "cost"


def _rates() -> dict[str, tuple[float, ...]]:
    return {
        "full": (1e-5, 3e-5, 1e-4),
        "lora": (3e-4, 1e-3, 3e-3),
        "multilora-3": (1e-3, 3e-3, 1e-2),
        "multilora-5": (1e-3, 3e-3, 1e-2),
        "task-arithmetic": (3e-4, 1e-3, 3e-3),
    }


@dataclass(frozen=True)
class Study:
    """Every method trains on the same ``steps`` batches of ``batch_size`` examples of a seed, drawn evenly from the
    tasks or, with ``micro_tokens``, in proportion to the square root of their sizes. Adapters have the total rank
    ``total_rank``, or that in ``ranks``, on all seven linear layers of a decoder layer.

    ``micro_tokens`` limits the tokens of a batch of bins, padding included; without it a step is one packed row. The
    mean excludes tasks with fewer than ``least_items`` test items. Seeds below ``first_tested`` are for the sweep alone
    and see no test items.
    """

    steps: int = 70
    batch_size: int = 8
    max_length: int = 128
    validation_items: int = 40
    test_items: int = 100
    seeds: int = 3
    total_rank: int = 30
    rates: dict[str, tuple[float, ...]] = field(default_factory=_rates)
    task_weights: tuple[float, ...] = (0.3, 0.6, 1.0)  # of every LoRA in the sum; validation chooses
    compared_rounds: int = 9
    dtype: str = "bfloat16"  # of autocast; weights and optimizer are float32
    ranks: dict[str, int] | None = None
    micro_tokens: int | None = None
    least_items: int | None = None
    first_tested: int | None = None
    guess: float = 600.0  # seconds of a run, until one is finished

    def settings(self) -> dict:
        """The settings that all runs of one results folder share, as in JSON."""
        free = {"seeds", "rates", "compared_rounds", "guess"}
        kept = {key: value for key, value in asdict(self).items() if key not in free and value is not None}
        return kept | {"task_weights": list(self.task_weights)}

    def rank(self, method: str) -> int:
        return (self.ranks or {}).get(method, self.total_rank)

    def rival(self, method: str) -> str:
        """The LoRA of the same total rank."""
        return next((m for m in self.rates if METHODS[m].kind == "lora" and not METHODS[m].task
                     and self.rank(m) == self.rank(method)), "lora")  # fmt: skip

    def is_tested(self, seed: int) -> bool:
        return seed >= (self.first_tested or 0)


def quick(study: Study) -> Study:
    """The study with every part once, in minutes. Its figures mean nothing."""
    rates = {method: rates[1:2] for method, rates in study.rates.items()}
    first = study.first_tested or 0
    return replace(
        study, steps=5, batch_size=8, max_length=128, validation_items=4, test_items=6, seeds=1 + first, rates=rates,
        task_weights=(0.5, 1.0), compared_rounds=min(study.compared_rounds, 1), least_items=study.least_items and 1,
        guess=20.0,
    )  # fmt: skip


@dataclass(frozen=True)
class Run:
    method: str
    rate: float | None = None
    seed: int = 0

    @property
    def name(self) -> str:
        """The stem of its file."""
        return self.method if self.rate is None else f"{self.method}-lr{self.rate:.0e}-seed{self.seed}"


Results = Mapping[str, Mapping]  # by the run's name


def next_run(study: Study, done: Results, running: Collection[str] = ()) -> Run | None:
    """The first run that is neither done nor running and does not depend on a running one."""
    return next((run for run in runs(study, done) if run.name not in done and run.name not in running), None)


def runs(study: Study, done: Results) -> Iterator[Run]:
    """All runs in order, the main comparison with all its seeds first. Further seeds of a method follow once its sweep
    is complete; until then they are left out."""
    yield Run(ZERO_SHOT)
    for group in (MAIN, FIRST, study.rates):
        methods = [method for method in group if method in study.rates]
        for method in methods:
            yield from (Run(method, rate) for rate in sweep(study, method, done))
        swept = {method: chosen(study, method, done) for method in methods if is_swept(study, method, done)}
        yield from (Run(method, rate, seed) for seed in range(1, study.seeds) for method, rate in swept.items())
    if study.compared_rounds:
        yield Run(COST)


def is_swept(study: Study, method: str, done: Results) -> bool:
    return method in study.rates and all(Run(method, rate).name in done for rate in sweep(study, method, done))


def sweep(study: Study, method: str, done: Results) -> list[float]:
    """The learning rates to try with seed 0: the grid and, if its best value is at the edge, one value beyond."""
    grid = sorted(study.rates[method])
    best = chosen_of(grid, method, done)
    if len(grid) < 2 or best not in (grid[0], grid[-1]) or any(Run(method, rate).name not in done for rate in grid):
        return grid
    neighbour = grid[1] if best == grid[0] else grid[-2]
    return [*grid, float(f"{best * best / neighbour:.0e}")]


def chosen(study: Study, method: str, done: Results) -> float | None:
    """The best learning rate tried so far, or None."""
    return chosen_of(sweep(study, method, done), method, done)


def chosen_of(grid: list[float], method: str, done: Results) -> float | None:
    """The best rate of ``grid`` tried so far, by :func:`validation_score`, or None."""
    tried = [rate for rate in grid if Run(method, rate).name in done]
    return max(tried, key=lambda rate: validation_score(done[Run(method, rate).name]), default=None)


def validation_score(result: Mapping) -> tuple[float, float]:
    """Mean accuracy over the tasks on validation items, and mean log-likelihood of the right option for ties."""
    tasks = result["validation"].values()
    return sum(t["accuracy"] for t in tasks) / len(tasks), -sum(t["nll"] for t in tasks) / len(tasks)
