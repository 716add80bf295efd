"""The study's scale, its runs in their order, and the learning rate that a method's sweep chose."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field

METHODS = {
    "full": "full fine-tuning",
    "lora": "LoRA",
    "multilora-3": "MultiLoRA, n = 3",
    "multilora-5": "MultiLoRA, n = 5",
    "task-arithmetic": "LoRA per task, summed",
}
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
    """Every method sees ``steps`` batches of ``batch_size`` examples, which depend on the seed alone, drawn evenly from
    the tasks. All adapters have the same total rank, on all seven linears of a layer."""

    steps: int = 70
    batch_size: int = 8
    max_length: int = 128
    validation_items: int = 40
    test_items: int = 100
    seeds: int = 3
    total_rank: int = 30
    rates: dict[str, tuple[float, ...]] = field(default_factory=_rates)
    task_weights: tuple[float, ...] = (0.3, 0.6, 1.0)  # of every LoRA in the sum; the best on validation is kept
    compared_rounds: int = 9
    dtype: str = "bfloat16"  # products run in it under autocast; weights, optimizer and sums are float32

    def settings(self) -> dict:
        """What must be the same in all runs of one results folder, as JSON keeps it."""
        kept = {key: value for key, value in asdict(self).items() if key not in ("seeds", "rates", "compared_rounds")}
        return kept | {"task_weights": list(self.task_weights)}


def quick(dtype: str) -> Study:
    """Every part of the study once, in minutes; its figures mean nothing."""
    rates = {method: rates[1:2] for method, rates in _rates().items()}
    return Study(
        steps=5, validation_items=4, test_items=6, seeds=1, rates=rates, task_weights=(0.5, 1.0), compared_rounds=1,
        dtype=dtype,
    )  # fmt: skip


@dataclass(frozen=True)
class Run:
    method: str
    rate: float | None = None
    seed: int = 0

    @property
    def name(self) -> str:
        """Of its file."""
        return self.method if self.rate is None else f"{self.method}-lr{self.rate:.0e}-seed{self.seed}"


Results = Mapping[str, Mapping]  # by the run's name


def next_run(study: Study, done: Results) -> Run | None:
    """The first run that is missing."""
    return next((run for run in runs(study, done) if run.name not in done), None)


def runs(study: Study, done: Results) -> Iterator[Run]:
    """All runs in their order: what answers the main question first. Later ones depend on the results of earlier."""
    last = "task-arithmetic"
    first = [method for method in ("lora", "multilora-3", "multilora-5", "full") if method in study.rates]
    yield Run(ZERO_SHOT)
    for method in first:
        yield from (Run(method, rate) for rate in sweep(study, method, done))
    yield Run(COST)
    yield from (Run(method, chosen(study, method, done), 1) for method in first if study.seeds > 1)
    if last in study.rates:
        yield from (Run(last, rate) for rate in sweep(study, last, done))
    for seed in range(1, study.seeds):
        yield from (Run(method, chosen(study, method, done), seed) for method in study.rates)


def sweep(study: Study, method: str, done: Results) -> list[float]:
    """The learning rates to try with seed 0: the grid and, where its best value lies at the edge, one value beyond."""
    grid = sorted(study.rates[method])
    best = chosen_of(grid, method, done)
    if len(grid) < 2 or best not in (grid[0], grid[-1]) or any(Run(method, rate).name not in done for rate in grid):
        return grid
    neighbour = grid[1] if best == grid[0] else grid[-2]
    return [*grid, float(f"{best * best / neighbour:.0e}")]


def chosen(study: Study, method: str, done: Results) -> float | None:
    """The best learning rate of those tried so far, None where none was."""
    return chosen_of(sweep(study, method, done), method, done)


def chosen_of(grid: list[float], method: str, done: Results) -> float | None:
    """By mean accuracy over the tasks on validation items; among equals, by the likelihood of the right option."""
    tried = [rate for rate in grid if Run(method, rate).name in done]
    return max(tried, key=lambda rate: validation_score(done[Run(method, rate).name]), default=None)


def validation_score(result: Mapping) -> tuple[float, float]:
    tasks = result["validation"].values()
    return sum(t["accuracy"] for t in tasks) / len(tasks), -sum(t["nll"] for t in tasks) / len(tasks)
