"""A run from a fresh model to its record, and records as files, which are written atomically."""

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from bench.environment import conditions
from examples.multitask import methods
from examples.multitask.data import Items, drawn, mixture, shuffled
from examples.multitask.plan import COST, METHODS, ZERO_SHOT, Run, Study, validation_score
from multilora_fast.demo.compare import build_methods, compare
from multilora_fast.demo.scoring import Encoded, all_scores
from multilora_fast.demo.tasks import majority_rate
from multilora_fast.demo.training import pack
from multilora_fast.files import atomic_file
from multilora_fast.models import LINEARS, PACKAGED
from multilora_fast.spectrum import by_kind, effective_rank, singular_values, top_share

WITH_VALUES = ("k_proj", "v_proj")  # projections whose singular values are kept for the first tested seed


@dataclass
class Bench:
    """Shared by all runs: the base model on its device, its tokenizer and the items, and whether training replays
    captured steps."""

    base: nn.Module
    tokenizer: object
    items: Items
    name: str = PACKAGED
    graphs: bool = False

    @property
    def device(self) -> torch.device:
        return next(self.base.parameters()).device


def execute(run: Run, study: Study, bench: Bench) -> dict:
    """Execute a run and return its record, which is JSON-serializable."""
    started = time.perf_counter()
    record = {"method": run.method, "learning_rate": run.rate, "seed": run.seed, "settings": study.settings()}
    record |= {"model": bench.name, "environment": conditions()}
    if run.method == COST:
        record |= _cost(study, bench)
    elif run.method == ZERO_SHOT:
        record |= _evaluated(bench.base, study, bench)
        record["majority"] = {task: majority_rate(items) for task, items in bench.items.test.items()}
    else:
        record |= _trained(run, study, bench)
    return record | {"seconds": round(time.perf_counter() - started, 1)}


def _trained(run: Run, study: Study, bench: Bench) -> dict:
    torch.manual_seed(run.seed)
    method = METHODS[run.method]
    examples = (mixture if study.micro_tokens is None else drawn)(bench.items, study, bench.tokenizer, run.seed)
    if method.task:
        examples = shuffled(bench.items.train[method.task], study, run.seed)
    record: dict = {}
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    if method.kind == "sum":
        with tempfile.TemporaryDirectory() as scratch:
            model, training = methods.task_sum(
                bench.base, examples, study, run.rate, Path(scratch), graphs=bench.graphs
            )
        record["task_weight"] = _best_weight(model, study, bench)
        methods.set_task_weight(model, record["task_weight"])
    else:
        model = methods.adapted(bench.base, run.method, study.rank(run.method))
        record["trainable"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        training = methods.train(model, examples, study, run.rate, graphs=bench.graphs)
    if bench.device.type == "cuda":
        record["cuda_peak"] = torch.cuda.max_memory_allocated()
    record["losses"] = [round(loss, 4) for loss in training.losses]
    record |= {"tokens": training.tokens, "training_seconds": round(training.seconds, 2)}
    if bench.graphs:
        record["replayed"] = training.replayed
    record["tokens_per_second"] = round(training.tokens / training.seconds, 1)
    parts = ("validation", "test") if study.is_tested(run.seed) else ("validation",)
    record |= _evaluated(model.eval(), study, bench, parts, method.task)
    before = bench.base if method.kind == "full" else None
    if study.is_tested(run.seed):
        record["spectrum"] = _spectrum(model, before, study.total_rank, run.seed == (study.first_tested or 0))
    if study.compared_rounds and method.kind != "sum":
        record["memory"] = methods.memory(model.train(), examples, study)
    return record


def _evaluated(
    model: nn.Module, study: Study, bench: Bench, parts: Sequence[str] = ("validation", "test"), task: str | None = None
) -> dict:
    """The answers on all tasks, or on ``task`` alone."""
    found = {}
    for part in parts:
        items = getattr(bench.items, part)
        found[part] = _answers(model, items if task is None else {task: items[task]}, study)
    return found


def _answers(model: nn.Module, items: Mapping[str, list[Encoded]], study: Study) -> dict[str, dict]:
    """By task: accuracy, mean negative log-likelihood of the right option among the options, and a mark per item."""
    together = [example for examples in items.values() for example in examples]
    large = {} if study.micro_tokens is None else {"batch_size": len(together), "limit": 2 * study.micro_tokens}
    with methods.autocast(study, next(model.parameters()).device):
        scores = iter(all_scores(model, together, **large))
    found = {}
    for task, examples in items.items():
        pairs = list(zip(islice(scores, len(examples)), examples, strict=True))
        right = [int(one.argmax()) == example.answer for one, example in pairs]
        losses = [-one.log_softmax(0)[example.answer].item() for one, example in pairs]
        found[task] = {
            "accuracy": sum(right) / len(right),
            "nll": round(sum(losses) / len(losses), 5),
            "right": "".join("01"[mark] for mark in right),
        }
    return found


def _best_weight(model: nn.Module, study: Study, bench: Bench) -> float:
    """The task weight with the best validation score."""
    scores = {}
    for weight in study.task_weights:
        methods.set_task_weight(model, weight)
        scores[weight] = validation_score({"validation": _answers(model, bench.items.validation, study)})
    return max(scores, key=scores.get)


def _spectrum(model: nn.Module, base: nn.Module | None, total_rank: int, keep_values: bool) -> dict[str, dict]:
    """By projection, a number per layer: the effective rank, that of the ``total_rank`` largest values, and the largest
    value's share. With ``keep_values``, also the values of WITH_VALUES."""
    found = {}
    for kind, values in by_kind(singular_values(model, modules=LINEARS, base=base)).items():
        found[kind] = {
            "effective_rank": [round(effective_rank(v), 3) for v in values],
            "leading": [round(effective_rank(v[:total_rank]), 3) for v in values],
            "top_share": [round(top_share(v), 4) for v in values],
        }
        if keep_values and kind in WITH_VALUES:
            found[kind]["values"] = [[float(f"{x:.3g}") for x in v.tolist()] for v in values]
    return found


def _cost(study: Study, bench: Bench) -> dict:
    """Seconds and bytes of a step by n, for LoRA, the loop over branches and the fused layers, interleaved on one
    batch."""
    examples = mixture(bench.items, study, bench.tokenizer, 0)[: study.batch_size]
    batch = {name: tensor.to(bench.device) for name, tensor in pack(examples).items()}
    costs = {}
    for n in (3, 5):
        r = study.total_rank // n
        built = build_methods(bench.base, LINEARS, r=r, lora_num=n, lora_alpha=r, lora_dropout=0.0)
        rounds = study.compared_rounds
        with tqdm(total=3 * (2 + rounds), desc="comparing", disable=None, leave=False) as bar, \
                methods.autocast(study, bench.device):  # fmt: skip
            costs[str(n)] = [asdict(cost) for cost in compare(built, batch, rounds=rounds, progress=bar)]
    return {"batch_tokens": batch["input_ids"].numel(), "rounds": study.compared_rounds, "costs": costs}


def read_results(folder: Path, study: Study | None) -> dict[str, dict]:
    """The finished runs in ``folder`` by name. With ``study`` None, settings are not checked.

    Raises:
        ValueError: a file is damaged or belongs to a study with other settings.
    """
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_text())
            settings = record["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is no record of a run ({type(error).__name__}): remove it to run it again."
            ) from None
        wanted = settings if study is None else study.settings()
        odd = {key for key in settings.keys() | wanted.keys() if settings.get(key) != wanted.get(key)}
        if odd:
            raise ValueError(f"{path} was run with another {', '.join(sorted(odd))}: give another --output.")
        found[path.stem] = record
    return found


def write_record(path: Path, record: Mapping) -> None:
    """Write one line per field. A failed write leaves the earlier file."""
    lines = ",\n".join(f'"{key}": {json.dumps(value, ensure_ascii=False)}' for key, value in record.items())
    write(path, f"{{\n{lines}\n}}\n")


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as unfinished:
        unfinished.write_text(text)
